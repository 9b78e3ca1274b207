"""Training on stored labels, as a user runs it: record once, train as often as one likes."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from forked import Forked
from images import write_images
from PIL import Image
from quick_training import SMALL, assert_equal_weights, read_checkpoint, summary

from timm_mealv2.cli.soft_labels import main as soft_labels
from timm_mealv2.data.dataset import image_names, open_dataset
from timm_mealv2.data.samples import EpochSampler
from timm_mealv2.errors import UserError
from timm_mealv2.report import write_report
from timm_mealv2.runs import TIMES, read_run
from timm_mealv2.training.run import main

Train = Callable[..., Path]

EVERYTHING = (
    '--aa rand-m9-mstd0.5-inc1 --reprob 0.3 --cutmix 1 --mixup 0.2 --mixup-mode pair '
    '--train-interpolation random --vflip 0.2'
).split()
"""All kinds of augmentation, in the training's own words."""


@pytest.fixture(scope='module')
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), path)
    return f'test_resnet={path}'


def record(teacher: str, data: Path, out: Path, *options: Any) -> Path:
    argv = ['record', '--teachers', teacher, '--num-classes', '3', '--data-dir', str(data), '--img-size', '16']
    argv += ['--epochs', '4', '--top-k', '2', '--workers', '0', '--device', 'cpu', '--color-jitter', '0']
    soft_labels([*argv, '--out', str(out), *map(str, options)])
    return out


