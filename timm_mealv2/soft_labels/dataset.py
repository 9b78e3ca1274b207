"""Images with the labels of a soft-label store: every crop that was recorded, again, each with its own label.

The label belongs to the very crop that the student sees (FKD, arXiv 2112.01528), and nothing else is drawn at random:
which crops an epoch takes is a function of (seed, epoch).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import FastCollateMixup
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from timm_mealv2.data.dataset import UnreadableImage, image_names, image_size, keeping_no_file_open, read_image
from timm_mealv2.data.seed import Stream, counted_seed
from timm_mealv2.errors import UserError
from timm_mealv2.soft_labels.store import SoftLabelStore, cut

_SIZES_CHECKED = 4096


class SoftLabelDataset(Dataset):
    """A data set's images as the crops of a store, with the stored labels as targets.

    Args:
        dataset: The images, by file name those of the store or some of them; without a transform.
        store: The store.
        unlabeled: Do not give the hard label.
        allow_decoder_change: Accept an image decoder that gives other pixels than that of the recording.

    Raises:
        UserError: If an image is not in the store, has another size there, is decoded to other pixels, or if the store
            has labels for none of them.
    """

    def __init__(
        self, dataset: Dataset, store: SoftLabelStore, *, unlabeled: bool = False, allow_decoder_change: bool = False
    ) -> None:
        self.dataset = dataset
        self.store = store
        self.unlabeled = unlabeled
        self._decoded: tuple[int, Image.Image, int] | None = None
        names = image_names(dataset)
        unknown = [name for name in names if name not in store.rows]
        if unknown:
            raise UserError(
                f'{len(unknown)} of {len(names)} images are not in the store, {unknown[0]} for one: record labels for '
                'these images.'
            )
        if names[:1] == ['#0'] and len(names) != len(store.names):
            raise UserError(
                f'the data set has {len(names)} images, the store {len(store.names)}: without file names they must be '
                'the same.'
            )
        self._rows = np.array([store.rows[name] for name in names], dtype=np.int64)
        self.images = np.flatnonzero(store.sizes[self._rows].all(axis=1))
        if not len(self.images):
            raise UserError('none of the images could be read when the store was recorded.')
        images = keeping_no_file_open(dataset)
        for index in self.images[:: math.ceil(len(self.images) / _SIZES_CHECKED)]:
            self._check_size(index, image_size(images, index))
        if not allow_decoder_change:
            numbers = {name: index for index, name in enumerate(names)}
            store.check_decoder(lambda name: read_image(images, numbers[name], store.meta.img_mode)[0])

    def __len__(self) -> int:
        """Number of images, also those that are never trained on as they could not be read when recording."""
        return len(self._rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return a crop and its label. Crops of one image in turn decode it once.

        Args:
            key: Number of the image in the data set, and of the crop.

        Returns:
            Pixels uint8 [chans, H, W] and label float32 [1 + 2K]: hard label (-1 if unknown), K class indices, K
            probabilities.

        Raises:
            UnreadableImage: If the image cannot be decoded, or could not be when the store was recorded.
            UserError: If the image has another size than when it was recorded.
        """
        index, number = key
        row = int(self._rows[index])
        if not self.store.sizes[row].all():
            raise UnreadableImage(f'{self.store.names[row]}: it has no labels, it could not be read when recording.')
        if self._decoded is None or self._decoded[0] != index:
            self._decoded = index, *read_image(self.dataset, index, self.store.meta.img_mode)
        _, image, target = self._decoded
        self._check_size(index, image.size)
        meta = self.store.meta
        (crop,), indices, probabilities = self.store.read(row, [number])
        label = np.concatenate([[-1 if self.unlabeled else target], indices[0], probabilities[0]])
        height, width = meta.image_size
        return cut(image, crop, (height, width), meta.interpolation), label.astype(np.float32)

    def _check_size(self, index: int, size: tuple[int, int] | None) -> None:
        width, height = self.store.sizes[self._rows[index]]
        if size is not None and size != (width, height):
            name = self.store.names[self._rows[index]]
            raise UserError(
                f'{name} has {size[0]}x{size[1]} pixels, {width}x{height} when its labels were recorded: these are '
                'other images, record labels for them.'
            )


