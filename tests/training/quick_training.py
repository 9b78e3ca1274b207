"""A training of a second, and how to look at what it leaves. A module of its own, as `conftest` cannot be imported."""

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.training.run_folder import RunFolder

SMALL = (
    '--model test_resnet --num-classes 3 --img-size 16 --batch-size 4 --workers 0 --lr 0.05 --epochs 2 '
    '--warmup-epochs 0 --log-interval 2 --device cpu --color-jitter 0 --smoothing 0 --weight-decay 0 '
    '--teacher-optimize off'
).split()

Train = Callable[..., Path]


def read_checkpoint(path: Path) -> dict[str, Any]:
    return TrainingCheckpoint.read(path).contents


def find_newest(folder: Path) -> Path | None:
    newest = RunFolder(folder).newest()
    return newest and newest.path


def summary(folder: Path) -> list[dict[str, str]]:
    with open(folder / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def weights(path: Path, key: str = 'state_dict') -> dict[str, torch.Tensor]:
    return read_checkpoint(path)[key]


def assert_equal_weights(a: Path, b: Path) -> None:
    """Student, average and discriminator of two checkpoints are the same to the bit."""
    first, second = read_checkpoint(a), read_checkpoint(b)
    for key in ('state_dict', 'state_dict_ema'):
        assert (key in first) == (key in second)
        for name, value in first.get(key, {}).items():
            assert torch.equal(value, second[key][name]), f'{key} {name}'
    for key in ('task_state', 'task_state_ema'):
        for part, state in first.get(key, {}).items():
            for name, value in state.items():
                assert torch.equal(value, second[key][part][name]), f'{key} {part} {name}'


def load_differences() -> Callable[[Path, Path], list[str]]:
    """The comparison of two run folders that the soak makes."""
    path = Path(__file__).parents[2] / 'benchmarks/soak.py'
    spec = importlib.util.spec_from_file_location('soak', path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.differences


differences = load_differences()
