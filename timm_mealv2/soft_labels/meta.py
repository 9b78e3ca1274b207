"""What a store of soft labels holds, as its `meta.json` says it: the settings of a recording."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import PIL
import timm
import torch
import torchvision
from PIL import features
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from timm_mealv2.data.augmentation import Augmentation
from timm_mealv2.data.dataset import image_names
from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.teacher import ClassSubset

FORMAT = 2
META = 'meta.json'
CHECKSUM_BYTES = 4


class Part(NamedTuple):
    """One file of records: a block of epochs for a range of images."""

    epochs: range
    images: range
    file: str


@dataclass(frozen=True)
class StoreMeta:
    """What a store holds, as `meta.json` says it.

    Attributes:
        format: `FORMAT` of the program that wrote it.
        teachers: For each teacher 'name' (as the user gave it), 'sha256' of its weights, 'weight', 'img_size' ([h, w]
            or None), 'classes' (those taken of its own, or None), 'autocast_dtype' (or None) and, where teachers were
            tuned, 'runs_as' (its form).
        seed: Seed of the samples.
        num_classes: Class count C.
        top_k: Classes kept of a sample, K.
        names_sha256: SHA-256 of the file of names.
        versions: Versions of the libraries that make the pixels.
        batch_size: Most samples that go through the teachers together; it decides the last bits of a prediction.
        part_images: Images of a part.
        blocks: First epoch of each block, and at the end the number of epochs M.
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
            found = values.get('format', values.get('format_version'))
            if found == FORMAT:
                crc = values.pop('crc', None)  # the first stores have none
                if crc not in (None, _crc(values)):
                    raise ValueError('its checksum is wrong')
                dtype = values.pop('autocast_dtype', None)  # in the first stores one for all teachers
                values['teachers'] = [{'autocast_dtype': dtype, **teacher} for teacher in values['teachers']]
                meta = cls(**{**values, 'augmentation': Augmentation(**values['augmentation'])})
                sizes = (meta.images, meta.num_classes, meta.top_k, meta.batch_size, meta.part_images, *meta.blocks)
                if not all(isinstance(size, int) and size >= 0 for size in sizes):
                    raise ValueError(f'{sizes} are not all whole numbers')
                return meta
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f'{folder / META} is damaged: {error}') from error
        raise UserError(f'{folder} has format {found}, this timm_mealv2 reads format {FORMAT}: record it again.')

    def write(self, folder: Path, first: bool = False) -> None:
        """Write `meta.json`, whole or not at all; as the `first` only where no other process has written one."""
        with suppress(FileExistsError), replacing(folder / META) as temporary:
            values = asdict(self)
            temporary.write_text(json.dumps({**values, 'crc': _crc(values)}, indent=1) + '\n', encoding='utf-8')
            if first:
                try:
                    os.link(temporary, folder / META)
                except FileExistsError:
                    raise
                except OSError:  # a file system without hard links: the last one counts
                    pass

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

    def full_batch(self, epochs: int) -> int:
        """Return how many samples of a part of `epochs` epochs go through the teachers together."""
        size = self.batch_size // epochs * epochs or self.batch_size
        return min(size, self.part_images * epochs, self.images * epochs)

    def parts(self) -> Iterator[Part]:
        """Yield the parts, block by block."""
        for first, end in pairwise(self.blocks):
            for number, start in enumerate(range(0, self.images, self.part_images)):
                images = range(start, min(start + self.part_images, self.images))
                yield Part(range(first, end), images, f'part-{first:05}-{number:05}')

    def part_bytes(self, part: Part) -> int:
        """Return the size of a part's file."""
        return len(part.epochs) * (len(part.images) * self.dtype.itemsize + CHECKSUM_BYTES)


def _crc(values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(values).encode())


