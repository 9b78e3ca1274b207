"""Tests of the package as a whole: what a wheel holds, what importing it does, and which file may import which."""

import ast
import configparser
import importlib
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import timm

import timm_mealv2

ROOT = Path(timm_mealv2.__file__).parents[1]
SOURCES = sorted((ROOT / 'timm_mealv2').rglob('*.py'))

# From the ground up. A room imports from its own layer and those below; no two rooms import each other.
LAYERS = (
    {'version', 'errors', 'files', 'randomness'},
    {'cli', 'normalisation', 'losses', 'discriminator', 'datasets', 'export_folder'},
    {'mealv2_students', 'mealv2_teachers'},
    {'task', 'soft_labels'},
    {'evaluation', 'report', 'hub', 'hub_client', 'hub_export', 'model_card', 'demo'},
    {'training'},
)


def run_python(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)


# Importing


def test_import_is_silent_and_leaves_the_programs_alone():
    result = run_python(
        'import sys, warnings, timm\n'
        'warnings.simplefilter("error")\n'
        'import timm_mealv2\n'
        'names = ("timm_mealv2.training", "timm_mealv2.cli.hub", "timm_mealv2.report", "matplotlib")\n'
        'assert not [name for name in names if name in sys.modules]\n'
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, '', '')


def test_import_takes_less_than_a_tenth_of_a_second_on_top_of_timm():
    # Of the processor's time, which other work on the machine leaves nearly as it is; the best of a few.
    code = 'import time, timm; start = time.process_time(); import timm_mealv2; print(time.process_time() - start)'
    assert any(float(run_python(code).stdout) < 0.1 for _ in range(5))


def test_public_names_and_models_are_there():
    assert set(timm_mealv2.__all__) == {
        'Discriminator',
        'DiscriminatorLoss',
        'EnsembleTeacher',
        'MealV2Task',
        '__version__',
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


# Layers


def room(path):
    return path.relative_to(ROOT / 'timm_mealv2').parts[0].removesuffix('.py')


def imported_names(path, top_level=False):
    """Full names of the modules that a file imports anywhere, or only outside of functions."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if top_level and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{path.name} has a relative import'
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def imported_rooms(path):
    names = [name.split('.') for name in imported_names(path)]
    return {name[1] for name in names if name[0] == 'timm_mealv2'} - {room(path)}


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    if room(path) == '__init__':
        return
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    assert room(path) in layer, 'a new file: give it a layer'
    assert not {name for name in imported_rooms(path) if layer[name] > layer[room(path)]}


def test_no_two_rooms_import_each_other():
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        graph.setdefault(room(path), set()).update(imported_rooms(path))
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_what_computes_knows_no_command_line():
    for name in ('losses', 'discriminator', 'data/normalize', 'task'):
        names = set(imported_names(ROOT / 'timm_mealv2' / f'{name}.py'))
        assert not [name for name in names if name.split('.')[0] == 'argparse' or name.startswith('timm_mealv2.cli')]


# Distribution


def test_every_import_is_a_declared_dependency():
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    declared = {line.split('>')[0].strip() for line in config['options']['install_requires'].split('\n')}
    names = {name.split('.')[0] for path in SOURCES for name in imported_names(path, top_level=True)}
    third_party = names - set(sys.stdlib_module_names) - {'timm_mealv2'}
    assert {{'yaml': 'pyyaml', 'PIL': 'pillow'}.get(name, name) for name in third_party} <= declared


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    # setuptools leaves its build folder in the source, and would pack what an older build left there.
    copytree(
        ROOT, folder / 'source', ignore=ignore_patterns('.*', 'output', 'build', 'dist', '*.egg-info', '__pycache__')
    )
    command = ['pip', 'wheel', '--no-deps', '--no-build-isolation', '--no-index', '-q', '-w', folder, folder / 'source']
    subprocess.run([sys.executable, '-m', *command], check=True)
    (path,) = folder.glob('*.whl')
    with zipfile.ZipFile(path) as file:
        yield file


def test_wheel_holds_the_package_and_nothing_else(wheel):
    info = f'timm_mealv2-{timm_mealv2.__version__}.dist-info'
    names = set(wheel.namelist())
    files = {'timm_mealv2/py.typed', 'timm_mealv2/model_card.md', *(str(path.relative_to(ROOT)) for path in SOURCES)}
    files |= {str(path.relative_to(ROOT)) for path in (ROOT / 'timm_mealv2' / 'recipes').glob('*.yaml')}
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
