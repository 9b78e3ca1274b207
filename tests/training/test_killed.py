"""A run that is killed, wherever it is, and started again ends as the one that was never killed."""

import random
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from forked import SIGKILL, Forked
from quick_training import differences, find_newest, read_checkpoint

from timm_mealv2.cli.soft_labels import main as soft_labels

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


class Killed:
    """The training program with EVERYTHING, which dies where it is told to; see forked.py."""

    def __init__(self, program: Forked, options: list[str], root: Path) -> None:
        self.program, self.options, self.root = program, options, root
        self._whole: dict[tuple[Any, ...], Path] = {}

    def run(self, output: Path, *options: str, **kwargs: Any) -> int:
        """Run it in the folder `output`/run; return its exit code."""
        job = self.program.start(output, *self.options, *options, **kwargs)
        code, self.passed = job.finish(), job.passed
        return code

    def whole(self, *options: str, processes: int = 1) -> Path:
        """The run folder of a run that is not killed."""
        key = (*options, processes)
        if key not in self._whole:
            output = self.root / f'whole-{len(self._whole)}'
            self.program.run(output, *self.options, *options, processes=processes)
            self._whole[key] = output / 'run'
        return self._whole[key]


@pytest.fixture(scope='module')
def killed(program: Forked, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    root = tmp_path_factory.mktemp('resume')
    options = [*EVERYTHING, '--data-dir', str(image_folder), '--teachers']
    for seed, name in enumerate(('test_resnet', 'test_efficientnet')):
        torch.manual_seed(seed)
        torch.save(timm.create_model(name, num_classes=3).state_dict(), root / f'{name}.pth')
        options.append(f'{name}={root / name}.pth')
    return Killed(program, options, root)


@pytest.mark.parametrize('point', [('step', 16), ('inside', 6), ('torn', 6)], ids=str)
def test_a_run_killed_between_or_inside_steps_or_in_a_checkpoint_ends_as_the_unbroken_one(
    killed: Killed, tmp_path: Path, point: tuple[str, int]
) -> None:
    assert killed.run(tmp_path, point=point) == SIGKILL
    assert killed.run(tmp_path) == 0
    assert killed.passed['step'] < 28  # it did not start anew
    assert differences(killed.whole(), tmp_path / 'run') == []


def test_so_does_one_with_workers_half_precision_and_checkpoints_of_epochs_alone(
    killed: Killed, tmp_path: Path
) -> None:
    whole = killed.whole(*OTHERWISE)
    assert 'amp_scaler' in read_checkpoint(whole / 'last.pth.tar')
    assert killed.run(tmp_path, *OTHERWISE, point=('step', 17)) == SIGKILL
    assert killed.run(tmp_path, *OTHERWISE) == 0
    assert killed.passed['step'] == 7
    assert differences(whole, tmp_path / 'run') == []


def test_so_does_one_on_stored_labels(killed: Killed, image_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / 'store'
    teachers = killed.options[killed.options.index('--teachers') + 1 :]
    argv = ['record', '--teachers', *teachers, '--num-classes', '3', '--data-dir', str(image_folder), '--device', 'cpu']
    argv += ['--mixup', '0.4', '--cutmix', '0.5', '--reprob', '0.5', '--img-size', '16', '--epochs', '3']
    soft_labels([*argv, '--top-k', '2', '--workers', '0', '--out', str(store)])
    options = ['--soft-labels', str(store), '--discriminator-weight', '1', '--workers', '2']
    options += ['--hard-label-weight', '0']  # mixed images have no hard label
    assert killed.run(tmp_path, *options, point=('inside', 6)) == SIGKILL
    assert killed.run(tmp_path, *options) == 0
    assert killed.passed['step'] < 28
    assert differences(killed.whole(*options), tmp_path / 'run') == []


OFTEN = ('--recovery-interval', '1', '--epochs', '3')


@pytest.mark.parametrize(('point', 'rank'), [(('step', 7), 0), (('inside', 4), 1), (('torn', 4), 0)], ids=str)
def test_so_do_two_processes(killed: Killed, tmp_path: Path, point: tuple[str, int], rank: int) -> None:
    # Each has sums of its own for the summary, and averages (EMA) of its own batch statistics.
    assert killed.run(tmp_path, *OFTEN, point=point, rank=rank, processes=2) == SIGKILL
    newest = find_newest(tmp_path / 'run')
    assert newest is not None
    assert newest.name.startswith('recovery-1')
    assert killed.run(tmp_path, *OFTEN, processes=2) == 0
    assert differences(killed.whole(*OFTEN, processes=2), tmp_path / 'run') == []


def test_so_does_one_that_is_killed_again_and_again_while_it_writes(killed: Killed, tmp_path: Path) -> None:
    generator = random.Random(0)
    kills = 0
    while kills < 5 and killed.run(tmp_path, point=('file', generator.randint(8, 30))) == SIGKILL:
        kills += 1
    assert kills > 2
    assert killed.run(tmp_path) == 0
    assert differences(killed.whole(), tmp_path / 'run') == []


# Run before the program: it leaves the run folder as a kill before each change of it would.
COPYING = """
import os, subprocess
import __main__

at = __main__.Killer.at

def copying(killer, kind):
    at(killer, kind)
    if kind == 'file':
        os.makedirs(copy := f'{}/{{killer.passed[kind]:02}}')
        subprocess.run(['cp', '-a', killer.folder / 'run', copy], check=True)  # hard links stay

__main__.Killer.at = copying
"""


def test_so_does_one_that_is_killed_at_any_point_of_the_end_of_an_epoch(killed: Killed, tmp_path: Path) -> None:
    # The last epoch's: whatever is not finished then, no later epoch will.
    assert killed.run(tmp_path / 'end', point=('step', 27)) == SIGKILL
    assert killed.run(tmp_path / 'end', code=COPYING.format(tmp_path / 'killed')) == 0
    folders = sorted((tmp_path / 'killed').iterdir())
    assert len(folders) == killed.passed['file'] > 10
    for output in folders:
        assert killed.run(output) == 0
        assert differences(killed.whole(), output / 'run') == [], f'killed before change {output.name}'


@pytest.mark.slow
@pytest.mark.parametrize('options', [(), OTHERWISE], ids=['everything', 'otherwise'])
def test_so_does_one_that_is_killed_before_any_change_of_its_folder(
    killed: Killed, tmp_path: Path, options: tuple[str, ...]
) -> None:
    whole = killed.whole(*options)
    number = 0
    while killed.run(output := tmp_path / str(number), *options, point=('file', number := number + 1)) == SIGKILL:
        assert killed.run(output, *options) == 0
        assert differences(whole, output / 'run') == [], f'killed before change {number}'
    assert number > 30
