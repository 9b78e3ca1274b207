"""What the machine refuses: space, a folder that takes files, open files, memory. One line, and nothing is lost."""

import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from timm_mealv2.cli import hub, soft_labels
from timm_mealv2.command_line import run_cli
from timm_mealv2.training import loop, run
from timm_mealv2.training.checkpoint_saver import read_checkpoint
from timm_mealv2.training.run_folder import find_newest

PAGE = os.sysconf('SC_PAGE_SIZE')
# Each program's folder, and what it changes of what is there before it has written all that is new.
CHANGING = {
    'train': {'args.yaml', 'summary.csv', 'train.log', 'preflight.json'},
    'record': {'meta.json'},
    'export': set(),
}


@dataclass
class Programs:
    """Training, recording and export on the small images, each in a fork of this process."""

    options: list[str]
    log: Path
    checkpoint: Path = Path()

    def start(self, kind: str, folder: Path, more: bool = True, before: Callable = int, workers: int = 0) -> int:
        """Run one of them in `folder` after `before()`; return its exit code. Without `more` it stops early."""
        common = [*self.options, '--workers', str(workers)]
        if kind == 'train':
            argv = [
                *common,
                *'--model test_resnet --batch-size 4 --lr 0.05 --warmup-epochs 0 --resume auto'.split(),
                '--teacher-tune',
                'off',
            ]
            argv += ['--epochs', '2' if more else '1', '--output', str(folder.parent), '--experiment', folder.name]
            return self.fork(run.main, argv, before)
        if kind == 'record':
            argv = ['record', *common, '--top-k', '2', '--epochs', '12' if more else '10', '--out', str(folder)]
            return self.fork(soft_labels.main, argv, before)
        return self.fork(hub.main, ['export', str(self.checkpoint), '--out', str(folder)], before)

    def fork(self, main: Callable, argv: list[str], before: Callable = int) -> int:
        """Run `main(argv)` as a program in a process of its own."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                sys.stdout, sys.stderr = os.fdopen(1, 'w', closefd=False), os.fdopen(2, 'w', closefd=False)
                signal.alarm(100)
                before()
                run_cli(main, argv)
                code = 0
            except SystemExit as error:
                code = int(error.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def error(self) -> str:
        """The line that the last one ended with; it has shown no traceback."""
        text = self.log.read_text()
        assert 'Traceback' not in text, text
        last = text.splitlines()[-1]
        assert last.startswith('error: '), text
        return last


@pytest.fixture(scope='module')
def programs(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Programs:
    root = tmp_path_factory.mktemp('programs')
    torch.manual_seed(0)
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), root / 'teacher.pth')
    options = f'--num-classes 3 --img-size 16 --device cpu --data-dir {image_folder}'.split()
    return Programs([*options, '--teachers', f'test_resnet={root}/teacher.pth'], root / 'log')


@pytest.fixture(scope='module')
def folders(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By program: `former`, what is there before the fault, and `whole`, what is there in the end without one."""
    root = tmp_path_factory.mktemp('folders')
    programs.checkpoint = root / 'train/former/it/last.pth.tar'
    for kind in CHANGING:
        former, whole = root / kind / 'former', root / kind / 'whole'
        former.mkdir(parents=True)
        assert programs.start(kind, former / 'it', more=False) == 0, programs.log.read_text()
        shutil.copytree(former, whole)
        assert programs.start(kind, whole / 'it') == 0, programs.log.read_text()
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """What has to be there to the byte in the end; of a training's files, what these hold but for times."""
    found = {path.name: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    if 'last.pth.tar' in found:
        state = read_checkpoint(folder / 'last.pth.tar')['state_dict']
        return dict.fromkeys(found, b'') | {name: value.numpy().tobytes() for name, value in state.items()}
    return found


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MiB."""
    path = tmp_path / 'disk'
    path.mkdir()
    result = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=16m', 'none', path], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f'no disk can be mounted here: {result.stderr.strip()}')
    yield path
    subprocess.run(['umount', '--lazy', path], check=True)


@dataclass
class Refusal:
    """Lets a program meet a refusal in a folder that holds something already.

    Attributes:
        disk: Where its folder is.
    """

    programs: Programs
    folders: Path
    disk: Path

    def meet(
        self,
        kind: str,
        fault: Callable[[], object] = int,
        mend: Callable[[], object] = int,
        before: Callable[[], object] = int,
        workers: int = 0,
    ) -> str:
        """Return the program's one line about a fault, '' if it got to its end all the same; nothing is lost.

        Mended, and given again, it ends as one that met no fault. `before` is called in its own process.
        """
        folder = self.disk / 'it'
        # With hard links as they are.
        subprocess.run(['cp', '-a', self.folders / kind / 'former' / 'it', folder], check=True)
        former = {path: path.read_bytes() for path in folder.rglob('*') if path.name not in CHANGING[kind]}
        rows = (folder / 'summary.csv').read_bytes() if kind == 'train' else b''
        fault()
        line = ''
        if (code := self.programs.start(kind, folder, before=before, workers=workers)) != 0:
            assert code == 2, self.programs.log.read_text()
            line = self.programs.error()
            for path, content in former.items():
                assert path.read_bytes() == content, path
            assert kind != 'train' or (folder / 'summary.csv').read_bytes().startswith(rows)
        mend()
        assert self.programs.start(kind, folder) == 0, self.programs.log.read_text()
        assert contents(folder) == contents(self.folders / kind / 'whole' / 'it')
        shutil.rmtree(folder)
        assert list(self.disk.iterdir()) == []
        return line


@pytest.fixture
def refusal(programs: Programs, folders: Path, disk: Path) -> Refusal:
    return Refusal(programs, folders, disk)


FREE = [('train', 0), ('train', 100 * PAGE), ('record', 0), ('export', PAGE)]
ALL = pytest.mark.slow


@pytest.mark.parametrize(('kind', 'free'), [*FREE, *(pytest.param(kind, None, marks=ALL) for kind in CHANGING)])
def test_a_full_disk(kind: str, free: int | None, refusal: Refusal) -> None:
    filler = refusal.disk / 'filler'

    def meet(size: int) -> str:
        def fill() -> None:
            room = os.statvfs(refusal.disk)
            filler.write_bytes(bytes(room.f_bavail * room.f_frsize - size))

        return refusal.meet(kind, fill, filler.unlink)

    if free is not None:
        assert re.search('[Nn]o space (is )?left', meet(free))
        return
    size = 0
    while meet(size):
        size += PAGE if size < 10 * PAGE else 20 * PAGE
    assert size >= PAGE


# A recording has the file of its lock open, so that its disk cannot be remounted.
@pytest.mark.parametrize('kind', ['train', 'export'])
def test_a_disk_that_takes_no_files_any_more(kind: str, refusal: Refusal) -> None:
    def remount(how: str) -> None:
        subprocess.run(['mount', '-o', f'remount,{how}', refusal.disk], check=True)

    def in_the_middle() -> None:
        """Remount with the first step."""
        function = loop.Stepper.step

        def remounting(*args: Any, **kwargs: Any) -> Any:
            remount('ro')
            return function(*args, **kwargs)

        loop.Stepper.step = remounting  # type: ignore[method-assign]

    if kind == 'export':
        line = refusal.meet(kind, fault=lambda: remount('ro'), mend=lambda: remount('rw'))
    else:
        line = refusal.meet(kind, mend=lambda: remount('rw'), before=in_the_middle)
    assert 'Read-only file system' in line


def limit(kind: int, size: int) -> None:
    resource.setrlimit(kind, (size, size))


@pytest.mark.parametrize('kind', ['train', 'record'])
def test_128_open_files_are_enough_and_too_few_are_told(kind: str, refusal: Refusal) -> None:
    assert refusal.meet(kind, before=lambda: limit(resource.RLIMIT_NOFILE, 128), workers=4) == ''
    assert 'Too many open files' in refusal.meet(kind, before=lambda: limit(resource.RLIMIT_NOFILE, 20), workers=4)


def limit_memory(more: int) -> None:
    """Allow so many bytes more than this process has mapped."""
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    limit(resource.RLIMIT_AS, pages * PAGE + more)


@pytest.mark.parametrize(('kind', 'steps'), [*((kind, 1) for kind in CHANGING), pytest.param('train', 40, marks=ALL)])
def test_too_little_memory(kind: str, steps: int, refusal: Refusal) -> None:
    lines = [refusal.meet(kind, before=partial(limit_memory, step * 2**19)) for step in range(steps)]
    assert 'Cannot allocate memory' in lines[0]


def test_a_worker_that_is_killed_for_its_memory(refusal: Refusal) -> None:
    def killing() -> None:
        step = loop.Stepper.step

        def killed(*args: Any, **kwargs: Any) -> Any:
            multiprocessing.active_children()[0].kill()
            return step(*args, **kwargs)

        loop.Stepper.step = killed  # type: ignore[method-assign]

    line = refusal.meet('train', before=killing, workers=2)
    assert re.search(r'DataLoader worker \(pid.* (exited unexpectedly|is killed by signal: Killed)', line)


def test_a_checkpoint_is_not_passed_over_as_corrupt_for_want_of_memory(programs: Programs, folders: Path) -> None:
    folder = folders / 'train/whole/it'
    assert find_newest(folder) is not None
    assert programs.fork(lambda argv: print(find_newest(folder)), [], before=lambda: limit_memory(0)) == 2
    assert 'Cannot allocate memory' in programs.error()
