"""What the tests of the training share: quick trainings and two teachers."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from quick_training import SMALL, Train

from timm_mealv2.training.run import main


@pytest.fixture
def train(image_folder: Path, tmp_path: Path) -> Train:
    """Trains with SMALL and further options; returns the run folder."""

    def run(name: str, *args: Any) -> Path:
        argv = [*SMALL, '--data-dir', image_folder, '--output', tmp_path, '--experiment', name, *args]
        main([str(word) for word in argv])
        return tmp_path / name

    return run


@pytest.fixture(scope='session')
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two different teachers as checkpoint files."""
    specs = []
    for seed, name in enumerate(('test_resnet', 'test_efficientnet')):
        torch.manual_seed(seed)
        path = tmp_path_factory.mktemp('teachers') / f'{name}.pth'
        torch.save(timm.create_model(name, num_classes=3).state_dict(), path)
        specs.append(f'{name}={path}')
    return specs
