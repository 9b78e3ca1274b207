"""Files from elsewhere are data: nothing in a checkpoint, a YAML file or a model's config runs as code or writes."""

import argparse
import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import timm_mealv2
from timm_mealv2.command_line import run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.hub.export import export_model
from timm_mealv2.models.factory import create_ensemble
from timm_mealv2.training.run import main
from timm_mealv2.training.settings import parse_args

PACKAGE = Path(timm_mealv2.__file__).parent
SMALL = '--model test_resnet --num-classes 3 --img-size 16 --epochs 1 --workers 0 --device cpu --lr 0.01'.split()


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable, tuple[str, str]]:
        return open, (str(self.mark), 'w')


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once foreign code has run."""
    return tmp_path / 'code-has-run'


@pytest.fixture
def malicious(tmp_path: Path, mark: Path) -> Path:
    path = tmp_path / 'malicious.pth.tar'
    state = timm.create_model('test_resnet', num_classes=3).state_dict()
    torch.save({'state_dict': state, 'arch': 'test_resnet', 'epoch': 0, 'args': Payload(mark)}, path)
    return path


def assert_refused(capfd: pytest.CaptureFixture[str], call: Callable[[], Any]) -> None:
    """`call` ends as a program does that tells the user in one line."""
    with pytest.raises(SystemExit) as exit:
        run_cli(lambda argv: call() and None, [])
    assert exit.value.code == 2
    assert 'Traceback' not in capfd.readouterr().err


def test_torch_reads_files_with_weights_only() -> None:
    calls = []
    for path in PACKAGE.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert not name.startswith(('pickle.', 'yaml.unsafe', 'yaml.full')), f'{path}: {name}'
            assert name not in ('eval', 'exec', 'np.load', 'joblib.load'), f'{path}: {name}'
            assert name != 'yaml.load' or ast.unparse(node.keywords[0]) == 'Loader=_Loader'  # a SafeLoader
            safe = any(k.arg == 'weights_only' and ast.unparse(k.value) == 'True' for k in node.keywords)
            assert not any(k.arg == 'weights_only' for k in node.keywords) or safe, f'{path}: {name}'
            if name == 'torch.load':
                calls.append(safe)
    assert calls
    assert all(calls)


@pytest.mark.parametrize('use', ['resume', 'auto', 'initial', 'teacher', 'export'])
def test_a_checkpoint_with_code_is_refused_and_does_not_run(
    use: str, malicious: Path, mark: Path, image_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = [*SMALL, '--data-dir', str(image_folder), '--output', str(tmp_path), '--experiment', 'run']
    if use == 'auto':
        (tmp_path / 'run').mkdir()
        malicious.rename(tmp_path / 'run' / 'last.pth.tar')
        main([*argv, '--resume', 'auto'])  # passes it over
    elif use == 'export':
        assert_refused(capfd, lambda: export_model(malicious, tmp_path / 'out'))
    else:
        more = {
            'resume': ['--resume', str(malicious)],
            'initial': ['--initial-checkpoint', str(malicious)],
            'teacher': ['--teachers', f'test_resnet={malicious}'],
        }
        assert_refused(capfd, lambda: main([*argv, *more[use]]))
        assert not (tmp_path / 'run').exists()
    assert not mark.exists()


BOMB = 'a: &a [x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'{name}: &{name} [{", ".join(9 * [f"*{former}"])}]\n' for former, name in zip('abcdefgh', 'bcdefghi', strict=True)
)


@pytest.mark.parametrize(
    'content',
    [
        '!!python/object/apply:os.system ["touch {mark}"]',
        'model: !!python/object/apply:os.system ["touch {mark}"]',
        'model: !!python/name:os.system',
        'epochs: !!python/object/new:int ["3"]',
        BOMB,
        f'{BOMB}scale: *i\n',
    ],
    ids=['document', 'value', 'name', 'object', 'bomb', 'shown bomb'],
)
def test_a_yaml_file_holds_plain_values_only(
    content: str, tmp_path: Path, mark: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / 'settings.yaml'
    path.write_text(content.replace('{mark}', str(mark)))
    with pytest.raises(UserError) as error:
        parse_args(['-c', str(path)])
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000
    assert not mark.exists()


CONFIGS: dict[str, dict[str, Any]] = {
    'architecture': {'architecture': 'os.system'},
    'path': {'architecture': '../../os'},
    'layer': {'architecture': 'test_resnet', 'model_args': {'act_layer': 'os.system'}},
    'remote': {'architecture': 'test_resnet', 'model_args': {'trust_remote_code': True}},
    'checkpoint': {'architecture': 'test_resnet', 'model_args': {'checkpoint_path': '{malicious}'}},
    'teacher': {'architecture': 'mealv2_ensemble', 'model_args': {'teachers': ['python:foreign:make']}},
    'text': {'architecture': 'mealv2_ensemble_gluon', 'model_args': {'teachers': 'python:foreign:make'}},
    'flat': {'architecture': 'mealv2_ensemble', 'teachers': ['python:foreign:make']},
    'source': {
        'architecture': 'mealv2_ensemble',
        'model_args': {'teachers': ['python:foreign:make'], 'pretrained_cfg': {'source': 'url'}},
        'pretrained_cfg': {'source': 'url'},
    },
}


@pytest.mark.parametrize('kind', CONFIGS)
def test_a_models_config_cannot_run_code(
    kind: str,
    tmp_path: Path,
    mark: Path,
    malicious: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / 'foreign.py').write_text(f'open({str(mark)!r}, "w")\n')
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / 'model'
    folder.mkdir()
    config = {'num_classes': 3, 'model_args': {}, 'pretrained_cfg': {}, **CONFIGS[kind]}
    if kind == 'flat':
        config.pop('pretrained_cfg')
    (folder / 'config.json').write_text(json.dumps(config).replace('{malicious}', str(malicious)))
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), folder / 'pytorch_model.bin')
    if kind == 'checkpoint':  # an argument that a file cannot give is left out
        create_ensemble([f'local-dir:{folder}'], num_classes=3)
        assert not mark.exists()
        return
    with pytest.raises(UserError) as error:
        create_ensemble([f'local-dir:{folder}'], num_classes=3)
    assert '\n' not in str(error.value)
    with pytest.raises((KeyError, RuntimeError, TypeError, UserError)):
        timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert not mark.exists()


def test_a_checkpoint_cannot_name_code_as_a_teacher(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'foreign.py').write_text(f'open({str(mark)!r}, "w")\n')
    monkeypatch.syspath_prepend(tmp_path)
    state = timm.create_model('test_resnet', num_classes=3).state_dict()
    args = argparse.Namespace(model='mealv2_ensemble', model_kwargs={'teachers': ['python:foreign:make']})
    state = {f'teachers.0.{name}': value for name, value in state.items()}
    torch.save({'state_dict': state, 'args': args}, tmp_path / 'x.pth')
    with pytest.raises(UserError, match='does not tell its model'):
        create_ensemble([f'mealv2_ensemble={tmp_path / "x.pth"}'])
    assert not mark.exists()


def test_a_run_writes_in_its_folder_alone(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path = tmp_path_factory.mktemp('e')  # short: the path of a worker's socket has 107 bytes at most
    for name in ('home', 'tmp', 'work', 'out'):
        (tmp_path / name).mkdir()
    teacher = tmp_path / 'teacher.pth'
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), teacher)

    def everything() -> set[Path]:
        return {path for root in (tmp_path, image_folder) for path in root.rglob('*')}

    before = everything()
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(('HF_', 'TORCH_', 'XDG_', 'TMP'))
    }
    environment |= {'HOME': str(tmp_path / 'home'), 'TMPDIR': str(tmp_path / 'tmp')}
    command = [sys.executable, str(Path(__file__).parents[2] / 'train_distill.py'), *SMALL, '--workers', '2']
    command += ['--data-dir', str(image_folder), '--teachers', f'test_resnet={teacher}', '--save-images']
    command += ['--output', str(tmp_path / 'out'), '--experiment', 'run', '--recovery-interval', '1']
    result = subprocess.run(command, cwd=tmp_path / 'work', env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    run = tmp_path / 'out' / 'run'
    assert {path for path in everything() - before if run not in path.parents} == {run}


@pytest.mark.parametrize('name', ['../../x', '/tmp/x', 'a/../../x', '.'])
def test_the_run_folder_lies_in_the_output_folder(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_refused(capfd, lambda: main([*SMALL, '--output', str(tmp_path / 'out'), '--experiment', name]))
    assert {path.name for path in tmp_path.iterdir()} <= {'hf_home', 'torch_home'}
