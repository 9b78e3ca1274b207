"""What a user sees of a run: on a terminal, elsewhere, and in train.log."""

import fcntl
import os
import pty
import re
import select
import struct
import termios
from pathlib import Path

import pytest
from forked import Forked
from quick_training import SMALL, Train

from timm_mealv2.errors import UserError
from timm_mealv2.training.logs import RunLog, logging_of_run, write_log
from timm_mealv2.training.run_folder import Position

# Run before the program: what it prints goes to a terminal.
MOVED = """
import os

os.environ.pop('COLUMNS', None)
terminal = os.open({!r}, os.O_WRONLY | os.O_NOCTTY)
for stream in (1, 2):
    os.dup2(terminal, stream)
"""


def run_in_terminal(columns: int, program: Forked, output: Path, *options: object) -> str:
    """Everything that the program writes to a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    job = program.start(output, *options, code=MOVED.format(os.ttyname(theirs)))
    written = b''
    while select.select([ours], [], [], 0.1)[0] or not job.result.is_file():
        if select.select([ours], [], [], 0)[0]:
            written += os.read(ours, 4096)
    os.close(theirs)
    os.close(ours)
    assert job.finish() == 0, written.decode()
    return written.decode().replace('\x1b[A', '')


def test_on_a_terminal_an_epoch_is_a_bar_that_fits_and_then_one_line(
    teachers: list[str], image_folder: Path, tmp_path: Path, program: Forked
) -> None:
    options = ['--data-dir', image_folder, '--experiment', 'run', '--teachers', *teachers, '--warmup-epochs', 1]
    written = run_in_terminal(80, program, tmp_path, *SMALL, *options)
    # What is overwritten, and what stays.
    bars = [text for text in re.split(r'[\r\n]+', written) if text.startswith('epoch ')]
    lines = [line.split('\r')[-1] for line in written.replace('\r\n', '\n').split('\n')]
    assert max(map(len, bars)) <= 80
    means = [
        bar
        for bar in bars
        if re.fullmatch(r'epoch \d \|.{8,}\| 1/5 [\d:]+ left, loss \S+, KL \S+, \d+ images/s *', bar)
    ]
    assert len(means) >= 2, bars  # from the first batch of each epoch
    epochs = [line for line in lines if ' epochs: ' in line]
    figures = r'loss \S+, KL \S+, top-1 \S+, best \S+, \d+ images/s'
    assert re.fullmatch(rf'1/2 epochs: {figures}, 00:\d\d left', epochs[0]), epochs[0]
    assert re.fullmatch(rf'2/2 epochs: {figures}', epochs[1]), epochs[1]
    between = lines[lines.index(epochs[0]) : lines.index(epochs[1])]
    assert len([line for line in between if line.strip()]) == 1, between
    # The file has what the bar has shown, too.
    log = (tmp_path / 'run' / 'train.log').read_text()
    assert all(line in log for line in ('Before the first step', *epochs))
    assert len(re.findall(r'epoch 2 \[\d+/\d+\] loss ', log)) > 1
    assert re.search(r'agreement \d+\.\d\d, .*its accuracy \d+\.\d\d,', log)
    assert 'top-5 100.00' in log


def test_elsewhere_and_in_train_log_lines_of_an_epoch_come_before_its_own(
    train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level('INFO'):
        folder = train('run')
        first = (folder / 'train.log').read_text()
        train('run', '--epochs', 3, '--resume', 'auto')
    text = (folder / 'train.log').read_text()
    assert text.startswith(first)
    order = [
        'test_resnet: ',
        'epoch 1 [2/',
        'student: loss',
        '1/2 epochs: ',
        'epoch 2 [2/',
        '2/2 epochs: ',
        'Best: top-1',
    ]
    order += ['test_resnet: ', 'Continuing from', 'epoch 3 [2/', '3/3 epochs: ', 'Best: top-1']
    assert re.search('.*'.join(map(re.escape, order)), text, re.DOTALL), text
    assert 'Current checkpoints' not in caplog.text


def test_what_is_left_is_reckoned_from_the_epochs_of_this_process() -> None:
    log = RunLog(Position(epoch=2, batch=5), epochs=4, batches=10, metric='loss')
    log.began -= 10
    trained = {'loss': 0.5, 'images_per_second': 100.0}
    line = log.line(3, trained, {'loss': 0.25, 'top1': 80.0}, best=0.125)
    assert line == '3/4 epochs: loss 0.5000, top-1 80.00, loss 0.2500, best 0.1250, 100 images/s, 00:20 left'
    assert log.line(3, trained, None, best=0.125) == '3/4 epochs: loss 0.5000, 100 images/s, 00:20 left'
    # A run whose last evaluation alone was missing has measured no training.
    done = RunLog(Position(epoch=2, batch=10), epochs=4, batches=10, metric='top1')
    assert done.line(3, trained, None, best=None) == '3/4 epochs: loss 0.5000, 100 images/s'


def test_the_error_that_ends_a_run_is_in_its_log(tmp_path: Path) -> None:
    def run(error: Exception) -> None:
        with logging_of_run(primary=True) as log:
            write_log(log, tmp_path / 'train.log')
            raise error

    with pytest.raises(UserError):
        run(UserError('no space is left'))
    with pytest.raises(RuntimeError):
        run(RuntimeError('a fault of ours'))
    user, *ours = (tmp_path / 'train.log').read_text().splitlines()
    assert user.endswith(' error: no space is left')
    assert [line.startswith('Traceback') for line in ours[:2]] == [False, True]
