"""Opening data sets, comparing their classes, and reading one image."""

import errno
import pickle
import shutil
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from images import cut_off
from timm.data import create_dataset

from timm_mealv2.data import dataset as dataset_module
from timm_mealv2.data.class_names import unlabeled
from timm_mealv2.data.dataset import (
    PathsAndTargets,
    UnreadableImage,
    image_names,
    open_dataset,
    read_image,
)
from timm_mealv2.errors import UserError


def test_what_cannot_be_opened_is_said_in_one_line(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / 'empty').mkdir()
    for root, text in (('absent', 'no data set at'), ('empty', 'cannot open')):
        with pytest.raises(UserError, match=text):
            open_dataset('', str(tmp_path / root), 'train')
    with pytest.raises(UserError, match='--data-dir'):
        open_dataset('', None, 'train')
    with pytest.raises(UserError, match='Cannot locate specified class map'):
        open_dataset('', str(image_folder), 'train', class_map=str(tmp_path / 'classes.txt'))
    with pytest.raises(UserError, match="cannot open split 'train' of 'torch/none'"):
        open_dataset('torch/none', str(tmp_path), 'train')


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

    def filename(self, *args: Any) -> str:
        return str(self.reader.filename(*args))


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


def test_paths_are_kept_as_one_array(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / 'n\u00e4me \udcff').mkdir()  # of bytes that are no UTF-8
    shutil.copy(image_folder / 'train' / 'cold' / '000.png', tmp_path / 'n\u00e4me \udcff')
    shutil.copytree(image_folder / 'train', tmp_path, dirs_exist_ok=True)
    theirs: Any = create_dataset('', root=tmp_path)
    ours: Any = open_dataset('', str(tmp_path), 'train')
    assert isinstance(ours.reader.samples, PathsAndTargets)
    assert list(ours.reader.samples) == theirs.reader.samples
    assert ours.reader.samples[-1] == theirs.reader.samples[-1]
    assert list(ours.reader.samples[[3, 4]]) == theirs.reader.samples[3:5]
    assert ours.filenames() == theirs.filenames() == image_names(ours) == image_names(theirs)
    assert ours.filename(2, absolute=True) == theirs.filename(2, absolute=True)
    with pytest.raises(IndexError):
        ours.reader.samples[22]


def _private_kilobytes() -> int:
    lines = Path('/proc/self/smaps_rollup').read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(('Private_Clean', 'Private_Dirty')))


def _read_all(samples: PathsAndTargets, answers: Any) -> None:
    before = _private_kilobytes()
    for index in range(len(samples)):
        path, _ = samples[index]
    answers.put((path, _private_kilobytes() - before))


@pytest.mark.skipif(not Path('/proc/self/smaps_rollup').exists(), reason='Linux tells what a process has of its own')
def test_workers_do_not_copy_the_paths() -> None:
    paths = [(f'/data/imagenet/train/n{i % 1000:08}/n{i:08}_{i}.JPEG', i % 1000) for i in range(60_000)]
    samples = PathsAndTargets(paths)
    context = torch.multiprocessing.get_context('fork')
    found: Any = context.Queue()
    process: Any = context.Process(target=_read_all, args=(samples, found))
    process.start()
    last, grown = found.get(timeout=60)
    process.join()
    assert last == paths[-1][0]
    assert grown < 2_000  # of the list it is 10 MB
    # A process that is started afresh gets the tensors as shared memory.
    assert len(ForkingPickler.dumps(samples)) < 2_000
    assert samples.letters.is_shared()
    assert list(pickle.loads(pickle.dumps(samples)))[-1] == paths[-1]
