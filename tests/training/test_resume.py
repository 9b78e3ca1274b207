"""A run that is killed, wherever it is, and started again ends as the one that was never killed."""

import csv
import importlib.util
import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from quick_training import find_newest, read_checkpoint

from timm_mealv2.cli.soft_labels import main as soft_labels
from timm_mealv2.errors import UserError
from timm_mealv2.training import loop
from timm_mealv2.training.run import main

SIGKILL = -9
# Everything that draws random numbers or keeps a state; batches of 3 make an update of one batch at each epoch's end.
EVERYTHING = (
    '--model test_resnet --num-classes 3 --img-size 16 --batch-size 3 --workers 0 --epochs 4 --lr 0.02 --opt adamw '
    '--sched plateau --patience-epochs 0 --warmup-epochs 1 --device cpu --log-interval 100 --no-preflight '
    '--grad-accum-steps 2 --clip-grad 1 --model-ema --model-ema-decay 0.9 --mixup 0.4 --cutmix 0.5 --reprob 0.5 '
    '--drop 0.2 --drop-path 0.1 --discriminator-lr-scale 0.5 --hard-label-weight 0.3 --eval-metric loss '
    '--checkpoint-hist 2 --recovery-interval 2 --resume auto --experiment run --teacher-optimize off'
).split()
# The same with worker processes, half precision with a loss scaler, a schedule by updates, no recovery files.
OTHERWISE = (*'--workers 2 --amp --sched cosine --sched-on-updates --epochs 3 --recovery-interval 0'.split(),)
PLAIN = (
    '--model test_resnet --num-classes 3 --img-size 16 --batch-size 7 --workers 0 --epochs 3 --lr 0.02 --device cpu '
    '--warmup-epochs 0 --experiment run --teacher-optimize off'
).split()


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


class Program:
    """The training program in processes that die where they are told to; see killing.py."""

    def __init__(self, server: subprocess.Popen, options: list[str], root: Path) -> None:
        self.server = server
        self.options = options
        self.root = root
        self._whole: dict[tuple[Any, ...], Path] = {}

    def run(
        self, output: Path, *options: str, point: tuple[str, int] | None = None, rank: int = 0, processes: int = 1
    ) -> int:
        """Run it in the folder `output`/run; return its exit code."""
        output.mkdir(exist_ok=True)
        job = {
            'argv': [*self.options, *options, '--output', str(output)],
            'processes': processes,
            'point': point and [*point, rank],
            'log': str(output / 'log'),
        }
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(f'{json.dumps(job)}\n')
        self.server.stdin.flush()
        code, self.passed = json.loads(self.server.stdout.readline())
        return code

    def whole(self, *options: str, processes: int = 1) -> Path:
        """The run folder of a run that is not killed."""
        key = (*options, processes)
        if key not in self._whole:
            output = self.root / f'whole-{len(self._whole)}'
            assert self.run(output, *options, processes=processes) == 0, (output / 'log').read_text()
            self._whole[key] = output / 'run'
        return self._whole[key]


