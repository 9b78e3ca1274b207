"""Training samples as a function of counters: sample(epoch, image) gives the same pixels wherever and whenever.

A sample is cropped and augmented with generators seeded by (seed, epoch, image), mixed with its partner by (seed,
epoch, pair) and erased by (seed, epoch, image). So neither the number of processes, workers or images in a batch nor
the point at which a run was resumed changes a pixel, and what teachers predict for a sample can be recorded and used
later.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import FastCollateMixup
from torch.utils.data import Dataset, Sampler

from timm_mealv2.data.augmentation import Augmentation, Erasing
from timm_mealv2.data.dataset import image_name, read_image
from timm_mealv2.data.seed import Stream, counted_seed, seed_cpu
from timm_mealv2.data.unreadable import Ignored
from timm_mealv2.errors import UserError


class Sample(NamedTuple):
    """One training sample.

    Attributes:
        pixels: uint8 [C, H, W], contiguous.
        target: Label of its image, -1 if unknown.
        mixed_target: Label of the image that is mixed in; its own where nothing is.
        lam: Mixup/CutMix lambda of the sample's own label.
        ignored: What is ignored of its images.
    """

    pixels: np.ndarray
    target: int
    mixed_target: int
    lam: float = 1.0
    ignored: tuple[Ignored, ...] = ()


class Pair(NamedTuple):
    """Two images that are mixed with each other; the last image of an odd number has no partner."""

    number: int
    first: int
    second: int | None


class Key(NamedTuple):
    """What a worker is asked for: one sample.

    Attributes:
        pair: The image's pair in this epoch; looked up if None.
        label: A stored record.
    """

    epoch: int
    index: int  # type: ignore[assignment]  # hides the method of tuples, which nobody calls
    pair: Pair | None = None
    label: bytes | None = None


class KeyBatch(NamedTuple):
    """A batch's keys, and the counters that mixing within the batch depends on."""

    epoch: int
    number: int
    keys: list[Key]


@functools.lru_cache(maxsize=2)
def _order_of_epoch(count: int, seed: int, epoch: int) -> np.ndarray:
    """The epoch's permutation of the images, as torch's DistributedSampler draws it."""
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    return torch.randperm(count, generator=generator).numpy()


@functools.lru_cache(maxsize=2)
def _places_of_images(count: int, seed: int, epoch: int) -> np.ndarray:
    """Where each image stands in the epoch's permutation."""
    places = np.empty(count, dtype=np.int64)
    places[_order_of_epoch(count, seed, epoch)] = np.arange(count)
    return places


def _pair_at(order: np.ndarray, place: int) -> Pair:
    number = place // 2
    members = order[2 * number : 2 * number + 2].tolist()
    return Pair(number, members[0], members[1] if len(members) == 2 else None)


