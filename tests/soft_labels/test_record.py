"""Tests of timm_mealv2/soft_labels/record.py: labels against plain torchvision and NumPy, and the same files always.

Real teachers (tiny) and real image files; kills are SIGKILL to a real process.
"""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, write_images
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import functional as TF

from timm_mealv2.data.dataset import open_dataset
from timm_mealv2.errors import UserError
from timm_mealv2.models.factory import create_ensemble
from timm_mealv2.soft_labels.crops import CropSource, Recipe
from timm_mealv2.soft_labels.record import measure, record
from timm_mealv2.soft_labels.recording import shard_ranges
from timm_mealv2.soft_labels.store import Crop, SoftLabelStore

RECIPE = Recipe(crops=50, image_size=(24, 24))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """12 images of three classes: with 50 crops of each, three shards."""
    root = tmp_path_factory.mktemp('record-images')
    write_images(root, 4, seed=3)
    return root


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Texts that name two teachers with fixed weights, of different mean and std."""
    folder = tmp_path_factory.mktemp('teachers')
    texts = []
    for seed, name in enumerate(('test_resnet', 'test_efficientnet')):
        torch.manual_seed(seed)
        path = folder / f'{name}.pth'
        torch.save(timm.create_model(name, num_classes=3).state_dict(), path)
        texts.append(f'{name}={path}')
    return texts


@pytest.fixture(scope='module')
def teachers(weights):
    return create_ensemble(weights, weights=[2, 1])


def record_folder(root, teachers, out, recipe=RECIPE, **kwargs):
    return record(open_dataset('', str(root), 'train'), teachers, out, recipe, **{'top_k': 3, 'workers': 0, **kwargs})


@pytest.fixture(scope='module')
def recorded(tmp_path_factory, images, teachers):
    path = tmp_path_factory.mktemp('store') / 'labels'
    record_folder(images, teachers, path)
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is recorded


def test_labels_are_the_mean_probabilities_for_the_very_crops(recorded, images, weights):
    store = SoftLabelStore(recorded)
    models = []
    for text in weights:
        name, path = text.split('=')
        model = timm.create_model(name, checkpoint_path=path, num_classes=3).eval()
        models.append((model, *(np.array(model.pretrained_cfg[key]).reshape(3, 1, 1) for key in ('mean', 'std'))))
    for row, number in ((0, 0), (3, 49), (7, 20), (11, 1)):
        (crop,), (classes,), (stored,) = store.read(row, [number])
        image = Image.open(images / store.names[row]).convert('RGB')
        image = TF.resized_crop(image, crop.top, crop.left, crop.height, crop.width, [24, 24])
        pixels = np.asarray(TF.hflip(image) if crop.flip else image).transpose(2, 0, 1) / 255
        mean = np.zeros(3)
        for (model, m, s), weight in zip(models, (2 / 3, 1 / 3), strict=True):
            with torch.no_grad():
                logits = model(torch.tensor(((pixels - m) / s)[None], dtype=torch.float32))[0].double().numpy()
            mean += weight * np.exp(logits) / np.exp(logits).sum()
        assert classes.tolist() == (-mean).argsort().tolist()
        assert stored == pytest.approx(np.sort(mean)[::-1], abs=3e-4)


def test_crops_are_timms_and_depend_on_seed_image_and_number_alone(recorded, images, teachers, tmp_path):
    store = SoftLabelStore(recorded)
    every = [store.read(row, range(50))[0] for row in range(12)]
    assert len({crop for crops in every for crop in crops}) > 500
    assert 0.4 < np.mean([crop.flip for crops in every for crop in crops]) < 0.6
    shares = [crop.width * crop.height / 24**2 for crops in every for crop in crops]
    assert min(shares) == pytest.approx(0.08, abs=0.02)
    assert max(shares) == 1

    record_folder(images, teachers, tmp_path / 'fewer', Recipe(crops=3, image_size=(24, 24)), top_k=1)
    fewer = SoftLabelStore(tmp_path / 'fewer')
    assert [fewer.read(row, range(3))[0] for row in range(12)] == [crops[:3] for crops in every]
    record_folder(images, teachers, tmp_path / 'other', Recipe(crops=3, image_size=(24, 24), seed=1), top_k=1)
    other = SoftLabelStore(tmp_path / 'other')
    assert all(other.read(row, range(3))[0] != crops[:3] for row, crops in enumerate(every))


def test_drawing_leaves_pythons_generator_alone_and_takes_timms_geometry(monkeypatch):
    image = Image.new('RGB', (40, 30))
    monkeypatch.setattr(RandomResizedCropAndInterpolation, 'get_params', lambda *args: (1, 2, 3, 4))
    random.seed(5)
    expected = random.random()
    random.seed(5)
    assert {crop[:4] for crop in RECIPE.draw(image, 0, range(9))} == {(2, 1, 4, 3)}
    assert random.random() == expected


def test_crops_of_the_smallest_images_lie_inside():
    for size in ((1, 1), (1, 9), (2, 3)):
        for left, top, width, height, _ in RECIPE.draw(Image.new('RGB', size), 0, range(50)):
            assert 0 <= left <= left + width - 1 < size[0]
            assert 0 <= top <= top + height - 1 < size[1]


def test_meta_says_what_was_recorded(recorded, weights, teachers):
    meta = SoftLabelStore(recorded).meta
    assert [teacher['name'] for teacher in meta.teachers] == weights
    assert [teacher['weight'] for teacher in meta.teachers] == pytest.approx([2 / 3, 1 / 3])
    assert len({teacher['sha256'] for teacher in meta.teachers}) == 2
    assert (meta.num_classes, meta.top_k, meta.crops, meta.images, meta.unreadable) == (3, 3, 50, 12, 0)
    assert (meta.image_size, meta.img_mode, meta.interpolation) == ([24, 24], 'RGB', 'bilinear')
    assert meta.kept_mass == pytest.approx(1, abs=1e-3)
    assert len(meta.pixel_samples) == 16


class Counting(Dataset):
    """Images without file names, as torchvision's data sets; counts how often each is read."""

    def __init__(self, images):
        self.images = images
        self.reads = [0] * len(images)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.images[index], 0


