"""Opening data sets, comparing their classes, and reading one image."""

import errno
import tarfile
from pathlib import Path
from typing import Any

import pytest
from images import cut_off

from timm_mealv2.data import dataset as dataset_module
from timm_mealv2.data.dataset import UnreadableImage, check_classes, class_names, open_dataset, read_image, unlabeled
from timm_mealv2.errors import UserError


def test_what_cannot_be_opened_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / 'empty').mkdir()
    for root, text in (('absent', 'no data set at'), ('empty', 'cannot open')):
        with pytest.raises(UserError, match=text):
            open_dataset('', str(tmp_path / root), 'train')
    with pytest.raises(UserError, match='--data-dir'):
        open_dataset('', None, 'train')


def test_class_counts_and_names_are_compared(image_folder: Path, tmp_path: Path) -> None:
    train = open_dataset('', str(image_folder), 'train')
    check_classes(train, open_dataset('', str(image_folder), 'validation'), 3)
    with pytest.raises(UserError, match='3 classes, the model 10'):
        check_classes(train, None, 10)
    other = tmp_path / 'validation'
    other.mkdir()
    for name in ('cold', 'plain', 'wet'):
        (other / name).symlink_to(image_folder / 'validation' / 'cold')
    with pytest.raises(UserError, match='warm, wet'):
        check_classes(train, open_dataset('', str(tmp_path), 'validation'), 3)
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        tar.add(image_folder / 'train', 'train')
    packed = open_dataset('', str(tmp_path), 'train.tar')
    assert class_names(packed) == ['cold', 'plain', 'warm']
    with pytest.raises(UserError, match='3 classes, the model 10'):
        check_classes(packed, None, 10)


def test_a_data_set_without_labels_shows_the_same_images(image_folder: Path) -> None:
    dataset = open_dataset('', str(image_folder), 'train')
    without = unlabeled(dataset)
    assert read_image(without, 20)[1] == without[20][1] == -1
    assert read_image(dataset, 20)[1] == 2
    assert read_image(without, 20)[0].tobytes() == read_image(dataset, 20)[0].tobytes()


class Flaky:
    """A reader on a network disk that fails a few times."""

    def __init__(self, reader: Any, number: int, times: int) -> None:
        self.reader, self.number, self.left = reader, number, times

    def __getitem__(self, index: int) -> Any:
        self.left -= 1
        if self.left >= 0:
            raise OSError(self.number, 'disk is away')
        return self.reader[index]


@pytest.mark.parametrize('number', [errno.ESTALE, errno.EIO, errno.ENOENT])
def test_a_disk_that_is_away_for_a_moment_is_asked_again(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(dataset_module, 'RETRY_AFTER', (0.01, 0.01))
    dataset: Any = open_dataset('', str(image_folder), 'train')
    reader = dataset.reader
    dataset.reader = Flaky(reader, number, times=2)
    assert read_image(dataset, 3)[0].size == (24, 24)
    dataset.reader = Flaky(reader, number, times=3)
    with pytest.raises(UnreadableImage, match='disk is away') as error:
        read_image(dataset, 3)
    assert error.value.index == 3


def test_what_cannot_be_decoded_counts_at_once(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, 'RETRY_AFTER', (3600,))
    (spoilt / 'train' / 'cold' / '001.png').write_bytes(b'no image')
    cut_off(spoilt / 'train' / 'cold' / '000.png')
    dataset = open_dataset('', str(spoilt), 'train')
    for index in range(2):
        with pytest.raises(UnreadableImage, match=f'00{index}.png: .'):
            read_image(dataset, index)
