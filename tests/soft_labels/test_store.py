"""Tests of timm_mealv2/soft_labels/store.py: the format byte by byte, the very pixels again, and what is refused."""

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image, ImageFilter
from safetensors import safe_open
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import functional as TF

from timm_mealv2.data.dataset import UnreadableImage, open_dataset
from timm_mealv2.errors import UserError
from timm_mealv2.models.factory import create_ensemble
from timm_mealv2.soft_labels import store as store_module
from timm_mealv2.soft_labels.crops import Recipe
from timm_mealv2.soft_labels.record import record
from timm_mealv2.soft_labels.recording import finish, shard_file, shard_ranges
from timm_mealv2.soft_labels.store import (
    Crop,
    SoftLabelStore,
    cut,
    fill_records,
    fingerprint,
    read_shard,
    record_dtype,
    write_shard,
)

RECIPE = Recipe(crops=50, image_size=(20, 16))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp('store-images')
    write_images(root, 4, seed=3)
    return root


@pytest.fixture(scope='module')
def recorded(tmp_path_factory, images):
    """A store of 12 images x 50 crops, the top 2 of 3 classes, in three shards."""
    torch.manual_seed(0)
    teachers = create_ensemble(['test_resnet'], pretrained=False, num_classes=3)
    path = tmp_path_factory.mktemp('store') / 'labels'
    record(open_dataset('', str(images), 'train'), teachers, path, RECIPE, top_k=2, workers=0)
    return path


@pytest.fixture
def copied(tmp_path, recorded):
    """A copy of the store to damage."""
    return Path(shutil.copytree(recorded, tmp_path / 'copy'))


def read_named(root):
    return lambda name: Image.open(root / name).convert('RGB')


# Format


@pytest.mark.parametrize(
    ('classes', 'top_k', 'size'), [(1000, 10, 48), (1000, 5, 28), (2**16, 10, 48), (2**16 + 1, 10, 68), (10, 3, 20)]
)
def test_a_record_has_8_and_4k_bytes(classes, top_k, size):
    assert record_dtype(classes, top_k).itemsize == size


def test_a_record_is_what_the_head_of_the_file_says():
    records = np.zeros(2, record_dtype(1000, 3))
    crops = [Crop(32767, 2, 3, 4, True), Crop(5, 6, 7, 8, False)]
    fill_records(records, crops, np.array([[999, 1, 0], [3, 2, 4]]), np.array([[0.5, 0.25, 0.1], [0.9, 0.05, 0.0]]))
    assert records.tobytes() == (
        struct.pack('<4H3H3e', 0xFFFF, 2, 3, 4, 999, 1, 0, 0.5, 0.25, 0.1)
        + struct.pack('<4H3H3e', 5, 6, 7, 8, 3, 2, 4, 0.9, 0.05, 0)
    )


def test_a_shard_is_one_safetensors_tensor_that_tells_its_images(recorded):
    store = SoftLabelStore(recorded)
    assert [(shard.start, shard.stop) for shard in store.meta.shards] == [(0, 5), (5, 10), (10, 12)]
    for shard in store.meta.shards:
        with safe_open(recorded / shard.file, 'np') as file:
            assert list(file.keys()) == ['records']
            tensor = file.get_tensor('records')
            sizes = json.loads(file.metadata()['sizes'])
        assert (tensor.dtype, tensor.shape) == (np.uint8, ((shard.stop - shard.start) * 50, 16))
        assert sizes == store.sizes[shard.start : shard.stop].tolist() == [[24, 24]] * (shard.stop - shard.start)
        assert shard.sha256 == hashlib.sha256((recorded / shard.file).read_bytes()).hexdigest()


def test_the_fingerprint_does_not_depend_on_the_order():
    sizes = np.array([[3, 4], [5, 6]], np.uint16)
    assert fingerprint(['a', 'b'], sizes) == fingerprint(['b', 'a'], sizes[::-1])
    assert len({fingerprint(['a', 'b'], s) for s in (sizes, sizes[::-1], sizes + 1)}) == 3


# Pixels


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
def test_cut_gives_the_very_pixels_of_timms_transform(mode, interpolation):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    transform = RandomResizedCropAndInterpolation((20, 28), interpolation=interpolation)
    for seed in range(10):
        random.seed(seed)
        top, left, height, width = transform.get_params(image, transform.scale, transform.ratio)
        random.seed(seed)
        expected = transform(image)
        for flip in (False, True):
            got = cut(image, Crop(left, top, width, height, flip), (20, 28), interpolation)
            reference = np.asarray(TF.hflip(expected) if flip else expected).reshape(20, 28, -1)
            assert got.dtype == np.uint8
            assert np.array_equal(got, reference.transpose(2, 0, 1))


# Reading


def test_crops_are_read_in_any_order_from_any_shard(recorded, monkeypatch):
    monkeypatch.setattr(store_module, '_MAX_OPEN', 1)
    store = SoftLabelStore(recorded)
    dtype = record_dtype(3, 2)
    every = np.concatenate([read_shard(recorded / shard.file, dtype) for shard in store.meta.shards]).reshape(12, 50)
    for row in (11, 0, 7, 4, 5, 10):
        for numbers in ([49, 0, 7], range(50), [3], []):
            crops, classes, probabilities = store.read(row, numbers)
            records = every[row, list(numbers)]
            assert classes.dtype == np.int64
            assert probabilities.dtype == np.float32
            assert np.array_equal(classes, records['classes'])
            assert np.array_equal(probabilities, records['probabilities'].astype(np.float32))
            assert [crop.left + 2**15 * crop.flip for crop in crops] == records['left'].tolist()
            assert [list(crop[1:4]) for crop in crops] == [list(record)[1:4] for record in records.tolist()]


