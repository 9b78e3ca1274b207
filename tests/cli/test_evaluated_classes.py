"""Classes are compared by name: those of the model, which a checkpoint or an exported folder tells, and the folders."""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from colors import CLASSES, evaluate, picture, save_model, train, write_folder, write_splits

from timm_mealv2 import UserError
from timm_mealv2.cli.hub import main as hub

REVERSED = CLASSES[::-1]


def said(capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> str:
    """All that a program has written."""
    return ''.join(capsys.readouterr()) + caplog.text


def export(root: Path, classes: Sequence[str]) -> str:
    """Train and export a model of these classes in this order; return the text that names it."""
    write_splits(root / 'data')
    (root / 'map.txt').write_text('\n'.join(classes))
    save_model(root / 'start.pth', classes)
    options = ('--data-dir', root / 'data', '--class-map', root / 'map.txt')
    train(root / 'run', *options, '--initial-checkpoint', root / 'start.pth')
    hub(['export', str(root / 'run' / 'last.pth.tar'), '--out', str(root / 'exported')])
    return f'local-dir:{root / "exported"}'


@pytest.mark.parametrize('exported', [False, True], ids=['checkpoint', 'export'])
@pytest.mark.parametrize(
    ('order', 'there'), [(CLASSES, CLASSES[1:]), (REVERSED, CLASSES), (REVERSED, CLASSES[2:])], ids=str
)
def test_a_model_is_scored_by_the_names_of_its_classes(
    exported: bool, order: Sequence[str], there: Sequence[str], tmp_path: Path
) -> None:
    name = export(tmp_path / 'model', order) if exported else save_model(tmp_path / 'm.pth', order, names=order)
    data = write_folder(tmp_path / 'images', classes=there)
    row = evaluate(tmp_path / 'e.json', name, '--data-dir', data)[name]
    assert row['samples'] == 4 * len(there)
    assert row['top1'] == 100


def test_names_that_are_numbers_are_names(tmp_path: Path) -> None:
    numbers = ('10', '2', '3', '7')  # in the order of text; timm reads folders as 2, 3, 7, 10
    name = save_model(tmp_path / 'm.pth', CLASSES, names=numbers)
    data = write_folder(tmp_path / 'images', folders=numbers)
    assert evaluate(tmp_path / 'e.json', name, '--data-dir', data)[name]['top1'] == 100


@pytest.mark.parametrize(
    'folders',
    [('pear', 'leaf', 'sea', 'sun'), ('Apple', 'leaf', 'sea', 'sun'), ('apple ', 'leaf', 'sea', 'sun')],
    ids=['another', 'case', 'space'],
)
def test_other_names_are_refused(folders: Sequence[str], tmp_path: Path) -> None:
    name = save_model(tmp_path / 'm.pth', names=CLASSES)
    data = write_folder(tmp_path / 'images', folders=folders)
    with pytest.raises(UserError, match=folders[0]):
        evaluate(tmp_path / 'e.json', name, '--data-dir', data)
    assert not (tmp_path / 'e.json').exists()


def test_a_class_too_many_is_refused(tmp_path: Path) -> None:
    name = save_model(tmp_path / 'm.pth', CLASSES[:3], names=CLASSES[:3])
    with pytest.raises(UserError, match='sun'):
        evaluate(tmp_path / 'e.json', name, '--data-dir', write_folder(tmp_path / 'images'))


def test_a_model_without_names_is_taken_as_it_is_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    name = save_model(tmp_path / 'm.pth')
    with caplog.at_level('INFO'):
        row = evaluate(tmp_path / 'e.json', name, '--data-dir', write_folder(tmp_path / 'images'))[name]
    assert row['top1'] == 100
    assert said(capsys, caplog).count('class names') == 1


def test_each_teacher_of_an_ensemble_is_mapped_by_itself(tmp_path: Path) -> None:
    models = [save_model(tmp_path / f'{order[0]}.pth', order, names=order) for order in (CLASSES, REVERSED)]
    data = write_folder(tmp_path / 'images', classes=CLASSES[1:])
    rows = evaluate(tmp_path / 'e.json', *models, '--data-dir', data, '--teachers', *models)
    for row in rows.values():
        assert row['top1'] == 100
    for name in models:
        assert rows[name]['agreement'] == 100
        assert rows[name]['kl'] == pytest.approx(0, abs=1e-4)


def test_an_exported_ensemble_is_mapped_as_one(tmp_path: Path) -> None:
    models = [save_model(tmp_path / f'{order[0]}.pth', order, names=order) for order in (REVERSED, CLASSES)]
    hub(['export-ensemble', '--teachers', *models, '--out', str(tmp_path / 'ensemble')])
    name = f'local-dir:{tmp_path / "ensemble"}'
    data = write_folder(tmp_path / 'images', classes=CLASSES[1:])
    assert evaluate(tmp_path / 'e.json', name, '--data-dir', data)[name]['top1'] == 100


def rows_of(path: Path) -> list[dict[str, Any]]:
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def test_predictions_have_the_names_of_the_model(tmp_path: Path) -> None:
    name = save_model(tmp_path / 'm.pth', REVERSED, names=REVERSED)
    data = write_folder(tmp_path / 'images', classes=CLASSES[2:])
    evaluate(tmp_path / 'e.json', name, '--data-dir', data, '--predictions', tmp_path / 'p.csv')
    rows = rows_of(tmp_path / 'p.csv')
    assert [row['filename'].partition('/')[0] for row in rows] == [row['label_0'] for row in rows]


def test_a_flat_folder_has_no_labels_and_no_score(tmp_path: Path) -> None:
    name = save_model(tmp_path / 'm.pth', names=CLASSES)
    (tmp_path / 'images').mkdir()
    for number, color in enumerate(CLASSES):
        picture(color, number).save(tmp_path / 'images' / f'{color}.png')
    options = ('--data-dir', tmp_path / 'images', '--predictions', tmp_path / 'p.csv')
    row = evaluate(tmp_path / 'e.json', name, *options)[name]
    assert row['samples'] == 4
    assert not {'top1', 'top5', 'loss'} & set(row)
    rows = rows_of(tmp_path / 'p.csv')
    assert [(row['filename'], row['target'], row['label_0']) for row in rows] == [
        (f'{color}.png', '', color) for color in CLASSES
    ]


# Class maps and folders


def test_a_class_map_with_a_byte_order_mark(tmp_path: Path) -> None:
    name = save_model(tmp_path / 'm.pth')
    (tmp_path / 'map.txt').write_text('\n'.join(CLASSES), encoding='utf-8-sig')
    options = ('--data-dir', write_folder(tmp_path / 'images'), '--class-map', tmp_path / 'map.txt')
    row = evaluate(tmp_path / 'e.json', name, *options)[name]
    assert (row['samples'], row['top1']) == (16, 100)


def test_folders_and_entries_of_a_class_map_that_miss_each_other_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    name = save_model(tmp_path / 'm.pth')
    (tmp_path / 'map.txt').write_text('apple\nleaf\nmoon\nsun\n')
    options = ('--data-dir', write_folder(tmp_path / 'images'), '--class-map', tmp_path / 'map.txt')
    text = ''
    with caplog.at_level('INFO'):
        try:
            evaluate(tmp_path / 'e.json', name, *options)
        except UserError as error:
            text = str(error)
    text += said(capsys, caplog)
    assert 'moon' in text  # without a folder
    assert 'sea' in text  # without an entry


@pytest.mark.parametrize('place', ['.ipynb_checkpoints', 'apple/.ipynb_checkpoints', '.Trash-1000/files'])
def test_hidden_folders_are_no_classes(place: str, tmp_path: Path) -> None:
    name = save_model(tmp_path / 'm.pth')
    data = write_folder(tmp_path / 'images')
    (data / place).mkdir(parents=True)
    shutil.copy(data / 'apple' / '000.png', data / place / '000-checkpoint.png')
    row = evaluate(tmp_path / 'e.json', name, '--data-dir', data)[name]
    assert (row['samples'], row['top1']) == (16, 100)


def test_one_name_in_two_branches_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    name = save_model(tmp_path / 'm.pth', CLASSES[:2])
    write_folder(tmp_path / 'images', classes=CLASSES[:2], folders=('apple/raw', 'leaf/raw'))
    text = ''
    with caplog.at_level('INFO'):
        try:
            evaluate(tmp_path / 'e.json', name, '--data-dir', tmp_path / 'images')
        except UserError as error:
            text = str(error)
    text += said(capsys, caplog)
    assert 'apple/raw' in text
    assert 'leaf/raw' in text
