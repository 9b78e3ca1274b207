"""Each bit of a small store flipped once: the store is refused, or gives what it gave before."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
from outcomes import is_accepted
from torch.utils.data import Dataset

from timm_mealv2.data.dataset import open_dataset
from timm_mealv2.soft_labels.replay import replay
from timm_mealv2.soft_labels.store import SoftLabelStore


def taught(folder: Path, images: Dataset) -> list[Any]:
    """All that a training of two epochs gets from a store: pixels and labels, in their order."""
    store = SoftLabelStore(folder)
    samples, sampler, collate = replay(store, images, 3, labels=range(3))
    batches: list[Any] = [store.epochs, store.meta.num_classes]
    for epoch in range(2):
        sampler.set_position(epoch)
        for batch in sampler:
            batches += [tensor.tolist() for tensor in collate(batch, [samples[key] for key in batch.keys])]
    return batches


def check_bits(bits: list[tuple[str, int]], store: Path, images: Path, tmp_path: Path) -> None:
    """Flip bits, one at a time."""
    data = open_dataset('', str(images), 'train')
    folder = Path(shutil.copytree(store, tmp_path / 'store'))
    expected, meta = taught(store, data), json.loads((store / 'meta.json').read_text())
    for name, bit in bits:
        content = bytearray((store / name).read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(content)
        found: list[Any] = []
        if is_accepted(lambda argv, found=found: found.extend(taught(folder, data)), []):
            assert found == expected
            if name == 'meta.json':
                assert json.loads(content) == meta  # another space or another end of a line
        (folder / name).write_bytes((store / name).read_bytes())


def bits_of(store: Path, *names: str) -> list[tuple[str, int]]:
    return [(name, bit) for name in names for bit in range(8 * (store / name).stat().st_size)]


def test_a_flipped_bit_of_a_store_is_refused_or_changes_nothing(store: Path, few_images: Path, tmp_path: Path) -> None:
    names = [path.name for path in sorted(store.iterdir())]
    assert names == ['meta.json', 'names.txt', 'part-00000-00000']
    few = [bit for name in names for bit in Random(0).sample(bits_of(store, name), 50)]
    check_bits(few, store, few_images, tmp_path)


@pytest.mark.slow
def test_every_bit_of_a_store_is_refused_or_changes_nothing(store: Path, few_images: Path, tmp_path: Path) -> None:
    check_bits(bits_of(store, 'meta.json', 'names.txt', 'part-00000-00000'), store, few_images, tmp_path)
