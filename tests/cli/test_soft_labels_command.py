"""The program `mealv2-softlabels` as a user runs it."""

import ctypes
import functools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from images import write_images
from PIL import Image

from timm_mealv2.cli import soft_labels
from timm_mealv2.cli.evaluate import main as evaluate
from timm_mealv2.cli.soft_labels import main
from timm_mealv2.command_line import run_cli
from timm_mealv2.soft_labels.store import SoftLabelStore, StoreMeta


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a teacher's weights and the same teacher trained otherwise, and a store of three mixed epochs."""
    root = tmp_path_factory.mktemp('command')
    write_images(root / 'images' / 'train', 4, seed=3)
    for seed, name in enumerate(('teacher', 'other')):
        torch.manual_seed(seed)
        torch.save(timm.create_model('test_resnet', num_classes=7).state_dict(), root / f'{name}.pth')
    main(record_arguments(root, root / 'store', '--cutmix', '1', '--aa', 'rand-m9'))
    return root


def record_arguments(root: Path, out: Path, *options: str) -> list[str]:
    return [
        *('record', '--teachers', f'test_resnet={root}/teacher.pth', '--data-dir', f'{root}/images', '--out', str(out)),
        *('--epochs', '3', '--top-k', '4', '--img-size', '24', '-j', '0', '--device', 'cpu', *options),
    ]