def test_an_image_is_read_once_whatever_the_batch_size_and_memory_is_bounded(images):
    pictures = [Image.open(path).convert('RGB') for path in sorted(images.rglob('*.png'))]
    for batch_size in (7, 50, 128, 10_000):
        data = Counting(pictures)
        source = CropSource(data, RECIPE, [(0, 0, 5), (1, 5, 10), (2, 10, 12)], batch_size)
        batches = list(source)
        assert data.reads == [1] * 12
        assert max(len(batch.pixels) for batch in batches) <= batch_size
        assert sorted((batch.shard, place) for batch in batches for place in batch.places) == [
            (shard, place) for shard, count in enumerate((5, 5, 2)) for place in range(50 * count)
        ]


def test_images_without_names_are_known_by_number_and_converted(tmp_path, teachers):
    data = Counting([Image.new('L', (24, 24), shade) for shade in (0, 100, 200)])
    record(data, teachers, tmp_path / 'labels', Recipe(crops=2, image_size=(24, 24)), top_k=1, workers=0)
    assert SoftLabelStore(tmp_path / 'labels').names == ['#0', '#1', '#2']


def test_a_tar_gives_the_labels_of_the_folder(tmp_path, images, teachers, recorded):
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        for number, path in enumerate(sorted(images.rglob('*.png'))):
            tar.add(path, f'{path.parent.name}/{number:02}.png')
    out = tmp_path / 'labels'
    record_folder(tmp_path / 'train.tar', teachers, out, workers=2)
    store = SoftLabelStore(out)
    assert [name.rpartition('/')[2] for name in store.names] == [f'{number:02}.png' for number in range(12)]
    shards = [path.name for path in out.glob('shard-*')]
    assert {name: contents(out)[name] for name in shards} == {name: contents(recorded)[name] for name in shards}


def test_grey_images_without_classes_are_recorded(tmp_path):
    write_images(tmp_path / 'images', 2, seed=0, mode='L')
    for number, path in enumerate(sorted((tmp_path / 'images').rglob('*.png'))):
        path.rename(tmp_path / 'images' / f'{number}.png')
    for name in CLASSES:
        (tmp_path / 'images' / name).rmdir()
    data = open_dataset('', str(tmp_path / 'images'), 'train', input_img_mode='L')
    teachers = create_ensemble(['test_resnet'], pretrained=False, num_classes=3, in_chans=1)
    grey = Recipe(crops=3, image_size=(24, 24), img_mode='L')
    meta = record(data, teachers, tmp_path / 'labels', grey, top_k=2, workers=0)
    assert (meta.images, meta.img_mode) == (6, 'L')
    with pytest.raises(UserError, match='the teachers take 1 channels, images of mode RGB have 3'):
        record(data, teachers, tmp_path / 'colour', Recipe(crops=3, image_size=(24, 24)), top_k=2)