@pytest.fixture(scope='module')
def store(teacher: str, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs of crops and flips."""
    return record(teacher, image_folder, tmp_path_factory.mktemp('stores') / 'store')


@pytest.fixture(scope='module')
def mixed(teacher: str, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs with all kinds of augmentation, and all classes."""
    return record(
        teacher, image_folder, tmp_path_factory.mktemp('stores') / 'mixed', '--epochs', 2, '--top-k', 3, *EVERYTHING
    )


@pytest.fixture
def train(image_folder: Path, store: Path, tmp_path: Path) -> Train:
    def run(name: str, *options: Any, data: Path = image_folder, labels: Path | None = store) -> Path:
        argv = [*SMALL, '--data-dir', str(data), '--output', str(tmp_path), '--experiment', name]
        argv += ['--soft-labels', str(labels)] if labels else []
        main([*argv, *map(str, options)])
        return tmp_path / name

    return run


def test_training_from_a_store_approaches_the_teachers_without_them(train: Train) -> None:
    rows = summary(train('learns', '--epochs', 6, '--sched', 'none', '--batch-size', 7))
    assert float(rows[-1]['train_kl']) < 0.7 * float(rows[0]['train_kl'])
    assert set(rows[0]) >= {'train_similarity_loss', 'train_teacher_agreement', 'eval_top1'}
    assert 'train_discriminator_loss' not in rows[0]


def test_what_the_teachers_reached_when_they_were_recorded_is_shown(train: Train, teacher: str) -> None:
    folder = train('shown', '--epochs', 1)
    rows = json.loads((folder / 'preflight.json').read_text())
    assert set(rows) == {'ensemble', f'teacher {teacher}', 'student (initial)'}
    assert [row['samples'] for row in rows.values()] == [12] * 3
    page = write_report({'run': read_run(folder)}, folder / 'report.html').read_text()
    assert '>top-1, %: teacher ' in page
    assert f'>{rows["ensemble"]["top1"]:.2f}<' in page


def test_labels_of_all_classes_give_the_live_training(
    teacher: str, mixed: Path, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    # The pixels are the same: their checksums are compared. What differs is that stored probabilities are rounded to
    # float16, by at most 2**-12 of each.
    common = ['--epochs', 2, '--batch-size', 10, '--workers', 2, '--lr', 0.02]
    stored = train('stored', *common, labels=mixed)
    options = [*EVERYTHING, '--teachers', teacher, '--discriminator-weight', 0, '--no-preflight']
    live = train('live', *common, *options, labels=None)
    for ours, expected in zip(summary(stored), summary(live), strict=True):
        for name in ('train_loss', 'train_kl'):
            assert float(ours[name]) == pytest.approx(float(expected[name]), abs=2**-12)
        for name in ('train_teacher_agreement', 'eval_top1', 'lr'):
            assert ours[name] == expected[name]
    former, now = (read_checkpoint(folder / 'last.pth.tar')['state_dict'] for folder in (live, stored))
    for name, value in former.items():
        torch.testing.assert_close(now[name], value, atol=1e-3, rtol=1e-3)
    assert 'recorded epochs begin again' not in caplog.text


@pytest.mark.parametrize('options', [['--samples-per-decode', 3, '--workers', 2], []], ids=str)
def test_a_run_that_is_continued_ends_with_the_same_bits(
    train: Train, store: Path, mixed: Path, options: list[Any]
) -> None:
    options = [*options, '--epochs', 3, '--drop', 0.2, '--recovery-interval', 2]
    labels = store if '--samples-per-decode' in options else mixed
    whole = train('whole', *options, labels=labels)
    (whole / 'last.pth.tar').rename(whole / 'end')
    stopped = train('stopped', *options, labels=labels)
    for path in stopped.glob('*.pth.tar'):
        checkpoint = read_checkpoint(path)
        if checkpoint['progress']['epoch'] > 1:
            path.unlink()
    train('stopped', *options, '--resume', 'auto', labels=labels)
    assert_equal_weights(stopped / 'last.pth.tar', whole / 'end')


def test_settings_that_were_not_given_are_those_of_the_store(train: Train, mixed: Path, image_folder: Path) -> None:
    argv = ['--model', 'test_resnet', '--batch-size', 7, '--workers', 0, '--epochs', 1, '--device', 'cpu']
    argv += ['--data-dir', image_folder, '--soft-labels', mixed, '--output', mixed.parent, '--experiment', 'run']
    main([str(word) for word in argv])
    text = (mixed.parent / 'run' / 'args.yaml').read_text()
    for words in ('num_classes: 3', '- 16\n- 16', 'aa: rand-m9-mstd0.5-inc1', 'mixup_mode: pair', 'reprob: 0.3'):
        assert words in text
    train('again', '-c', mixed.parent / 'run' / 'args.yaml', labels=None)


def test_a_discriminator_is_trained_where_it_is_asked_for(train: Train) -> None:
    rows = summary(train('discriminator', '--discriminator-weight', 1, '--batch-size', 7))
    assert float(rows[0]['train_discriminator_loss']) > 0


@pytest.mark.parametrize('rest', ['renormalize', 'drop'])
def test_the_rest_of_the_labels_is_treated_as_asked(train: Train, rest: str) -> None:
    first = {name: summary(train(name, '--label-rest', name, '--lr', 0))[0] for name in ('uniform', rest)}
    losses = {name: float(row['train_loss']) for name, row in first.items()}
    assert losses[rest] != pytest.approx(losses['uniform'], rel=1e-4)


def test_gray_and_unlabeled_images_train_from_a_store(tmp_path: Path, train: Train) -> None:
    for number in range(15):
        path = tmp_path / 'gray' / 'train' / str(number % 3) / f'{number}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', (24, 24), 15 * number).save(path)
    torch.manual_seed(1)
    gray = tmp_path / 'gray.pth'
    torch.save(timm.create_model('test_resnet', num_classes=3, in_chans=1).state_dict(), gray)
    labels = record(f'test_resnet={gray}', tmp_path / 'gray', tmp_path / 'store', '--in-chans', 1)
    options = ['--in-chans', 1, '--unlabeled', '--epochs', 1]
    rows = summary(train('gray', *options, data=tmp_path / 'gray', labels=labels))
    assert float(rows[0]['train_kl']) > 0


def test_epochs_that_come_again_are_announced(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train('many', '--epochs', 5)
    assert 'Epoch 4: the 4 recorded epochs begin again' in caplog.text


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--reprob', '0.2'], '--reprob was 0.0 when .* was recorded and is 0.2 here'),
        (['--aa', 'rand-m9'], '--aa was None'),
        (['--color-jitter', '0.4'], '--color-jitter was 0'),
        (['--cutmix', '1'], '--cutmix was 0.0'),
        (['--scale', '0.5', '1'], '--scale was 0.08 1.0 when .* was recorded and is 0.5 1.0 here'),
        (['--img-size', '24'], '--img-size was 16'),
        (['--in-chans', '1'], '--in-chans was 3'),
        (['--num-classes', '4'], '--num-classes was 3'),
        (['--teachers', 'test_vit.r160_in1k'], '--teachers was test_resnet='),
        (['--teacher-dtype', 'float16'], '--teacher-dtype float16: the predictions are stored'),
        (['--kd-distill-type', 'logit'], '--soft-labels'),
        (['--soft-labels', '/nowhere'], '/nowhere holds no soft labels: there is no such folder'),
    ],
)
def test_what_does_not_go_with_the_store_is_refused_before_the_data_is_opened(
    train: Train, options: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train('refused', *options, data=Path('/no/such/data'))


def test_its_options_need_a_store(image_folder: Path) -> None:
    for options in (['--label-rest', 'drop'], ['--allow-pixel-change']):
        with pytest.raises(UserError, match='needs --soft-labels'):
            main([*SMALL, '--data-dir', str(image_folder), *options])


def test_other_images_stop_the_training_with_one_line_or_are_counted(
    image_folder: Path, tmp_path: Path, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / 'data'
    for split in ('train', 'validation'):
        for path in (image_folder / split).rglob('*.png'):
            (data / split / path.parent.name).mkdir(parents=True, exist_ok=True)
            Image.open(path).rotate(180).save(data / split / path.parent.name / path.name)
    with pytest.raises(UserError, match=r'image \d+, epoch 1: .* was recorded from other pixels.*Pillow'):
        train('other', '--workers', 1, data=data)
    with caplog.at_level(logging.INFO):
        train('other', '--allow-pixel-change', '--epochs', 1, data=data)
    assert 'train: 20 images have other pixels than when they were recorded' in caplog.text


@pytest.mark.parametrize('when', ['before', 'after'])
def test_a_batch_of_unreadable_images_is_filled_up_as_in_live_training(
    when: str, teacher: str, image_folder: Path, tmp_path: Path, train: Train
) -> None:
    """All images of the first batch are broken before or after the recording: training goes on as live training."""
    data = Path(shutil.copytree(image_folder, tmp_path / 'data'))
    names = image_names(open_dataset('', str(data), 'train'))
    options = ['--aa', 'rand-m9', '--top-k', 3]
    if when == 'after':
        labels = record(teacher, data, tmp_path / 'labels', *options)
    for key in next(iter(EpochSampler(len(names), 4, seed=42))).keys:
        (data / 'train' / names[key.index]).write_bytes(b'broken')
    if when == 'before':
        labels = record(teacher, data, tmp_path / 'labels', *options)
    slow = ['--lr', 1e-4]  # the images that fill a batch up are one: its gradient is large, and makes rounding grow
    stored = train('stored', *slow, data=data, labels=labels)
    live = [*slow, '--aa', 'rand-m9', '--teachers', teacher, '--discriminator-weight', 0, '--no-preflight']
    for ours, expected in zip(summary(stored), summary(train('live', *live, data=data, labels=None)), strict=True):
        assert float(ours['train_loss']) == pytest.approx(float(expected['train_loss']), abs=2**-12)
        assert ours['train_teacher_agreement'] == expected['train_teacher_agreement']


def test_two_processes_train_on_stored_labels_as_one_with_the_double_batch(
    teacher: str, tmp_path: Path, train: Train, program: Forked
) -> None:
    data = tmp_path / 'data'
    write_images(data / 'train', 8, seed=2)
    write_images(data / 'validation', 3, seed=3)
    labels = record(teacher, data, tmp_path / 'labels', *EVERYTHING)
    # Layer norm: batch norm has statistics of each process's own.
    options = ['--model', 'test_vit', '--img-size', '16', '--model-kwargs', 'img_size=16', '--batch-size']
    one = train('one', *options, 8, data=data, labels=labels)
    words = [*SMALL, '--data-dir', data, '--soft-labels', labels, '--experiment', 'two', *options, 4]
    program.run(tmp_path, *words, processes=2)
    for first, second in zip(summary(one), summary(tmp_path / 'two'), strict=True):
        for column in set(first) - {'epoch', 'images_per_second', *TIMES}:
            assert float(second[column]) == pytest.approx(float(first[column]), rel=1e-4, abs=1e-5), column
