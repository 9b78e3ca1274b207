"""The loaders: training batches from any batch of any epoch, batches of a stream, and evaluation batches.

What a batch holds is decided by the keys that the sampler hands to the worker processes, so neither their number nor
the point at which a run was resumed changes a pixel.

An image that cannot be read is left out of its batch, named and counted; timm's own access would take the next image
in its place and tell nobody. Which images are left out is a function of the data alone.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.data import FastCollateMixup, create_transform
from timm.data.loader import PrefetchLoader
from timm.data.mixup import one_hot
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from timm_mealv2.data.augmentation import Augmentation, Erasing, pixels_of
from timm_mealv2.data.dataset import image_mode
from timm_mealv2.data.normalize import Stats
from timm_mealv2.data.samples import EpochSampler, Key, KeyBatch, Sample, Samples, mix_batch
from timm_mealv2.data.seed import Stream, counted_seed, preserved_generators, seed_cpu
from timm_mealv2.data.stream import StreamedImages, load_stream
from timm_mealv2.data.unreadable import BadImages, Fetched, ReportingLoader, UnreadableImage
from timm_mealv2.data.workers import ignore_signals
from timm_mealv2.errors import UserError

Batch = tuple[Tensor, Tensor]

Collate = Callable[[KeyBatch, list[Sample]], Batch]
"""Makes a batch of the samples that could be read; the keys are those of the samples."""


def stack_pixels(samples: list[Sample]) -> Tensor:
    """Return the pixels of samples as one batch uint8 [B, C, H, W]."""
    return torch.from_numpy(np.stack([sample.pixels for sample in samples]))


def collate_labels(batch: KeyBatch, samples: list[Sample]) -> Batch:
    """Collate samples with their labels int64 [B]."""
    return stack_pixels(samples), torch.tensor([sample.target for sample in samples])


class CollatePairs:
    """Collates samples that are mixed with each other: soft targets [B, num_classes] as timm's Mixup makes them.

    Where all labels are unknown (-1), they stay so: [B].
    """

    def __init__(self, num_classes: int, smoothing: float) -> None:
        self.num_classes = num_classes
        off = smoothing / num_classes
        self.values = {'off_value': off, 'on_value': 1.0 - smoothing + off}

    def __call__(self, batch: KeyBatch, samples: list[Sample]) -> Batch:
        images, labels = collate_labels(batch, samples)
        if (labels < 0).all():
            return images, labels
        others = torch.tensor([sample.mixed_target for sample in samples])
        lam = torch.tensor([[sample.lam] for sample in samples])
        own, other = (one_hot(classes, self.num_classes, **self.values) for classes in (labels, others))
        return images, own * lam + other * (1 - lam)


class CollateMixed:
    """Mixes the images of a batch with each other as timm does, by (seed, epoch, batch, rank), then erases.

    Where all labels are unknown (-1), they stay so: [B]; otherwise the targets are soft: [B, num_classes].

    Args:
        mixing: Arguments of timm's `Mixup`.
        erasing: Erases a mixed image, with the counters of its own sample.
        off_epoch: First epoch without mixing, 0 for never.
    """

    def __init__(
        self, mixing: dict[str, Any], erasing: Erasing, *, seed: int, rank: int = 0, off_epoch: int = 0
    ) -> None:
        self.mixing = FastCollateMixup(**mixing)
        self.erasing, self.seed, self.rank, self.off_epoch = erasing, seed, rank, off_epoch

    def __call__(self, batch: KeyBatch, samples: list[Sample]) -> Batch:
        self.mixing.mixup_enabled = not 0 < self.off_epoch <= batch.epoch
        seed_cpu(counted_seed(Stream.MIXUP, self.seed, batch.epoch, batch.number, self.rank))
        labeled = [(sample.pixels, max(sample.target, 0)) for sample in samples]
        images, target = mix_batch(self.mixing, labeled)
        for key, image in zip(batch.keys, images.numpy(), strict=True):
            self.erasing(image, key.epoch, key.index)
        if all(sample.target < 0 for sample in samples):
            target = torch.full((len(samples),), -1)
        return images, target


class _ReadableBatches(Dataset):
    """Makes whole batches, in a worker: what cannot be read is left out.

    Args:
        fill: Fill up a batch of which less than two images are left: every process has something to train on, and
            batch norm a variance. The next images of the data set take the place.
        limit: Images that may be unreadable: beyond that the batch is given up, as a folder that is gone takes long to
            search to its end.
    """

    def __init__(self, samples: Samples, collate: Collate, *, limit: int, fill: bool = False) -> None:
        self.samples, self.collate, self.fill, self.limit = samples, collate, fill, limit

    def __getitem__(self, batch: KeyBatch) -> Fetched | UserError:
        read: list[tuple[Key, Sample]] = []
        unreadable: dict[int | str, str] = {}
        asked = len(batch.keys)
        try:
            with preserved_generators():
                for number, key in enumerate(chain(batch.keys, self._next(batch.keys) if self.fill else ()), 1):
                    try:
                        read.append((key, self.samples[key]))
                    except UnreadableImage as error:
                        if error.index is not None:  # else the sampler has told that there is no record
                            unreadable[error.index] = str(error)
                    if len(unreadable) > self.limit or (number >= asked and len(read) >= min(2, asked)):
                        break
                if not read:
                    return Fetched(None, unreadable)
                keys, samples = zip(*read, strict=True)
                ignored = {entry for sample in samples for entry in sample.ignored}
                return Fetched(self.collate(batch._replace(keys=list(keys)), list(samples)), unreadable, ignored)
        except UserError as error:  # returned, not raised: DataLoader would add the worker's traceback to its text
            return error

    def _next(self, keys: list[Key]) -> Iterator[Key]:
        """Yield the images of the data set that come after a batch's last, but for those of the batch."""
        asked, last = {key.index for key in keys}, keys[-1]
        for step in range(1, len(self.samples)):
            index = (last.index + step) % len(self.samples)
            if index not in asked:
                yield last._replace(index=index, pair=None, label=None)


