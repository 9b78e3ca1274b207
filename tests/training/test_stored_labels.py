"""Training on stored labels, as a user runs it: record once, train as often as one likes."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import write_images
from test_run import REPOSITORY, SMALL, assert_equal_weights, summary
from timm.data import create_dataset

from timm_mealv2.cli.soft_labels import main as soft_labels
from timm_mealv2.data.loader import TrainLoader
from timm_mealv2.errors import UserError
from timm_mealv2.soft_labels.dataset import SoftLabelDataset
from timm_mealv2.soft_labels.store import SoftLabelStore
from timm_mealv2.training.checkpoint_saver import read_checkpoint
from timm_mealv2.training.run import main

pytestmark = pytest.mark.skip('stored labels are being rebuilt on the deterministic samples')

Train = Callable[..., Path]


@pytest.fixture(scope='module')
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), path)
    return f'test_resnet={path}'


@pytest.fixture(scope='module')
def store(teacher: str, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('stores') / 'store'
    record(teacher, image_folder, out)
    return out


def record(teacher: str, data: Path, out: Path, *options: Any) -> None:
    argv = ['record', '--teachers', teacher, '--num-classes', '3', '--data-dir', str(data), '--img-size', '16']
    argv += ['--crops', '4', '--top-k', '2', '--workers', '0', '--device', 'cpu', '--out', str(out)]
    soft_labels([*argv, *map(str, options)])


@pytest.fixture
def train(image_folder: Path, store: Path, tmp_path: Path) -> Train:
    def run(name: str, *options: Any, data: Path = image_folder, labels: Path = store) -> Path:
        argv = [*SMALL, '--data-dir', str(data), '--soft-labels', str(labels), '--output', str(tmp_path)]
        main([*argv, '--experiment', name, *map(str, options)])
        return tmp_path / name

    return run


def test_training_from_a_store_approaches_the_teachers_without_them(train: Train) -> None:
    rows = summary(train('learns', '--epochs', 6, '--sched', 'none', '--batch-size', 7))
    assert float(rows[-1]['train_kl']) < 0.7 * float(rows[0]['train_kl'])
    assert set(rows[0]) >= {'train_similarity_loss', 'train_teacher_agreement', 'eval_top1'}
    assert 'train_discriminator_loss' not in rows[0]


def test_labels_of_all_classes_give_the_loss_of_live_teachers(
    teacher: str, image_folder: Path, tmp_path: Path, train: Train
) -> None:
    # One step over all images, cut as the whole image and not flipped: live and stored see the same pixels.
    whole = ['--scale', '1', '1', '--ratio', '1', '1', '--hflip', '0']
    record(teacher, image_folder, tmp_path / 'all', '--top-k', 3, *whole)
    common = [*whole, '--train-interpolation', 'bilinear', '--batch-size', '21', '--epochs', '1', '--val-interval', '9']
    stored = train('stored', *common, labels=tmp_path / 'all')
    argv = [*SMALL, *common, '--data-dir', str(image_folder), '--teachers', teacher, '--discriminator-weight', '0']
    main([*argv, '--output', str(tmp_path), '--experiment', 'live', '--no-preflight'])
    ours, live = summary(stored)[0], summary(tmp_path / 'live')[0]
    for name in ('train_loss', 'train_kl'):
        assert float(ours[name]) == pytest.approx(float(live[name]), abs=2e-4)
    assert ours['train_teacher_agreement'] == live['train_teacher_agreement']


@pytest.mark.parametrize('workers', [0, 2])
def test_a_run_that_is_continued_ends_with_the_same_bits(train: Train, workers: int) -> None:
    options = [
        '--workers',
        workers,
        '--crops-per-decode',
        3,
        '--cutmix',
        1,
        '--mixup',
        0.5,
        '--epochs',
        3,
        '--drop',
        0.2,
    ]
    whole = train('whole', *options, '--recovery-interval', 2)
    (whole / 'last.pth.tar').rename(whole / 'end')
    stopped = train('stopped', *options, '--recovery-interval', 2)
    for path in stopped.glob('*.pth.tar'):
        checkpoint = read_checkpoint(path)
        if checkpoint['progress']['epoch'] > 1:
            path.unlink()
    train('stopped', *options, '--resume', 'auto')
    assert_equal_weights(stopped / 'last.pth.tar', whole / 'end')


def test_a_discriminator_is_trained_where_it_is_asked_for(train: Train) -> None:
    rows = summary(train('discriminator', '--discriminator-weight', 1, '--batch-size', 7))
    assert float(rows[0]['train_discriminator_loss']) > 0


@pytest.mark.parametrize('rest', ['renormalize', 'drop'])
def test_the_rest_of_the_labels_is_treated_as_asked(train: Train, rest: str) -> None:
    first = {name: summary(train(name, '--label-rest', name, '--lr', 0))[0] for name in ('uniform', rest)}
    losses = {name: float(row['train_loss']) for name, row in first.items()}
    assert losses[rest] != pytest.approx(losses['uniform'], rel=1e-4)


def test_grey_and_unlabelled_images_train_from_a_store(teacher: str, tmp_path: Path, train: Train) -> None:
    write_images(tmp_path / 'grey' / 'train', 5, seed=0, mode='L')
    torch.manual_seed(1)
    grey = tmp_path / 'grey.pth'
    torch.save(timm.create_model('test_resnet', num_classes=3, in_chans=1).state_dict(), grey)
    record(f'test_resnet={grey}', tmp_path / 'grey', tmp_path / 'store', '--in-chans', 1)
    options = ['--in-chans', 1, '--unlabeled', '--epochs', 1]
    rows = summary(train('grey', *options, data=tmp_path / 'grey', labels=tmp_path / 'store'))
    assert float(rows[0]['train_kl']) > 0


def test_more_epochs_than_crops_are_announced(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train('many', '--epochs', 5)
    assert 'each up to 2 times' in caplog.text


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--reprob', '0.2'], '--reprob 0.2: refused with --soft-labels'),
        (['--aa', 'rand-m9'], '--aa rand-m9: refused'),
        (['--color-jitter', '0.4'], '--color-jitter 0.4: refused'),
        (['--vflip', '0.5'], '--vflip'),
        (['--no-aug'], '--no-aug'),
        (['--aug-repeats', '3'], '--aug-repeats'),
        (['--train-crop-mode', 'rkrc'], '--train-crop-mode'),
        (['--no-prefetcher'], '--no-prefetcher'),
        (['--scale', '0.5', '1'], r'--scale was \[0.08, 1.0\] when it was recorded and is \[0.5, 1.0\] here'),
        (['--train-interpolation', 'bicubic'], '--train-interpolation was bilinear'),
        (['--hflip', '0'], '--hflip was 0.5'),
        (['--img-size', '24'], r'image size \(height, width\) was \(16, 16\)'),
        (['--in-chans', '1'], 'image mode was RGB'),
        (['--num-classes', '4'], 'classes'),
        (['--teachers', 'test_vit.r160_in1k'], 'recorded with the teachers'),
        (['--teacher-dtype', 'float16'], '--teacher-dtype float16: the answers are stored'),
        (['--crops-per-decode', '5'], 'the store has 4 crops'),
        (['--label-rest', 'drop', '--discriminator-weight', '1'], '--label-rest drop'),
        (['--hard-label-weight', '1', '--mixup', '1'], '--hard-label-weight'),
        (['--kd-distill-type', 'logit'], '--soft-labels'),
    ],
)
def test_what_does_not_go_with_the_store_is_refused_by_name(train: Train, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train('refused', *options)


def test_its_options_need_a_store(image_folder: Path) -> None:
    for options in (['--crops-per-decode', '2'], ['--label-rest', 'drop'], ['--allow-decoder-change']):
        with pytest.raises(UserError, match='needs --soft-labels'):
            main([*SMALL, '--data-dir', str(image_folder), *options])


# The loader


@pytest.mark.parametrize('workers', [0, 2])
def test_an_epoch_of_stored_crops_entered_in_the_middle_goes_on_as_the_unbroken_one(
    image_folder: Path, store: Path, workers: int
) -> None:
    def loader(workers: int) -> TrainLoader:
        labels = SoftLabelDataset(create_dataset('', root=image_folder, split='train'), SoftLabelStore(store))
        return TrainLoader(
            labels,
            input_size=(3, 16, 16),
            batch_size=4,
            transform={'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)},
            mixup={'cutmix_alpha': 1.0, 'mixup_alpha': 0.5, 'num_classes': 3, 'mode': 'elem'},
            crops_per_decode=2,
            workers=workers,
        )

    whole = [(images.clone(), labels.clone()) for images, labels in loader(0).batches(3)]
    assert [labels.shape[1] for _, labels in whole] == [1 + 4 * 2] * 5
    continued = loader(workers)
    for start in (3, 0):
        batches = list(continued.batches(3, start))
        for (images, labels), (expected, expected_labels) in zip(batches, whole[start:], strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(labels, expected_labels)


def test_two_processes_train_on_stored_labels_as_one_with_the_double_batch(
    teacher: str, tmp_path: Path, train: Train
) -> None:
    data, labels = tmp_path / 'data', tmp_path / 'labels'
    write_images(data / 'train', 8, seed=2, size=32)
    write_images(data / 'validation', 3, seed=3, size=32)
    record(teacher, data, labels, '--img-size', 32)
    options = ['--model', 'test_vit', '--img-size', '32', '--batch-size']
    one = train('one', *options, 6, data=data, labels=labels)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    command += [str(REPOSITORY / 'train_distill.py'), *SMALL, '--data-dir', str(data), '--soft-labels', str(labels)]
    command += ['--output', str(tmp_path), '--experiment', 'two', *options, '3']
    result = subprocess.run(command, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for first, second in zip(summary(one), summary(tmp_path / 'two'), strict=True):
        for column in set(first) - {'epoch', 'images_per_second'}:
            assert float(second[column]) == pytest.approx(float(first[column]), rel=1e-4, abs=1e-5), column
