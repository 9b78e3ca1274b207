"""The folder of a recording: its settings, its shards, and what makes it a store in the end."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import ClassSubset, EnsembleTeacher
from timm_mealv2.soft_labels.store import (
    INDEX,
    META,
    RECORDING,
    PixelSample,
    Shard,
    StoreMeta,
    file_hash,
    fingerprint,
    names_hash,
    read_index,
    read_shard,
    record_dtype,
    shard_sizes,
    write_index,
    write_json,
)

_logger = logging.getLogger(__name__)

# A kill costs a process at most a shard: a thousandth of the whole, but for small and very large recordings.
_SHARDS = 1024
_SHARD_RECORDS = (256, 2**18)

_OPTIONS = {
    'format_version': 'format version',
    'teacher_dtype': '--teacher-dtype',
    'num_classes': '--num-classes',
    'top_k': '--top-k',
    'crops': '--crops',
    'image_size': '--img-size',
    'img_mode': '--input-img-mode',
    'interpolation': '--train-interpolation',
    'scale': '--scale',
    'ratio': '--ratio',
    'hflip': '--hflip',
    'seeds': '--seed',
    'pillow': 'Pillow',
    'libjpeg': 'libjpeg',
    'images': 'the number of images',
    'names_sha256': 'the names of the images, SHA-256',
}
"""What a user calls the settings of a recording."""

Settings = dict[str, Any]


def shard_ranges(images: int, crops: int) -> list[tuple[int, int]]:
    """Return the images (start, stop) of each shard; it depends on nothing but the numbers of images and crops."""
    least, most = _SHARD_RECORDS
    size = max(1, min(max(least, math.ceil(images * crops / _SHARDS)), most) // crops)
    return [(start, min(start + size, images)) for start in range(0, images, size)]


def shard_file(number: int) -> str:
    """Return the name of a shard."""
    return f'shard-{number:05}.safetensors'


def describe_teachers(ensemble: EnsembleTeacher) -> list[dict[str, Any]]:
    """Return what `StoreMeta.teachers` says of an ensemble."""
    return [
        {
            'name': name,
            'sha256': _weights_hash(teacher),
            'weight': weight,
            'img_size': list(size) if size else None,
            'classes': teacher.get_buffer('indices').tolist() if isinstance(teacher, ClassSubset) else None,
        }
        for name, teacher, weight, size in zip(
            ensemble.names, ensemble.teachers, ensemble.weights, ensemble.img_sizes, strict=True
        )
    ]


def difference(former: Settings, now: Settings) -> str | None:
    """Say in a few words how two recordings differ, None if they do not; only what both settings have is compared.

    The texts that name the teachers may differ, as paths do: their weights count.
    """
    if len(former['teachers']) != len(now['teachers']):
        return f'--teachers {_teacher_names(former)}, not {_teacher_names(now)}'
    for a, b in zip(former['teachers'], now['teachers'], strict=True):
        if a['sha256'] != b['sha256']:
            if a['name'] != b['name']:
                return f'--teachers {_teacher_names(former)}, not {_teacher_names(now)}'
            return f'other weights of {a["name"]} (SHA-256 {a["sha256"][:12]}, not {b["sha256"][:12]})'
        for key, option in (('weight', 'weights'), ('img_size', 'img-size'), ('classes', 'classes')):
            if a[key] != b[key]:
                return f'--teacher-{option} {_brief(a[key])} for {a["name"]}, not {_brief(b[key])}'
    for key, option in _OPTIONS.items():
        if key in former and key in now and former[key] != now[key]:
            return f'{option} {_brief(former[key])}, not {_brief(now[key])}'
    return None


def finish(
    out: Path,
    names: Sequence[str],
    settings: Settings,
    pixel_samples: Callable[[np.ndarray], list[PixelSample]],
) -> StoreMeta:
    """Write index and `meta.json`, which makes a folder with all of its shards a store.

    Args:
        out: The folder.
        names: Names of the images.
        settings: The settings of the recording.
        pixel_samples: Gives the samples, for the images' sizes (uint16 [N, 2]).
    """
    dtype = record_dtype(settings['num_classes'], settings['top_k'])
    sizes = np.zeros((len(names), 2), np.uint16)
    shards, mass = [], 0.0
    for number, (start, stop) in enumerate(shard_ranges(len(names), settings['crops'])):
        path = out / shard_file(number)
        shard = shard_sizes(path)
        assert shard is not None, f'{path} has not been written'
        sizes[start:stop] = shard
        mass += float(read_shard(path, dtype)['probabilities'].sum(dtype=np.float64))
        shards.append(Shard(path.name, start, stop, path.stat().st_size, file_hash(path)))
    unreadable = int((sizes == 0).any(axis=1).sum())
    if unreadable == len(names):
        raise UserError(f'none of the {len(names)} images can be read: nothing is recorded.')
    samples = pixel_samples(sizes)
    write_index(out, names, sizes)
    meta = StoreMeta(
        **{key: value for key, value in settings.items() if key != 'names_sha256'},
        fingerprint=fingerprint(names, sizes),
        unreadable=unreadable,
        kept_mass=mass / ((len(names) - unreadable) * settings['crops']),
        shards=shards,
        index_sha256=file_hash(out / INDEX),
        pixel_samples=samples,
    )
    meta.write(out)
    (out / RECORDING).unlink(missing_ok=True)
    return meta


def start(out: Path, settings: Settings) -> None:
    """Make the folder of a recording, or take up one that was stopped: write what it is, remove unfinished files."""
    out.mkdir(parents=True, exist_ok=True)
    for pattern in ('.shard-*.safetensors', '.index-*.safetensors', '.meta-*.json', '.recording-*.json'):
        for leftover in out.glob(pattern):
            leftover.unlink()
    write_json(out / RECORDING, settings)


def take_up(out: Path, settings: Settings) -> bool:
    """Tell whether `out` is finished; if not, it is a folder to start or go on with.

    Raises:
        UserError: If it is a recording with other settings, or holds other files.
    """
    finished = (out / META).is_file()
    if finished:
        former = {**asdict(StoreMeta.read(out)), 'names_sha256': names_hash(read_index(out)[0])}
    elif (out / RECORDING).is_file():
        former = json.loads((out / RECORDING).read_text(encoding='utf-8'))
    elif out.exists() and (not out.is_dir() or any(not path.name.startswith('.') for path in out.iterdir())):
        raise UserError(f'--out {out} holds other files: name a new folder.')
    else:
        return False
    differing = difference(former, settings)
    if differing:
        raise UserError(f'{out} is a recording with {differing}: give the same options, or another --out.')
    if finished:
        (out / RECORDING).unlink(missing_ok=True)  # a kill may have left it
        _logger.info(f'{out} is finished, nothing is left to do.')
    return finished


def _weights_hash(model: nn.Module) -> str:
    """The SHA-256 over names, types, shapes and values of a model's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {list(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _teacher_names(settings: Settings) -> str:
    return ' '.join(teacher['name'] for teacher in settings['teachers'])


def _brief(value: Any) -> str:
    text = ' '.join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f'{text[:60]}...'
