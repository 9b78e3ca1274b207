"""Recording: what the teachers predict for the very samples of a training, and the same bytes however they come about.

Real teachers (tiny) and real image files; kills are SIGKILL to a real process.
"""

import errno
import fcntl
import multiprocessing
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from filelock import FileLock
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from timm_mealv2.data.augmentation import Augmentation
from timm_mealv2.data.dataset import open_dataset
from timm_mealv2.data.samples import Samples
from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import create_ensemble
from timm_mealv2.soft_labels.describe import describe, difference
from timm_mealv2.soft_labels.record import measure_rate, predict, record
from timm_mealv2.soft_labels.replay import StoredSamples
from timm_mealv2.soft_labels.store import SoftLabelStore, StoreMeta, pixel_crc
from timm_mealv2.soft_labels.verify import compare

AUGMENTATION = Augmentation((3, 24, 24), aa='rand-m9-mstd0.5', reprob=0.3)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.0005)
    assert condition()


@pytest.fixture
def start(train: Dataset, teachers: EnsembleTeacher, settings: StoreMeta) -> Callable[..., Any]:
    """Start a process that records the store `out`."""

    def start(out: Path, **kwargs: Any) -> Any:
        context = multiprocessing.get_context('fork')
        process = context.Process(target=record, args=(out, train, teachers, settings, 12), kwargs=kwargs)
        process.start()
        return process

    return start


# What is recorded


def test_records_are_the_mean_probabilities_for_the_very_samples(
    recorded: SoftLabelStore, train: Dataset, weights: list[str]
) -> None:
    models = []
    for text in weights:
        name, path = text.split('=')
        model = timm.create_model(name, checkpoint_path=path, num_classes=3).eval()
        models.append((model, *(np.array(model.pretrained_cfg[key]).reshape(3, 1, 1) for key in ('mean', 'std'))))
    samples = Samples(train, recorded.meta.augmentation, 42)
    for epoch, image in ((0, 0), (9, 20), (10, 4), (11, 13)):
        (record,) = recorded.read_epoch(epoch, np.array([image]))
        pixels = samples.sample(epoch, image).pixels
        assert record['crc'] == pixel_crc(pixels)
        mean = np.zeros(3)
        for (model, m, s), weight in zip(models, (2 / 3, 1 / 3), strict=True):
            with torch.no_grad():
                x = torch.tensor(((pixels / 255 - m) / s)[None], dtype=torch.float32)
                logits = model(x)[0].double().numpy()
            mean += weight * np.exp(logits) / np.exp(logits).sum()
        assert record['classes'].tolist() == (-mean).argsort().tolist()
        assert record['probabilities'] == pytest.approx(np.sort(mean)[::-1], abs=3e-4)


def test_one_teacher_is_drawn_for_each_sample_by_epoch_and_image_alone(
    train: Dataset, teachers: EnsembleTeacher, tmp_path: Path
) -> None:
    for size in (4, 50):
        meta = describe(train, teachers, AUGMENTATION, top_k=3, batch_size=size, part_images=5, teachers_per_sample=1)
        record(tmp_path / str(size), train, teachers, meta, 2)
    store = SoftLabelStore(tmp_path / '50')
    assert store.meta.teachers_per_sample == 1
    alone = [EnsembleTeacher([teacher]) for teacher in teachers.teachers]
    for teacher in alone:
        teacher.pretrained_cfg = teachers.pretrained_cfg
    samples, drawn = Samples(train, AUGMENTATION, 42), []
    for epoch in range(2):
        records = store.read_epoch(epoch, np.arange(21))
        others = SoftLabelStore(tmp_path / '4').read_epoch(epoch, np.arange(21))
        assert np.abs(records['probabilities'] - others['probabilities']).max() < 1e-3
        pixels = torch.from_numpy(np.stack([samples.sample(epoch, image).pixels for image in range(21)]))
        each = [predict(teacher, pixels).numpy() for teacher in alone]
        for row, *of_teachers in zip(records, *each, strict=True):
            errors = [np.abs(np.sort(p)[::-1] - row['probabilities']).max() for p in of_teachers]
            assert min(errors) < 5e-4 < max(errors)
            drawn.append(int(np.argmin(errors)))
    assert 20 < drawn.count(0) < 36  # of 42, two thirds
    assert drawn[:21] != drawn[21:]
    assert compare(StoredSamples(store, train), teachers, count=40)[1] < 5e-4
    with pytest.raises(UserError, match='a recording with --teachers-per-sample 1, not None'):
        record(tmp_path / '50', train, teachers, replace(meta, teachers_per_sample=None), 2)
    with pytest.raises(UserError, match=r'--teachers-per-sample 2: test_resnet.*give at most 1'):
        describe(train, teachers, AUGMENTATION, teachers_per_sample=2)


