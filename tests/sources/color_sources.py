"""The same pictures in every kind of source that timm reads, made on the spot.

Each has two splits: train has 4 pictures of each color, validation 3. One picture of validation has a wrong label, so
that a model that knows all colors has an accuracy of 11/12 = 91.67 % there, and of 100 % on train.
"""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from colors import CLASSES, picture

RIGHT = {'train': 100.0, 'validation': 100 * 11 / 12}

Item = tuple[str, int, int]  # color, number of the picture, label


def items(split: str) -> list[Item]:
    """The pictures of a split, the colors in turn."""
    count = {'train': 4, 'validation': 3}[split]
    found = [(name, number, label) for number in range(count) for label, name in enumerate(CLASSES)]
    if split == 'validation':
        found[-1] = (*found[-1][:2], 0)
    return found


def png(name: str, number: int, mode: str = 'RGB') -> bytes:
    buffer = io.BytesIO()
    picture(name, number, mode).save(buffer, 'PNG')
    return buffer.getvalue()


def write_shards(root: Path, mode: str = 'RGB', unreadable: dict[str, int] | None = None) -> Path:
    """Write two WebDataset shards a split, and timm's _info.json; picture `unreadable[split]` is cut off."""
    webdataset = pytest.importorskip('webdataset')
    root.mkdir(parents=True)
    splits = {}
    for split in ('train', 'validation'):
        all_items = items(split)
        lengths, names = [], []
        for shard in range(2):
            names.append(f'{split}-{shard:04}.tar')
            numbers = range(shard, len(all_items), 2)
            lengths.append(len(numbers))
            with webdataset.TarWriter(str(root / names[-1])) as writer:
                for number in numbers:
                    name, which, label = all_items[number]
                    content = png(name, which, mode)
                    if (unreadable or {}).get(split) == number:
                        content = content[:40]
                    writer.write({'__key__': f'{split}{number:03}', 'png': content, 'cls': label})
        splits[split] = {
            'name': split,
            'filenames': names,
            'shard_lengths': lengths,
            'num_samples': sum(lengths),
        }
    (root / '_info.json').write_text(json.dumps({'splits': splits}))
    return root


def write_parquet(
    root: Path,
    mode: str = 'RGB',
    image: str = 'image',
    label: str = 'label',
    text_labels: bool = False,
    unreadable: dict[str, int] | None = None,
    not_in_validation: str | None = None,
) -> Path:
    """Write a Hugging Face set as the Hub keeps it: ROOT/data/SPLIT-00000-of-00001.parquet, with its features."""
    datasets, pyarrow = pytest.importorskip('datasets'), pytest.importorskip('pyarrow')
    parquet = pytest.importorskip('pyarrow.parquet')
    (root / 'data').mkdir(parents=True)
    kind = datasets.Value('string') if text_labels else datasets.ClassLabel(names=list(CLASSES))
    features = datasets.Features({image: datasets.Image(), label: kind})
    entry = '  - name: {}\n    num_bytes: 0\n    num_examples: {}\n'
    written = {'train': items('train'), 'validation': [i for i in items('validation') if i[0] != not_in_validation]}
    counts = ''.join(entry.format(split, len(rows)) for split, rows in written.items())
    (root / 'README.md').write_text(f'---\ndataset_info:\n  splits:\n{counts}---\n')
    for split, rows in written.items():
        contents = [png(name, number, mode) for name, number, _ in rows]
        if unreadable and split in unreadable:
            contents[unreadable[split]] = contents[unreadable[split]][:40]
        labels = [CLASSES[label] if text_labels else label for *_, label in rows]
        columns = {image: [{'bytes': content, 'path': None} for content in contents], label: labels}
        table = pyarrow.Table.from_pydict(columns, schema=features.arrow_schema)
        parquet.write_table(table, root / 'data' / f'{split}-00000-of-00001.parquet')
    return root


def write_image_folder(root: Path, mode: str = 'RGB') -> Path:
    """Write ROOT/SPLIT/CLASS/*.png."""
    for split in ('train', 'validation'):
        for name, number, label in items(split):
            folder = root / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            picture(name, number, mode).save(folder / f'{name}{number}.png')
    return root


def write_fashion_mnist(root: Path) -> Path:
    """Write gray pictures as torchvision keeps Fashion-MNIST; of its ten classes, four have pictures."""
    folder = root / 'FashionMNIST' / 'raw'
    folder.mkdir(parents=True)
    for prefix, split in (('train', 'train'), ('t10k', 'validation')):
        pixels = np.stack([np.asarray(picture(name, number, 'L')) for name, number, _ in items(split)])
        header = struct.pack('>IIII', 2051, *pixels.shape)
        (folder / f'{prefix}-images-idx3-ubyte').write_bytes(header + pixels.tobytes())
        labels = bytes(label for *_, label in items(split))
        (folder / f'{prefix}-labels-idx1-ubyte').write_bytes(struct.pack('>II', 2049, len(labels)) + labels)
    return root