def test_names_lead_to_rows(recorded, images):
    store = SoftLabelStore(recorded)
    assert store.names == sorted(str(path.relative_to(images)) for path in images.rglob('*.png'))
    assert all(store.names[row] == name for name, row in store.rows.items())
    assert store.sizes.dtype == np.uint16


def test_a_store_reads_the_same_when_pickled_and_after_a_fork(recorded):
    store = SoftLabelStore(recorded)
    expected = [store.read(row, range(50)) for row in range(12)]
    copy = pickle.loads(pickle.dumps(store))
    with multiprocessing.get_context('fork').Pool(2) as pool:
        for got in (
            [copy.read(row, range(50)) for row in range(12)],
            pool.starmap(store.read, [(row, range(50)) for row in range(12)]),
        ):
            for (crops, *arrays), (other_crops, *others) in zip(expected, got, strict=True):
                assert crops == other_crops
                assert all(np.array_equal(a, b) for a, b in zip(arrays, others, strict=True))


def test_memory_stays_flat_however_much_is_read(tmp_path, recorded):
    images, crops = 100, 10_000  # 16 MB
    names = [f'{number}.jpg' for number in range(images)]
    for number, (start, stop) in enumerate(shard_ranges(images, crops)):
        records = np.ones((stop - start) * crops, record_dtype(3, 2))
        write_shard(tmp_path / shard_file(number), records, np.ones((stop - start, 2), np.uint16))
    settings = {key: value for key, value in SoftLabelStore(recorded).meta.__dict__.items() if key in SETTINGS}
    finish(tmp_path, names, {**settings, 'images': images, 'crops': crops}, lambda sizes: [])

    def resident():
        return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')

    store = SoftLabelStore(tmp_path)
    a_crop_a_page = range(0, crops, 4096 // 16)
    store.read(0, a_crop_a_page)
    before = resident()
    for row in range(images):
        store.read(row, a_crop_a_page)
    assert resident() - before < 4e6


SETTINGS = (
    *('format_version', 'teachers', 'teacher_dtype', 'num_classes', 'top_k', 'image_size', 'img_mode'),
    *('interpolation', 'scale', 'ratio', 'hflip', 'seeds', 'pillow', 'libjpeg'),
)


# What is refused


def edit_meta(path, **values):
    meta = json.loads((path / 'meta.json').read_text())
    (path / 'meta.json').write_text(json.dumps({**meta, **values}))


def truncate(path):
    shard = path / 'shard-00001.safetensors'
    os.truncate(shard, shard.stat().st_size - 16)


def alter(name):
    def change(path):
        data = bytearray((path / name).read_bytes())
        data[-5] ^= 1
        (path / name).write_bytes(data)

    return change


def unfinish(path):
    (path / 'meta.json').rename(path / 'recording.json')


@pytest.mark.parametrize(
    ('damage', 'words'),
    [
        (shutil.rmtree, ['holds no soft labels']),
        (unfinish, ['not finished', 'command again']),
        (lambda path: edit_meta(path, format_version=2), ['format version 2', 'up to 1', 'update']),
        (lambda path: edit_meta(path, topk=3), ['meta.json is damaged', 'topk']),
        (lambda path: (path / 'meta.json').write_text('{"format'), ['meta.json is damaged']),
        (truncate, ['shard-00001.safetensors', 'bytes instead of']),
        (lambda path: (path / 'shard-00002.safetensors').unlink(), ['shard-00002.safetensors is missing']),
        (alter('shard-00002.safetensors'), ['shard-00002.safetensors has been altered']),
        (alter('index.safetensors'), ['index.safetensors has been altered']),
        (lambda path: (path / 'index.safetensors').unlink(), ['index.safetensors is missing']),
    ],
)
def test_a_store_that_is_not_whole_is_refused_in_one_line(copied, damage, words):
    damage(copied)
    with pytest.raises(UserError) as error:
        SoftLabelStore(copied)
    assert '\n' not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_shard_that_is_cut_off_is_refused_without_the_checksums_too(copied):
    SoftLabelStore(copied, check=False)
    truncate(copied)
    with pytest.raises(UserError, match='bytes instead of'):
        SoftLabelStore(copied, check=False)


def test_the_same_pixels_pass(recorded, images):
    SoftLabelStore(recorded).check_decoder(read_named(images))


def test_other_pixels_are_refused_with_the_versions(copied, images):
    edit_meta(copied, pillow='1.2.3', libjpeg='turbo 0.1')
    store = SoftLabelStore(copied)

    def read(name):
        return Image.open(images / name).convert('RGB').filter(ImageFilter.SMOOTH)

    with pytest.raises(UserError, match=r'12 of 12|16 of 16') as error:
        store.check_decoder(read)
    for word in ('Pillow 1.2.3', 'libjpeg turbo 0.1', f'Pillow {Image.__version__}'):
        assert word in str(error.value)


def test_an_image_of_another_size_is_refused(recorded, images):
    with pytest.raises(UserError, match='30x24 pixels, but had 24x24'):
        SoftLabelStore(recorded).check_decoder(lambda name: read_named(images)(name).resize((30, 24)))


def test_the_decoder_is_judged_by_the_images_that_are_there(recorded, images):
    def read_some(name):
        if name.startswith('cold'):
            raise KeyError(name)
        if name.startswith('warm'):
            raise UnreadableImage(name)
        return read_named(images)(name)

    SoftLabelStore(recorded).check_decoder(read_some)