def refused(capsys: Any, *arguments: Any) -> str:
    """The one line that the program ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        run_cli(main, [str(argument) for argument in arguments])
    assert error.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith('error: ')
    return line


# record, info


def test_without_a_gpu_it_runs_on_the_cpu(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    words = record_arguments(folder, tmp_path / 'store')
    words = [word for word in words if word not in ('--device', 'cpu')]
    main(words)
    main(['verify', str(tmp_path / 'store'), '--data-dir', str(folder / 'images')])


def test_info_shows_what_a_store_holds(folder: Path, capsys: Any) -> None:
    capsys.readouterr()
    main(['show', str(folder / 'store')])
    text = capsys.readouterr().out
    for words in (
        'teacher   name test_resnet=',
        'weight 1',
        'samples   input_size 3 24 24, ',
        'seed 42',
        'aa rand-m9, ',
        'cutmix 1.0',
        '12 images x 3 epochs = 36 records of 20 bytes, 720B',
        f'Pillow {Image.__version__}',
        'epoch 1   top 4 of 7 classes keep 0.',
        '0 images without a record',
    ):
        assert words in text


def test_the_teachers_are_measured_where_there_is_a_validation_split(
    image_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    for seed, name in enumerate(('test_resnet', 'test_efficientnet')):
        torch.manual_seed(seed)
        torch.save(timm.create_model(name, num_classes=3).state_dict(), tmp_path / f'{name}.pth')
    texts = [f'{name}={tmp_path}/{name}.pth' for name in ('test_resnet', 'test_efficientnet')]
    data = ['--data-dir', str(image_folder), '--device', 'cpu']
    store = str(tmp_path / 'store')
    options = ['--epochs', '1', '--img-size', '24', '-j', '0', '--teachers', *texts]
    main(['record', *data, *options, '--out', store])
    file = str(tmp_path / 'rows.json')
    evaluate([texts[0], *data, '--teachers', *texts, '--img-size', '24', '-j', '0', '--json', file])
    rows = json.loads(Path(file).read_text())
    figures = StoreMeta.read(tmp_path / 'store').figures
    assert set(figures) == {'ensemble', *(f'teacher {text}' for text in texts)}
    for name, expected in ((f'teacher {texts[0]}', rows[texts[0]]), ('ensemble', rows['ensemble'])):
        assert (figures[name]['top1'], figures[name]['samples']) == (expected['top1'], expected['samples'])
    capsys.readouterr()
    main(['show', store])
    shown = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert ['ensemble', '12', f'{figures["ensemble"]["top1"]:.2f}'] in shown


def test_info_names_unreadable_images_and_how_far_a_recording_is(folder: Path, tmp_path: Path, capsys: Any) -> None:
    root = Path(shutil.copytree(folder, tmp_path / 'copy'))
    (root / 'images' / 'train' / 'plain' / '001.png').write_bytes(b'')
    main(record_arguments(root, tmp_path / 'labels', '--epochs', '11'))
    (tmp_path / 'labels' / 'part-00010-00000').unlink()
    main(['info', str(tmp_path / 'labels')])
    text = capsys.readouterr().out
    assert '1 images without a record plain/001.png' in text
    assert 'epochs    10 of 11 are there; 1 of 2 parts of' in text


def test_further_epochs_are_recorded_by_the_same_command(folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folder / 'store', tmp_path / 'store'))
    main(record_arguments(folder, out, '--cutmix', '1', '--aa', 'rand-m9', '--epochs', '5'))
    assert SoftLabelStore(out).epochs == 5


def test_a_batch_that_is_larger_than_the_data_set_is_all_of_it(folder: Path, tmp_path: Path) -> None:
    for name, size in (('all', 36), ('more', 10**12)):
        main(record_arguments(folder, tmp_path / name, '-b', str(size)))
    part = 'part-00000-00000'
    assert (tmp_path / 'more' / part).read_bytes() == (tmp_path / 'all' / part).read_bytes()


def test_pixels_are_the_teachers_or_those_of_a_student(folder: Path, tmp_path: Path) -> None:
    arguments = [*record_arguments(folder, tmp_path / 'labels')[:7], '--epochs', '1', '-j', '0', '--device', 'cpu']
    main(arguments)
    meta = SoftLabelStore(tmp_path / 'labels').meta
    assert meta.augmentation.input_size == (3, 160, 160)
    assert meta.augmentation.mean == (0.5,) * 3
    assert (meta.top_k, meta.num_classes) == (7, 7)  # of the 10 by default, those that there are
    arguments[arguments.index('--out') + 1] = str(tmp_path / 'student')
    main([*arguments, '--model', 'resnet18', '--mean', '0.4'])
    augmentation = SoftLabelStore(tmp_path / 'student').meta.augmentation
    assert (augmentation.input_size, augmentation.mean, augmentation.std) == (
        (3, 224, 224),
        (0.4,) * 3,
        (0.229, 0.224, 0.225),
    )


def test_settings_come_from_a_recipe_and_a_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / 'settings.yaml'
    file.write_text(f'data_dir: {folder}/images\nepochs: 2\nlr: 0.1\nreprob: 0.5\nscale: [0.5, 1]\nworkers: 0\n')
    torch.manual_seed(0)
    torch.save(timm.create_model('test_resnet', num_classes=10, in_chans=1).state_dict(), tmp_path / 'gray.pth')
    arguments = ['record', '--recipe', 'quickstart', '-c', str(file), '--out', str(tmp_path / 'store')]
    main([*arguments, '--teachers', f'test_resnet={tmp_path}/gray.pth', '--device', 'cpu', '--reprob', '0.4'])
    meta = SoftLabelStore(tmp_path / 'store').meta
    augmentation = meta.augmentation
    assert (meta.epochs, augmentation.reprob, augmentation.scale) == (2, 0.4, (0.5, 1))
    assert (augmentation.input_size, augmentation.mean, augmentation.color_jitter) == ((1, 32, 32), (0.286,), 0)


def test_one_teacher_a_sample_is_recorded_shown_and_verified(folder: Path, tmp_path: Path, capsys: Any) -> None:
    both = [f'test_resnet={folder}/{name}.pth' for name in ('teacher', 'other')]
    main(record_arguments(folder, tmp_path / 'store', '--teachers', *both, '--teachers-per-sample', '1'))
    capsys.readouterr()
    main(['info', str(tmp_path / 'store')])
    assert '1 of the teachers for each sample' in capsys.readouterr().out
    main(verify(folder, tmp_path / 'store'))
    line = refused(capsys, *record_arguments(folder, tmp_path / 'store', '--teachers', *both))
    assert '--teachers-per-sample 1, not None' in line


def test_mixed_precision_is_recorded_and_said(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level('INFO'):
        main(record_arguments(folder, tmp_path / 'store', '--amp', '--amp-dtype', 'bfloat16'))
    assert caplog.text.count('Teachers in bfloat16: on the first batch') == 1
    assert StoreMeta.read(tmp_path / 'store').teachers[0]['autocast_dtype'] == 'bfloat16'
    main(record_arguments(folder, tmp_path / 'exact', '--amp', '--teacher-dtype', 'float32'))
    assert StoreMeta.read(tmp_path / 'exact').teachers[0]['autocast_dtype'] == 'float32'


def test_the_classes_of_a_teacher_are_chosen(folder: Path, tmp_path: Path) -> None:
    (tmp_path / 'classes.txt').write_text('5\n0\n3\n')
    spec = f'test_resnet={folder}/teacher.pth'
    options = ['--teacher-classes', f'{spec}={tmp_path}/classes.txt', '--top-k', '3', '--num-classes', '3']
    main(record_arguments(folder, tmp_path / 'labels', *options))
    meta = SoftLabelStore(tmp_path / 'labels').meta
    assert (meta.num_classes, meta.teachers[0]['classes']) == (3, [5, 0, 3])
    main(verify(folder, tmp_path / 'labels'))


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (('--num-classes', '10'), 'has 7 classes, but 10'),
        (('--mixup', '0.2', '--mixup-mode', 'batch'), '--mixup-mode batch: a sample would depend on its batch'),
        (('--data-dir', '/nowhere'), "no data set at '/nowhere'"),
        (('--dataset', 'wds/some', '--data-dir', '/nowhere'), 'wds/some'),
        (('--device', 'nonsense'), '--device nonsense cannot be used: '),
        (('--teachers', 'resnet999'), 'resnet999'),
        (('--epochs', '0'), '--epochs'),
        (('--device', 'xpu'), '--device xpu cannot be used: '),
        (('--model', 'absent'), "--model: 'absent': timm has no such model"),
        (('--model', 'local-dir:/absent'), '--model local-dir:/absent cannot be made'),
        (('--mean', '0.1', '0.2'), '--mean and --std take one value or 3'),
        (('--cutmix-minmax', '0.5'), '--cutmix-minmax 0.5: must be two values'),
    ],
)
def test_mistakes_are_one_line(options: tuple[str, ...], words: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert words in refused(capsys, *record_arguments(folder, tmp_path / 'labels', *options))
    assert not (tmp_path / 'labels').exists()


def test_teachers_and_epochs_are_needed(folder: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ['record', '--out', tmp_path / 'x', '--data-dir', folder / 'images']
    for given in (['--epochs', 1], ['--teachers', 'resnet18']):
        assert 'name --teachers' in refused(capsys, *arguments, *given)


# Containers

_UNSHARE = ['unshare', '--pid', '--fork', '--mount-proc']
_CLONE_NEWPID = 0x20000000


def record_slowly(name: str, begun: Path, arguments: list[str]) -> None:
    """Record as process number 1, and note what has been written."""
    assert os.getpid() == 1
    rename = os.replace

    def replace(source: Any, target: Any) -> None:
        time.sleep(0.2)  # so that both processes are at it
        rename(source, target)
        with (begun / name).open('a') as file:
            print(Path(target).name, file=file)

    os.replace = replace
    (begun / name).touch()
    while len(list(begun.iterdir())) < 2:
        time.sleep(0.01)
    main(arguments)


def contain(*args: Any) -> None:
    """Call `record_slowly` in a process that is the first of a namespace of its own."""
    ctypes.CDLL(None).unshare(_CLONE_NEWPID)
    process = multiprocessing.get_context('fork').Process(target=record_slowly, args=args)
    process.start()
    process.join()
    sys.exit(process.exitcode)


@pytest.mark.skipif(
    not shutil.which('unshare') or subprocess.run([*_UNSHARE, 'true'], capture_output=True).returncode != 0,
    reason='needs process namespaces',
)
def test_two_containers_with_one_hostname_share_the_parts(folder: Path, tmp_path: Path) -> None:
    arguments = record_arguments(folder, tmp_path / 'store', '--epochs', '80')  # eight parts
    begun = tmp_path / 'begun'
    begun.mkdir()
    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=contain, args=(name, begun, arguments)) for name in ('one', 'two')]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    made = [[line for line in path.read_text().split() if line.startswith('part-')] for path in begun.iterdir()]
    assert min(map(len, made)) > 0
    assert sorted(made[0] + made[1]) == [f'part-{10 * number:05}-00000' for number in range(8)]


# verify


def verify(root: Path, store: Path, *options: str) -> list[str]:
    return ['verify', str(store), '--data-dir', f'{root}/images', '--device', 'cpu', '--samples', '20', *options]


def test_verify_passes_for_the_recorded_teachers(folder: Path, capsys: Any) -> None:
    capsys.readouterr()
    main(verify(folder, folder / 'store'))
    found = {line[:20].strip(): line[20:].split()[0] for line in capsys.readouterr().out.splitlines()}
    assert (found['read'], found['compared']) == ('36', '20')
    assert 0 < float(found['largest difference']) < 5e-4  # float16


def test_verify_refuses_damage_other_teachers_and_other_images(folder: Path, tmp_path: Path, capsys: Any) -> None:
    store = Path(shutil.copytree(folder / 'store', tmp_path / 'store'))
    data = bytearray((store / 'part-00000-00000').read_bytes())
    data[-1] ^= 1
    (store / 'part-00000-00000').write_bytes(data)
    assert 'part-00000-00000 is damaged (epoch 3)' in refused(capsys, *verify(folder, store))

    line = refused(capsys, *verify(folder, folder / 'store', '--teachers', f'test_resnet={folder}/other.pth'))
    assert re.search(r'the teachers predict something else: a probability differs by \S+ \(--tolerance\)', line)
    refused(capsys, *verify(folder, folder / 'store', '--tolerance', '1e-9'))

    write_images(tmp_path / 'images' / 'train', 4, seed=4)
    assert 'was recorded from other pixels' in refused(capsys, *verify(tmp_path, folder / 'store'))
    for number, path in enumerate(sorted((tmp_path / 'images').rglob('*.png'))):
        path.rename(path.with_name(f'{number + 100}.png'))
    assert '12 of 12 images are not in' in refused(capsys, *verify(tmp_path, folder / 'store'))


def test_verify_takes_teachers_from_another_place(folder: Path, tmp_path: Path, capsys: Any) -> None:
    root = Path(shutil.copytree(folder, tmp_path / 'moved'))
    meta = StoreMeta.read(root / 'store')
    replace(meta, teachers=[{**meta.teachers[0], 'name': 'test_resnet=gone/teacher.pth'}]).write(root / 'store')
    assert 'gone/teacher.pth' in refused(capsys, *verify(root, root / 'store'))
    main(verify(root, root / 'store', '--teachers', f'test_resnet={root}/teacher.pth'))


# --dry-run


def test_a_dry_run_tells_bytes_and_hours_and_writes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(soft_labels, 'measure_rate', functools.partial(soft_labels.measure_rate, seconds=0.2))
    capsys.readouterr()
    main(record_arguments(folder, Path('x'), '--epochs', '100000', '--dry-run'))
    text = capsys.readouterr().out
    assert '12 images x 100000 epochs = 1,200,000 records of 20 bytes, 24.0MB' in text
    found = re.search(r'([\d,.]+) samples/s on cpu: ([\d,.]+) hours', text)
    assert found
    rate, hours = (float(number.replace(',', '')) for number in found.groups())
    assert hours == pytest.approx(1_200_000 / rate / 3600, rel=0.02, abs=0.006)
    assert not list(tmp_path.iterdir())
