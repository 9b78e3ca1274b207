"""Flipped bits of a store and of a checkpoint: refused in one line, or without any effect."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from outcomes import ends, flipped
from torch import Tensor
from torch.utils.data import Dataset

from timm_mealv2.data.dataset import open_dataset
from timm_mealv2.models.checkpoint import TrainingCheckpoint
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
        content = flipped((store / name).read_bytes(), bit)
        (folder / name).write_bytes(content)
        found: list[Any] = []
        code = ends(lambda argv, found=found: found.extend(taught(folder, data)), [])
        assert code in (0, 2), f'{name} {bit}'
        if code == 0:
            assert found == expected
            if name == 'meta.json':
                assert json.loads(content) == meta  # another space or another end of a line
        (folder / name).write_bytes((store / name).read_bytes())


def bits_of(store: Path, name: str) -> list[tuple[str, int]]:
    return [(name, bit) for bit in range(8 * (store / name).stat().st_size)]


def test_a_flipped_bit_of_a_store_is_refused_or_changes_nothing(store: Path, few_images: Path, tmp_path: Path) -> None:
    names = [path.name for path in sorted(store.iterdir()) if path.is_file()]
    few = [bit for name in names for bit in Random(0).sample(bits_of(store, name), 50)]
    check_bits(few, store, few_images, tmp_path)


@pytest.mark.slow
def test_every_bit_of_a_store_is_refused_or_changes_nothing(store: Path, few_images: Path, tmp_path: Path) -> None:
    names = ('meta.json', 'names.txt', 'part-00000-00000')
    check_bits([bit for name in names for bit in bits_of(store, name)], store, few_images, tmp_path)


def test_a_flipped_bit_of_a_checkpoint_is_refused_or_changes_nothing(run_folder: Path, tmp_path: Path) -> None:
    content = (run_folder / 'last.pth.tar').read_bytes()
    whole = dict(tensors('', TrainingCheckpoint.read(run_folder / 'last.pth.tar').contents))
    path = tmp_path / 'flipped.pth.tar'
    refused = 0
    for bit in Random(0).sample(range(8 * len(content)), 60):
        path.write_bytes(flipped(content, bit))
        found: list[TrainingCheckpoint] = []
        code = ends(lambda argv, found=found: found.append(TrainingCheckpoint.read(path)), [])
        assert code in (0, 2), bit
        refused += code == 2
        if code == 0:
            read = dict(tensors('', found[0].contents))
            assert read.keys() == whole.keys()
            assert all(torch.equal(read[name], tensor) for name, tensor in whole.items())
    assert refused


def tensors(name: str, value: Any) -> list[tuple[str, Tensor]]:
    """The tensors among the entries of a checkpoint, by their place."""
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in tensors(f'{name}.{key}', item)]
    return [(name, value)] if isinstance(value, Tensor) else []