class Samples:
    """The training samples of a data set.

    Args:
        dataset: Images with random access (`open_dataset` makes it), without a transform.
        labels: The possible labels; None takes all.
        positions: Place in the data set of each image, where the images are numbered otherwise.
        transform: Makes uint8 pixels of an image, in place of the augmentation's.
    """

    def __init__(
        self,
        dataset: Dataset,
        augmentation: Augmentation,
        seed: int,
        *,
        labels: range | None = None,
        positions: np.ndarray | None = None,
        transform: Any = None,
    ) -> None:
        self.dataset, self.augmentation, self.seed = dataset, augmentation, seed
        self.labels, self.positions = labels, positions
        self._transform = transform or augmentation.transform()
        self._erasing = Erasing(augmentation, seed)
        self._mixing: FastCollateMixup | None = None
        if augmentation.mixes:
            self._mixing = FastCollateMixup(
                mixup_alpha=augmentation.mixup,
                cutmix_alpha=augmentation.cutmix,
                cutmix_minmax=augmentation.cutmix_minmax,
                prob=augmentation.mixup_prob,
                switch_prob=augmentation.mixup_switch_prob,
                mode='pair',
                label_smoothing=0.0,
                num_classes=2,
            )
        self._decoded: dict[int, tuple[Image.Image, int, list[str]]] = {}  # the last image and its partner
        self._mixed: tuple[Any, list[Sample]] | None = None  # the last pair

    def __len__(self) -> int:
        """Number of images."""
        return len(self.dataset if self.positions is None else self.positions)  # type: ignore[arg-type]

    def sample(self, epoch: int, index: int) -> Sample:
        """Return the sample of image `index` in `epoch`.

        Seeds Python's, NumPy's and torch's CPU generators: a caller who draws from them wraps the call in
        `preserved_generators`.

        Raises:
            UnreadableImage: If the image, or the one it is mixed with, cannot be read.
            UserError: If the label is none of the possible ones.
        """
        return self[Key(epoch, index)]

    def __getitem__(self, key: Key) -> Sample:
        """Return the sample of a key; see `sample`."""
        sample = self._before_erasing(key)
        self._erasing(sample.pixels, key.epoch, key.index)
        return sample

    def pair(self, epoch: int, index: int) -> Pair:
        """Return the pair of image `index`: neighbors 2q, 2q + 1 of the epoch's permutation are partners."""
        drawn = len(self), self.seed, epoch
        return _pair_at(_order_of_epoch(*drawn), int(_places_of_images(*drawn)[index]))

    def _before_erasing(self, key: Key) -> Sample:
        if self._mixing is None or 0 < self.augmentation.mixup_off_epoch <= key.epoch:
            return self._augmented(key)
        pair = key.pair or self.pair(key.epoch, key.index)
        if pair.second is None:
            return self._augmented(key)
        if self._mixed is None or self._mixed[0] != (key.epoch, pair):
            self._mixed = (key.epoch, pair), self._mix(self._mixing, key, pair.number, (pair.first, pair.second))
        sample = self._mixed[1][key.index == pair.second]
        return sample._replace(pixels=sample.pixels.copy()) if self._erasing.probability else sample

    def _mix(self, mixing: FastCollateMixup, key: Key, number: int, images: tuple[int, int]) -> list[Sample]:
        first, second = (self._augmented(key._replace(index=index)) for index in images)
        seed_cpu(counted_seed(Stream.PAIR, self.seed, key.epoch, number))
        # As the labels are two classes, what comes back for the first is lambda and 1 - lambda.
        pixels, targets = mixing([(first.pixels, 0), (second.pixels, 1)])
        lam = float(targets[0, 0])
        return [
            Sample(pixels[0].numpy(), first.target, second.target, lam, first.ignored),
            Sample(pixels[1].numpy(), second.target, first.target, lam, second.ignored),
        ]

    def _augmented(self, key: Key) -> Sample:
        image, target, ignored = self._read(key.index)
        notes = tuple((key.index, what) for what in ignored)
        seed_cpu(counted_seed(Stream.AUGMENTATION, self.seed, key.epoch, key.index))
        return Sample(self._transform(image), target, target, ignored=notes)

    def _read(self, index: int) -> tuple[Image.Image, int, list[str]]:
        position = index if self.positions is None else int(self.positions[index])
        if index in self._decoded:
            read = self._decoded.pop(index)
        else:
            read = read_image(self.dataset, position, self.augmentation.input_img_mode, self.augmentation.decode)
            target = read[1]
            if self.labels is not None and target not in self.labels:
                raise UserError(
                    f'image {image_name(self.dataset, position)} has the label {target}, expected '
                    f'{max(self.labels.start, 0)} to {self.labels.stop - 1}: set --num-classes, or map the labels '
                    'with --class-map.'
                )
        while len(self._decoded) > 1:
            del self._decoded[next(iter(self._decoded))]
        self._decoded[index] = read
        return read


