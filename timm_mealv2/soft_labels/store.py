"""A store of soft labels: a folder that says which crops were cut from the images and what the teachers answered.

    meta.json                  what was recorded, and the checksums of the other files
    index.safetensors          names (U8: UTF-8, separated by NUL) and sizes (U16 [N, 2]: width, height) of the images
    shard-00000.safetensors    records (U8 [images * crops, bytes]), the crops of an image side by side; its header
                               tells the images' sizes once more, so that a shard is complete in itself

A record is 8 + 4K bytes, little-endian: u2 left (bit 15: flip), u2 top, u2 width, u2 height, u2 class index [K],
f2 probability [K], the most probable class first; u4 class indices above 65,536 classes. An image that could not be
read has the size 0 0 and empty records.
"""

import bisect
import hashlib
import json
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import PIL
from PIL import Image, features
from safetensors.numpy import load_file, save_file
from timm.data.transforms import str_to_interp_mode
from torchvision.transforms import functional as TF

from timm_mealv2.data.dataset import UnreadableImage
from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing

FORMAT_VERSION = 1

META = 'meta.json'
RECORDING = 'recording.json'
"""The settings of a recording that is not finished: there from its start until `meta.json` is written."""
INDEX = 'index.safetensors'

MAX_SIDE = 2**15 - 1
"""Longest side of an image, in pixels: a record has 15 bits for the left edge."""

PIXEL_SAMPLES = 16

_FLIP = 1 << 15
_MAX_OPEN = 64  # shards of one store; a process may open about 1,000 files


class Crop(NamedTuple):
    """A rectangle of an image, in its pixels, and whether it is flipped horizontally after resizing."""

    left: int
    top: int
    width: int
    height: int
    flip: bool


@dataclass(frozen=True)
class Shard:
    """A file of records: those of the images `start` to `stop` - 1."""

    file: str
    start: int
    stop: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class PixelSample:
    """A crop as it was when recorded: the SHA-256 of its pixels, as `cut` gives them."""

    name: str
    crop: int
    sha256: str


