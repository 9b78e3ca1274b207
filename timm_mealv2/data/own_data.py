"""Images of the user's own: a table of paths and labels, and validation images held out of the training images."""

import csv
import hashlib
import logging
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, BinaryIO

from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from timm_mealv2.data.class_names import read_class_map, tell_classes
from timm_mealv2.data.dataset import PathsAndTargets, open_dataset, select
from timm_mealv2.errors import UserError

_logger = logging.getLogger(__name__)

TRAINING = ('train', 'training')
_VALIDATION = ('val', 'valid', 'validation', 'eval', 'evaluation')

_IMAGES = ('path', 'file', 'filename', 'file_name', 'filepath', 'image', 'image_path')
_LABELS = ('label', 'class', 'class_name', 'target', 'category')


def open_images(name: str, root: str | None, split: str, **kwargs: Any) -> Dataset:
    """Open a split: `open_dataset`, and what one's own data needs beside it.

    A `root` that ends in .csv or .tsv is a table. A `test` split stands in for a validation split that is not there.

    Raises:
        UserError: See `open_dataset`; where the table lacks a column or the split.
    """
    if root is not None and not name and root.lower().endswith(('.csv', '.tsv')) and Path(root).is_file():
        columns = {key: kwargs.get(key) for key in ('input_key', 'target_key', 'class_map')}
        return open_table(Path(root), split, **columns)
    if split == 'validation' and root is not None and Path(root, 'test').is_dir():
        there = any(Path(root, known).exists() for known in _VALIDATION)
        split = split if there else _stand_in(root)
    return open_dataset(name, root, split, **kwargs)


def _stand_in(root: str | Path) -> str:
    _logger.warning(f'{root} has no validation split: test stands in for it.')
    return 'test'


# A table of paths and labels


class ReaderTable(Reader):
    """timm's reader of images whose paths and labels are in a table; paths count from the table's folder."""

    def __init__(self, folder: Path, samples: PathsAndTargets, class_to_idx: dict[str, int], has_splits: bool) -> None:
        super().__init__()
        self.folder, self.samples, self.class_to_idx, self.has_splits = folder, samples, class_to_idx, has_splits

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, target = self.samples[index]
        return open(self.folder / path, 'rb'), target

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return os.path.basename(path) if basename else str(self.folder / path) if absolute else path


def open_table(
    file: Path, split: str, input_key: str | None = None, target_key: str | None = None, class_map: Any = None
) -> ImageDataset:
    """Open the images of a CSV file with a column of paths, one of labels, and perhaps one of splits.

    Labels are names of classes. They are numbered in the order of timm's folders, over all splits.

    Args:
        file: The table.
        split: The rows to take where there is a column `split`; all rows otherwise.
        input_key: Header of the column of paths; None for one of the usual names.
        target_key: Header of the column of labels; None for one of the usual names.
        class_map: timm's class map, in place of the order of the names. Rows of other classes are left out.

    Raises:
        UserError: If it cannot be read, or a column, an entry, or the split is missing.
    """
    try:
        with file.open(newline='', encoding='utf-8-sig') as text:  # Excel writes the mark
            header = text.readline()
            text.seek(0)
            reader = csv.DictReader(text, delimiter=max(',;\t|', key=header.count), skipinitialspace=True)
            rows = [{str(key).strip().lower(): value for key, value in row.items()} for row in reader]
        classes = read_class_map(class_map, str(file.parent)) if class_map else None
    except (AssertionError, OSError, ValueError, csv.Error) as error:
        raise UserError(f'cannot read {file}: {error}') from error
    if not rows:
        raise UserError(f'{file} has no rows below its header.')
    image = _column(file, rows[0], '--input-key', input_key, _IMAGES)
    label = _column(file, rows[0], '--target-key', target_key, _LABELS)
    for number, row in enumerate(rows, 2):
        lacking = next((column for column in (image, label) if not row[column]), '')
        # One path is enough to see where they begin.
        if number == 2 and not lacking and not (file.parent / row[image]).exists():
            lacking = f'file {row[image]} in {file.parent.absolute()}, from where paths count'
        if lacking:
            raise UserError(f'{file}, row {number}: there is no {lacking}.')
    if classes is None:
        names = sorted({row[label] for row in rows}, key=natural_key)
        classes = {name: index for index, name in enumerate(names)}
    tell_classes(split, 'labels without an entry in the class map, left out', {row[label] for row in rows} - {*classes})
    has_splits = 'split' in rows[0]
    if has_splits:
        rows = _rows_of(file, rows, split)
    samples = PathsAndTargets([(row[image], classes[row[label]]) for row in rows if row[label] in classes])
    dataset: Any = ImageDataset(str(file), reader=ReaderTable(file.parent, samples, classes, has_splits))
    dataset.split_name = split
    return dataset


def _column(file: Path, row: dict[str, str], option: str, asked: str | None, usual: tuple[str, ...]) -> str:
    for name in [asked.lower()] if asked else usual:
        if name in row:
            return name
    raise UserError(
        f'{file} has no column {asked or usual[0]!r} but {", ".join(row)}: name the right one with {option}.'
    )


def _rows_of(file: Path, rows: list[dict[str, str]], split: str) -> list[dict[str, str]]:
    """Return the rows of a split, which may have another of the usual names there."""
    there: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        there[(row['split'] or '').strip().lower()].append(row)
    same = next((names for names in (TRAINING, _VALIDATION) if split in names), (split,))
    found = next((name for name in (split, *same) if name in there), None)
    if found is None and split == 'validation' and 'test' in there:
        found = _stand_in(file)
    if found is None:
        raise UserError(f'{file} has no split {split!r} but {", ".join(there)}.')
    return there[found]


# Validation images of a training set


def hold_out(dataset: Any, share: float) -> tuple[Dataset, Dataset]:
    """Return a data set without the images of each class that are held out for validation, and these.

    Which ones is a function of their names alone: not of a seed, so that no teacher has been trained on what a student
    is validated with, and mostly the same where images are added.

    Args:
        dataset: A folder, a tar or a table of images.
        share: Share of each class that is held out, but at least one image, and none of a single one.

    Raises:
        UserError: If it is another kind of data set.
    """
    samples = getattr(getattr(dataset, 'reader', None), 'samples', None)
    if samples is None:
        raise UserError('--val-share needs a folder, a tar or a CSV file: name another split with --val-split.')
    targets = getattr(dataset.reader, 'targets', None)  # of a tar
    classes: dict[int, list[int]] = defaultdict(list)
    for index, target in enumerate((samples.targets if targets is None else targets).tolist()):
        classes[target].append(index)
    held: set[int] = set()
    hashes = [hashlib.sha256(os.fsencode(dataset.filename(index))).digest() for index in range(len(samples))]
    for members in classes.values():
        count = max(1, round(share * len(members))) if len(members) > 1 else 0
        held.update(sorted(members, key=hashes.__getitem__)[:count])
    _logger.info(f'Validation: {len(held):,} of the {len(samples):,} training images, {share:g} of each class.')
    rest = [index for index in range(len(samples)) if index not in held]
    return select(dataset, rest), select(dataset, sorted(held))
