"""What several test files share: a small data set with something to learn, and a quiet, offline environment."""

import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'  # huggingface_hub reads it when it is imported
os.environ['OMP_NUM_THREADS'] = '1'  # tiny models: more threads only wait for each other, in programs too

import pytest
from colors import save_model, write_splits
from forked import Forked, forked
from images import write_images

# Files that take longest begin first, so that no process is left alone with one at the end.
_FIRST = ('test_killed', 'test_processes', 'test_faults', 'test_run', 'test_resume', 'test_task_ddp', 'test_ensemble')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _FIRST.index(item.path.stem) if item.path.stem in _FIRST else len(_FIRST))


def pytest_xdist_auto_num_workers() -> int:
    """Take one more process than there are cores: many tests wait for programs. Each takes a GB of memory."""
    return min(4, (os.cpu_count() or 1) + 1)


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


@pytest.fixture(scope='session')
def small_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the quick start's data, with 20 images of each class: two batches, the second of them smaller."""
    sample = Path(__file__).parents[1] / 'examples/fashion_mnist/data'
    folder = tmp_path_factory.mktemp('small_sample')
    for name in ('train.tar', 'validation.tar'):
        with tarfile.open(sample / name) as whole, tarfile.open(folder / name, 'w') as some:
            for member in whole.getmembers()[::10]:  # sorted by class, 200 each
                some.addfile(member, whole.extractfile(member))
    return folder


@pytest.fixture(scope='session')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with splits of pictures of four colors."""
    return write_splits(tmp_path_factory.mktemp('colors'))


@pytest.fixture(scope='session')
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a test_resnet that knows the four colors, without their names."""
    path = tmp_path_factory.mktemp('models') / 'knowing.pth'
    save_model(path)
    return path


@pytest.fixture(scope='session')
def program() -> Iterator[Forked]:
    """The training program, in processes of its own that are there at once."""
    with forked() as programs:
        yield programs


@pytest.fixture
def spoilt(image_folder: Path, tmp_path: Path) -> Path:
    """A copy of the sample images, to spoil."""
    return Path(shutil.copytree(image_folder, tmp_path / 'spoilt'))