@dataclass(frozen=True)
class StoreMeta:
    """What a store holds, as `meta.json` says it.

    Attributes:
        format_version: `FORMAT_VERSION` of the program that wrote it.
        teachers: For each teacher 'name' (as the user gave it), 'sha256' of its weights, 'weight', 'img_size' ([h, w]
            or None) and 'classes' (those taken of its own, or None).
        teacher_dtype: The teachers' autocast; None for none.
        num_classes: Class count C.
        top_k: Classes kept for a crop, K.
        crops: Crops of an image.
        image_size: [height, width] of a crop for the student.
        img_mode: 'RGB' or 'L'.
        interpolation: timm's name of the interpolation that crops are resized with.
        scale: Range of a crop's share of the image's area.
        ratio: Range of a crop's aspect ratio.
        hflip: Probability of a flip.
        seeds: What the crops were drawn with; a merged store has several.
        pillow: Pillow's version.
        libjpeg: libjpeg's version.
        images: Number of images N.
        fingerprint: `fingerprint` of their names and sizes.
        unreadable: Number of images without records.
        kept_mass: Mean over the crops of the probability that their K classes sum up to.
        shards: The files of records, in the order of their images.
        index_sha256: Checksum of the index.
        pixel_samples: Crops to compare the decoder with.
    """

    format_version: int
    teachers: list[dict[str, Any]]
    teacher_dtype: str | None
    num_classes: int
    top_k: int
    crops: int
    image_size: list[int]
    img_mode: str
    interpolation: str
    scale: list[float]
    ratio: list[float]
    hflip: float
    seeds: list[int]
    pillow: str
    libjpeg: str
    images: int
    fingerprint: str
    unreadable: int
    kept_mass: float
    shards: list[Shard]
    index_sha256: str
    pixel_samples: list[PixelSample]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `meta.json`.

        Raises:
            UserError: If there is none, it is of a newer format, or damaged.
        """
        if not (folder / META).is_file():
            if (folder / RECORDING).is_file():
                raise UserError(
                    f'{folder} is a recording that is not finished: give the same mealv2-softlabels command again, it '
                    'goes on where it stopped.'
                )
            raise UserError(f'{folder} holds no soft labels: there is no {META}.')
        try:
            values = json.loads((folder / META).read_text(encoding='utf-8'))
            version = values['format_version']
            if version > FORMAT_VERSION:
                raise UserError(
                    f'{folder} has format version {version}, this timm_mealv2 reads up to {FORMAT_VERSION}: update it.'
                )
            values['shards'] = [Shard(**shard) for shard in values['shards']]
            values['pixel_samples'] = [PixelSample(**sample) for sample in values['pixel_samples']]
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f'{folder / META} is damaged: {error}') from error

    def write(self, folder: Path) -> None:
        """Write `meta.json`, which makes the folder a store."""
        write_json(folder / META, asdict(self))


class SoftLabelStore:
    """Reads a store. What is read is not kept: the memory that it takes does not grow with the records.

    May be used by several processes: after a fork each reads for itself, and it can be pickled.

    Attributes:
        path: The folder.
        meta: What the store holds.
        names: Names of the images, as `timm_mealv2.data.dataset.image_names` gives them.
        sizes: uint16 [N, 2], width and height of each image; 0 0 where it could not be read.
        rows: Name -> row of the image.

    Args:
        path: The folder.
        check: Compare the checksums of all shards, which reads them once. Their sizes are compared in any case.

    Raises:
        UserError: If there is no finished store, it is of a newer format, or a file is missing, cut off or altered.
    """

    def __init__(self, path: str | os.PathLike[str], *, check: bool = True) -> None:
        self.path = Path(path)
        self.meta = StoreMeta.read(self.path)
        self._dtype = record_dtype(self.meta.num_classes, self.meta.top_k)
        self._starts = [shard.start for shard in self.meta.shards]
        self._files: dict[int, _ShardFile] = {}
        for shard in self.meta.shards:
            file = self.path / shard.file
            size = file.stat().st_size if file.is_file() else 0
            if size != shard.bytes:
                what = f'has {size:,} bytes instead of {shard.bytes:,}' if file.is_file() else 'is missing'
                raise UserError(f'{file} {what}: copy the store again, or record it again.')
            if check:
                _check_hash(file, shard.sha256)
        if not (self.path / INDEX).is_file():
            raise UserError(f'{self.path / INDEX} is missing: copy the store again, or record it again.')
        _check_hash(self.path / INDEX, self.meta.index_sha256)
        self.names, self.sizes = read_index(self.path)
        self.rows = {name: row for row, name in enumerate(self.names)}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open files: the other process opens its own."""
        return {**self.__dict__, '_files': {}}

    def read(self, row: int, crops: Sequence[int]) -> tuple[list[Crop], np.ndarray, np.ndarray]:
        """Read crops of one image.

        Args:
            row: The image's row.
            crops: Numbers of the crops, each from 0 to `meta.crops` - 1.

        Returns:
            The n crops, the classes int64 [n, K] and their probabilities float32 [n, K], falling along K.
        """
        records = self.records(row, crops)
        columns = (records[name].tolist() for name in ('left', 'top', 'width', 'height'))
        rectangles = [
            Crop(left & ~_FLIP, top, width, height, bool(left & _FLIP))
            for left, top, width, height in zip(*columns, strict=True)
        ]
        return rectangles, records['classes'].astype(np.int64), records['probabilities'].astype(np.float32)

    def records(self, row: int, crops: Sequence[int]) -> np.ndarray:
        """Read crops of one image as they are stored, [n] of `record_dtype`."""
        number = bisect.bisect_right(self._starts, row) - 1
        shard = self.meta.shards[number]
        assert shard.start <= row < shard.stop, f'no row {row} among {self.meta.images} images'
        assert all(0 <= crop < self.meta.crops for crop in crops), f'no such crops among {self.meta.crops}: {crops}'
        if number not in self._files:
            if len(self._files) >= _MAX_OPEN:
                del self._files[next(iter(self._files))]
            self._files[number] = _ShardFile(self.path / shard.file)
        size = self._dtype.itemsize
        # All records of the shard come after its header.
        first = shard.bytes - (shard.stop - row) * self.meta.crops * size
        if isinstance(crops, range) and crops.step == 1:
            data = self._files[number].read(first + crops.start * size, len(crops) * size)
        else:
            data = b''.join(self._files[number].read(first + crop * size, size) for crop in crops)
        return np.frombuffer(data, self._dtype)

    def check_decoder(self, read: Callable[[str], Image.Image]) -> None:
        """Cut the sample crops anew, and compare their pixels with those that the teachers saw.

        Args:
            read: Gives an image by its name, decoded in the store's mode. Those that it has not (KeyError) or cannot
                read (UnreadableImage) are left out.

        Raises:
            UserError: If an image has another size, or pixels differ.
        """
        compared, differing = 0, []
        for sample in self.meta.pixel_samples:
            try:
                image = read(sample.name)
            except (KeyError, UnreadableImage):
                continue
            row = self.rows[sample.name]
            size = tuple(self.sizes[row].tolist())
            if image.size != size:
                raise UserError(
                    f'{sample.name} has {image.width}x{image.height} pixels, but had {size[0]}x{size[1]} when '
                    f'{self.path} was recorded: these are other images.'
                )
            compared += 1
            crop = self.read(row, [sample.crop])[0][0]
            height, width = self.meta.image_size
            if pixel_hash(image, crop, (height, width), self.meta.interpolation) != sample.sha256:
                differing.append(sample.name)
        if differing:
            raise UserError(
                f'{len(differing)} of {compared} sample crops of {self.path} have other pixels now ({differing[0]}): '
                f'recorded with Pillow {self.meta.pillow} and libjpeg {self.meta.libjpeg}, here are Pillow '
                f'{PIL.__version__} and libjpeg {libjpeg_version()}; install the former, or record again if the images '
                'have changed.'
            )


def record_dtype(num_classes: int, top_k: int) -> np.dtype:
    """Return the type of a record."""
    index = '<u2' if num_classes <= 2**16 else '<u4'
    edges = [(name, '<u2') for name in ('left', 'top', 'width', 'height')]
    return np.dtype([*edges, ('classes', index, (top_k,)), ('probabilities', '<f2', (top_k,))])


