"""What the searches share: no code, no request, no file written elsewhere; a run, its export, and a store."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from images import write_images
from outcomes import SMALL

from timm_mealv2.cli import soft_labels
from timm_mealv2.hub.export import export_model
from timm_mealv2.training.run import main


@pytest.fixture(autouse=True)
def _no_request(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file may cause a request. huggingface_hub is not told that it is offline: it would refrain by itself."""
    requests = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        requests.append(args)
        raise OSError('a test wants to send a request')

    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    yield
    assert not requests


@pytest.fixture(autouse=True)
def _nothing_run_or_written_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """The folders of work, home and temporary files are empty in the end; importing `evil` would write there."""
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    for name in ('home', 'tmp', 'work'):
        (elsewhere / name).mkdir()
    code = tmp_path_factory.mktemp('code')
    (code / 'evil.py').write_text(f'open({str(elsewhere / "home" / "mark")!r}, "w")\n')
    monkeypatch.syspath_prepend(code)
    monkeypatch.setenv('HOME', str(elsewhere / 'home'))
    monkeypatch.setenv('TMPDIR', str(elsewhere / 'tmp'))
    monkeypatch.setattr('tempfile.tempdir', None)
    monkeypatch.chdir(elsewhere / 'work')
    yield
    assert [path for path in elsewhere.rglob('*') if path.is_file()] == []


@pytest.fixture(autouse=True)
def _nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report's pictures take seconds, and only numbers of the files come into them."""
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda *args, **kwargs: None)


@pytest.fixture(scope='session')
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with splits train (3 x 2 images) and validation (3 x 1), 16x16."""
    root = tmp_path_factory.mktemp('few_images')
    write_images(root / 'train', 2, seed=0, size=16)
    write_images(root / 'validation', 1, seed=1, size=16)
    return root


@pytest.fixture(scope='session')
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text that names a teacher of three classes."""
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.manual_seed(0)
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), path)
    return f'test_resnet={path}'


@pytest.fixture(scope='session')
def run_folder(few_images: Path, teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an epoch with a teacher, and an average of the weights. Not to be changed."""
    output = tmp_path_factory.mktemp('output')
    argv = [*SMALL, '--data-dir', str(few_images), '--teachers', teacher, '--model-ema']
    main([*argv, '--output', str(output), '--experiment', 'run'])
    return output / 'run'


@pytest.fixture(scope='session')
def export(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported student of that run. Not to be changed."""
    return export_model(run_folder / 'last.pth.tar', tmp_path_factory.mktemp('export') / 'student')


@pytest.fixture(scope='session')
def store(few_images: Path, teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recorded epochs of these images. Not to be changed."""
    out = tmp_path_factory.mktemp('recorded') / 'store'
    argv = ['--out', str(out), '--epochs', '2', '--teachers', teacher, '--data-dir', str(few_images)]
    soft_labels.main(['record', *argv, '--workers', '0', '--device', 'cpu', '--img-size', '16'])
    return out
