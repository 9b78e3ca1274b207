"""A small recorded store: 21 images, 12 epochs in blocks of 10 and 2, five parts a block, all kinds of augmentation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.utils.data import Dataset

from timm_mealv2.data.augmentation import Augmentation
from timm_mealv2.data.dataset import open_dataset
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import create_ensemble
from timm_mealv2.soft_labels.describe import describe
from timm_mealv2.soft_labels.record import record
from timm_mealv2.soft_labels.store import SoftLabelStore, StoreMeta

AUGMENTATION = Augmentation((3, 24, 24), aa='rand-m9-mstd0.5', reprob=0.3)
MIXED = Augmentation((3, 24, 24), aa='rand-m9-mstd0.5', cutmix=1.0, mixup=0.2)

Record = Callable[..., SoftLabelStore]


@pytest.fixture(scope='session')
def train(image_folder: Path) -> Dataset:
    """The 21 training images of the shared folder."""
    return open_dataset('', str(image_folder), 'train')


@pytest.fixture(scope='session')
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Texts that name two teachers with fixed weights, of different mean and std."""
    folder = tmp_path_factory.mktemp('teachers')
    for seed, name in enumerate(('test_resnet', 'test_efficientnet')):
        torch.manual_seed(seed)
        torch.save(timm.create_model(name, num_classes=3).state_dict(), folder / f'{name}.pth')
    return [f'{name}={folder}/{name}.pth' for name in ('test_resnet', 'test_efficientnet')]


@pytest.fixture(scope='session')
def teachers(weights: list[str]) -> EnsembleTeacher:
    """The ensemble of these two."""
    return create_ensemble(weights, weights=[2, 1])


@pytest.fixture(scope='session')
def settings(train: Dataset, teachers: EnsembleTeacher) -> StoreMeta:
    """What the recorded store holds."""
    return describe(train, teachers, AUGMENTATION, top_k=3, batch_size=50, part_images=5)


@pytest.fixture(scope='session')
def recorded(train: Dataset, teachers: EnsembleTeacher, settings: StoreMeta, tmp_path_factory: Any) -> SoftLabelStore:
    """The recorded store, not to be changed."""
    return record(tmp_path_factory.mktemp('recorded') / 'store', train, teachers, settings, 12)


@pytest.fixture(scope='session')
def mixed(train: Dataset, teachers: EnsembleTeacher, tmp_path_factory: Any) -> SoftLabelStore:
    """The same images in mixed pairs, two epochs of them."""
    meta = describe(train, teachers, MIXED, top_k=3, part_images=8)
    return record(tmp_path_factory.mktemp('mixed') / 'store', train, teachers, meta, 2)