def fill_records(records: np.ndarray, crops: Sequence[Crop], classes: np.ndarray, probabilities: np.ndarray) -> None:
    """Write crops and their labels, [n, K] each, into `records` [n] of `record_dtype`."""
    edges = np.array([crop[:4] for crop in crops], dtype=np.uint16)
    records['left'] = edges[:, 0] | np.array([_FLIP * crop.flip for crop in crops], dtype=np.uint16)
    for column, name in enumerate(('top', 'width', 'height'), 1):
        records[name] = edges[:, column]
    records['classes'] = classes
    records['probabilities'] = probabilities


def cut(image: Image.Image, crop: Crop, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Cut a crop of a fully decoded image, resize it as timm's `RandomResizedCropAndInterpolation` does, then flip it.

    Args:
        image: The image, of one band or several.
        crop: Where to cut.
        size: (height, width) of the result.
        interpolation: timm's name of the interpolation, such as 'bilinear'.

    Returns:
        uint8 [chans, height, width].
    """
    left, top, width, height, flip = crop
    image = TF.resized_crop(image, top, left, height, width, list(size), str_to_interp_mode(interpolation))
    if flip:
        image = TF.hflip(image)
    pixels = np.array(image)  # a copy: Mixup writes into it
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def pixel_hash(image: Image.Image, crop: Crop, size: tuple[int, int], interpolation: str) -> str:
    """Return the SHA-256 of a crop's pixels; the arguments are those of `cut`."""
    return hashlib.sha256(cut(image, crop, size, interpolation).tobytes()).hexdigest()


def names_hash(names: Sequence[str]) -> str:
    """Return the SHA-256 of names in their order."""
    return hashlib.sha256('\0'.join(names).encode('utf-8', 'surrogateescape')).hexdigest()


def fingerprint(names: Sequence[str], sizes: np.ndarray) -> str:
    """Return the SHA-256 over names and sizes (width, height) of images, in whatever order they come."""
    digest = hashlib.sha256()
    for name, (width, height) in sorted(zip(names, sizes.tolist(), strict=True)):
        digest.update(f'{name}\0{width} {height}\n'.encode('utf-8', 'surrogateescape'))
    return digest.hexdigest()


def libjpeg_version() -> str:
    """Return the version of the libjpeg that Pillow decodes with, '' if it has none."""
    turbo = features.version('libjpeg_turbo')
    return f'turbo {turbo}' if turbo else features.version('jpg') or ''


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + '\n', encoding='utf-8')


def write_shard(path: Path, records: np.ndarray, sizes: np.ndarray) -> None:
    """Write a shard: `records` [images * crops] of `record_dtype`, `sizes` uint16 [images, 2]."""
    tensor = records.view(np.uint8).reshape(len(records), records.dtype.itemsize)
    with replacing(path) as temporary:
        # Of several entries safetensors would change the order from run to run.
        save_file({'records': tensor}, temporary, metadata={'sizes': json.dumps(sizes.tolist())})


def shard_sizes(path: Path) -> np.ndarray | None:
    """Read the sizes of a shard's images, uint16 [images, 2]; None if the shard is missing or cut off."""
    try:
        with path.open('rb') as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), 'little')))
            if file.tell() + header['records']['data_offsets'][1] != path.stat().st_size:
                return None
        return np.array(json.loads(header['__metadata__']['sizes']), dtype=np.uint16)
    except (FileNotFoundError, KeyError, ValueError):
        return None


def read_shard(path: Path, dtype: np.dtype) -> np.ndarray:
    """Read all records of a shard, [images * crops] of `dtype`."""
    with path.open('rb') as file:
        file.seek(int.from_bytes(file.read(8), 'little'), os.SEEK_CUR)
        return np.fromfile(file, dtype)


def write_index(folder: Path, names: Sequence[str], sizes: np.ndarray) -> None:
    """Write the index: names of the images and their sizes, uint16 [N, 2]."""
    text = '\0'.join(names).encode('utf-8', 'surrogateescape')
    with replacing(folder / INDEX) as temporary:
        save_file({'names': np.frombuffer(text, np.uint8), 'sizes': sizes}, temporary)


def read_index(folder: Path) -> tuple[list[str], np.ndarray]:
    """Read the index: names of the images and their sizes, uint16 [N, 2]."""
    tensors = load_file(folder / INDEX)
    return tensors['names'].tobytes().decode('utf-8', 'surrogateescape').split('\0'), tensors['sizes']


def _check_hash(path: Path, expected: str) -> None:
    if file_hash(path) != expected:
        raise UserError(f'{path} has been altered (its SHA-256 is another): copy the store again, or record it again.')


class _ShardFile:
    """An open shard, closed when it is forgotten.

    Read at given places rather than mapped: the pages of a mapping would count as the process's memory, one by one
    until the whole store is in it. Processes that share the file after a fork do not disturb each other either.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, start)
        if len(data) != size:
            raise UserError(f'{self._path} is cut off: copy the store again, or record it again.')
        return data