def mix_batch(mixing: FastCollateMixup, labeled: list[tuple[Any, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix images with each other as timm does, which takes even numbers: an odd last one is mixed with itself."""
    if len(labeled) % 2 == 0:
        images, target = mixing(labeled)
        return images, target
    images, target = (part[:1] for part in mixing([labeled[-1]] * 2))
    if len(labeled) > 1:
        others = mixing(labeled[:-1])
        images, target = torch.cat([others[0], images]), torch.cat([others[1], target])
    return images, target


class EpochSampler(Sampler[KeyBatch]):
    """The batches of an epoch, as keys, for one of several processes: all get the same number of batches.

    The last batch is smaller, and is left out if it were a single sample: batch norm cannot train on one, which has no
    variance. Another sample is left out in the next epoch.

    With R samples a decode, R epochs make a block: epoch e = b R + part visits N / R images, each with the R samples of
    the epochs b R to b R + R - 1. Each epoch still has N samples, and after the block each image has been visited once.
    Where R does not divide N, the last image of an epoch gets fewer samples, and the last epoch of a block is filled up
    from the beginning of the block's permutation.

    Args:
        count: Number of images.
        batch_size: Samples a batch and process.
        samples_per_decode: R.
        pairs: Keep neighbors of the permutation in one batch, to be mixed with each other.

    Raises:
        UserError: If the settings exclude each other.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        samples_per_decode: int = 1,
        pairs: bool = False,
    ) -> None:
        if samples_per_decode > 1 and pairs:
            raise UserError('--samples-per-decode cannot go with --mixup-mode pair.')
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.samples_per_decode, self.pairs = samples_per_decode, pairs
        self.epoch = self.start = 0
        self._length = math.ceil(count / world_size)
        if pairs and world_size > 1:
            self._length = 2 * math.ceil(math.ceil(count / 2) / world_size)

    def __len__(self) -> int:
        """Batches an epoch on every process."""
        whole, rest = divmod(self._length, self.batch_size)
        return whole + (rest > 1 or (rest == 1 and not whole))

    def batch_sizes(self) -> list[int]:
        """Return the number of samples of each batch of an epoch, the same on every process."""
        return [min(self.batch_size, self._length - batch * self.batch_size) for batch in range(len(self))]

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch and the first batch of the next iteration; what is skipped is not loaded."""
        self.epoch, self.start = epoch, start

    def samples(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what this process takes in `epoch`, in turn: epochs of the samples int64 [n], images int64 [n]."""
        if self.samples_per_decode == 1:
            images = _order_of_epoch(self.count, self.seed, epoch)[self._places()]
            return np.full(len(images), epoch), images
        block, part = divmod(epoch, self.samples_per_decode)
        visits = math.ceil(self.count / self.samples_per_decode)  # images an epoch, of all processes
        visit, turn = np.divmod(np.arange(self._length), self.samples_per_decode)
        visit = (visit * self.world_size + self.rank) % visits
        images = _order_of_epoch(self.count, self.seed, block)[(part * visits + visit) % self.count]
        return block * self.samples_per_decode + turn, images

    def _places(self) -> np.ndarray:
        """This process's places in an epoch's permutation: every world_size-th, or every world_size-th pair."""
        if self.pairs and self.world_size > 1:
            pairs = np.arange(self.rank, self._length // 2 * self.world_size, self.world_size)
            first = 2 * (pairs % math.ceil(self.count / 2))
            return np.stack([first, first + 1], axis=1).reshape(-1) % self.count
        return np.arange(self.rank, self._length * self.world_size, self.world_size) % self.count

    def __iter__(self) -> Iterator[KeyBatch]:
        epochs, images = self.samples(self.epoch)
        order, places = _order_of_epoch(self.count, self.seed, self.epoch), self._places() if self.pairs else None
        for number in range(self.start, len(self)):
            keys = []
            for at in range(self._length)[number * self.batch_size : (number + 1) * self.batch_size]:
                pair = None if places is None else _pair_at(order, int(places[at]))
                keys.append(Key(int(epochs[at]), int(images[at]), pair))
            yield KeyBatch(self.epoch, number, keys)
