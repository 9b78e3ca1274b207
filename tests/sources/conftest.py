"""Sources that several tests read, and a model that knows their pictures."""

from collections.abc import Callable
from pathlib import Path

import pytest
from color_sources import write_parquet, write_shards


@pytest.fixture(autouse=True)
def _own_cache_of_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What `datasets` makes of a source goes to the test's own folder."""
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'hf_datasets')
    datasets.disable_progress_bars()


@pytest.fixture(scope='session')
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WebDataset shards: `--dataset wds/ --data-dir` this."""
    return write_shards(tmp_path_factory.mktemp('wds') / 'colors')


@pytest.fixture(scope='session')
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face set: `--dataset hfds/` and `hfids/` this."""
    return write_parquet(tmp_path_factory.mktemp('hf') / 'colors')


@pytest.fixture
def source(shards: Path, parquet: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """Returns the options that name a source: 'wds', 'hfds' or 'hfids', the last two with a folder for their cache."""

    def options(kind: str) -> list[str]:
        if kind == 'wds':
            return ['--dataset', 'wds/', '--data-dir', str(shards)]
        return ['--dataset', f'{kind}/{parquet}', '--data-dir', str(tmp_path / 'cache')]

    return options
