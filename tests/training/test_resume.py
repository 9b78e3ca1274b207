"""Runs that go on: from damaged files, in folders of other runs, with other settings."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_training import differences, find_newest, read_checkpoint

from timm_mealv2.errors import UserError
from timm_mealv2.training import loop
from timm_mealv2.training.run import main

PLAIN = (
    '--model test_resnet --num-classes 3 --img-size 16 --batch-size 7 --workers 0 --epochs 3 --lr 0.02 --device cpu '
    '--warmup-epochs 0 --experiment run --teacher-optimize off'
).split()


# Files that are damaged, moved or of another run


@pytest.fixture
def train(image_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    def run(*args: Any, output: Path = tmp_path / 'runs') -> Path:
        main([*PLAIN, '--data-dir', str(image_folder), '--output', str(output), *map(str, args)])
        return output / 'run'

    return run


@pytest.fixture(scope='module')
def whole(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing has happened to."""
    output = tmp_path_factory.mktemp('whole')
    argv = ['--data-dir', str(image_folder), '--output', str(output), '--resume', 'auto', '--checkpoint-hist', '2']
    main([*PLAIN, *argv])
    return output / 'run'


@pytest.mark.parametrize('damage', ['cut off', 'zeros', 'empty'])
def test_a_torn_checkpoint_is_passed_over_and_mended(
    train: Callable[..., Path], whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    torn = Path(shutil.copytree(whole, tmp_path / 'torn' / 'run'))
    data = (whole / 'last.pth.tar').read_bytes()
    half = len(data) // 2
    bad = {'cut off': data[:half], 'empty': b'', 'zeros': data[: half - 4096] + bytes(8192) + data[half + 4096 :]}
    (torn / 'last.pth.tar').unlink()
    (torn / 'last.pth.tar').write_bytes(bad[damage])
    with caplog.at_level('INFO'):
        train('--resume', 'auto', '--checkpoint-hist', 2, output=tmp_path / 'torn')
    assert 'Passed over' in caplog.text
    assert str(torn / 'last.pth.tar') in caplog.text
    assert differences(whole, torn) == []


def test_no_whole_checkpoint_means_a_fresh_start(
    train: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / 'runs' / 'run'
    folder.mkdir(parents=True)
    (folder / 'last.pth.tar').write_bytes(b'PK')
    with caplog.at_level('INFO'):
        train('--resume', 'auto', '--epochs', 1)
    assert 'Passed over' in caplog.text
    assert 'starting fresh' in caplog.text


def test_an_earlier_checkpoint_is_continued_in_a_folder_of_its_own(train: Callable[..., Path], tmp_path: Path) -> None:
    folder = train('--checkpoint-hist', 3)
    before = {path.name: path.read_bytes() for path in folder.glob('*.pth.tar')}
    earlier = ('--checkpoint-hist', 3, '--resume', folder / 'checkpoint-0.pth.tar')
    for damage in ('none', 'pointer'):
        with pytest.raises(UserError, match=r'later than checkpoint-0\.pth\.tar: .* --experiment NEW continues'):
            train(*earlier)
        assert {path.name: path.read_bytes() for path in folder.glob('*.pth.tar')} == before, damage
        (folder / 'last_written.json').unlink(missing_ok=True)
    train(*earlier, output=tmp_path / 'other')
    train('--checkpoint-hist', 3, '--resume', folder / 'checkpoint-2.pth.tar')  # the same as `last`
    expected = read_checkpoint(folder / 'last.pth.tar')['state_dict']
    for name, value in read_checkpoint(tmp_path / 'other' / 'run' / 'last.pth.tar')['state_dict'].items():
        assert torch.equal(value, expected[name]), name


def test_a_run_folder_is_not_mixed_with_another_run(train: Callable[..., Path], tmp_path: Path) -> None:
    other = train('--epochs', 1)
    train('--epochs', 1, output=tmp_path / 'other')
    with pytest.raises(UserError, match='already holds a run: continue it with --resume auto'):
        train('--resume', other / 'last.pth.tar', output=tmp_path / 'other')


def test_a_restarted_group_prefers_its_own_checkpoint_to_the_one_it_began_with(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = train('--epochs', 1)
    options = ('--resume', first / 'last.pth.tar', '--epochs', 2)
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    with caplog.at_level('INFO'):
        again = train(*options, output=tmp_path / 'again')  # killed before its first checkpoint
        assert f'Continuing from {first}' in caplog.text
        caplog.clear()
        train(*options, output=tmp_path / 'again')
    assert f'Continuing from {again / "last.pth.tar"}: epoch 3' in caplog.text


def test_a_continued_run_does_not_go_back_to_its_start_epoch(
    train: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    train('--resume', 'auto', '--start-epoch', 1, '--epochs', 2)
    caplog.clear()  # where another test has let the program set up its log, the first run is in it
    with caplog.at_level('INFO'):
        train('--resume', 'auto', '--start-epoch', 1, '--epochs', 3)
    assert 'epoch 3 [' in caplog.text
    assert 'epoch 2 [' not in caplog.text


def test_a_run_that_resumes_reads_its_checkpoint_once(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    train('--epochs', 2, '--model-ema')
    loaded = []
    load = torch.load
    monkeypatch.setattr(torch, 'load', lambda path, *args, **kwargs: loaded.append(path) or load(path, *args, **kwargs))
    folder = train('--epochs', 4, '--model-ema', '--resume', 'auto')
    assert loaded == [folder / 'last.pth.tar']
    train('--epochs', 5, '--model-ema', '--resume', folder / 'last.pth.tar')
    assert len(loaded) == 2
    assert json.loads((folder / 'last_written.json').read_text()) == {'file': 'last.pth.tar', 'count': 5}
    assert read_checkpoint(folder / 'last.pth.tar')['written'] == 5


@pytest.mark.parametrize('content', ['', '{', '[]', '{"file": "../run/checkpoint-0.pth.tar", "count": 9}'])
def test_where_last_written_is_damaged_the_counters_of_the_files_decide(
    train: Callable[..., Path], content: str, tmp_path: Path
) -> None:
    folder = train('--epochs', 2)
    (folder / 'last_written.json').write_text(content)
    assert find_newest(folder) == folder / 'last.pth.tar'
    shutil.copy(folder / 'checkpoint-0.pth.tar', tmp_path / 'x')
    (tmp_path / 'x').rename(folder / 'last.pth.tar')
    assert find_newest(folder) == folder / 'checkpoint-1.pth.tar'


class StoppedError(Exception):
    """In place of a kill."""


MIDDLE = ('--sched-on-updates', '--batch-size', 4, '--epochs', 2, '--recovery-interval', 4, '--resume', 'auto')


@pytest.fixture(scope='module')
def stopped(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of runs that ended before update 5 or 9, of 5 an epoch."""
    folders = {}
    step = loop.Stepper.step
    for last in (5, 9):

        def counted(stepper: loop.Stepper, *args: Any, update: int, last: int = last, **kwargs: Any) -> Any:
            if update == last:
                raise StoppedError
            return step(stepper, *args, update=update, **kwargs)

        folders[last] = tmp_path_factory.mktemp('stopped') / 'run'
        words = (*PLAIN, '--data-dir', image_folder, '--output', folders[last].parent, *MIDDLE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.Stepper, 'step', counted)
            with pytest.raises(StoppedError):
                main([str(word) for word in words])
    return folders


@pytest.mark.parametrize(
    ('steps', 'options', 'position', 'left'),
    [
        (9, (), 'batch 3, update 8', 0.2),
        (9, ('--batch-size', 2), 'batch 0, update 10', 0.5),
        (9, ('--grad-accum-steps', 2), 'batch 0, update 3', 0.5),
        (9, ('--mixup', 0.2), 'batch 0, update 5', 0.5),
        (5, ('--batch-size', 2), 'batch 0, update 10', 0.5),  # an epoch's start
    ],
)
def test_the_middle_of_an_epoch_is_entered_only_where_an_update_is_still_the_same(
    train: Callable[..., Path],
    stopped: dict[int, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    steps: int,
    options: tuple[Any, ...],
    position: str,
    left: float,
) -> None:
    shutil.copytree(stopped[steps], tmp_path / 'runs' / 'run')
    with caplog.at_level('INFO'):
        folder = train(*MIDDLE, *options)
    assert f': epoch 2, {position}.' in caplog.text
    with open(folder / 'summary.csv', newline='') as file:
        row = list(csv.DictReader(file))[1]
    # timm's cosine over 2 epochs, at the update that the epoch goes on with.
    assert float(row['lr']) == pytest.approx(0.01 * (1 - math.cos(math.pi * left)))
