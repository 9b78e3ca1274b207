"""Runs that go on with updates of another kind: batch size, processes, accumulation, mixing; and preempted streams."""

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from colors import CLASSES, STANDING, picture, train, write_splits
from forked import Forked

Preempted = Callable[..., None]


@pytest.fixture
def preempted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Preempted:
    """Trains with a teacher that sends the program a SIGTERM in its `step`th step, as a cluster does."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / 'preempting.py').write_text(
        'import os, signal\n'
        'import torch\n\n\n'
        'class Teacher(torch.nn.Module):\n'
        '    num_classes, in_chans, left, former = 4, 3, -1, torch.zeros(0)\n'
        '    pretrained_cfg = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)\n\n'
        '    def __init__(self):\n'
        '        super().__init__()\n'
        '        self.fc = torch.nn.Linear(3, 4)\n\n'
        '    def forward(self, x):\n'
        '        if len(x) == 4 and not torch.equal(x, Teacher.former):  # not one that is only measured or checked\n'
        '            Teacher.left, Teacher.former = Teacher.left - 1, x.clone()\n'
        '            if Teacher.left == 0:\n'
        '                os.kill(os.getpid(), signal.SIGTERM)\n'
        '        return self.fc(x.mean(dim=(2, 3)))\n'
    )
    monkeypatch.delitem(sys.modules, 'preempting', raising=False)
    import preempting  # type: ignore[import-not-found]

    module: types.ModuleType = preempting

    def run(folder: Path, *options: Any, step: int) -> None:
        module.Teacher.left = step
        with pytest.raises(SystemExit) as caught:
            train(folder, '--teachers', 'python:preempting:Teacher', '--no-preflight', *options)
        assert caught.value.code == 128 + 15
        module.Teacher.left = -1

    return run


TEACHER = ('--teachers', 'python:preempting:Teacher', '--no-preflight')


@pytest.mark.parametrize(
    ('former', 'now', 'update'),
    [
        ('--batch-size 4', '--batch-size 8', 2),
        ('--batch-size 8', '--batch-size 2', 8),
        ('--grad-accum-steps 1', '--grad-accum-steps 4', 1),
        ('--grad-accum-steps 2', '--grad-accum-steps 1', 4),
    ],
)
def test_an_epoch_begins_with_the_update_that_an_unbroken_run_would_have_there(
    former: str, now: str, update: int, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = '--sched cosine --sched-on-updates --lr 0.1 --min-lr 0 --opt momentum --seed 1'.split()
    options = ('--data-dir', data, '--epochs', 3, *schedule)
    unbroken = train(tmp_path / 'unbroken', *options, *now.split())
    train(tmp_path / 'run', *options, *former.split(), '--epochs', 1, '--sched', 'none')
    caplog.clear()
    with caplog.at_level('INFO'):
        rows = train(tmp_path / 'run', *options, *now.split(), '--resume', 'auto')
    assert f'epoch 2, batch 0, update {update}' in caplog.text
    assert [float(row['lr']) for row in rows[1:]] == pytest.approx([float(row['lr']) for row in unbroken[1:]])


def test_the_middle_of_an_epoch_is_entered_where_nothing_has_changed(
    data: Path, tmp_path: Path, preempted: Preempted, caplog: pytest.LogCaptureFixture
) -> None:
    options = ('--data-dir', data, '--lr', 0.1)
    preempted(tmp_path / 'run', *options, step=2)
    with caplog.at_level('INFO'):
        train(tmp_path / 'run', *options, *TEACHER, '--resume', 'auto')
    assert re.search(r'Continuing from .*: epoch 1, batch ([123]), update \1\b', caplog.text)


@pytest.mark.parametrize(
    'changed',
    [
        '--grad-accum-steps 2',
        '--mixup 0.5',
        '--mixup 0.5 --mixup-mode pair',
        '--samples-per-decode 2',
    ],
)
def test_an_epoch_begins_anew_where_an_update_has_become_something_else(
    changed: str, data: Path, tmp_path: Path, preempted: Preempted, caplog: pytest.LogCaptureFixture
) -> None:
    options = ('--data-dir', data, '--lr', 0.1)
    preempted(tmp_path / 'run', *options, step=2)
    caplog.clear()
    with caplog.at_level('INFO'):
        train(tmp_path / 'run', *options, *TEACHER, *changed.split(), '--resume', 'auto')
    assert 'epoch 1, batch 0, update 0' in caplog.text


def test_an_epoch_begins_anew_where_the_processes_have_other_batches(
    tmp_path: Path, preempted: Preempted, program: Forked
) -> None:
    write_splits(tmp_path / 'data')
    options = ('--data-dir', tmp_path / 'data', '--lr', 0.1)
    preempted(tmp_path / 'run', *options, step=2)
    # Two processes with batches of two: as many batches of an epoch as before, and other images in them.
    words = (*STANDING, *options, *TEACHER, '--batch-size', 2, '--resume', 'auto', '--experiment', 'run')
    job = program.run(tmp_path, *words, processes=2, code=f'import sys\nsys.path.insert(0, {str(tmp_path)!r})')
    assert 'epoch 1, batch 0, update 0' in job.text


def write_set(root: Path) -> str:
    """Write a Hugging Face set; return the name of its stream."""
    datasets = pytest.importorskip('datasets')
    for split in ('train', 'validation'):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for number in range(8):
                picture(name, number).save(root / split / name / f'{number}.png')
    splits = ''.join(
        f'  - name: {split}\n    num_bytes: 0\n    num_examples: 32\n' for split in ('train', 'validation')
    )
    (root / 'README.md').write_text(f'---\ndataset_info:\n  splits:\n{splits}---\n')
    datasets.disable_progress_bars()
    return f'hfids/{root}'


def test_a_stream_that_is_preempted_again_and_again_goes_on_from_what_was_written_last(
    tmp_path: Path, preempted: Preempted, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip('datasets').config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    run = tmp_path / 'run'
    options = ('--dataset', write_set(tmp_path / 'set'), '--epochs', 2, '--lr', 0.1, '--resume', 'auto')

    def written_last() -> Path:
        return max(run.glob('*.pth.tar'), key=lambda path: path.stat().st_mtime_ns)

    preempted(run, *options, step=14)  # an epoch has eight steps: in the second, which each start begins anew
    for step in (4, 2):  # at positions before that of the first file
        newest = written_last()
        caplog.clear()
        with caplog.at_level('INFO'):
            preempted(run, *options, step=step)
        assert f'Continuing from {newest}: epoch 2, batch 0, update 8' in caplog.text
    newest = written_last()
    caplog.clear()
    with caplog.at_level('INFO'):
        rows = train(run, *options, *TEACHER)
    assert f'Continuing from {newest}: epoch 2, batch 0, update 8' in caplog.text
    assert [row['epoch'] for row in rows] == ['0', '1']
