"""The settings of a recording: made from data set, teachers and augmentation, and compared with those of a store."""

import hashlib
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from timm_mealv2.data.augmentation import Augmentation
from timm_mealv2.data.class_names import class_names_of
from timm_mealv2.data.dataset import image_names
from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import ClassSubset, EnsembleTeacher
from timm_mealv2.soft_labels.store import FORMAT, StoreMeta, library_versions, names_sha256, option_text, shown


def describe(
    dataset: Dataset,
    teachers: EnsembleTeacher,
    augmentation: Augmentation,
    *,
    seed: int = 42,
    top_k: int = 10,
    batch_size: int = 128,
    part_images: int | None = None,
    teachers_per_sample: int | None = None,
) -> StoreMeta:
    """Return the settings of a recording; `StoreMeta.extend` adds the epochs.

    Args:
        seed: Seed of the training.
        top_k: Classes to keep, or all where there are fewer.
        part_images: Images of a part. None for 128 parts a block of epochs, or more for very many images and fewer for
            few: a store has some thousand files at most, and a process that dies loses little.
        teachers_per_sample: Teachers to draw for each sample, by (seed, epoch, image); None for all.

    Raises:
        UserError: If the data set has no random access, or so many teachers cannot be drawn.
    """
    if teachers_per_sample is not None:
        teachers.check_per_sample(teachers_per_sample)
    if isinstance(dataset, IterableDataset):
        raise UserError('a streaming data set has no numbered images to record: take a folder, a tar or hfds/NAME.')
    images = len(dataset)  # type: ignore[arg-type]
    return StoreMeta(
        format=FORMAT,
        teachers=describe_teachers(teachers),
        augmentation=augmentation,
        seed=seed,
        num_classes=teachers.num_classes,
        top_k=min(top_k, teachers.num_classes),
        images=images,
        names_sha256=names_sha256(image_names(dataset)),
        versions=library_versions(),
        batch_size=batch_size,
        part_images=part_images or min(max(-(-images // 128), 256), 2**14),
        blocks=[0],
        teachers_per_sample=teachers_per_sample,
        class_names=class_names_of(teachers),
    )


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
        for teacher, weight, name, size, dtype in ensemble.members
    ]


def _weights_sha256(model: nn.Module) -> str:
    """The SHA-256 over names, types, shapes and values of a model's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {list(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def difference(former: StoreMeta, now: StoreMeta) -> str | None:
    """Say in a few words how two recordings differ, None if they do not.

    The texts that name the teachers may differ, as paths do: their weights count. So may the libraries' versions as
    long as the pixels are the same.
    """
    weights = [[teacher['sha256'] for teacher in meta.teachers] for meta in (former, now)]
    if weights[0] != weights[1]:
        names = [' '.join(f'{t["name"]} (SHA-256 {t["sha256"][:12]})' for t in meta.teachers) for meta in (former, now)]
        return f'--teachers {names[0]}, not {names[1]}'
    settings = [_settings(former), _settings(now)]
    differing = (name for name, value in settings[0].items() if value != settings[1][name])
    return next((f'{name} {", not ".join(shown(one[name]) for one in settings)}' for name in differing), None)


def _settings(meta: StoreMeta) -> dict[str, Any]:
    """The settings that must not change within a store, by option."""
    options = {'weight': 'weights', 'img_size': 'img_size', 'classes': 'classes', 'autocast_dtype': 'dtype'}
    named: dict[str, Any] = {f'teacher_{name}': [t[key] for t in meta.teachers] for key, name in options.items()}
    named |= {'teachers_per_sample': meta.teachers_per_sample, 'top_k': meta.top_k, 'seed': meta.seed}
    named |= meta.settings()
    return {
        **{option_text(name): value for name, value in named.items()},
        'the number of images': meta.images,
        'the SHA-256 of the names of the images': meta.names_sha256,
    }