class Counting(Dataset):
    """Images without file names, as torchvision's data sets; counts how often each is read."""

    def __init__(self, count: int) -> None:
        generator = np.random.default_rng(0)
        self.images = [Image.fromarray(generator.integers(0, 255, (24, 24), np.uint8)) for _ in range(count)]
        self.reads = [0] * count

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.reads[index] += 1
        return self.images[index], 0


def test_an_image_is_decoded_once_for_a_block_of_epochs(teachers: EnsembleTeacher, tmp_path: Path) -> None:
    data = Counting(20)
    meta = describe(data, teachers, Augmentation((3, 24, 24)), top_k=1, batch_size=60)
    store = record(tmp_path / 'store', data, teachers, meta, 1)
    first = sum(data.reads)
    record(store.path, data, teachers, meta, 21)
    assert sum(data.reads) - first == 20 * 3  # blocks from 1 to 10, to 20 and to 21
    assert store.names() == [f'#{index}' for index in range(20)]


def test_gray_images_are_recorded(tmp_path: Path) -> None:
    for shade in range(6):
        (tmp_path / 'images' / str(shade % 3)).mkdir(parents=True, exist_ok=True)
        Image.new('L', (30, 20), 40 * shade).save(tmp_path / 'images' / str(shade % 3) / f'{shade}.png')
    data = open_dataset('', str(tmp_path / 'images'), 'train', input_img_mode='L')
    teachers = create_ensemble(['test_resnet'], pretrained=False, num_classes=3, in_chans=1)
    meta = describe(data, teachers, Augmentation((1, 24, 24), 'L', mean=(0.5,), std=(0.5,), cutmix=1.0), top_k=2)
    store = record(tmp_path / 'store', data, teachers, meta, 2)
    assert (store.read_epoch(1, np.arange(6))['crc'] > 0).all()


def test_an_image_that_cannot_be_read_has_no_record(
    image_folder: Path, teachers: EnsembleTeacher, mixed: SoftLabelStore, tmp_path: Path, caplog: Any
) -> None:
    root = Path(shutil.copytree(image_folder / 'train', tmp_path / 'train'))
    (root / 'plain' / '002.png').write_bytes(b'broken')
    data = open_dataset('', str(root), 'train')
    meta = describe(data, teachers, mixed.meta.augmentation, top_k=3, part_images=8)
    store = record(tmp_path / 'store', data, teachers, meta, 2)
    pairs = Samples(data, meta.augmentation, 42)
    for epoch in range(2):  # the image is mixed with another one in each epoch, which has no sample then
        found, expected = (one.read_epoch(epoch, np.arange(21)) for one in (store, mixed))
        missing = sorted(place for place in pairs.pair(epoch, 9)[1:] if place is not None)
        assert np.flatnonzero(found['crc'] == 0).tolist() == missing
        assert (np.delete(found, missing)['crc'] == np.delete(expected, missing)['crc']).all()
    assert '002.png' in caplog.text
    assert '2 of 21 images cannot be read: they are never trained on' in caplog.text


