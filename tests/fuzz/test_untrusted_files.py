"""Whatever a file says, no code of its runs, no request is sent, and nothing is written elsewhere (see conftest)."""

import json
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from outcomes import SMALL, WORDS, altered, ends

from timm_mealv2.cli import evaluate, hub, report, soft_labels
from timm_mealv2.training.run import main

ON_CPU = ('--workers', 0, '--device', 'cpu')
SEEDS = range(3)


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('use', ['resume', 'auto', 'initial', 'teacher', 'export', 'report'])
def test_a_checkpoint(use: str, seed: int, run_folder: Path, few_images: Path, teacher: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / 'output/run'))
    contents = torch.load(run / 'last.pth.tar', weights_only=False)
    path = tmp_path / 'altered.pth.tar'
    torch.save(altered(Random(seed), contents), path)
    training = [*SMALL, '--data-dir', few_images, '--teachers', teacher, '--output', run.parent, '--experiment']
    if use == 'teacher':
        ends(evaluate.main, [f'test_resnet={path}', '--data-dir', few_images, *ON_CPU])
    elif use == 'export':
        ends(hub.main, ['export', path, '--out', tmp_path / 'export'])
    elif use == 'initial':
        ends(main, [*training, 'new', '--initial-checkpoint', path])
    elif use == 'resume':
        ends(main, [*training, 'new', '--resume', path, '--epochs', 2])
    else:
        path.replace(run / 'last.pth.tar')
        if use == 'auto':
            ends(main, [*training, 'run', '--resume', 'auto', '--epochs', 2])
        else:
            ends(report.main, [run])


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('use', ['evaluate', 'teacher', 'student', 'ensemble'])
def test_a_config_json(use: str, seed: int, export: Path, few_images: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(export, tmp_path / 'export'))
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(altered(Random(seed), config)))
    name = f'local-dir:{folder}'
    if use == 'evaluate':
        ends(evaluate.main, [name, '--data-dir', few_images, *ON_CPU])
    elif use == 'ensemble':
        ends(hub.main, ['export-ensemble', '--teachers', name, '--out', tmp_path / 'ensemble'])
    else:
        chosen = ['--teachers', name] if use == 'teacher' else ['--model', name, '--pretrained']
        ends(main, [*SMALL, *chosen, '--data-dir', few_images, '--output', tmp_path / 'output'])


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('use', ['info', 'verify', 'train', 'record'])
def test_the_meta_json_of_a_store(
    use: str, seed: int, store: Path, few_images: Path, teacher: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(store, tmp_path / 'store'))
    meta = json.loads((folder / 'meta.json').read_text())
    meta.pop('crc', None)
    (folder / 'meta.json').write_text(json.dumps(altered(Random(seed), meta)))
    data = ['--data-dir', few_images]
    if use == 'train':
        ends(main, [*SMALL, *data, '--soft-labels', folder, '--output', tmp_path / 'output'])
    elif use == 'record':
        argv = ['--out', folder, '--epochs', 2, '--teachers', teacher, '--img-size', 16]
        ends(soft_labels.main, ['record', *data, *argv, *ON_CPU])
    elif use == 'verify':
        ends(soft_labels.main, ['verify', folder, *data, '--teachers', teacher, '--device', 'cpu'])
    else:
        ends(soft_labels.main, ['info', folder])


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('name', ['args.yaml', 'preflight.json', 'summary.csv'])
def test_a_run_folder(name: str, seed: int, run_folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / 'run'))
    random, path = Random(seed), run / name
    if name == 'summary.csv':
        path.write_text(path.read_text().replace(',', f',{random.choice(WORDS)}', random.randrange(5)))
    else:
        path.write_text(yaml.safe_dump(altered(random, yaml.safe_load(path.read_text())), default_style='"'))
    ends(report.main, [run])


@pytest.mark.parametrize(
    'tag', ['object/apply:os.system [touch x]', 'name:os.system', 'module:evil', 'object:evil.x {}']
)
def test_a_yaml_file_of_settings(tag: str, few_images: Path, tmp_path: Path) -> None:
    (tmp_path / 'settings.yaml').write_text(f'model: !!python/{tag}\n')
    argv = [*SMALL, '-c', tmp_path / 'settings.yaml', '--data-dir', few_images, '--output', tmp_path / 'output']
    assert ends(main, argv) == 2


@pytest.mark.parametrize('word', [word for word in WORDS if not word.startswith(('hf', 'python', 'resnet'))])
def test_a_list_of_classes_and_a_teachers_text(word: str, few_images: Path, teacher: str, tmp_path: Path) -> None:
    path = tmp_path / 'classes.txt'
    path.write_text(f'{word}\n0\n{word}\n')
    argv = [*SMALL, '--data-dir', few_images, '--output', tmp_path / 'output', '--teachers']
    ends(main, [*argv, teacher, '--class-map', path])
    ends(main, [*argv, teacher, '--teacher-classes', f'{teacher}={path}'])
    ends(main, [*argv, f'{word}={teacher.partition("=")[2]}'])
