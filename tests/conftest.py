"""What several test files share: a small data set with something to learn, and a quiet, offline environment."""

import os
import shutil
import tarfile
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'  # huggingface_hub reads it when it is imported
os.environ['OMP_NUM_THREADS'] = '1'  # tiny models: more threads only wait for each other, in programs too

import pytest
from hypothesis import HealthCheck, Phase, settings
from images import write_images

# As a whole, the suite searches the same examples in every run; `--fuzz-minutes` searches others each time.
_CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    'suite',
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=_CHECKS,
    phases=[Phase.explicit, Phase.generate],
    print_blob=True,
)
settings.register_profile('long', settings.get_profile('suite'), derandomize=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--fuzz-minutes', type=float, metavar='N', help='go on with each test of tests/fuzz for N minutes')


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile('long' if config.getoption('--fuzz-minutes') else 'suite')


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how much tests/fuzz has searched."""
    searched = [report for report in terminalreporter.getreports('passed') if report.user_properties]
    if searched:
        terminalreporter.section('examples: accepted, refused in one line')
    for report in searched:
        terminalreporter.line(f'{report.head_line}: {dict(report.user_properties)["examples"]}')


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


@pytest.fixture
def spoilt(image_folder: Path, tmp_path: Path) -> Path:
    """A copy of the sample images, to spoil."""
    return Path(shutil.copytree(image_folder, tmp_path / 'spoilt'))
