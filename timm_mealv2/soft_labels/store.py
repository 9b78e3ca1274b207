"""Soft labels on disk, format 2: what the teachers predicted for each sample of the epochs 0 to M - 1 of a training.

    meta.json            what was recorded: the teachers, each setting that decides a pixel, versions of the libraries
    names.txt            names of the images, UTF-8, separated by NUL
    part-00010-00003     records of the fourth range of images, for the block of epochs that begins with epoch 10

A part is one slice for each epoch of its block, so that an epoch is read sequentially. A slice has the records of its
images in their order, and a u4 checksum. A record is 4 + 4K bytes, little-endian: u4 CRC-32 of the sample's pixels
(0: the image could not be read), u2 class index [K] (u4 above 65,536 classes), f2 probability [K], the largest first.
"""

import bisect
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import PIL
import timm
import torchvision
from PIL import features

from timm_mealv2.data.augmentation import Augmentation
from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing

FORMAT = 2
META = 'meta.json'
NAMES = 'names.txt'
CHECKSUM_BYTES = 4


class Part(NamedTuple):
    """One file of records: a block of epochs for a range of images."""

    epochs: range
    images: range
    file: str

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.epochs) * len(self.images)


@dataclass(frozen=True)
class StoreMeta:
    """The settings of a recording, as `meta.json` has them. A key that it lacks has the default here.

    Attributes:
        format: `FORMAT` of the program that wrote it.
        teachers: For each teacher 'name' (as the user gave it), 'sha256' of its weights, 'weight', 'img_size' ([h, w]
            or None), 'classes' (those taken of its own, or None) and 'autocast_dtype' (or None).
        seed: Seed of the samples.
        num_classes: Class count C.
        top_k: Classes kept of a sample, K.
        names_sha256: SHA-256 of the file of names.
        versions: Versions of the libraries that make the pixels.
        batch_size: Most samples that go through the teachers together; it decides the last bits of a prediction.
        part_images: Images of a part.
        blocks: First epoch of each block, and at the end the number of epochs M.
        teachers_per_sample: Teachers that were drawn for each sample; None for all.
        class_names: Names of the classes in the order of their indices, None if they are not known.
        figures: 'ensemble' and 'teacher NAME' -> metrics on the validation split; empty where they are not known.
    """

    format: int
    teachers: list[dict[str, Any]]
    augmentation: Augmentation
    seed: int
    num_classes: int
    top_k: int
    images: int
    names_sha256: str
    versions: dict[str, str]
    batch_size: int
    part_images: int
    blocks: list[int]
    teachers_per_sample: int | None = None
    class_names: list[str] | None = None
    figures: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `meta.json`.

        Raises:
            UserError: If there is none, it is of another format, or damaged.
        """
        if not (folder / META).is_file():
            lacking = META if folder.is_dir() else 'such folder (record makes it)'
            raise UserError(f'{folder} holds no soft labels: there is no {lacking}.')
        try:
            values = json.loads((folder / META).read_text(encoding='utf-8'))
            damaged = values.pop('crc', None) != _crc(values)
        except ValueError:
            values, damaged = {'format': FORMAT}, True
        if values.get('format') != FORMAT:
            raise UserError(
                f'{folder} has format {values.get("format")}, this timm_mealv2 reads format {FORMAT}: record it again.'
            )
        if damaged:
            raise UserError(f'{folder / META} is damaged: copy the store again, or record it again.')
        settings = values['augmentation']
        for name in ('aug_splits', 'resplit'):  # of older versions, which could not record with them either
            settings.pop(name, None)
        return cls(**{**values, 'augmentation': Augmentation(**settings)})

    def write(self, folder: Path) -> None:
        """Write `meta.json`, whole or not at all."""
        values = asdict(self)
        with replacing(folder / META) as temporary:
            temporary.write_text(json.dumps({**values, 'crc': _crc(values)}, indent=1) + '\n', encoding='utf-8')

    @property
    def epochs(self) -> int:
        """Number of epochs that are, or are to be, recorded."""
        return self.blocks[-1]

    @cached_property
    def dtype(self) -> np.dtype:
        """The type of a record."""
        index = '<u2' if self.num_classes <= 2**16 else '<u4'
        fields = [('crc', '<u4'), ('classes', index, (self.top_k,)), ('probabilities', '<f2', (self.top_k,))]
        return np.dtype(fields)

    def extend(self, epochs: int, block_epochs: int) -> Self:
        """Return the settings for `epochs` epochs in all, the further ones in blocks of at most `block_epochs`."""
        blocks = list(self.blocks)
        while blocks[-1] < epochs:
            blocks.append(min(blocks[-1] // block_epochs * block_epochs + block_epochs, epochs))
        return replace(self, blocks=blocks)

    def parts(self) -> Iterator[Part]:
        """Yield the parts, block by block."""
        for first, end in pairwise(self.blocks):
            for number, start in enumerate(range(0, self.images, self.part_images)):
                images = range(start, min(start + self.part_images, self.images))
                yield Part(range(first, end), images, f'part-{first:05}-{number:05}')

    def part_bytes(self, part: Part) -> int:
        """Return the size of a part's file."""
        return part.samples * self.dtype.itemsize + len(part.epochs) * CHECKSUM_BYTES

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide pixels and classes, by the names of the training's options."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.augmentation).items()}
        return {**values, 'num_classes': self.num_classes}


