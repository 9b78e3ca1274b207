"""Tests of the package as a whole: what importing it does, and what a wheel holds."""

import ast
import configparser
import importlib
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import timm

import timm_mealv2

ROOT = Path(timm_mealv2.__file__).parents[1]
SOURCES = sorted((ROOT / 'timm_mealv2').rglob('*.py'))


# Importing


def test_import_is_silent_and_quick_and_programs_load_what_they_use_where_they_use_it():
    # Their help takes hardly longer than `import timm`, which loads a part of torch.compile and of the Hub's client.
    code = """
import contextlib, importlib, io, sys, time, warnings, timm
before = set(sys.modules)
LATER = {'datasets', 'jinja2', 'matplotlib', 'onnx', 'onnxruntime', 'onnxscript', 'pandas', 'sklearn', 'tensorboard'}
LATER |= {'huggingface_hub', 'sympy', 'wandb', 'webdataset'}
PARTS = ('torch._dynamo', 'torch._inductor', 'torch.distributed.elastic', 'torch.onnx', 'torch.utils.tensorboard')
with warnings.catch_warnings():
    warnings.simplefilter('error')
    start = time.process_time()  # which other work on the machine leaves nearly as it is
    import timm_mealv2
    seconds = time.process_time() - start
rooms = ('timm_mealv2.training', 'timm_mealv2.hub', 'timm_mealv2.cli', 'timm_mealv2.report', 'matplotlib')
assert not [name for name in rooms if name in sys.modules]
for name in ('training.run', 'cli.hub', 'cli.predict', 'cli.soft_labels'):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        importlib.import_module(f'timm_mealv2.{name}').main(['--help'])
new = set(sys.modules) - before
print(seconds, len(new), *sorted(name for name in new if name.split('.')[0] in LATER or name.startswith(PARTS)))
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, '')
    seconds, count, *loaded = result.stdout.split()
    assert float(seconds) < 0.2
    assert loaded == []
    assert int(count) < 180


def test_public_names_and_models_are_there():
    assert set(timm_mealv2.__all__) == {
        'Discriminator',
        'DiscriminatorLoss',
        'EnsembleTeacher',
        'MealV2Task',
        'UserError',
        '__version__',
        'create_ensemble',
        'distill',
        'evaluate',
    }
    assert all(hasattr(timm_mealv2, name) for name in timm_mealv2.__all__)
    assert set(timm.list_models('mealv*')) == {
        'mealv1_resnet50',
        'mealv2_efficientnet_b0',
        'mealv2_ensemble',
        'mealv2_ensemble_efficientnet_b4',
        'mealv2_ensemble_gluon',
        'mealv2_mobilenetv3_large_100',
        'mealv2_mobilenetv3_small_075',
        'mealv2_mobilenetv3_small_100',
        'mealv2_resnet18',
        'mealv2_resnet50',
    }


def test_installed_version_is_that_of_the_source():
    assert version('timm_mealv2') == timm_mealv2.__version__


# Distribution


def test_every_import_is_a_declared_dependency():
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    declared = {line.split('>')[0].strip() for line in config['options']['install_requires'].split('\n')}
    # Imports outside of functions: packages that few users need are imported where they are used.
    nodes = [node for path in SOURCES for node in ast.parse(path.read_text()).body]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    third_party = {name.split('.')[0] for name in names} - set(sys.stdlib_module_names) - {'timm_mealv2'}
    assert {{'yaml': 'pyyaml', 'PIL': 'pillow'}.get(name, name) for name in third_party} <= declared


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of what belongs to the project: setuptools leaves its build folder in the source, and would pack it."""
    folder = tmp_path_factory.mktemp('package') / 'source'
    ignored = ignore_patterns('.*', 'output', 'build', 'dist', 'site', '*.egg-info', '__pycache__')
    return Path(copytree(ROOT, folder, ignore=ignored))


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    command = ['pip', 'wheel', '--no-deps', '--no-build-isolation', '--no-index', '-q', '-w', folder, source]
    subprocess.run([sys.executable, '-m', *command], check=True)
    (path,) = folder.glob('*.whl')
    with zipfile.ZipFile(path) as file:
        yield file


def test_source_distribution_holds_all_that_its_tests_need(source, tmp_path):
    code = f'from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=source, capture_output=True)
    (path,) = tmp_path.glob('*.tar.gz')
    with tarfile.open(path) as file:
        names = {name.partition('/')[2] for name in file.getnames()}
    there = {str(path.relative_to(source)) for path in source.rglob('*') if path.is_file()}
    assert {name for name in there if '.egg-info' not in name and not name.startswith('build/')} <= names


def test_wheel_holds_the_package_and_nothing_else(wheel):
    info = f'timm_mealv2-{timm_mealv2.__version__}.dist-info'
    names = set(wheel.namelist())
    files = {'timm_mealv2/py.typed', 'timm_mealv2/hub/card.md', *(str(path.relative_to(ROOT)) for path in SOURCES)}
    for data in ('recipes', 'templates'):
        files |= {str(path.relative_to(ROOT)) for path in (ROOT / 'timm_mealv2' / data).iterdir()}
    assert {name for name in names if not name.startswith(f'{info}/')} == files
    metadata = wheel.read(f'{info}/METADATA').decode()
    for line in ('Requires-Python: >=3.11', 'License-Expression: Apache-2.0', 'Requires-Dist: timm>=1.0.31'):
        assert line in metadata.splitlines()


def test_commands_of_the_wheel_lead_to_functions(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith('/entry_points.txt'))
    config = configparser.ConfigParser()
    config.read_string(wheel.read(name).decode())
    commands = dict(config['console_scripts'])
    assert {'mealv2-train', 'mealv2-eval', 'mealv2-report', 'mealv2-hub'} <= set(commands)
    for target in commands.values():
        module, function = target.split(':')
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.slow
def test_the_installed_wheel_trains_and_exports_in_an_empty_folder(wheel, image_folder, tmp_path):
    site, work = tmp_path / 'site', tmp_path / 'work'
    work.mkdir()
    command = ['pip', 'install', '--no-deps', '--no-index', '-q', '--target', site, wheel.filename]
    subprocess.run([sys.executable, '-m', *command], check=True)
    environment = {**os.environ, 'PYTHONPATH': str(site)}

    def run(program, *words):
        result = subprocess.run(
            [sys.executable, site / 'bin' / program, *words], cwd=work, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result

    options = '--model test_resnet --num-classes 3 --img-size 16 --epochs 1 --warmup-epochs 0 --workers 0 --device cpu'
    images = len(list((image_folder / 'train').rglob('*.png')))
    options += f' --batch-size {images // 2} --log-interval 1 --output . --experiment run'
    (work / 'teacher.py').write_text(
        'import timm\nimport timm_mealv2\n\n\ndef make():\n'
        f'    assert timm_mealv2.__file__.startswith({str(site)!r})\n'
        "    return timm.create_model('test_efficientnet', num_classes=3)\n"
    )
    log = run('mealv2-train', *options.split(), '--data-dir', image_folder, '--teachers', 'python:teacher:make').stderr
    assert 'epoch 1 [2/2] loss' in log
    run('mealv2-hub', 'export', 'run/last.pth.tar', '--out', 'student')
    assert 'MEAL V2' in (work / 'student/README.md').read_text()
    recipe = (ROOT / 'timm_mealv2/recipes/quickstart.yaml').read_text()
    assert run('mealv2-train', 'recipes', 'show', 'quickstart').stdout == recipe
    run('mealv2-report', 'run')
