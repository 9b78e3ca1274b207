"""Crops of the images of a data set, cut batch by batch."""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from timm_mealv2.data.dataset import UnreadableImage, read_image
from timm_mealv2.data.seed import Stream, counted_seed
from timm_mealv2.errors import UserError
from timm_mealv2.soft_labels.store import MAX_SIDE, Crop, cut


@dataclass(frozen=True)
class Recipe:
    """Which crops are cut, and how.

    Attributes:
        crops: Crops of an image.
        image_size: (height, width) of a crop.
        img_mode: Pillow's mode of the images, 'RGB' or 'L'.
        interpolation: timm's name of the interpolation; one, as every later use of a crop must give the same pixels.
        scale: Range of a crop's share of the image's area.
        ratio: Range of a crop's aspect ratio.
        hflip: Probability of a horizontal flip.
        seed: Seed of the crops.

    Raises:
        UserError: If a value is not possible.
    """

    crops: int
    image_size: tuple[int, int]
    img_mode: str = 'RGB'
    interpolation: str = 'bilinear'
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    seed: int = 42

    def __post_init__(self) -> None:
        if self.crops < 1:
            raise UserError(f'--crops must be 1 or more, got {self.crops}.')
        if min(self.image_size) < 1:
            raise UserError(f'--img-size must be 1 or more, got {min(self.image_size)}.')
        if self.img_mode not in ('RGB', 'L'):
            raise UserError(f'--input-img-mode must be RGB or L, got {self.img_mode}.')
        try:
            str_to_interp_mode(self.interpolation)
        except KeyError:
            raise UserError(
                f'--train-interpolation must be one interpolation, such as bilinear or bicubic, got '
                f'{self.interpolation}: a crop has the same pixels whenever it is used.'
            ) from None
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f'--scale must be two shares of the area, 0 < low <= high <= 1, got {self.scale}.')
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise UserError(f'--ratio must be two aspect ratios, 0 < low <= high, got {self.ratio}.')
        if not 0 <= self.hflip <= 1:
            raise UserError(f'--hflip must be a probability, got {self.hflip}.')
        if self.seed < 0:
            raise UserError(f'--seed must be 0 or more, got {self.seed}.')

    def draw(self, image: Image.Image, index: int, crops: Iterable[int]) -> list[Crop]:
        """Draw crops of an image by their numbers, each from (seed, `index` of the image, number) alone."""
        state = random.getstate()
        try:
            return [self._draw(image, counted_seed(Stream.STORED_CROP, self.seed, index, crop)) for crop in crops]
        finally:
            random.setstate(state)

    def _draw(self, image: Image.Image, seed: int) -> Crop:
        random.seed(seed)
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, self.scale, self.ratio)
        flip = random.random() < self.hflip
        # Of an image of a few pixels, a share may be rounded to none.
        width, height = max(width, 1), max(height, 1)
        return Crop(min(left, image.width - width), min(top, image.height - height), width, height, flip)


def decode(dataset: Dataset, index: int, img_mode: str) -> Image.Image:
    """Return an image of the data set as it is recorded.

    Raises:
        UnreadableImage: Also if it is larger than a record can say.
    """
    image = read_image(dataset, index, img_mode)[0]
    if max(image.size) > MAX_SIDE:
        raise UnreadableImage(f'image {index} has {image.width}x{image.height} pixels, more than {MAX_SIDE} a side')
    return image


class CropBatch(NamedTuple):
    """Crops that go through the teachers together; they are all of one shard."""

    shard: int
    places: list[int]  # place of each crop in the shard
    crops: list[Crop]
    pixels: Tensor  # uint8 [n, chans, h, w]
    images: list[tuple[int, int, int]]  # place in the shard, width and height
    total: int  # crops that are dealt with, those of unreadable images included
    failures: list[str]  # what is wrong with images that cannot be read


class CropSource(IterableDataset):
    """Cuts the crops of ranges of images, batch by batch; each image is decoded once.

    Several small images make a batch, or an image several batches: at most `batch_size` crops are in memory.

    Args:
        dataset: The images.
        recipe: Which crops are cut.
        ranges: (number of the shard, first image, last image + 1) each.
        batch_size: Most crops of a batch.
    """

    def __init__(
        self, dataset: Dataset, recipe: Recipe, ranges: Sequence[tuple[int, int, int]], batch_size: int
    ) -> None:
        self.dataset = dataset
        self.recipe = recipe
        self.ranges = ranges
        self.group = max(1, batch_size // recipe.crops)
        self.parts = _even_parts(range(recipe.crops), batch_size)

    @property
    def total(self) -> int:
        """Number of crops."""
        return sum(stop - start for _, start, stop in self.ranges) * self.recipe.crops

    def __iter__(self) -> Iterator[CropBatch]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        # Every worker makes as many batches of what it takes up: the loader gets them in turn.
        for shard, origin, images in islice(self._groups(), first, None, step):
            if len(self.parts) > 1:
                decoded = [self._decode(images[0])]
                for part in self.parts:
                    yield self._batch(shard, origin, images, decoded, part)
                    decoded = [(decoded[0][0], None)]  # a failure is told once
            else:
                yield self._batch(shard, origin, images, map(self._decode, images), self.parts[0])

    def _groups(self) -> Iterator[tuple[int, int, range]]:
        for shard, start, stop in self.ranges:
            for images in _even_parts(range(start, stop), self.group):
                yield shard, start, images

    def _decode(self, index: int) -> tuple[Image.Image | None, str | None]:
        """The image, or None and what is wrong with it."""
        try:
            return decode(self.dataset, index, self.recipe.img_mode), None
        except UnreadableImage as error:
            return None, str(error)

    def _batch(
        self,
        shard: int,
        origin: int,
        images: range,
        decoded: Iterable[tuple[Image.Image | None, str | None]],
        numbers: range,
    ) -> CropBatch:
        recipe = self.recipe
        channels = 1 if recipe.img_mode == 'L' else 3
        batch = CropBatch(shard, [], [], torch.empty(0), [], len(images) * len(numbers), [])
        pixels = np.empty((batch.total, channels, *recipe.image_size), dtype=np.uint8)
        for index, (image, failure) in zip(images, decoded, strict=True):
            if failure is not None:
                batch.failures.append(failure)
            if image is None:
                continue
            batch.images.append((index - origin, image.width, image.height))
            for number, crop in zip(numbers, recipe.draw(image, index, numbers), strict=True):
                pixels[len(batch.crops)] = cut(image, crop, recipe.image_size, recipe.interpolation)
                batch.places.append((index - origin) * recipe.crops + number)
                batch.crops.append(crop)
        return batch._replace(pixels=torch.from_numpy(pixels[: len(batch.crops)]))


def crop_loader(source: CropSource, workers: int, device: torch.device) -> DataLoader:
    """Return what gives the batches of `source`, made by `workers` processes (0: in this one)."""
    return DataLoader(
        source,
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=device.type == 'cuda',
        generator=torch.Generator(),  # nothing here draws from it, and no shared generator moves on
    )


def _even_parts(whole: range, most: int) -> list[range]:
    """Consecutive parts of nearly the same length, `most` at most."""
    count = math.ceil(len(whole) / most)
    return [whole[a:b] for a, b in pairwise(len(whole) * part // count for part in range(count + 1))]


def _unchanged(batch: Any) -> Any:
    return batch