def _crc(values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(values).encode())


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
            'record again with the same command, which makes what is missing.'
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
                f'{path} is damaged (epoch {epoch + 1}): copy it again, or delete it and record again, which makes '
                'what is missing.'
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
            UserError: If an image is not in the store; images without file names are only known all together.
        """
        if len(names) == self.meta.images and names_sha256(names) == self.meta.names_sha256:
            return None
        places = {name: row for row, name in enumerate(self.names())}
        unknown = [name for name in names if name not in places or names[0] == '#0']
        if unknown:
            raise UserError(
                f'{len(unknown):,} of {len(names):,} images are not in {self.path}, {unknown[0]} for one: '
                f'give the {self.meta.images:,} images that were recorded, or record these.'
            )
        return np.array([places[name] for name in names])

    def training_settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Compare a training's settings with the store's, and return those that the store decides.

        Mean and standard deviation are not compared: the store's fill what augmentation leaves empty, the training's
        normalize the pixels.

        `given` has the options (timm's names) that the user gave; the options returned are others.

        Raises:
            UserError: At the first setting that would give other pixels or classes than the recorded ones.
        """
        stored = {name: value for name, value in self.meta.settings().items() if name not in ('mean', 'std')}
        if self.meta.augmentation.mixes:
            stored['mixup_mode'] = 'pair'
        channels, height, width = self.meta.augmentation.input_size
        teachers = sorted(teacher['name'] for teacher in self.meta.teachers)
        compared = {**stored, 'in_chans': channels, 'teachers': teachers}
        if height == width:
            compared['img_size'] = height
        for name, value in given.items():
            if name not in compared or (name == 'teachers' and not value):
                continue
            now = sorted(value) if name == 'teachers' else value
            if (now or None) != (compared[name] or None):
                raise UserError(
                    f'{option_text(name)} was {shown(compared[name])} when {self.path} was recorded and is '
                    f'{shown(value)} here: leave it out, or record again.'
                )
        return {name: value for name, value in stored.items() if name not in given}


def checksum(records: bytes, epoch: int, start: int) -> bytes:
    """Return the checksum of a slice; a slice in the place of another has a wrong one."""
    place = np.array([epoch, start], '<u4').tobytes()
    return zlib.crc32(records, zlib.crc32(place)).to_bytes(CHECKSUM_BYTES, 'little')


def pixel_crc(pixels: np.ndarray) -> int:
    """Return the CRC-32 of a sample's pixels, uint8; never 0, which marks an image that could not be read."""
    return zlib.crc32(np.ascontiguousarray(pixels).data) or 1


def option_text(name: str) -> str:
    """Return an option as the command line spells it."""
    return f'--{name.replace("_", "-")}'


def shown(value: Any) -> str:
    """Return a setting's value as a user writes it, shortened."""
    if isinstance(value, dict):
        return ', '.join(f'{name} {shown(entry)}' for name, entry in value.items())
    text = ' '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 60 else f'{text[:60]}...'


def names_sha256(names: Sequence[str]) -> str:
    """Return the SHA-256 of names in their order."""
    return hashlib.sha256('\0'.join(names).encode('utf-8', 'surrogateescape')).hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that make the pixels."""
    turbo = features.version('libjpeg_turbo')
    return {
        'timm': timm.__version__,
        'torchvision': torchvision.__version__,
        'Pillow': PIL.__version__,
        'libjpeg': f'turbo {turbo}' if turbo else features.version('jpg') or 'none',
        'numpy': np.__version__,
    }