def unchanged(fetched: Any) -> Any:
    """Collate function of a `DataLoader` whose data set makes whole batches."""
    return fetched


def _load_batches(
    batches: _ReadableBatches,
    sampler: Any,
    bad: BadImages,
    split: str,
    normalization: tuple[Stats, Stats],
    device: torch.device,
    dtype: torch.dtype,
    **workers: Any,
) -> PrefetchLoader:
    """Load batches in worker processes, bring them to `device` and normalize them there, in timm's arithmetic."""
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=sampler,
        collate_fn=unchanged,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # the workers' own seed, which nothing uses, comes out of no shared generator
        **workers,
    )
    mean, std = normalization
    return PrefetchLoader(
        ReportingLoader(loader, bad, split), mean=mean, std=std, channels=len(mean), device=device, img_dtype=dtype
    )


class TrainLoader:
    """Training batches on the device, from any batch of any epoch.

    Args:
        sampler: Says which make each batch.
        normalization: Mean and std of the pixels (0..1), one number per channel each.
        prefetch: Normalize on the device and ahead of the training, otherwise on the CPU.
        device: Where batches go, the CPU if None.
        dtype: Floating point type of the images.
    """

    resumable = True
    """An epoch can be entered in the middle."""

    def __init__(
        self,
        samples: Samples,
        sampler: EpochSampler,
        collate: Collate = collate_labels,
        *,
        normalization: tuple[Stats, Stats],
        bad: BadImages | None = None,
        workers: int = 0,
        pin_memory: bool = False,
        prefetch: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.sampler, self.device = sampler, device or torch.device('cpu')
        bad = bad or BadImages()
        batches = _ReadableBatches(samples, collate, fill=True, limit=bad.limit)
        where = self.device if prefetch else torch.device('cpu')
        options = {'num_workers': workers, 'pin_memory': pin_memory, 'persistent_workers': workers > 0}
        self.loader = _load_batches(batches, sampler, bad, 'train', normalization, where, dtype, **options)

    def __len__(self) -> int:
        """Batches an epoch on every process."""
        return len(self.sampler)

    def batch_sizes(self) -> list[int]:
        """Return the number of images of each batch of an epoch, where all of them can be read."""
        return self.sampler.batch_sizes()

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield (images [B, chans, H, W] normalized, targets) of `epoch` from batch `start` on."""
        self.sampler.set_position(epoch, start)
        for images, target in self.loader:
            yield images.to(self.device), target.to(self.device)


def eval_loader(
    dataset: Dataset,
    data_config: dict[str, Any],
    *,
    batch_size: int,
    device: torch.device,
    bad: BadImages | None = None,
    img_mode: str | None = None,
    decode: str = 'timm',
    distributed: bool = False,
    **kwargs: Any,
) -> Iterable[Batch]:
    """Return an evaluation loader: images as `data_config` says, in the data set's order.

    What cannot be read is left out, and each image comes on one process alone: the processes may have different
    numbers of batches.

    Args:
        data_config: As timm's `resolve_data_config` gives it.
        batch_size: Images a batch and process.
        img_mode: Pillow's mode of the images; RGB or L, as the channels are, if None.
        decode: How images are decoded, see `timm_mealv2.data.decode.decode`.
        distributed: Share the images among the processes of the default group.
        **kwargs: Further arguments of timm's `create_loader`: 'num_workers', 'pin_memory', 'use_prefetcher' and
            'img_dtype'.
    """
    names = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    config = {name: data_config[name] for name in names}
    img_mode, bad = image_mode(img_mode, config['input_size'][0]), bad or BadImages()
    if isinstance(dataset, IterableDataset):
        kwargs |= {'batch_size': batch_size, 'device': device, 'distributed': distributed, 'is_training': False}
        return load_stream(StreamedImages(dataset, img_mode, decode), bad, 'validation', **config, **kwargs)
    prefetch = kwargs.pop('use_prefetcher', True)
    dtype = kwargs.pop('img_dtype', torch.float32)
    transform = create_transform(**config, is_training=False, use_prefetcher=True)
    transform.transforms[-1] = pixels_of
    augmentation = Augmentation(config['input_size'], img_mode, decode, no_aug=True)
    samples = Samples(dataset, augmentation, seed=0, transform=transform)
    rank, processes = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    keys = [Key(0, index) for index in range(rank, len(samples), processes)]
    starts = range(0, len(keys), batch_size)
    sampler = [KeyBatch(0, number, keys[start : start + batch_size]) for number, start in enumerate(starts)]
    batches = _ReadableBatches(samples, collate_labels, limit=bad.limit)
    normalization = tuple(config['mean']), tuple(config['std'])
    where = device if prefetch else torch.device('cpu')
    return _load_batches(batches, sampler, bad, 'validation', normalization, where, dtype, **kwargs)
