"""Trainings whose teachers, initial weights, store or checkpoint have the classes in another order than the folders."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from colors import CLASSES, picture, preflight, save_model, train, write_folder, write_splits

from timm_mealv2 import UserError
from timm_mealv2.cli.hub import main as hub
from timm_mealv2.cli.soft_labels import main as soft_labels

REVERSED = CLASSES[::-1]
TEACHERS_ALONE = ('--discriminator-weight', 0)


def contents(folder: Path) -> dict:
    checkpoint: dict = torch.load(folder / 'last.pth.tar', weights_only=False)
    return checkpoint


def test_a_teacher_is_mapped_by_the_names_of_its_classes(data: Path, knowing: Path, tmp_path: Path) -> None:
    teachers = [save_model(tmp_path / f'{order[0]}.pth', order, names=order) for order in (CLASSES, REVERSED)]
    run = tmp_path / 'run'
    start = ('--initial-checkpoint', knowing, *TEACHERS_ALONE)
    row = train(run, '--data-dir', data, '--teachers', *teachers, *start)[0]
    assert preflight(run)['ensemble']['top1'] == 100
    for name in teachers:
        assert preflight(run)[f'teacher {name}']['top1'] == 100
    assert float(row['train_kl']) == pytest.approx(0, abs=1e-3)  # the student's classes are the folders'
    assert contents(run)['class_names'] == list(CLASSES)


def test_an_exported_teacher_with_more_classes_is_mapped_to_those_that_are_there(
    data: Path, knowing: Path, tmp_path: Path
) -> None:
    train(tmp_path / 'of four', '--data-dir', data, '--initial-checkpoint', knowing)
    hub(['export', str(tmp_path / 'of four' / 'last.pth.tar'), '--out', str(tmp_path / 'exported')])
    write_splits(tmp_path / 'three', classes=CLASSES[1:])
    save_model(tmp_path / 'start.pth', CLASSES[1:])
    options = ('--data-dir', tmp_path / 'three', '--num-classes', 3, '--initial-checkpoint', tmp_path / 'start.pth')
    row = train(tmp_path / 'run', *options, '--teachers', f'local-dir:{tmp_path / "exported"}', *TEACHERS_ALONE)[0]
    assert preflight(tmp_path / 'run')['ensemble']['top1'] == 100
    assert float(row['train_kl']) == pytest.approx(0, abs=1e-3)


def test_a_teacher_of_other_classes_is_refused(data: Path, tmp_path: Path) -> None:
    teacher = save_model(tmp_path / 't.pth', names=('apple', 'leaf', 'sea', 'moon'))
    with pytest.raises(UserError, match='moon'):
        train(tmp_path / 'run', '--data-dir', data, '--teachers', teacher)
    assert not (tmp_path / 'run').exists()


def test_a_run_without_labels_has_the_classes_of_its_teachers(tmp_path: Path) -> None:
    (tmp_path / 'data' / 'train' / 'all').mkdir(parents=True)
    for number, name in enumerate(CLASSES * 2):
        picture(name, number).save(tmp_path / 'data' / 'train' / 'all' / f'{number}.png')
    teachers = [save_model(tmp_path / f'{order[0]}.pth', order, names=order) for order in (REVERSED, CLASSES)]
    save_model(tmp_path / 'start.pth', REVERSED)
    options = ('--unlabeled', '--data-dir', tmp_path / 'data', '--initial-checkpoint', tmp_path / 'start.pth')
    row = train(tmp_path / 'run', *options, '--teachers', *teachers, *TEACHERS_ALONE)[0]
    assert contents(tmp_path / 'run')['class_names'] == list(REVERSED)  # those of the first
    assert float(row['train_kl']) == pytest.approx(0, abs=1e-3)


def test_initial_weights_are_mapped_by_the_names_of_their_classes(data: Path, tmp_path: Path) -> None:
    save_model(tmp_path / 'start.pth', REVERSED, names=REVERSED)
    row = train(tmp_path / 'run', '--data-dir', data, '--initial-checkpoint', tmp_path / 'start.pth')[0]
    assert float(row['train_loss']) < 1e-3
    assert float(row['eval_top1']) == 100


def test_initial_weights_of_other_classes_are_refused(data: Path, tmp_path: Path) -> None:
    save_model(tmp_path / 'start.pth', names=('apple', 'leaf', 'sea', 'moon'))
    with pytest.raises(UserError, match='moon'):
        train(tmp_path / 'run', '--data-dir', data, '--initial-checkpoint', tmp_path / 'start.pth')


def class_map(path: Path, classes: Sequence[str]) -> tuple[str, Path]:
    path.write_text('\n'.join(classes))
    return '--class-map', path


def test_a_run_is_not_resumed_with_its_classes_in_another_order(data: Path, knowing: Path, tmp_path: Path) -> None:
    options = ('--data-dir', data, '--resume', 'auto')
    former = class_map(tmp_path / 'map.txt', CLASSES)
    train(tmp_path / 'run', *options, *former, '--initial-checkpoint', knowing)
    now = class_map(tmp_path / 'map.txt', REVERSED)
    with pytest.raises(UserError, match='class'):
        train(tmp_path / 'run', *options, *now, '--epochs', 2)


def record(store: Path, teacher: str, data: Path, *options: str) -> None:
    words = ('record', '--teachers', teacher, '--data-dir', data, '--img-size', 32, '--no-aug', '--epochs', 1)
    soft_labels(
        [str(word) for word in (*words, '--top-k', 4, '--workers', 0, '--device', 'cpu', '--out', store, *options)]
    )


def test_a_recording_maps_its_teachers_by_the_names_of_their_classes(data: Path, knowing: Path, tmp_path: Path) -> None:
    record(tmp_path / 'store', save_model(tmp_path / 't.pth', REVERSED, names=REVERSED), data)
    start = ('--initial-checkpoint', knowing, *TEACHERS_ALONE)
    row = train(tmp_path / 'run', '--data-dir', data, '--soft-labels', tmp_path / 'store', *start)[0]
    assert float(row['train_kl']) == pytest.approx(0, abs=1e-3)


def test_stored_labels_of_another_order_are_refused(data: Path, knowing: Path, tmp_path: Path) -> None:
    record(tmp_path / 'store', save_model(tmp_path / 't.pth', names=CLASSES), data)
    with pytest.raises(UserError, match='class'):
        train(
            tmp_path / 'run',
            *('--data-dir', data, '--soft-labels', tmp_path / 'store', *class_map(tmp_path / 'map.txt', REVERSED)),
        )
    assert not (tmp_path / 'run').exists()


def test_a_training_with_hidden_folders_and_a_byte_order_mark(knowing: Path, tmp_path: Path) -> None:
    write_splits(tmp_path / 'data')
    for split in ('train', 'validation'):
        (tmp_path / 'data' / split / '.ipynb_checkpoints').mkdir()
        picture('sun').save(tmp_path / 'data' / split / '.ipynb_checkpoints' / 'sun-checkpoint.png')
    (tmp_path / 'map.txt').write_text('\n'.join(CLASSES), encoding='utf-8-sig')
    for name, options in {'plain': (), 'mapped': ('--class-map', tmp_path / 'map.txt')}.items():
        teachers = ('--teachers', f'test_resnet={knowing}')
        train(tmp_path / name, '--data-dir', tmp_path / 'data', *teachers, *options)
        assert preflight(tmp_path / name)['ensemble']['top1'] == 100
        assert preflight(tmp_path / name)['ensemble']['samples'] == 12
        assert contents(tmp_path / name)['class_names'] == list(CLASSES)


def test_a_validation_split_without_one_of_the_classes(knowing: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / 'data' / 'train')
    write_folder(tmp_path / 'data' / 'validation', classes=CLASSES[1:])
    row = train(tmp_path / 'run', '--data-dir', tmp_path / 'data', '--initial-checkpoint', knowing)[0]
    assert float(row['eval_top1']) == 100


def test_a_run_without_labels_is_judged_on_those_of_the_validation_split(data: Path, tmp_path: Path) -> None:
    teacher = save_model(tmp_path / 't.pth', REVERSED, names=REVERSED)
    options = ('--unlabeled', '--data-dir', data, '--initial-checkpoint', tmp_path / 't.pth')
    row = train(tmp_path / 'run', *options, '--teachers', teacher, *TEACHERS_ALONE)[0]
    assert float(row['eval_top1']) == preflight(tmp_path / 'run')['ensemble']['top1'] == 100


@pytest.mark.parametrize('folder', ['.', 'all'])
def test_images_without_labels_are_recorded(folder: str, knowing: Path, tmp_path: Path) -> None:
    """In the order of the teachers' classes, which the training that follows takes over."""
    (tmp_path / 'data' / folder).mkdir(parents=True)
    for number, name in enumerate(CLASSES * 2):
        picture(name, number).save(tmp_path / 'data' / folder / f'{number}.png')
    record(tmp_path / 'store', save_model(tmp_path / 't.pth', REVERSED, names=REVERSED), tmp_path / 'data')
    save_model(tmp_path / 'start.pth', REVERSED)
    options = ('--unlabeled', '--data-dir', tmp_path / 'data', '--soft-labels', tmp_path / 'store')
    start = ('--initial-checkpoint', tmp_path / 'start.pth', *TEACHERS_ALONE)
    row = train(tmp_path / 'run', *options, *start)[0]
    assert float(row['train_kl']) == pytest.approx(0, abs=1e-3)
    assert contents(tmp_path / 'run')['class_names'] == list(REVERSED)


def test_folders_that_are_no_classes_are_recorded_where_that_is_said(data: Path, tmp_path: Path) -> None:
    teacher = save_model(tmp_path / 't.pth', names=('apfel', 'blatt', 'meer', 'sonne'))
    with pytest.raises(UserError, match='apfel'):
        record(tmp_path / 'store', teacher, data)
    record(tmp_path / 'store', teacher, data, '--unlabeled')


def test_timms_distillation_maps_its_teacher_too(data: Path, knowing: Path, tmp_path: Path) -> None:
    teacher = save_model(tmp_path / 't.pth', REVERSED, names=REVERSED)
    options = ('--kd-distill-type', 'logit', '--teachers', teacher, '--task-loss-weight', 0)
    row = train(tmp_path / 'run', '--data-dir', data, '--initial-checkpoint', knowing, *options)[0]
    assert float(row['train_loss']) == pytest.approx(0, abs=1e-3)
