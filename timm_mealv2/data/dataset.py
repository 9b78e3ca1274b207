"""Data sets of images, as timm opens them: what the images are called, and one image of one."""

import os
import time
from collections.abc import Sequence
from copy import copy
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageMode
from timm.data import ImageDataset, create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.data.readers.targets import get_field, has_field
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.datasets import ImageFolder

from timm_mealv2.data.class_names import number_classes, read_class_map, unlabeled
from timm_mealv2.data.decode import decode, find_all_images, image_endings, is_image_file
from timm_mealv2.data.unreadable import UnreadableImage
from timm_mealv2.errors import UserError, one_line

RETRY_AFTER = (0.1, 0.5, 2.0)
"""Seconds before each further attempt to read an image after an error of the file system."""


def open_dataset(name: str, root: str | None, split: str, class_map: Any = None, **kwargs: Any) -> Dataset:
    """Open a data set with timm's `create_dataset`, with all the images that Pillow reads.

    Hidden folders are no classes, and pictures that lie in no class folders have no labels (-1).

    Raises:
        UserError: If there is nothing at `root`, no image in it, or the data set's library is missing.
    """
    # timm's readers name a path that is not there with a bare assertion.
    local = '/' not in name or name.lower().startswith(('torch/image_folder', 'torch/folder'))
    if local and not (root and Path(root).exists()):
        lacking = f'no data set at {root!r}' if root else 'no data set is named'
        raise UserError(f'{lacking}: give a folder, a .tar file or a .csv table with --data-dir.')
    kind = name.lower().split('/')
    find_all_images()
    if kind[0] == 'wds' and not kwargs.get('input_key'):
        kwargs['input_key'] = ';'.join(ending[1:] for ending in image_endings())
    elif kind[0] == 'torch' and kind[-1] in ('folder', 'image_folder'):
        kwargs['is_valid_file'] = is_image_file
    if class_map and kind[0] == 'torch':
        raise UserError(f'--class-map: {name} numbers its classes by itself; leave it out, or give a plain folder.')
    try:
        if class_map and kind[0] in ('hfds', 'hfids', 'tfds', 'wds'):
            kwargs['class_map'] = read_class_map(class_map)
        dataset: Any = create_dataset(name, root=root, split=split, **kwargs)
        reader = getattr(dataset, 'reader', None)
        class_folders = None
        if isinstance(reader, (ReaderImageFolder, ReaderImageInTar)):
            class_folders = number_classes(reader, class_map, split)
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:  # timm's way to say what is wrong
        raise UserError(f'cannot open split {split!r} of {name or root!r}: {error}') from error
    if not isinstance(dataset, IterableDataset) and not len(dataset):
        raise UserError(f'split {split!r} of {name or root!r} holds no images.')
    dataset.split_name = split
    if hasattr(dataset, 'loader'):  # torchvision's, which decodes: the files themselves are wanted
        dataset.loader = partial(open, mode='rb')
    if isinstance(reader, ReaderImageFolder):
        reader.samples = PathsAndTargets(reader.samples)
    elif name.lower().startswith(('hfds/', 'hfids/', 'tfds/')):
        _check_columns(dataset, name, **kwargs)
    return unlabeled(dataset) if class_folders == [''] else dataset


def _check_columns(
    dataset: Any,
    name: str,
    input_key: str | None = None,
    target_key: str | None = None,
    class_map: Any = None,
    **_: Any,
) -> None:
    """Refuse columns that are not there, and number labels that are words in the order of the alphabet."""
    reader = dataset.reader
    table = getattr(reader, 'dataset', None)  # of hfds/
    image, label = input_key or 'image', target_key or 'label'
    if table is None:
        features = reader.builder.info.features
        if features is None and hasattr(reader.builder, 'as_streaming_dataset'):
            features = reader.builder.as_streaming_dataset(split=reader.split).features
    else:
        features = dict(table.features)
        if table.select_columns(image)[0][image] is None:  # timm's cast has added a column of that name
            del features[image]
    if features is None:
        return
    for option, key in (('--input-key', image), ('--target-key', label)):
        if ',' not in key and not has_field(features, key):
            raise UserError(
                f'{name} has no column {key!r} but {", ".join(features)}: name the right one with {option}.'
            )
    labels = get_field(features, label) if has_field(features, label) else None
    if class_map:
        return
    if names := getattr(labels, 'names', None):  # of a stream, timm has not looked for them
        reader.class_to_idx = {name: number for number, name in enumerate(names)}
    if getattr(labels, 'dtype', '') not in ('string', 'large_string'):
        return
    if table is None:
        raise UserError(f'the labels of {name} are words, which a stream cannot number: take hfds/, or --class-map.')
    import datasets

    splits = datasets.load_dataset(name.partition('/')[2], cache_dir=reader.root)  # each may lack a class
    found = sorted({word for split in splits.values() for word in split.unique(label)} - {None})
    reader.class_to_idx = {word: index for index, word in enumerate(found)}
    dataset.target_transform = reader.class_to_idx.__getitem__


