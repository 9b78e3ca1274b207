"""Folders and files from elsewhere: exported models, stores of soft labels, run folders, images, lists of classes."""

import io
import json
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from outcomes import SMALL, WORDS, altered, damaged, is_accepted
from PIL import Image

from timm_mealv2.cli import evaluate, hub, soft_labels
from timm_mealv2.models.factory import TeacherSpec
from timm_mealv2.training.run import main

ON_CPU = ('--workers', 0, '--device', 'cpu')


def alter_json(random: Random, path: Path) -> None:
    """Change the values of a JSON file, or damage its text."""
    content = path.read_bytes()
    if random.randrange(4):
        path.write_text(json.dumps(altered(random, json.loads(content))))
    else:
        path.write_bytes(damaged(random, content))


@settings(max_examples=12)
@given(st.sampled_from(['evaluate', 'teacher', 'student', 'push']), st.randoms())
def test_any_config_json_is_used_or_refused_in_one_line(
    export: Path, few_images: Path, tmp_path: Path, how: str, random: Random
) -> None:
    folder = tmp_path / 'export'
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(export, folder)
    alter_json(random, folder / 'config.json')
    name = f'local-dir:{folder}'
    if how == 'evaluate':
        is_accepted(evaluate.main, [name, '--data-dir', few_images, *ON_CPU])
    elif how == 'push':
        is_accepted(hub.main, ['export-ensemble', '--teachers', name, '--out', tmp_path / 'ensemble'])
    else:
        chosen = ['--teachers', name] if how == 'teacher' else ['--model', name, '--pretrained']
        shutil.rmtree(tmp_path / 'output', ignore_errors=True)
        is_accepted(main, [*SMALL, *chosen, '--data-dir', few_images, '--output', tmp_path / 'output'])


@settings(max_examples=12)
@given(st.sampled_from(['info', 'verify', 'show', 'train', 'record']), st.randoms())
def test_a_damaged_store_is_used_or_refused_in_one_line(
    store: Path, few_images: Path, teacher: str, tmp_path: Path, how: str, random: Random
) -> None:
    folder = tmp_path / 'store'
    for made in (folder, tmp_path / 'output'):
        shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(store, folder)
    path = random.choice([folder / 'meta.json', *sorted(folder.iterdir())])
    if path.name == 'meta.json':
        alter_json(random, path)
    else:
        path.write_bytes(damaged(random, path.read_bytes()))
    note(path.name)
    data = ['--data-dir', few_images]
    if how == 'train':
        is_accepted(main, [*SMALL, *data, '--soft-labels', folder, '--output', tmp_path / 'output'])
    elif how == 'record':
        argv = ['--out', folder, '--epochs', 2, '--teachers', teacher, '--img-size', 16]
        is_accepted(soft_labels.main, ['record', *data, *argv, *ON_CPU])
    elif how == 'show':
        is_accepted(soft_labels.main, ['show', folder, 0, *data, '--out', tmp_path / 'shown.png'])
    elif how == 'verify':
        is_accepted(soft_labels.main, ['verify', folder, *data, '--samples', 4, '--device', 'cpu'])
    else:
        is_accepted(soft_labels.main, ['info', folder])


@settings(max_examples=8)
@given(st.randoms())
def test_a_damaged_run_folder_is_continued_or_refused_in_one_line(
    run_folder: Path, few_images: Path, teacher: str, tmp_path: Path, random: Random
) -> None:
    output = tmp_path / 'output'
    shutil.rmtree(output, ignore_errors=True)
    run = Path(shutil.copytree(run_folder, output / 'run'))
    name = random.choice(['summary.csv', 'summary.csv', 'preflight.json', 'args.yaml'])
    note(name)
    path = run / name
    if name == 'preflight.json':
        alter_json(random, path)
    elif name == 'summary.csv' and random.randrange(2):
        rows = [line.split(',') for line in path.read_text().splitlines()]
        path.write_text('\n'.join(','.join(map(str, row)) for row in altered(random, rows) if isinstance(row, list)))
    else:
        path.write_bytes(damaged(random, path.read_bytes()))
    argv = [*SMALL, '--data-dir', few_images, '--teachers', teacher, '--model-ema', '--output', output]
    is_accepted(main, [*argv, '--experiment', 'run', '--resume', 'auto', '--epochs', 2])