@pytest.fixture(scope='module')
def program(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    root = tmp_path_factory.mktemp('resume')
    options = [*EVERYTHING, '--data-dir', str(image_folder), '--teachers']
    for seed, name in enumerate(('test_resnet', 'test_efficientnet')):
        torch.manual_seed(seed)
        torch.save(timm.create_model(name, num_classes=3).state_dict(), root / f'{name}.pth')
        options.append(f'{name}={root / name}.pth')
    script = Path(__file__).with_name('killing.py')
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield Program(server, options, root)
        assert server.stdin is not None
        server.stdin.close()


@pytest.mark.parametrize('point', [('step', 16), ('inside', 9), ('torn', 6)], ids=str)
def test_a_run_killed_between_or_inside_steps_or_in_a_checkpoint_ends_as_the_unbroken_one(
    program: Program, tmp_path: Path, point: tuple[str, int]
) -> None:
    assert program.run(tmp_path, point=point) == SIGKILL
    assert program.run(tmp_path) == 0
    assert program.passed['step'] < 28  # it did not start anew
    assert differences(program.whole(), tmp_path / 'run') == []


def test_so_does_one_with_workers_half_precision_and_checkpoints_of_epochs_alone(
    program: Program, tmp_path: Path
) -> None:
    whole = program.whole(*OTHERWISE)
    assert 'amp_scaler' in read_checkpoint(whole / 'last.pth.tar')
    assert program.run(tmp_path, *OTHERWISE, point=('step', 17)) == SIGKILL
    assert program.run(tmp_path, *OTHERWISE) == 0
    assert program.passed['step'] == 7
    assert differences(whole, tmp_path / 'run') == []


def test_so_does_one_on_stored_labels(program: Program, image_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / 'store'
    teachers = program.options[program.options.index('--teachers') + 1 :]
    argv = ['record', '--teachers', *teachers, '--num-classes', '3', '--data-dir', str(image_folder), '--device', 'cpu']
    argv += ['--mixup', '0.4', '--cutmix', '0.5', '--reprob', '0.5', '--img-size', '16', '--epochs', '3']
    soft_labels([*argv, '--top-k', '2', '--workers', '0', '--out', str(store)])
    options = ['--soft-labels', str(store), '--discriminator-weight', '1', '--workers', '2']
    options += ['--hard-label-weight', '0']  # mixed images have no hard label
    assert program.run(tmp_path, *options, point=('inside', 9)) == SIGKILL
    assert program.run(tmp_path, *options) == 0
    assert program.passed['step'] < 28
    assert differences(program.whole(*options), tmp_path / 'run') == []


OFTEN = ('--recovery-interval', '1', '--epochs', '3')


@pytest.mark.parametrize(('point', 'rank'), [(('step', 7), 0), (('inside', 8), 1), (('torn', 4), 0)], ids=str)
def test_so_do_two_processes(program: Program, tmp_path: Path, point: tuple[str, int], rank: int) -> None:
    # Each has sums of its own for the summary, and averages (EMA) of its own batch statistics.
    assert program.run(tmp_path, *OFTEN, point=point, rank=rank, processes=2) == SIGKILL
    newest = find_newest(tmp_path / 'run')
    assert newest is not None
    assert newest.name.startswith('recovery-1')
    assert program.run(tmp_path, *OFTEN, processes=2) == 0
    assert differences(program.whole(*OFTEN, processes=2), tmp_path / 'run') == []


@pytest.mark.parametrize('seed', [0, 1])
def test_so_does_one_that_is_killed_again_and_again_while_it_writes(
    program: Program, tmp_path: Path, seed: int
) -> None:
    generator = random.Random(seed)
    kills = 0
    while kills < 8 and program.run(tmp_path, point=('file', generator.randint(8, 30))) == SIGKILL:
        kills += 1
    assert kills > 2
    assert program.run(tmp_path) == 0
    assert differences(program.whole(), tmp_path / 'run') == []


def test_so_does_one_that_is_killed_at_any_point_of_the_end_of_an_epoch(program: Program, tmp_path: Path) -> None:
    # The last epoch's: whatever is not finished then, no later epoch will.
    assert program.run(tmp_path / 'before', point=('step', 27)) == SIGKILL
    assert program.run(shutil.copytree(tmp_path / 'before', tmp_path / 'end')) == 0
    changes = program.passed['file']
    assert changes > 10
    for number in range(1, changes + 1):
        output = shutil.copytree(tmp_path / 'before', tmp_path / str(number))
        assert program.run(output, point=('file', number)) == SIGKILL
        assert program.run(output) == 0
        assert differences(program.whole(), output / 'run') == [], f'killed before change {number}'


@pytest.mark.slow
@pytest.mark.parametrize('options', [(), OTHERWISE], ids=['everything', 'otherwise'])
def test_so_does_one_that_is_killed_before_any_change_of_its_folder(
    program: Program, tmp_path: Path, options: tuple[str, ...]
) -> None:
    whole = program.whole(*options)
    number = 0
    while program.run(output := tmp_path / str(number), *options, point=('file', number := number + 1)) == SIGKILL:
        assert program.run(output, *options) == 0
        assert differences(whole, output / 'run') == [], f'killed before change {number}'
    assert number > 30


# Files that are damaged, moved or of another run


@pytest.fixture
def train(image_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    def run(*args: Any, output: Path = tmp_path / 'runs') -> Path:
        main([*PLAIN, '--data-dir', str(image_folder), '--output', str(output), *map(str, args)])
        return output / 'run'

    return run


@pytest.mark.parametrize('damage', ['cut off', 'zeros', 'empty'])
def test_a_torn_checkpoint_is_passed_over_and_mended(
    train: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    whole = train('--resume', 'auto', '--checkpoint-hist', 2)
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


@pytest.mark.parametrize(
    ('steps', 'options', 'position', 'left'),
    [
        (9, (), 'batch 3, update 8', 0.2),  # of 5 updates an epoch
        (9, ('--batch-size', 2), 'batch 0, update 10', 0.5),
        (9, ('--grad-accum-steps', 2), 'batch 0, update 3', 0.5),
        (9, ('--mixup', 0.2), 'batch 0, update 5', 0.5),
        (5, ('--batch-size', 2), 'batch 0, update 10', 0.5),  # an epoch's start
    ],
)
def test_the_middle_of_an_epoch_is_entered_only_where_an_update_is_still_the_same(
    train: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    steps: int,
    options: tuple[Any, ...],
    position: str,
    left: float,
) -> None:
    argv = ('--sched-on-updates', '--batch-size', 4, '--epochs', 2, '--recovery-interval', 4, '--resume', 'auto')
    step = loop.Stepper.step

    def counted(stepper: loop.Stepper, *args: Any, update: int, **kwargs: Any) -> Any:
        if update == steps:
            raise StoppedError
        return step(stepper, *args, update=update, **kwargs)

    monkeypatch.setattr(loop.Stepper, 'step', counted)
    with pytest.raises(StoppedError):
        train(*argv)
    monkeypatch.undo()
    with caplog.at_level('INFO'):
        folder = train(*argv, *options)
    assert f': epoch 2, {position}.' in caplog.text
    with open(folder / 'summary.csv', newline='') as file:
        row = list(csv.DictReader(file))[1]
    # timm's cosine over 2 epochs, at the update that the epoch goes on with.
    assert float(row['lr']) == pytest.approx(0.01 * (1 - math.cos(math.pi * left)))
