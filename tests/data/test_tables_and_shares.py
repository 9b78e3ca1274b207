"""Tables of paths and labels, and validation images held out of the training images."""

import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from timm_mealv2 import UserError
from timm_mealv2.data.class_names import class_names_of
from timm_mealv2.data.dataset import image_names, read_image
from timm_mealv2.data.own_data import hold_out, open_images


def labels_of(dataset: Any) -> list[int]:
    return [read_image(dataset, index)[1] for index in range(len(dataset))]


def write_table(path: Path, images: Path, header: str = 'path,label,split', separator: str = ',') -> Path:
    """Write a table of all images below a folder of splits, with `é` and a comma in a name of class `plain`."""
    lines = [header.replace(',', separator)]
    for file in sorted(images.rglob('*.png')):
        split, label, _ = file.relative_to(images).parts
        label = {'plain': '"é, plain"'}.get(label, label)
        lines.append(separator.join([str(file.relative_to(path.parent)), label, split]))
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8-sig')
    return path


@pytest.mark.parametrize(('separator', 'ending'), [(',', 'csv'), (';', 'csv'), ('|', 'csv'), ('\t', 'tsv')])
def test_a_table_is_read_as_the_folder_that_it_lists(
    image_folder: Path, spoilt: Path, separator: str, ending: str
) -> None:
    table = write_table(spoilt / f'labels.{ending}', spoilt, 'File, Class ,split', separator)
    for split, count in (('train', 21), ('training', 21), ('val', 12), ('validation', 12)):
        dataset: Any = open_images('', str(table), split)
        folder: Any = open_images('', str(image_folder), split.removesuffix('ing'))
        assert len(dataset) == count
        assert class_names_of(dataset) == ['cold', 'warm', 'é, plain']
        assert [name.split('/', 1)[1] for name in image_names(dataset)] == image_names(folder)
        assert labels_of(dataset) == [{0: 0, 1: 2, 2: 1}[label] for label in labels_of(folder)]
        assert Path(dataset.filename(3, absolute=True)).is_file()
    with pytest.raises(UserError, match=r"no split 'test' but train, validation"):
        open_images('', str(table), 'test')


def test_labels_are_numbered_as_folders_of_these_names_or_by_a_class_map(tmp_path: Path) -> None:
    table = tmp_path / 'labels.csv'
    for name in ('a.png', '10'):
        (tmp_path / name).touch()
    table.write_text('image,target\na.png,10\nb.png,9\nc.png,1\n')
    assert class_names_of(open_images('', str(table), 'train')) == ['1', '9', '10']
    (tmp_path / 'classes.txt').write_text('9\n10\n')
    mapped: Any = open_images('', str(table), 'train', class_map=str(tmp_path / 'classes.txt'))
    assert (class_names_of(mapped), mapped.filenames()) == (['9', '10'], ['a.png', 'b.png'])
    other: Any = open_images('', str(table), 'train', input_key='target', target_key='Image')
    assert other.filenames() == ['10', '9', '1']


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('picture,label\na.png,cat\n', "no column 'path' but picture, label: name the right one with --input-key"),
        ('path,kind\na.png,cat\n', "no column 'label' but path, kind: name the right one with --target-key"),
        ('path,label\na.png,cat\nb.png,\n', 'row 3: there is no label'),
        ('path,label\nphotos/a.png,cat\n', 'row 2: there is no file photos/a.png in .* from where paths count'),
        ('path,label\n', 'no rows'),
    ],
)
def test_what_a_table_lacks_is_told(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / 'labels.csv').write_text(text)
    (tmp_path / 'a.png').touch()
    with pytest.raises(UserError, match=message):
        open_images('', str(tmp_path / 'labels.csv'), 'train')


@pytest.mark.parametrize('kind', ['classes', 'train', 'tar', 'table'])
def test_a_share_of_each_class_is_held_out(kind: str, spoilt: Path, tmp_path: Path) -> None:
    root = tmp_path / 'data'
    if kind == 'train':
        root = spoilt
    elif kind == 'classes':
        shutil.copytree(spoilt / 'train', root)
    elif kind == 'tar':
        root = tmp_path / 'data.tar'
        with tarfile.open(root, 'w') as tar:
            for folder in sorted((spoilt / 'train').iterdir()):
                tar.add(folder, folder.name)
    else:
        shutil.rmtree(spoilt / 'validation')
        root = write_table(spoilt / 'labels.csv', spoilt, 'path,label,part')
    train, held = hold_out(open_images('', str(root), 'train'), 0.3)
    assert Counter(labels_of(held)) == {0: 2, 1: 2, 2: 2}  # of 7
    assert Counter(labels_of(train)) == {0: 5, 1: 5, 2: 5}
    assert not set(image_names(train)) & set(image_names(held))
    assert class_names_of(train) == class_names_of(held)


def test_what_is_held_out_stays_held_out_where_images_are_added(spoilt: Path) -> None:
    before = image_names(hold_out(open_images('', str(spoilt), 'train'), 0.3)[1])
    for number in range(7):
        shutil.copy(spoilt / 'train/cold/000.png', spoilt / f'train/cold/more{number}.png')
    after = image_names(hold_out(open_images('', str(spoilt), 'train'), 0.3)[1])
    assert set(before) - set(after) == {name for name in before if 'cold' in name} - set(after)
    assert len(after) == 4 + 4
    assert sum('more' not in name for name in after) >= 6 - 2


def test_a_class_of_one_image_is_trained_on(spoilt: Path) -> None:
    for number in range(1, 7):
        (spoilt / f'train/cold/00{number}.png').unlink()
    train, held = hold_out(open_images('', str(spoilt), 'train'), 0.01)
    assert (Counter(labels_of(train)), Counter(labels_of(held))) == ({0: 1, 1: 6, 2: 6}, {1: 1, 2: 1})
