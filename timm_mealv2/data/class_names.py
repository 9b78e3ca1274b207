"""Labels by name: what models and data sets call their classes, and how two lists of names go together."""

import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils import unwrap_model
from torch import nn
from torch.utils.data import Dataset

from timm_mealv2.errors import UserError

_logger = logging.getLogger(__name__)


def class_names_of(source: nn.Module | Dataset) -> list[str] | None:
    """Return the names of a model's or a data set's classes in the order of their numbers, None if they are not known.

    A model has them as `label_names` in its `pretrained_cfg`, as exports and checkpoints do.
    """
    if isinstance(source, nn.Module):
        model: Any = unwrap_model(source)
        names = [str(name) for name in (getattr(model, 'pretrained_cfg', None) or {}).get('label_names') or ()]
        return names if names and len(set(names)) == len(names) == model.num_classes else None
    reader = getattr(source, 'reader', source)
    numbers = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)  # of tars
    if not numbers or not has_labels(source) or sorted(numbers.values()) != list(range(len(numbers))):
        return None
    return [str(name) for name in sorted(numbers, key=numbers.__getitem__)]


def index_map(
    known: Sequence[str] | None, wanted: Sequence[str] | None, whose: str, than: str = 'the data set'
) -> list[int] | None:
    """Return the number that each of the `wanted` classes has among the `known` ones.

    None where the numbers are the same, and where one side has no names: then it is taken as it is. A line of the log
    tells of that, and of other numbers.

    Args:
        known: Names of the classes of `whose`, a model in most cases.
        wanted: Names of the classes of `than`.
        whose: What the one side is called.
        than: What the other side is called.

    Raises:
        UserError: If a class that is wanted is not known.
    """
    if not known or not wanted:
        if names := known or wanted:
            nameless = whose if names is wanted else than
            _logger.warning(f'{nameless} has no class names: its classes are taken in their order, {names[0]!r} first.')
        return None
    if list(known) == list(wanted):
        return None
    numbers = {name: number for number, name in enumerate(known)}
    if unknown := [name for name in wanted if name not in numbers]:
        others = sorted(set(known) - set(wanted), key=numbers.__getitem__)
        it_has = f', but has {_first(others)}' if others else ''
        raise UserError(f'{whose} lacks {_first(unknown)} of {than}{it_has}: name the classes alike (--class-map).')
    count = 'all' if len(known) == len(wanted) else str(len(wanted))
    _logger.warning(f'{whose}: {count} of its {len(known)} classes are mapped by name to the numbers of {than}.')
    return [numbers[name] for name in wanted]


def _first(names: Sequence[str]) -> str:
    return ', '.join(map(repr, names[:3])) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def check_same_classes(former: Sequence[str] | None, now: Sequence[str] | None, where: str) -> None:
    """Raise a `UserError` where both lists of names are known and differ, be it in their order alone."""
    if former and now and list(former) != list(now):
        a, b = next(pair for pair in zip([*former, '-'], [*now, '-'], strict=False) if pair[0] != pair[1])
        raise UserError(
            f'{where} has other classes, or in another order ({a!r} where {b!r} is now): --class-map orders them.'
        )


# The labels of a data set


def unlabeled(dataset: Dataset) -> Dataset:
    """Return a data set of timm or torchvision with all its labels -1: unknown."""
    dataset = copy(dataset)
    dataset.target_transform = _no_label  # type: ignore[attr-defined]
    return dataset


def has_labels(dataset: Dataset) -> bool:
    """Whether a data set has labels, as far as is known: `unlabeled` ones have none, and pictures without folders."""
    return getattr(dataset, 'target_transform', None) is not _no_label


def relabeled(dataset: Dataset, numbers: Sequence[int] | None) -> Dataset:
    """Return a data set with `numbers[i]` in place of each label i; as it is where `numbers` is None."""
    if numbers is None:
        return dataset
    dataset = copy(dataset)
    dataset.target_transform = partial(_renumber, dataset.target_transform, numbers)  # type: ignore[attr-defined]
    return dataset


def _no_label(_: Any) -> int:
    return -1


def _renumber(former: Any, numbers: Sequence[int], target: Any) -> int:
    return numbers[target if former is None else former(target)]


# Folders and class maps


def read_class_map(class_map: str | Mapping[Any, int], root: str = '') -> dict[Any, int]:
    """Read a class map as timm does, without the byte order mark that editors put before the first name."""
    numbers = load_class_map(class_map, root)
    return {k.removeprefix('\ufeff') if isinstance(k, str) else k: v for k, v in numbers.items() if k != ''}


def number_classes(reader: Any, class_map: str | Mapping[Any, int] | None, split: str) -> list[str]:
    """Leave out the hidden folders of timm's reader of a folder or tar, and number its classes as a class map says.

    Returns the names of the class folders, which is one empty name where there are none.

    Tells of folders without an entry in the map, whose images are left out, of entries without a folder, and of folders
    of one name in several branches, which are one class for timm.
    """
    in_tar = isinstance(reader, ReaderImageInTar)
    former = reader.class_name_to_idx if in_tar else reader.class_to_idx
    paths = [sample[0].path for sample in reader.samples] if in_tar else [path for path, _ in reader.samples]
    targets = reader.targets.tolist() if in_tar else [target for _, target in reader.samples]
    folders = [path.rpartition('/' if in_tar else os.sep)[0] for path in paths]
    inside = {folder: PurePath(folder if in_tar else os.path.relpath(folder, reader.root)) for folder in {*folders}}
    hidden = {folder for folder, path in inside.items() if any(part.startswith('.') for part in path.parts)}
    names = sorted(former, key=former.__getitem__)
    branches: dict[str, set[str]] = defaultdict(set)
    for folder, target in {*zip(folders, targets, strict=True)}:
        if folder not in hidden:
            branches[names[target]].add(str(inside[folder]))
    numbers = {name: number for number, name in enumerate(name for name in names if name in branches)}
    if class_map:
        numbers = read_class_map(class_map, reader.root)
        tell_classes(split, 'folders without an entry in the class map, left out', branches.keys() - numbers.keys())
        if isinstance(class_map, str):
            tell_classes(split, 'entries of the class map without a folder', numbers.keys() - branches.keys())
    repeated = {min(paths): paths for paths in branches.values() if len(paths) > 1}
    tell_classes(split, 'folders of one name are one class', {' and '.join(sorted(p)[:2]) for p in repeated.values()})
    if numbers == former:
        return names
    kept = [
        (place, numbers[names[target]])
        for place, (folder, target) in enumerate(zip(folders, targets, strict=True))
        if folder not in hidden and names[target] in numbers
    ]
    if in_tar:
        reader.samples = reader.samples[[place for place, _ in kept]]
        reader.targets = np.array([number for _, number in kept])
        reader.class_name_to_idx, reader.class_idx_to_name = numbers, {v: k for k, v in numbers.items()}
    else:
        reader.samples, reader.class_to_idx = [(paths[place], number) for place, number in kept], numbers
    return [name for name in names if name in branches]


def tell_classes(split: str, what: str, names: set[str]) -> None:
    """Log what is the matter with these classes of a split, if there are any."""
    if names:
        _logger.warning(f'{split}: {what}: {_first(sorted(names))}.')
