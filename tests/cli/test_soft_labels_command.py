"""Tests of timm_mealv2/soft_labels/command.py, merge.py and verify.py: the program as a user runs it."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import write_images
from PIL import Image
from torch import nn

from timm_mealv2.cli.parser import run_cli
from timm_mealv2.cli.soft_labels import main
from timm_mealv2.soft_labels.store import SoftLabelStore, record_dtype


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Images, a teacher's weights and the same teacher trained otherwise, and two stores with different seeds."""
    root = tmp_path_factory.mktemp('command')
    write_images(root / 'images' / 'train', 4, seed=3)
    for seed, name in enumerate(('teacher', 'other')):
        torch.manual_seed(seed)
        torch.save(timm.create_model('test_resnet', num_classes=7).state_dict(), root / f'{name}.pth')
    for name, options in (('a', ()), ('b', ('--seed', '7', '--crops', '2'))):
        main(record_arguments(root, root / name, *options))
    return root


def record_arguments(root, out, *options):
    return [
        *('record', '--teachers', f'test_resnet={root}/teacher.pth', '--data-dir', f'{root}/images', '--out', str(out)),
        *('--crops', '3', '--top-k', '4', '--img-size', '24', '-j', '0', '--device', 'cpu', *options),
    ]


def refused(capsys, *arguments):
    """The one line that the program ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        run_cli(main, [str(argument) for argument in arguments])
    assert error.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith('error: ')
    return line


# record, info


def test_the_program_runs_as_a_module(folder):
    result = subprocess.run(
        [sys.executable, '-m', 'timm_mealv2.soft_labels', 'info', folder / 'a'], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, '')


def test_info_shows_what_a_store_holds(folder, capsys):
    main(['info', str(folder / 'a')])
    text = capsys.readouterr().out
    meta = SoftLabelStore(folder / 'a').meta
    size = sum(path.stat().st_size for path in (folder / 'a').iterdir())
    for words in (
        f'teachers  test_resnet={folder}/teacher.pth: weight 1',
        meta.teachers[0]['sha256'][:12],
        f'top 4 of 7 classes, mean kept probability mass {meta.kept_mass:.4f}',
        '3 an image, 24x24 RGB, bilinear, scale 0.08..1, ratio 0.75..1.333, hflip 0.5, seed 42',
        '12, 0 of them unreadable',
        '12 images x 3 crops = 36 records of 24 bytes',
        f'{size:,} bytes in 3 files',
        f'Pillow {Image.__version__}',
    ):
        assert words in text
    assert 4 / 7 < meta.kept_mass < 1


def test_info_names_unreadable_images(folder, tmp_path, capsys):
    root = shutil.copytree(folder, tmp_path / 'copy')
    (root / 'images' / 'train' / 'plain' / '001.png').write_bytes(b'')
    main(record_arguments(root, tmp_path / 'labels'))
    main(['info', str(tmp_path / 'labels')])
    assert '12, 1 of them unreadable\n          plain/001.png\n' in capsys.readouterr().out


def test_info_refuses_an_altered_store(folder, tmp_path, capsys):
    shutil.copytree(folder / 'a', tmp_path / 'a')
    data = bytearray((tmp_path / 'a' / 'shard-00000.safetensors').read_bytes())
    data[-1] ^= 1
    (tmp_path / 'a' / 'shard-00000.safetensors').write_bytes(data)
    assert 'shard-00000.safetensors has been altered' in refused(capsys, 'info', tmp_path / 'a')


def test_defaults_are_those_of_the_teachers(folder, tmp_path):
    main([*record_arguments(folder, tmp_path / 'labels')[:7], '--crops', '1', '-j', '0', '--device', 'cpu'])
    meta = SoftLabelStore(tmp_path / 'labels').meta
    assert meta.image_size == list(timm.create_model('test_resnet').pretrained_cfg['input_size'][1:])
    assert (meta.top_k, meta.num_classes) == (7, 7)  # of the 10 by default, those that there are


def test_the_classes_of_a_teacher_are_chosen(folder, tmp_path, capsys):
    (tmp_path / 'classes.txt').write_text('5\n0\n3\n')
    spec = f'test_resnet={folder}/teacher.pth'
    options = ['--teacher-classes', f'{spec}={tmp_path}/classes.txt', '--top-k', '3', '--num-classes', '3']
    main(record_arguments(folder, tmp_path / 'labels', *options))
    meta = SoftLabelStore(tmp_path / 'labels').meta
    assert (meta.num_classes, meta.teachers[0]['classes']) == (3, [5, 0, 3])
    main(['verify', str(tmp_path / 'labels'), '--data-dir', f'{folder}/images', '--device', 'cpu', '--samples', '9'])


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (('--top-k', '8'), '--top-k must be from 1 to 7'),
        (('--num-classes', '10'), 'has 7 classes, but 10 are asked for'),
        (('--train-interpolation', 'random'), '--train-interpolation must be one'),
        (('--data-dir', '/nowhere'), "no data set at '/nowhere'"),
        (('--dataset', 'wds/some', '--data-dir', '/nowhere'), 'wds/some'),
        (('--device', 'nonsense'), '--device nonsense'),
        (('--teachers', 'resnet999'), "'resnet999' is no timm model"),
        (('--batch-size', '0'), '--batch-size must be 1 or more'),
    ],
)
def test_mistakes_are_one_line(options, words, folder, tmp_path, capsys):
    assert words in refused(capsys, *record_arguments(folder, tmp_path / 'labels', *options))
    assert not (tmp_path / 'labels').exists()


# verify


def verify(root, store, *options):
    return ['verify', str(store), '--data-dir', f'{root}/images', '--device', 'cpu', '--samples', '20', *options]


def figures(text):
    return {line[:20].strip(): line[20:].split()[0] for line in text.splitlines()}


def test_verify_passes_for_the_recorded_teachers(folder, capsys):
    capsys.readouterr()
    main(verify(folder, folder / 'a'))
    found = figures(capsys.readouterr().out)
    assert found['compared'] == '20'
    assert 0 < float(found['mean difference']) <= float(found['largest difference']) < 5e-4  # float16
    assert found['same top-1'] == '100.00%'


def test_verify_takes_teachers_from_another_place(folder, tmp_path, capsys):
    root = Path(shutil.copytree(folder, tmp_path / 'moved'))
    meta = (root / 'a' / 'meta.json').read_text()
    (root / 'a' / 'meta.json').write_text(meta.replace(f'{folder}/teacher.pth', 'gone/teacher.pth'))
    assert 'gone/teacher.pth: there is no such file' in refused(capsys, *verify(root, root / 'a'))
    main(verify(root, root / 'a', '--teachers', f'test_resnet={root}/teacher.pth'))


def test_verify_names_teachers_with_other_weights(folder, capsys):
    line = refused(capsys, *verify(folder, folder / 'a', '--teachers', f'test_resnet={folder}/other.pth'))
    assert f'not the recorded teachers: test_resnet={folder}/teacher.pth had other weights' in line
    line = refused(capsys, *verify(folder, folder / 'a', '--teachers', 'resnet18', 'resnet34'))
    assert 'must name the 1 recorded ones' in line


def test_verify_refuses_labels_that_do_not_match(folder, tmp_path, capsys):
    store = Path(shutil.copytree(folder / 'a', tmp_path / 'a'))
    (shard,) = store.glob('shard-*')
    meta = json.loads((store / 'meta.json').read_text())
    data = np.frombuffer(bytearray(shard.read_bytes()), np.uint8)
    records = data[-36 * 24 :].view(record_dtype(7, 4))
    records['classes'] = records['classes'][:, ::-1]  # the probabilities are now those of other classes
    shard.write_bytes(data.tobytes())
    meta['shards'][0]['sha256'] = hashlib.sha256(data.tobytes()).hexdigest()
    (store / 'meta.json').write_text(json.dumps(meta))
    line = refused(capsys, *verify(folder, store, '--tolerance', '0.001'))
    assert re.search(r'the labels do not match: a probability differs by \S+, more than --tolerance 0.001', line)


def test_verify_refuses_other_images(folder, tmp_path, capsys):
    write_images(tmp_path / 'images' / 'train', 4, seed=4)
    assert 'have other pixels now' in refused(capsys, *verify(tmp_path, folder / 'a'))
    for number, path in enumerate(sorted((tmp_path / 'images').rglob('*.png'))):
        path.rename(path.with_name(f'{number + 100}.png'))
    assert 'has labels for none of these images' in refused(capsys, *verify(tmp_path, folder / 'a'))


# estimate


def test_estimate_tells_bytes_and_hours_and_writes_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    arguments = record_arguments(folder, 'x')
    arguments[arguments.index('--out') : arguments.index('--out') + 2] = ['--images', '1281167']
    main(['estimate', *arguments[1:], '--seconds', '0.2'])
    text = capsys.readouterr().out
    rate = float(re.search(r'measured  ([\d,.]+) crops/s', text)[1].replace(',', ''))
    assert '1,281,167 images x 3 crops = 3,843,501, 24 bytes each' in text
    assert 'bytes     92,244,024 (92.2 MB' in text
    hours = float(re.search(r'hours     ([\d,.]+)', text)[1].replace(',', ''))
    assert hours == pytest.approx(3_843_501 / rate / 3600, rel=0.02, abs=0.006)
    assert not list(tmp_path.iterdir())


# merge


def test_merge_joins_the_crops_of_stores(folder, tmp_path):
    out = tmp_path / 'merged'
    main(['merge', str(folder / 'a'), str(folder / 'b'), '--out', str(out)])
    merged, a, b = (SoftLabelStore(path) for path in (out, folder / 'a', folder / 'b'))
    assert (merged.meta.crops, merged.meta.seeds, merged.names) == (5, [42, 7], a.names)
    assert merged.meta.fingerprint == a.meta.fingerprint
    assert merged.meta.kept_mass == pytest.approx((3 * a.meta.kept_mass + 2 * b.meta.kept_mass) / 5)
    for row in range(12):
        records = merged.records(row, range(5)).tobytes()
        assert records == a.records(row, range(3)).tobytes() + b.records(row, range(2)).tobytes()
    main(verify(folder, out))  # compares the sample crops' pixels too
    assert len(merged.meta.pixel_samples) == 16
    assert any(sample.crop < 3 for sample in merged.meta.pixel_samples)
    assert any(sample.crop >= 3 for sample in merged.meta.pixel_samples)

    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    main(['merge', str(folder / 'a'), str(folder / 'b'), '--out', str(out)])
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_merge_refuses_stores_that_do_not_fit(folder, tmp_path, capsys):
    root = Path(shutil.copytree(folder, tmp_path / 'copy'))
    a = folder / 'a'
    model = timm.create_model('test_resnet', num_classes=7)
    nn.init.normal_(model.get_classifier().weight)
    torch.save(model.state_dict(), tmp_path / 'retrained.pth')
    for number, (options, words) in enumerate(
        (
            ((), 'hold the same crops (seed 42)'),
            (('--seed', '3', '--top-k', '2'), '--top-k 4, not 2'),
            (('--seed', '3', '--img-size', '32'), '--img-size 24 24, not 32 32'),
            (('--seed', '3', '--scale', '0.2', '1'), '--scale 0.08 1.0, not 0.2 1.0'),
            (('--seed', '3', '--teachers', f'test_resnet={tmp_path}/retrained.pth'), '--teachers'),
        )
    ):
        other = tmp_path / f'other{number}'
        main(record_arguments(root, other, *options))
        line = refused(capsys, 'merge', a, other, '--out', tmp_path / 'merged')
        assert words in line
        assert str(a) in line
        assert str(other) in line
    (root / 'images' / 'train' / 'warm' / '003.png').write_bytes(b'')
    main(record_arguments(root, tmp_path / 'fewer', '--seed', '3'))
    line = refused(capsys, 'merge', a, tmp_path / 'fewer', '--out', tmp_path / 'merged')
    assert 'the size of warm/003.png 24x24, not 0x0' in line
    assert 'two stores or more' in refused(capsys, 'merge', a, '--out', tmp_path / 'merged')
    assert not (tmp_path / 'merged').exists()
