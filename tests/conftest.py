"""What several test files share: a small data set with something to learn, and a quiet, offline environment."""

import os
import shutil
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'  # huggingface_hub reads it when it is imported

import pytest
import torch
from images import write_images


@pytest.fixture(autouse=True, scope='session')
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other


@pytest.fixture(autouse=True)
def _own_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads or writes the user's caches, or reaches for the network by itself."""
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf_home'))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch_home'))


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with splits train (3 x 7 images) and validation (3 x 4), 24x24 RGB."""
    root = tmp_path_factory.mktemp('images')
    write_images(root / 'train', 7, seed=0)
    write_images(root / 'validation', 4, seed=1)
    return root


@pytest.fixture
def spoilt(image_folder: Path, tmp_path: Path) -> Path:
    """A copy of the sample images, to spoil."""
    return Path(shutil.copytree(image_folder, tmp_path / 'spoilt'))