class CropSampler(Sampler[tuple[int, int]]):
    """The crops of an epoch as (data set index, number of the crop), for one of several processes.

    With R crops a decode, R epochs make a block: epoch e visits part e mod R of a permutation seeded by (seed, e // R),
    N / R images with R crops each, so that R = 1 takes one crop of every image. In block b these are the crops b R to
    b R + R - 1; after the last crop comes the first again. Where R does not divide N, the last image of an epoch gets
    fewer crops, and the last epoch of a block is filled up from the beginning of the permutation.

    Args:
        images: Data set indices of the N images.
        crops: Crops stored of each.
        per_decode: R.
        seed: The run's seed.
        rank: Number of this process.
        world_size: Number of processes, which take the images in turn; each gets ceil(N / world_size) crops.
    """

    def __init__(
        self,
        images: Sequence[int] | np.ndarray,
        crops: int,
        *,
        per_decode: int = 1,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images = np.asarray(images)
        self.crops, self.per_decode, self.seed = crops, per_decode, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def __len__(self) -> int:
        """Crops an epoch on every process."""
        return math.ceil(len(self.images) / self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        count, per_decode = len(self.images), self.per_decode
        block, part = divmod(self.epoch, per_decode)
        order = np.random.default_rng(counted_seed(Stream.CROP_ORDER, self.seed, block)).permutation(count)
        visits = math.ceil(count / per_decode)  # images an epoch, of all processes
        for place in range(len(self)):
            visit, turn = divmod(place, per_decode)
            visit = (visit * self.world_size + self.rank) % visits
            image = self.images[order[(part * visits + visit) % count]]
            yield int(image), (block * per_decode + turn) % self.crops


def collate_crops(samples: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    """Collate crops with their labels: images uint8 [B, chans, H, W], labels float32 [B, 1 + 2K]."""
    images, labels = zip(*samples, strict=True)
    # By itself NumPy would keep the channels last, which is slow to normalise.
    batch = np.stack(images, out=np.empty((len(images), *images[0].shape), dtype=np.uint8))
    return torch.from_numpy(batch), torch.from_numpy(np.stack(labels))


class MixCrops(FastCollateMixup):
    """timm's Mixup and CutMix of a batch of crops, with their stored labels: `mix_labels` by the areas that are left.

    Args:
        options: Arguments of timm's `Mixup`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(**{**options, 'label_smoothing': 0.0})

    def __call__(self, batch: Sequence[tuple[np.ndarray, np.ndarray]], _: Any = None) -> tuple[Tensor, Tensor]:
        """Collate and mix: images uint8 [B, chans, H, W], labels float32 [B, 1 + 4K]; B is even."""
        # What timm makes of the numbers of the images, as labels, tells how much of each there is in every image.
        self.num_classes = len(batch)
        images, shares = super().__call__([(image, number) for number, (image, _) in enumerate(batch)])
        return images, mix_labels(torch.from_numpy(np.stack([label for _, label in batch])), shares.diagonal())


def mix_labels(labels: Tensor, share: Tensor) -> Tensor:
    """Labels of images that were mixed with those of the reversed batch, as timm's Mixup and CutMix mix them.

    Args:
        labels: float32 [B, 1 + 2K].
        share: Share [B] of its own pixels that each image has kept.

    Returns:
        float32 [B, 1 + 4K]: -1 (no hard label), the K class indices of each image and of its partner, and their
        probabilities times the shares.
    """
    k = labels.shape[1] // 2
    indices, probabilities, share = labels[:, 1 : 1 + k], labels[:, 1 + k :], share[:, None]
    # An image of which nothing is to be seen names no classes: they would be without their part of the rest.
    first = torch.where(share == 0, indices.flip(0), indices)
    second = torch.where(share == 1, indices, indices.flip(0))
    mixed = [probabilities * share, probabilities.flip(0) * (1 - share)]
    return torch.cat([torch.full_like(share, -1), first, second, *mixed], dim=1)