def describe(
    dataset: Dataset,
    teachers: EnsembleTeacher,
    augmentation: Augmentation,
    *,
    seed: int = 42,
    top_k: int = 10,
    batch_size: int = 128,
    part_images: int | None = None,
) -> StoreMeta:
    """Return what is to be recorded (see `StoreMeta`), still without epochs; `seed` is that of the training.

    With `part_images=None` 128 parts share a block of epochs, or more for very many images and fewer for few: a store
    has some thousand files at most, and a process that dies loses little.

    Raises:
        UserError: If the data set has no random access, or a value is not possible.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, '__len__'):
        raise UserError('a streaming data set has no numbered images to record: take a folder, a tar or hfds/NAME.')
    if not 1 <= top_k <= teachers.num_classes:
        raise UserError(f'--top-k must be from 1 to {teachers.num_classes}, the number of classes, got {top_k}.')
    if augmentation.aug_splits:
        raise UserError(f'--aug-splits {augmentation.aug_splits}: refused, a record is of one image.')
    channels = augmentation.input_size[0]
    if teachers.in_chans != channels:
        raise UserError(f'the teachers take {teachers.in_chans} channels, the samples have {channels}: set --in-chans.')
    images = len(dataset)
    return StoreMeta(
        format=FORMAT,
        teachers=describe_teachers(teachers),
        augmentation=augmentation,
        seed=seed,
        num_classes=teachers.num_classes,
        top_k=top_k,
        images=images,
        names_sha256=names_sha256(image_names(dataset)),
        versions=library_versions(),
        batch_size=batch_size,
        part_images=part_images or min(max(-(-images // 128), 256), 2**14),
        blocks=[0],
    )


def difference(former: StoreMeta, now: StoreMeta) -> str | None:
    """Say in a few words how two recordings differ, None if they do not.

    The texts that name the teachers may differ, as paths do: their weights count. So may the libraries' versions as
    long as the pixels are the same.
    """
    names = [' '.join(teacher['name'] for teacher in meta.teachers) for meta in (former, now)]
    if len(former.teachers) != len(now.teachers):
        return f'--teachers {names[0]}, not {names[1]}'
    for a, b in zip(former.teachers, now.teachers, strict=True):
        if a['sha256'] != b['sha256']:
            if a['name'] != b['name']:
                return f'--teachers {names[0]}, not {names[1]}'
            return f'other weights of {a["name"]} (SHA-256 {a["sha256"][:12]}, not {b["sha256"][:12]})'
        options = {'weight': 'weights', 'img_size': 'img-size', 'classes': 'classes', 'autocast_dtype': 'dtype'}
        for key, option in options.items():
            if a[key] != b[key]:
                return f'--teacher-{option} {shown(a[key])} for {a["name"]}, not {shown(b[key])}'
    pairs = [
        ('--num-classes', former.num_classes, now.num_classes),
        ('--top-k', former.top_k, now.top_k),
        ('--seed', former.seed, now.seed),
        ('the number of images', former.images, now.images),
        ('the SHA-256 of the names of the images', former.names_sha256, now.names_sha256),
    ]
    fields = asdict(former.augmentation), asdict(now.augmentation)
    pairs += [(option_text(name), fields[0][name], fields[1][name]) for name in fields[0]]
    return next((f'{option} {shown(a)}, not {shown(b)}' for option, a, b in pairs if a != b), None)


def option_text(name: str) -> str:
    """Return an option as the command line spells it."""
    return f'--{name.replace("_", "-")}'


def shown(value: Any) -> str:
    """Return a setting's value as a user writes it, shortened."""
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


def describe_teachers(ensemble: EnsembleTeacher) -> list[dict[str, Any]]:
    """Return what `StoreMeta.teachers` says of an ensemble."""
    return [
        {
            'name': name,
            'sha256': _weights_sha256(teacher),
            'weight': weight,
            'img_size': list(size) if size else None,
            'classes': teacher.get_buffer('indices').tolist() if isinstance(teacher, ClassSubset) else None,
            'autocast_dtype': str(dtype).removeprefix('torch.') if dtype else None,
        }
        for name, teacher, weight, size, dtype in zip(
            ensemble.names,
            ensemble.teachers,
            ensemble.weights,
            ensemble.img_sizes,
            ensemble.autocast_dtypes,
            strict=True,
        )
    ]


def _weights_sha256(model: nn.Module) -> str:
    """The SHA-256 over names, types, shapes and values of a model's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {list(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