def test_an_image_that_cannot_be_read_is_marked_and_the_others_keep_their_labels(
    tmp_path, images, teachers, recorded, caplog
):
    root = shutil.copytree(images, tmp_path / 'images')
    (root / 'plain' / '001.png').write_bytes(b'no image')
    Image.new('RGB', (32768, 1)).save(root / 'plain' / '002.png')
    meta = record_folder(root, teachers, tmp_path / 'labels')
    store, whole = SoftLabelStore(tmp_path / 'labels'), SoftLabelStore(recorded)
    assert meta.unreadable == 2
    for row in range(12):
        if store.names[row] in ('plain/001.png', 'plain/002.png'):
            assert store.sizes[row].tolist() == [0, 0]
            assert store.read(row, [7])[0] == [Crop(0, 0, 0, 0, False)]
        else:
            (crops, classes, probabilities), others = (each.read(row, range(50)) for each in (store, whole))
            assert crops == others[0]
            assert (classes == others[1]).mean() > 0.99  # other batches, other rounding
            assert probabilities == pytest.approx(others[2], abs=1e-3)
    for name in ('001.png', '32768x1'):
        assert sum('cannot be read' in line and name in line for line in caplog.messages) == 1
    assert any('2 of 12 images cannot be read' in line for line in caplog.messages)
    assert meta.kept_mass == pytest.approx(1, abs=1e-3)


# The same files, however they come about


@pytest.mark.parametrize('workers', [1, 2])
def test_workers_change_nothing(workers, tmp_path, images, teachers, recorded):
    record_folder(images, teachers, tmp_path / 'labels', workers=workers)
    assert contents(tmp_path / 'labels') == contents(recorded)


def command(images, weights, out, *options):
    return [
        *('-m', 'timm_mealv2.soft_labels', 'record', '--teachers', *weights, '--teacher-weights', '2', '1'),
        *('--data-dir', str(images), '--out', str(out), '--crops', '50', '--img-size', '24', '--top-k', '3'),
        *('--device', 'cpu', *options),
    ]


ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}