class PathsAndTargets(Sequence[tuple[str, int]]):
    """A list of paths and class indices that takes 16 bytes a file beside the letters of its path.

    Worker processes that are forked share these arrays, where each would soon have a copy of a list of tuples: reading
    an object writes its reference count. Workers that are started afresh get the tensors in shared memory.
    """

    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        paths = [os.fsencode(path) for path, _ in samples]
        self.letters = torch.frombuffer(bytearray(b''.join(paths)), dtype=torch.uint8)
        self.ends = torch.tensor([len(path) for path in paths]).cumsum(0)
        self.targets = torch.tensor([target for _, target in samples])

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, list):
            return PathsAndTargets([self[number] for number in index])
        number = range(len(self))[index]  # also counts from the end, and raises IndexError
        start = int(self.ends[number - 1]) if number else 0
        path = self.letters[start : int(self.ends[number])].numpy().tobytes()
        return os.fsdecode(path), int(self.targets[number])

    def names(self, root: str) -> list[str]:
        """Return the paths without the folder `root`, which all of them begin with."""
        data, begin = self.letters.numpy().tobytes(), len(os.fsencode(root)) + 1
        names = b'\0'.join(data[start + begin : end] for start, end in pairwise([0, *self.ends.tolist()]))
        return os.fsdecode(names).split('\0')


def select(dataset: Any, indices: Sequence[int]) -> Dataset:
    """Return the images of some indices, as a data set of the same kind where it is timm's."""
    if not isinstance(dataset, ImageDataset):
        return Subset(dataset, indices)
    chosen: Any = copy(dataset)
    chosen.reader = reader = copy(dataset.reader)
    for name in ('samples', 'targets'):  # of folders and tables, and both of tars
        if hasattr(reader, name):
            setattr(reader, name, getattr(reader, name)[indices])
    if hasattr(reader, 'dataset'):  # of hfds/
        reader.dataset = reader.dataset.select(indices)
    return chosen


def split_is_missing(dataset: Dataset, data_dir: str | None, split: str) -> bool:
    """Whether timm has opened something else, as there is no split of that name.

    It takes the whole folder, and torchvision's sets of two splits take their test images. All others name the splits
    that they have.
    """
    if isinstance(getattr(dataset, 'train', None), bool):
        return split not in _TWO_SPLITS
    reader = getattr(dataset, 'reader', dataset)
    if hasattr(reader, 'has_splits'):  # of a table, whose rows are all taken where it has none
        return not reader.has_splits
    if data_dir is None or not isinstance(reader, (ReaderImageFolder, ReaderImageInTar, ImageFolder)):
        return False
    return Path(reader.root) == Path(data_dir) != Path(data_dir, split)  # '' and '.' name the whole folder


_TWO_SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test')


def image_mode(asked: str | None, channels: int) -> str:
    """Return Pillow's mode of images for a model of so many channels: the one that is asked for, else RGB or L.

    Raises:
        UserError: If the mode has another number of channels.
    """
    mode = asked or ('L' if channels == 1 else 'RGB')
    bands = len(ImageMode.getmode(mode).bands)
    if bands != channels:
        raise UserError(f'--input-img-mode {mode} has {bands} channels, the model takes {channels}.')
    return mode


def image_names(dataset: Dataset) -> list[str]:
    """Names of the images in the order of their indices: file names relative to the split, `#index` without files."""
    if isinstance(dataset, ImageDataset):
        samples, root = getattr(dataset.reader, 'samples', None), getattr(dataset.reader, 'root', '')
        if isinstance(samples, PathsAndTargets) and root == os.path.normpath(root):
            return samples.names(root)  # what follows takes 10 s for a million files
        names = [str(name) for name in dataset.filenames()]
        if len(set(names)) == len(names):
            return names
    return [f'#{index}' for index in range(len(dataset))]  # type: ignore[arg-type]


def read_image(
    dataset: Dataset, index: int, img_mode: str = 'RGB', how: str = 'timm'
) -> tuple[Image.Image, int, list[str]]:
    """Return an image, fully decoded and without its transform, its label, and faults of its file that were ignored.

    timm's own access would give the next image in place of one that cannot be read. After an error of the file system,
    such as a network disk that is away for a moment, it tries again (`RETRY_AFTER`).

    Args:
        dataset: timm's `ImageDataset`, or one whose items are (image or open file, label) with its transform unset.
        index: Number of the image.
        img_mode: Pillow's mode of the image.
        how: How it is decoded, see `decode`.

    Returns:
        The image, its label, -1 if unknown, and what `decode` ignored.

    Raises:
        UnreadableImage: If the image is missing, cut off or no image.
    """
    for pause in (*RETRY_AFTER, None):
        try:
            file, target = _open(dataset, index)
            image, ignored = decode(file, img_mode, how)
            break
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise many kinds
            # Pillow's own OSErrors, of files that are cut off or no image, have no number.
            if pause is None or getattr(error, 'errno', None) is None:
                raise UnreadableImage(f'{image_name(dataset, index)}: {one_line(error)}', index) from error
            time.sleep(pause)
    return image, -1 if target is None else int(target), ignored


def _open(dataset: Dataset, index: int) -> tuple[Any, Any]:
    """Return the open file, or the image, and the label."""
    if not isinstance(dataset, ImageDataset):
        return dataset[index]
    file, target = dataset.reader[index][:2]
    if target is not None and dataset.target_transform is not None:
        target = dataset.target_transform(target)
    return file, target


def image_name(dataset: Dataset, index: int) -> str:
    """Path of an image, for messages; its split and number where the data set keeps no files."""
    name = dataset.filename(index, absolute=True) if isinstance(dataset, ImageDataset) else None
    return str(name) if name else f'{getattr(dataset, "split_name", "")} #{index}'.strip()
