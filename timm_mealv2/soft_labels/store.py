"""Soft labels on disk, format 2: what the teachers predicted for each sample of the epochs 0 to M - 1 of a training.

    meta.json            what was recorded: the teachers, each setting that decides a pixel, versions of the libraries
    names.txt            names of the images, UTF-8, separated by NUL
    pixels.safetensors   a few samples as the teachers saw them: uint8 [C, H, W], called EPOCH-IMAGE
    part-00010-00003     records of the fourth range of images, for the block of epochs that begins with epoch 10

A part is one slice for each epoch of its block, so that an epoch is read sequentially. A slice has the records of its
images in their order, and a u4 checksum. A record is 4 + 4K bytes, little-endian: u4 CRC-32 of the sample's pixels
(0: the image could not be read), u2 class index [K] (u4 above 65,536 classes), f2 probability [K], the largest first.
"""

import bisect
import hashlib
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch.utils.data import Dataset

from timm_mealv2.data.dataset import UnreadableImage, image_names
from timm_mealv2.data.samples import Samples
from timm_mealv2.data.seed import preserved_generators
from timm_mealv2.errors import UserError, one_line
from timm_mealv2.soft_labels.meta import CHECKSUM_BYTES, StoreMeta, library_versions, names_sha256, option_text, shown

_logger = logging.getLogger(__name__)

NAMES = 'names.txt'
PIXELS = 'pixels.safetensors'

MAX_PIXEL_CHANGE = 2.0
"""Largest mean difference of a sample's pixels, in levels of 256, that --allow-pixel-change accepts."""