def test_two_processes_write_the_files_of_one(tmp_path, images, weights, recorded):
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    arguments = command(images, weights, tmp_path / 'labels', '-j', '1')
    result = subprocess.run([*torchrun, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / 'labels') == contents(recorded)


def test_a_killed_recording_goes_on_without_loss_or_repetition(tmp_path, images, weights, teachers, recorded):
    out = tmp_path / 'labels'
    arguments = command(images, weights, out, '-j', '0', '-b', '50')
    log = tmp_path / 'log'
    with log.open('w') as file:
        process = subprocess.Popen([sys.executable, *arguments], env=ENVIRONMENT, stdout=file, stderr=file)
    first = out / 'shard-00000.safetensors'
    end = time.monotonic() + 60
    while not first.exists() and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, log.read_text()
    assert first.exists()
    assert not (out / 'meta.json').exists()
    with pytest.raises(UserError, match='is a recording that is not finished'):
        SoftLabelStore(out)
    (out / '.shard-00001-abcdefgh.safetensors').write_bytes(b'what the kill may have left')
    before = {path.name: path.stat() for path in out.glob('shard-*')}

    record_folder(images, teachers, out, batch_size=50)
    unbroken = tmp_path / 'unbroken'
    record_folder(images, teachers, unbroken, batch_size=50)
    assert contents(out) == contents(unbroken)
    for name, stat in before.items():
        assert ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_a_shard_that_is_cut_off_is_recorded_again(tmp_path, images, teachers, recorded):
    out = tmp_path / 'labels'
    stop_before_the_end(images, teachers, out)
    os.truncate(out / 'shard-00001.safetensors', 100)
    record_folder(images, teachers, out)
    assert contents(out) == contents(recorded)


def stop_before_the_end(images, teachers, out):
    """Leave a recording with all of its shards, but not finished."""

    def interrupt(*args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('timm_mealv2.soft_labels.record.finish', interrupt)
        with pytest.raises(KeyboardInterrupt):
            record_folder(images, teachers, out)


def test_a_finished_store_is_left_as_it_is(images, teachers, recorded, caplog):
    before = {path.name: path.stat().st_mtime_ns for path in recorded.iterdir()}
    caplog.set_level('INFO')
    meta = record_folder(images, teachers, recorded)
    assert meta == SoftLabelStore(recorded).meta
    assert {path.name: path.stat().st_mtime_ns for path in recorded.iterdir()} == before
    assert any('is finished' in line for line in caplog.messages)


@pytest.mark.parametrize('finished', [True, False])
def test_going_on_with_other_settings_is_refused_by_name(finished, tmp_path, images, teachers, weights, recorded):
    out = tmp_path / 'labels'
    if finished:
        shutil.copytree(recorded, out)
    else:
        stop_before_the_end(images, teachers, out)
    before = contents(out)
    torch.manual_seed(9)
    retrained = create_ensemble(weights, weights=[2, 1])
    nn.init.normal_(retrained.teachers[1].get_classifier().weight)
    more = shutil.copytree(images, tmp_path / 'more')
    shutil.copy(more / 'cold' / '000.png', more / 'cold' / '100.png')
    renamed = shutil.copytree(images, tmp_path / 'renamed')
    (renamed / 'cold' / '000.png').rename(renamed / 'cold' / 'zero.png')
    for root, ensemble, recipe, top_k, words in (
        (images, teachers, RECIPE, 2, '--top-k 3, not 2'),
        (images, teachers, Recipe(crops=51, image_size=(24, 24)), 3, '--crops 50, not 51'),
        (images, teachers, Recipe(crops=50, image_size=(24, 32)), 3, '--img-size 24 24, not 24 32'),
        (images, teachers, Recipe(crops=50, image_size=(24, 24), seed=1), 3, '--seed 42, not 1'),
        (images, create_ensemble(weights), RECIPE, 3, '--teacher-weights 0.6666666666666666 for test_resnet='),
        (images, create_ensemble(weights[:1]), RECIPE, 3, '--teachers test_resnet='),
        (images, retrained, RECIPE, 3, 'other weights of test_efficientnet='),
        (images, create_ensemble(weights, weights=[2, 1], img_sizes=[32]), RECIPE, 3, '--teacher-img-size None'),
        (more, teachers, RECIPE, 3, 'the number of images 12, not 13'),
        (renamed, teachers, RECIPE, 3, 'the names of the images'),
    ):
        with pytest.raises(UserError) as error:
            record_folder(root, ensemble, out, recipe, top_k=top_k)
        assert words in str(error.value)
        assert '\n' not in str(error.value)
    assert contents(out) == before


def test_a_folder_with_other_files_is_refused(images, teachers, tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(UserError, match='holds other files'):
        record_folder(images, teachers, tmp_path)


@pytest.mark.parametrize(('images', 'crops'), [(12, 50), (1_281_167, 1), (1_281_167, 300), (10, 10**6), (5, 1)])
def test_a_shard_is_a_small_share_of_the_whole(images, crops):
    ranges = shard_ranges(images, crops)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == images
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
    size = (ranges[0][1] - ranges[0][0]) * crops
    assert size <= max(256, math.ceil(images * crops / 1024), crops)
    assert size <= max(2**18, crops)


# What is refused


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'crops': 0}, '--crops must be 1 or more'),
        ({'image_size': (0, 24)}, '--img-size must be 1 or more'),
        ({'img_mode': 'CMYK'}, '--input-img-mode must be RGB or L'),
        ({'interpolation': 'random'}, '--train-interpolation must be one interpolation'),
        ({'scale': (0.0, 1.0)}, '--scale must be'),
        ({'scale': (0.5, 0.1)}, '--scale must be'),
        ({'ratio': (1.0,)}, '--ratio must be'),
        ({'hflip': 1.5}, '--hflip must be'),
        ({'seed': -1}, '--seed must be'),
    ],
)
def test_crops_that_are_not_possible_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        Recipe(**{'crops': 1, 'image_size': (24, 24), **changes})


@pytest.mark.parametrize('top_k', [0, 4])
def test_more_classes_than_there_are_is_refused(top_k, images, teachers, tmp_path):
    with pytest.raises(UserError, match=f'--top-k must be from 1 to 3, the number of classes, got {top_k}'):
        record_folder(images, teachers, tmp_path / 'labels', top_k=top_k)
    assert not (tmp_path / 'labels').exists()


def test_answers_that_are_no_numbers_are_refused(images, weights, tmp_path):
    broken = create_ensemble(weights)
    nn.init.constant_(broken.teachers[0].get_classifier().weight, float('nan'))
    with pytest.raises(UserError, match='the teachers answer with NaN'):
        record_folder(images, broken, tmp_path / 'labels')


def test_images_none_of_which_can_be_read_are_refused(teachers, tmp_path):
    (tmp_path / 'images' / 'a').mkdir(parents=True)
    (tmp_path / 'images' / 'a' / '0.png').write_bytes(b'')
    with pytest.raises(UserError, match='none of the 1 images can be read'):
        record_folder(tmp_path / 'images', teachers, tmp_path / 'labels')


def test_measuring_gives_a_rate_and_writes_nothing(images, teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = open_dataset('', str(images), 'train')
    rate = measure(data, teachers, RECIPE, top_k=3, batch_size=64, workers=0, seconds=0.2)
    assert 1 < rate < 1e6
    assert not list(tmp_path.iterdir())