def encoded(random: Random) -> bytes:
    """An image of some size, mode and format, whole or not."""
    mode = random.choice(['RGB', 'L', 'I;16', 'CMYK', 'P', 'RGBA', 'LA', '1', 'F', 'YCbCr', 'animated', 'turned'])
    size = random.choice([(1, 1), (1, 40), (40, 1), (16, 16), (31, 17), (300, 2)])
    image = Image.fromarray(np.random.default_rng(random.randrange(2**32)).integers(0, 256, (*size, 3), np.uint8))
    file, options = io.BytesIO(), {}
    kind = {'CMYK': 'JPEG', 'YCbCr': 'JPEG', 'turned': 'JPEG', 'F': 'TIFF', 'animated': 'GIF'}.get(mode, 'PNG')
    if mode == 'animated':
        options = {'save_all': True, 'append_images': [image.rotate(90)]}
    elif mode == 'turned':
        options = {'exif': Image.Exif()}
        options['exif'][0x0112] = random.choice([1, 3, 6, 8, 99])
    elif mode == 'I;16':
        image = Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(file, kind, **options)
    note(f'{mode} {size}')
    return damaged(random, file.getvalue()) if random.randrange(3) == 0 else file.getvalue()


@settings(max_examples=12)
@given(st.sampled_from(['train', 'evaluate', 'record']), st.randoms())
def test_any_image_is_read_or_left_out(
    few_images: Path, teacher: str, tmp_path: Path, how: str, random: Random
) -> None:
    data = tmp_path / 'data'
    for made in (data, tmp_path / 'output', tmp_path / 'store'):
        shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(few_images, data)
    for path in random.sample(sorted(data.rglob('*.png')), 4):
        path.write_bytes(encoded(random))
    if how == 'evaluate':
        accepted = is_accepted(evaluate.main, [teacher, '--data-dir', data, *ON_CPU])
    elif how == 'train':
        accepted = is_accepted(main, [*SMALL, '--data-dir', data, '--output', tmp_path / 'output'])
    else:
        argv = ['--out', tmp_path / 'store', '--epochs', 1, '--teachers', teacher, '--img-size', 16]
        accepted = is_accepted(soft_labels.main, ['record', '--data-dir', data, *argv, *ON_CPU])
    note(f'accepted: {accepted}')


def test_an_image_of_60000_pixels_a_side_is_left_out(
    few_images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Path(shutil.copytree(few_images, tmp_path / 'data'))
    header = b'BM' + bytes(8) + (54).to_bytes(4, 'little') + (40).to_bytes(4, 'little')
    side = (60_000).to_bytes(4, 'little')
    content = header + side + side + b'\1\0\x18\0' + bytes(24)
    (data / 'train' / 'cold' / '000.png').write_bytes(content + bytes(100))
    assert is_accepted(main, [*SMALL, '--data-dir', data, '--output', tmp_path / 'output'])
    assert 'Left out' in caplog.text
    assert 'decompression bomb' in caplog.text


def lines(random: Random) -> bytes:
    """A text file of class names or indices, or what somebody takes for one."""
    words = ['0', '1', '2', '-1', '99', '1.5', 'cold', 'plain', 'warm', '# x', '0 1', 'cold 0', 'cold,0', *WORDS]
    text = '\n'.join(random.choice(words) for _ in range(random.randrange(6)))
    return damaged(random, text.encode()) if text and random.randrange(4) == 0 else text.encode()


@settings(max_examples=20)
@given(st.sampled_from(['class-map', 'class-map of mealv2-eval', 'teacher-classes']), st.randoms())
def test_any_list_of_classes_is_used_or_refused_in_one_line(
    few_images: Path, teacher: str, tmp_path: Path, how: str, random: Random
) -> None:
    shutil.rmtree(tmp_path / 'output', ignore_errors=True)
    path = tmp_path / f'classes{random.choice([".txt", ".pkl", ""])}'
    path.write_bytes(lines(random))
    data = ['--data-dir', few_images]
    if how == 'class-map of mealv2-eval':
        is_accepted(evaluate.main, [teacher, *data, '--class-map', path, *ON_CPU])
    else:
        chosen = ['--class-map', path] if how == 'class-map' else ['--teacher-classes', f'{teacher}={path}']
        is_accepted(main, [*SMALL, *data, '--teachers', teacher, *chosen, '--output', tmp_path / 'output'])


@settings(max_examples=120)
@given(st.text(max_size=12) | st.lists(st.sampled_from(['=', ':', ',', 'python:', *WORDS])).map(''.join))
def test_any_text_names_a_teacher_or_is_refused_in_one_line(text: str) -> None:
    if not text.startswith('hf-hub:'):
        is_accepted(lambda argv: [spec.check() for spec in TeacherSpec.parse_all(argv)] and None, [text])