class SoftLabelStore:
    """Reads a store. Opening it looks at `meta.json` and at the files' sizes only.

    Attributes:
        missing: The parts that are not there, or have another size than they should.
        epochs: Number of epochs, from the first on, of which no part is missing.

    Raises:
        UserError: If there is no store of this format.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.meta = StoreMeta.read(self.path)
        with os.scandir(self.path) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries if entry.name.startswith('part-')}
        parts = self.meta.parts()
        self.missing = [part for part in parts if sizes.get(part.file) != self.meta.part_bytes(part)]
        self.epochs = min([part.epochs.start for part in self.missing], default=self.meta.epochs)

    def incomplete(self) -> str:
        """Return what to do about missing parts."""
        total = sum(1 for _ in self.meta.parts())
        return (
            f'{len(self.missing):,} of {total:,} parts of {self.path} are missing or cut off ({self.missing[0].file}): '
            'copy it again, or give the mealv2-softlabels record command again, which makes what is missing.'
        )

    def read_slice(self, epoch: int, number: int) -> np.ndarray:
        """Read the records [images] of an epoch for range `number` of the images, and compare them with their checksum.

        Raises:
            UserError: If the records are damaged.
        """
        first = self.meta.blocks[bisect.bisect_right(self.meta.blocks, epoch) - 1]
        start = number * self.meta.part_images
        count = min(self.meta.part_images, self.meta.images - start)
        size = count * self.meta.dtype.itemsize + CHECKSUM_BYTES
        path = self.path / f'part-{first:05}-{number:05}'
        with path.open('rb', buffering=0) as file:
            file.seek((epoch - first) * size)
            data = file.read(size)
        if len(data) != size or data[-CHECKSUM_BYTES:] != checksum(data[:-CHECKSUM_BYTES], epoch, start):
            raise UserError(
                f'{path} is damaged (epoch {epoch}): copy it again, or delete it and record again, which makes what is '
                'missing.'
            )
        return np.frombuffer(data, self.meta.dtype, count)

    def read_epoch(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Read the records [n] of the images `rows`, int [n] in any order, in one epoch, slice by slice."""
        records = np.empty(len(rows), self.meta.dtype)
        order = np.argsort(rows)
        step = self.meta.part_images
        bounds = np.searchsorted(rows, np.arange(0, self.meta.images + step, step), sorter=order)
        for number, (low, high) in enumerate(pairwise(bounds)):
            if low < high:
                places = order[low:high]
                records[places] = self.read_slice(epoch, number)[rows[places] - number * step]
        return records

    def names(self) -> list[str]:
        """Read the images' names."""
        data = (self.path / NAMES).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.meta.names_sha256:
            raise UserError(f'{self.path / NAMES} is damaged: copy the store again, or record it again.')
        return data.decode('utf-8', 'surrogateescape').split('\0')

    def match(self, names: Sequence[str]) -> np.ndarray | None:
        """Return the number in the store of each image of a data set, int64 [n].

        None if they are the same images in the same order, which one digest tells.

        Raises:
            UserError: If an image is not in the store.
        """
        if len(names) == self.meta.images and names_sha256(names) == self.meta.names_sha256:
            return None
        if names[0] == '#0':
            raise UserError(
                f'the data set has {len(names):,} images without file names, {self.path} was recorded from '
                f'{self.meta.images:,} others: give the data set that was recorded.'
            )
        stored, ours = _hashes(self.names()), _hashes(names)
        order = np.argsort(stored)
        rows = order[np.searchsorted(stored, ours, sorter=order).clip(max=len(stored) - 1)]
        unknown = np.flatnonzero(stored[rows] != ours)
        if len(unknown):
            raise UserError(
                f'{len(unknown):,} of {len(names):,} images are not in {self.path}, {names[unknown[0]]} for one: '
                'record labels for these images.'
            )
        return rows

    def samples(self, dataset: Dataset, labels: range | None = None) -> tuple[Samples, np.ndarray | None]:
        """Return the recorded training's samples, by the images' numbers in the store, and these numbers (see `match`).

        Args:
            dataset: The images of the store, or some of them, without a transform.
            labels: The possible labels; None takes all.
        """
        rows, positions = self.match(image_names(dataset)), None
        if rows is not None:
            positions = np.full(self.meta.images, -1)
            positions[rows] = np.arange(len(rows))
        samples = Samples(dataset, self.meta.augmentation, self.meta.seed, labels=labels, positions=positions)
        return samples, rows

    def training_settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Compare a training's settings with the store's, and return those that the store decides.

        Mean and standard deviation are not compared: the store's fill what augmentation leaves empty, the training's
        normalize the pixels.

        `given` has the options (timm's names) that the user gave; the options returned are others.

        Raises:
            UserError: At the first setting that would give other pixels or classes than the recorded ones.
        """
        channels, height, width = self.meta.augmentation.input_size
        fields = asdict(self.meta.augmentation)
        stored = {name: value for name, value in fields.items() if name not in ('mean', 'std')}
        stored['num_classes'] = self.meta.num_classes
        if self.meta.augmentation.mixes:
            stored['mixup_mode'] = 'pair'
        teachers = sorted(teacher['name'] for teacher in self.meta.teachers)
        compared = {**stored, 'in_chans': channels, 'teachers': teachers}
        if height == width:
            compared['img_size'] = height
        for name, value in given.items():
            if name not in compared or (name == 'teachers' and not value):
                continue
            now = sorted(value) if name == 'teachers' else tuple(value) if isinstance(value, list) else value
            if (now or None) != (compared[name] or None):
                raise UserError(
                    f'{option_text(name)} was {shown(compared[name])} when {self.path} was recorded and is '
                    f'{shown(value)} here: leave it out, or record again.'
                )
        new = {name: value for name, value in stored.items() if name not in given}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in new.items()}

    def check_pixels(self, samples: Samples, accept_change: bool = False) -> None:
        """Make the stored samples anew, and compare their pixels with those that the teachers saw.

        Samples of images that are not there now are left out. `accept_change` accepts small differences, such as
        another version of the image decoder makes.

        Raises:
            UserError: If pixels differ.
        """
        try:
            stored = load_file(self.path / PIXELS)
            names = [name.split('-') for name in stored]
            keys = [(int(epoch), range(self.meta.images)[int(row)]) for epoch, row in names]
        except (IndexError, KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
            raise UserError(f'cannot read {self.path / PIXELS}: {one_line(error)}; copy the store again.') from error
        for (epoch, row), former in zip(keys, stored.values(), strict=True):
            if samples.positions is not None and samples.positions[row] < 0:
                continue
            try:
                with preserved_generators():
                    now = samples.sample(epoch, row).pixels
            except UnreadableImage:
                continue
            same_shape = now.shape == former.shape
            change = float(np.abs(now.astype(np.int16) - former).mean()) if same_shape else 255.0
            if change > (MAX_PIXEL_CHANGE if accept_change else 0):
                raise UserError(f'image {row} differs by {change:.2f} levels on average: {self.pixels_differ()}')

    def pixels_differ(self) -> str:
        """Return what to do about other pixels than the recorded ones, with the versions of what makes them."""
        recorded, here = (
            ', '.join(f'{library} {version}' for library, version in versions.items())
            for versions in (self.meta.versions, library_versions())
        )
        return (
            f'{self.path} was recorded from other pixels. Either the image has changed, or a library: recorded with '
            f'{recorded}; here are {here}. Record again, or accept small differences with --allow-pixel-change.'
        )


def checksum(records: bytes, epoch: int, start: int) -> bytes:
    """Return the checksum of a slice; a slice in the place of another has a wrong one."""
    place = np.array([epoch, start], '<u4').tobytes()
    return zlib.crc32(records, zlib.crc32(place)).to_bytes(CHECKSUM_BYTES, 'little')


def pixel_crc(pixels: np.ndarray) -> int:
    """Return the CRC-32 of a sample's pixels, uint8; never 0, which marks an image that could not be read."""
    return zlib.crc32(np.ascontiguousarray(pixels).data) or 1


def _hashes(names: Sequence[str]) -> np.ndarray:
    """64-bit hashes of names. Two of 13 million are equal once in 200,000 stores, and pixels are compared anyway."""
    digests = (hashlib.blake2b(name.encode('utf-8', 'surrogateescape'), digest_size=8).digest() for name in names)
    return np.frombuffer(b''.join(digests), np.uint64)