def test_a_folder_of_broken_images_is_refused(teachers: EnsembleTeacher, tmp_path: Path) -> None:
    for name in 'abc':
        (tmp_path / 'images' / name).mkdir(parents=True)
        (tmp_path / 'images' / name / '0.png').write_bytes(b'no image')
    data = open_dataset('', str(tmp_path / 'images'), 'train')
    meta = describe(data, teachers, Augmentation((3, 24, 24)), top_k=1)
    with pytest.raises(UserError, match='none of the 3 images can be read'):
        record(tmp_path / 'store', data, teachers, meta, 1)


# The same bytes


def test_processes_and_workers_change_nothing(recorded: SoftLabelStore, start: Any, tmp_path: Path) -> None:
    processes = [start(tmp_path / 'three', workers=workers) for workers in (0, 0, 2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert contents(tmp_path / 'three') == contents(recorded.path)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_killed_recording_goes_on_without_loss_or_repetition(
    workers: int,
    recorded: SoftLabelStore,
    train: Dataset,
    teachers: EnsembleTeacher,
    settings: StoreMeta,
    start: Any,
    tmp_path: Path,
) -> None:
    out = tmp_path / 'store'
    for _ in range(5):  # on a busy machine it may be through before the kill
        shutil.rmtree(out, ignore_errors=True)
        process = start(out, workers=workers)
        wait_for((out / 'part-00000-00001').exists)
        process.kill()
        process.join()
        before = {path.name: path.stat() for path in out.glob('part-*')}
        if len(before) < 10:
            break
    assert process.exitcode == -signal.SIGKILL
    assert 2 <= len(before) < 10
    (out / '.part-00000-00000-abcdefgh').write_bytes(b'what the kill may have left')
    (out / 'part-00000-00000').write_bytes(b'cut off')
    del before['part-00000-00000']

    store = record(out, train, teachers, settings, 12)
    assert store.epochs == 12
    assert contents(out) == contents(recorded.path)
    assert not (out / '.locks').exists()
    for name, stat in before.items():
        assert ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_a_part_that_another_process_makes_is_waited_for(recorded: SoftLabelStore, start: Any, tmp_path: Path) -> None:
    out = tmp_path / 'store'
    (out / '.locks').mkdir(parents=True)
    with FileLock(out / '.locks' / 'lock-part-00000-00002'):
        process = start(out)
        wait_for(lambda: len(list(out.glob('part-*'))) == 9)
        process.join(0.5)
        assert process.is_alive()
        assert not (out / 'part-00000-00002').exists()
    process.join(60)
    assert process.exitcode == 0
    assert contents(out) == contents(recorded.path)


def test_without_locks_of_the_file_system_the_bytes_are_the_same(
    recorded: SoftLabelStore,
    train: Dataset,
    teachers: EnsembleTeacher,
    settings: StoreMeta,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, 'Function not implemented')

    monkeypatch.setattr(fcntl, 'flock', flock)
    record(tmp_path / 'store', train, teachers, settings, 12)
    assert contents(tmp_path / 'store') == contents(recorded.path)
    assert caplog.text.count('this file system has no locks') == 1


def test_further_epochs_are_added_and_what_is_there_stays(
    recorded: SoftLabelStore, train: Dataset, teachers: EnsembleTeacher, settings: StoreMeta, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(recorded.path, tmp_path / 'store'))
    before = {part.name: part.stat().st_mtime_ns for part in path.glob('part-*')}
    store = record(path, train, teachers, settings, 14)
    assert store.epochs == 14
    assert len(list(path.glob('part-*'))) == 15
    assert all((path / name).stat().st_mtime_ns == mtime for name, mtime in before.items())
    assert record(path, train, teachers, settings, 3).epochs == 14  # nothing is taken away


def test_going_on_with_other_settings_or_images_is_refused(
    recorded: SoftLabelStore, image_folder: Path, train: Dataset, teachers: EnsembleTeacher, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(recorded.path, tmp_path / 'store'))
    before = contents(path)
    augmentation = recorded.meta.augmentation
    with pytest.raises(UserError, match='is a recording with --top-k 3, not 2: give the same options, or another'):
        record(path, train, teachers, describe(train, teachers, augmentation, top_k=2), 12)
    root = Path(shutil.copytree(image_folder / 'train', tmp_path / 'train'))
    Image.new('RGB', (24, 24)).save(root / 'cold' / '000.png')
    other = open_dataset('', str(root), 'train')
    with pytest.raises(UserError, match=r'image 0, epoch 1: .* was recorded from other pixels'):
        record(path, other, teachers, describe(other, teachers, augmentation, top_k=3), 12)
    assert contents(path) == before
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'thesis.txt').touch()
    with pytest.raises(UserError, match='holds other files'):
        record(tmp_path / 'other', train, teachers, recorded.meta, 12)


def test_teachers_that_predict_nan_are_told(train: Dataset, weights: list[str], tmp_path: Path) -> None:
    teachers = create_ensemble(weights)
    with torch.no_grad():
        next(teachers.teachers[0].parameters()).fill_(torch.nan)
    meta = describe(train, teachers, Augmentation((3, 24, 24)), top_k=1)
    with pytest.raises(UserError, match='the teachers predict NaN'):
        record(tmp_path / 'store', train, teachers, meta, 1)
    assert not list((tmp_path / 'store').glob('part-*'))


def test_the_rate_is_measured_without_writing(train: Dataset, teachers: EnsembleTeacher, settings: StoreMeta) -> None:
    began = time.monotonic()
    assert 10 < measure_rate(train, teachers, settings, seconds=0.2) < 1e5
    assert time.monotonic() - began > 0.2


# Settings


@pytest.mark.parametrize(('images', 'parts'), [(1_281_167, 128), (300, 2)])
def test_a_block_of_epochs_has_as_many_parts_as_are_worth_a_file(
    images: int, parts: int, teachers: EnsembleTeacher
) -> None:
    data = type('Many', (Dataset,), {'__len__': lambda self: images})()
    meta = describe(data, teachers, Augmentation((3, 24, 24)), top_k=3).extend(20, 10)
    assert len(list(meta.parts())) == 2 * parts


def test_recordings_that_differ_are_told_apart_by_name(
    train: Dataset, teachers: EnsembleTeacher, weights: list[str], settings: StoreMeta, mixed: SoftLabelStore
) -> None:
    retrained = create_ensemble(weights, weights=[2, 1])
    nn.init.normal_(retrained.teachers[1].get_classifier().weight)
    first, second = weights
    in_half = create_ensemble([first, create_ensemble(second, autocast_dtype=torch.bfloat16)], weights=[2, 1])
    for meta, words in (
        (replace(settings, top_k=2), '--top-k 3, not 2'),
        (replace(settings, seed=1), '--seed 42, not 1'),
        (describe(train, in_half, settings.augmentation, top_k=3), '--teacher-dtype None None, not None bfloat16'),
        (replace(settings, names_sha256=''), 'the names of the images'),
        (describe(train, teachers, Augmentation((3, 24, 24)), top_k=3), '--aa rand-m9-mstd0.5, not None'),
        (replace(settings, augmentation=mixed.meta.augmentation), '--reprob 0.3, not 0.0'),
        (describe(train, create_ensemble(weights), settings.augmentation, top_k=3), '--teacher-weights 0.66'),
        (describe(train, create_ensemble(weights[:1]), settings.augmentation, top_k=3), '--teachers test_resnet='),
        (describe(train, retrained, settings.augmentation, top_k=3), '(SHA-256 '),
    ):
        assert words in (difference(settings, meta) or '')
    moved = [{**teacher, 'name': 'moved'} for teacher in settings.teachers]
    assert difference(settings, replace(settings, teachers=moved, batch_size=1, part_images=1)) is None
