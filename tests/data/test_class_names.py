"""What classes are called, and data sets whose folders or class maps are not quite as they should be."""

import tarfile
from pathlib import Path

import pytest
from colors import CLASSES, color_model, write_folder

from timm_mealv2.data.class_names import class_names_of, has_labels, index_map
from timm_mealv2.data.dataset import image_names, open_dataset
from timm_mealv2.errors import UserError


def test_numbers_by_name(caplog: pytest.LogCaptureFixture) -> None:
    assert index_map(['a', 'b', 'c'], ['c', 'a'], 'teacher') == [2, 0]
    assert '2 of its 3 classes' in caplog.text
    caplog.clear()
    assert index_map(['a', 'b'], ['a', 'b'], 'teacher') is index_map(None, None, 'teacher') is None
    assert not caplog.messages
    for known, wanted, nameless in ((None, ['a'], 'teacher'), (['a'], None, 'the data set')):
        caplog.clear()
        assert index_map(known, wanted, 'teacher') is None
        assert caplog.messages == [f"{nameless} has no class names: its classes are taken in their order, 'a' first."]
    with pytest.raises(UserError, match="teacher lacks 'A', 'c ' of the data set, but has 'a', 'c'"):
        index_map(['a', 'b', 'c'], ['A', 'b', 'c '], 'teacher')


def test_names_that_do_not_tell_the_classes_are_none() -> None:
    model = color_model()
    for names in ([*CLASSES[:3], 'apple'], CLASSES[:3], None):  # one twice, one too few
        model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': names}  # type: ignore[dict-item]
        assert class_names_of(model) is None


def test_hidden_folders_in_a_tar(tmp_path: Path) -> None:
    write_folder(tmp_path / 'images', 2)
    write_folder(tmp_path / 'images', 1, ['apple'], folders=['.ipynb_checkpoints'])
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        tar.add(tmp_path / 'images', '.')  # as `tar -C images -cf train.tar .`
    dataset = open_dataset('', str(tmp_path), 'train.tar')
    assert class_names_of(dataset) == list(CLASSES)
    assert [dataset[index][1] for index in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert not any('checkpoints' in name for name in image_names(dataset))


def test_a_class_map_numbers_what_is_in_a_tar(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path / 'images', 1)
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        tar.add(tmp_path / 'images', 'images')
    (tmp_path / 'map.txt').write_text('sun\nmoon\napple\nleaf\n', encoding='utf-8-sig')
    dataset = open_dataset('', str(tmp_path), 'train.tar', class_map=str(tmp_path / 'map.txt'))
    assert class_names_of(dataset) == ['sun', 'moon', 'apple', 'leaf']
    assert [dataset[index][1] for index in range(3)] == [2, 3, 0]
    assert caplog.messages == [
        "train.tar: folders without an entry in the class map, left out: 'sea'.",
        "train.tar: entries of the class map without a folder: 'moon'.",
    ]


def test_pictures_outside_of_class_folders_have_no_labels(tmp_path: Path) -> None:
    write_folder(tmp_path, 2, ['apple'])
    dataset = open_dataset('', str(tmp_path / 'apple'), 'validation')
    assert not has_labels(dataset)
    assert [dataset[index][1] for index in range(2)] == [-1, -1]
