"""Everyday mistakes are one line and exit code 2, whichever program meets them; on a full disk nothing is lost."""

import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from timm_mealv2.cli import evaluate, hub, report, soft_labels
from timm_mealv2.command_line import run_cli
from timm_mealv2.training import run
from timm_mealv2.training.settings import recipe_file

PROGRAMS: dict[str, Callable[[Sequence[str]], None]] = {
    'train': run.main,
    'eval': evaluate.main,
    'softlabels': soft_labels.main,
    'hub': hub.main,
    'report': report.main,
}
SMALL = '--data-dir {data} --img-size 16 --workers 0 --device cpu'
TRAIN = f'train {SMALL} --model test_resnet --num-classes 3 --output {{o}}'
RECORD = f'softlabels record {SMALL} --epochs 1 --out {{o}}'


@pytest.fixture(scope='module')
def files(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The data set, checkpoints that are whole, damaged or none at all, and YAML files with mistakes."""
    root = tmp_path_factory.mktemp('files')
    torch.manual_seed(0)
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), root / 'whole.pth')
    content = (root / 'whole.pth').read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    (root / 'flipped.pth').write_bytes(flipped)
    (root / 'cut.pth').write_bytes(content[: len(content) // 2])
    (root / 'text.pth').write_text('no checkpoint')
    (root / 'key.yaml').write_text('epoch: 3\n')
    (root / 'value.yaml').write_text('lr: fast\n')
    (root / 'broken.yaml').write_text('lr: [\n')
    return {path.name: path for path in root.iterdir()} | {'data': image_folder}


@pytest.mark.parametrize(
    ('line', 'text'),
    [
        (f'{TRAIN} --epoch 3', 'the nearest option is --epochs'),
        (f'{TRAIN} --epochs 0', 'must be 1 or more, got 0'),
        (f'{TRAIN} --jsd-loss --bce-loss', '--jsd-loss: refused'),
        (f'{TRAIN} --model resnet5o', 'the nearest is resnet50'),
        (f'{TRAIN} --model output/teacher', 'weights are for --initial-checkpoint'),
        (f'{TRAIN} --teachers resnet18.nonsense', 'no tag of resnet18'),
        (f'{TRAIN} --teachers test_resnet={{text.pth}}', 'not a readable checkpoint'),
        (f'{TRAIN} --teachers test_resnet={{cut.pth}}', 'not a readable checkpoint'),
        (f'{TRAIN} --teachers test_resnet={{flipped.pth}}', 'not a readable checkpoint'),
        (f'{TRAIN} --teachers test_resnet=absent.pth', 'there is no such file'),
        (f'{TRAIN} --teachers local-dir:absent', 'absent'),
        (f'{TRAIN} --teachers python:absent:model', 'absent'),
        (f'{TRAIN} --teachers test_resnet={{whole.pth}} test_resnet={{whole.pth}}', 'the same weights'),
        (f'{TRAIN} --num-classes 4', 'the training split has 3 classes, the model 4'),
        (f'{TRAIN} --num-classes 4 --class-map {{key.yaml}} --teachers test_resnet={{whole.pth}}', 'class'),
        (f'{TRAIN} --data-dir absent', 'no data set at'),
        (f'{TRAIN} --val-split absent', "no split 'absent' in {data}, but train, validation: name"),
        (f'{TRAIN} --recipe mealv2_resnet5', 'the nearest is mealv2_resnet50_'),
        (f'{TRAIN} -c absent.yaml', 'cannot read absent.yaml'),
        (f'{TRAIN} -c {{key.yaml}}', "key.yaml: there is no option 'epoch', the nearest is 'epochs'"),
        (f'{TRAIN} -c {{value.yaml}}', "value.yaml: lr: invalid float value: 'fast'"),
        (f'{TRAIN} -c {{broken.yaml}}', 'broken.yaml'),
        (f'{TRAIN} --initial-checkpoint absent.pth', 'there is no such file'),
        (f'{TRAIN} --resume absent.pth.tar', 'o such file'),
        (f'{TRAIN} --experiment ../elsewhere', 'inside --output'),
        (f'{TRAIN} --soft-labels absent', 'there is no such folder'),
        (f'{TRAIN} --device xpu', '--device xpu'),
        (f'{TRAIN} --push-to-hub me', 'me'),
        ('eval test_resnet={whole.pth} --data-dir absent', 'no data set at'),
        ('eval test_resnet={cut.pth} --data-dir {data}', 'not a readable checkpoint'),
        ('eval absent --data-dir {data}', 'no timm model'),
        (f'{RECORD}', '--teachers'),
        (f'{RECORD} --teachers test_resnet={{text.pth}}', 'not a readable checkpoint'),
        ('softlabels info absent', 'absent'),
        ('hub export absent.pth.tar --out {o}', 'absent.pth.tar: there is no such file'),
        ('hub export {text.pth} --out {o}', 'not a readable checkpoint'),
        ('report absent', 'absent'),
    ],
)
def test_an_everyday_mistake_is_one_line(
    line: str, text: str, files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, path in files.items():
        line, text = (words.replace(f'{{{name}}}', str(path)) for words in (line, text))
    program, *argv = line.replace('{o}', str(tmp_path / 'out')).split()
    with pytest.raises(SystemExit) as exit:
        run_cli(PROGRAMS[program], argv)
    error = capfd.readouterr().err
    assert exit.value.code == 2
    assert 'Traceback' not in error
    assert [told.startswith('error: ') for told in error.splitlines()].count(True) == 1
    assert text in error.splitlines()[-1]
    assert not (tmp_path / 'out').exists()


def test_recipes_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match='the nearest is quickstart'):
        recipe_file('quikstart')


# A full disk

PAGE = os.sysconf('SC_PAGE_SIZE')
# Each program's folder, and what it changes of what is there before it has written all that is new.
CHANGING = {
    'train': {'args.yaml', 'summary.csv', 'train.log', 'preflight.json', 'last_written.json'},
    'record': {'meta.json'},
    'export': set(),
}


@dataclass
class Programs:
    """Training, recording and export on the small images, each in a fork of this process."""

    options: list[str]
    log: Path
    checkpoint: Path = Path()

    def start(self, kind: str, folder: Path, more: bool = True) -> int:
        """Run one of them in `folder`; return its exit code. Without `more` it stops early."""
        if kind == 'train':
            argv = [
                *self.options,
                *'--model test_resnet --batch-size 4 --lr 0.05 --warmup-epochs 0 --teacher-optimize off'.split(),
            ]
            argv += ['--epochs', '2' if more else '1', '--output', str(folder.parent), '--experiment', folder.name]
            return self.fork(run.main, [*argv, '--resume', 'auto'])
        if kind == 'record':
            argv = ['record', *self.options, '--top-k', '2', '--epochs', '12' if more else '10', '--out', str(folder)]
            return self.fork(soft_labels.main, argv)
        return self.fork(hub.main, ['export', str(self.checkpoint), '--out', str(folder)])

    def fork(self, main: Callable, argv: list[str]) -> int:
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


@pytest.fixture(scope='module')
def programs(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Programs:
    options = ['--teachers', f'test_resnet={files["whole.pth"]}', '--data-dir', str(files['data'])]
    options += '--num-classes 3 --img-size 16 --workers 0 --device cpu'.split()
    return Programs(options, tmp_path_factory.mktemp('programs') / 'log')


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
        if kind != 'export':  # the second is the same
            assert programs.start(kind, whole / 'it') == 0, programs.log.read_text()
    return root


def contents(folder: Path) -> dict[str, Any]:
    """What has to be there to the byte in the end; of a training, the names of its files and the weights."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    if 'last.pth.tar' in found:
        state = torch.load(folder / 'last.pth.tar', weights_only=False)['state_dict']
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


@pytest.mark.parametrize(('kind', 'free'), [('train', 0), ('train', 100 * PAGE), ('record', 0), ('export', PAGE)])
def test_a_full_disk(kind: str, free: int, programs: Programs, folders: Path, disk: Path) -> None:
    folder, filler = disk / 'it', disk / 'filler'
    subprocess.run(['cp', '-a', folders / kind / 'former' / 'it', folder], check=True)  # hard links stay
    former = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    room = os.statvfs(disk)
    filler.write_bytes(bytes(room.f_bavail * room.f_frsize - free))

    assert programs.start(kind, folder) == 2, programs.log.read_text()
    told = programs.log.read_text()
    assert 'Traceback' not in told
    assert re.match('error: .*[Nn]o space (is )?left', told.splitlines()[-1])
    for path, content in former.items():
        assert path.name in CHANGING[kind] or path.read_bytes() == content, path
    if kind == 'train':
        assert (folder / 'summary.csv').read_bytes().startswith(former[folder / 'summary.csv'])

    filler.unlink()
    assert programs.start(kind, folder) == 0, programs.log.read_text()
    assert contents(folder) == contents(folders / kind / 'whole' / 'it')
