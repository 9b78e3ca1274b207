"""The format of a store and reading it: only whole records, and only for the images and settings they belong to."""

import json
import os
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import connected
from huggingface_hub.cli.hf import app as hf
from torch.utils.data import Dataset

from timm_mealv2.data.augmentation import Augmentation
from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.soft_labels.describe import describe
from timm_mealv2.soft_labels.record import record
from timm_mealv2.soft_labels.store import META, SoftLabelStore, StoreMeta


def test_meta_says_what_was_recorded(recorded: SoftLabelStore, weights: list[str]) -> None:
    meta = StoreMeta.read(recorded.path)
    assert meta.augmentation == Augmentation((3, 24, 24), aa='rand-m9-mstd0.5', reprob=0.3)
    assert [teacher['name'] for teacher in meta.teachers] == weights
    assert [teacher['weight'] for teacher in meta.teachers] == pytest.approx([2 / 3, 1 / 3])
    assert len({teacher['sha256'] for teacher in meta.teachers}) == 2
    assert (meta.format, meta.seed, meta.num_classes, meta.top_k, meta.images, meta.epochs) == (2, 42, 3, 3, 21, 12)
    assert set(meta.versions) == {'timm', 'torchvision', 'Pillow', 'libjpeg', 'numpy'}


@pytest.mark.parametrize(
    ('classes', 'top_k', 'size'), [(1000, 10, 44), (2**16, 10, 44), (2**16 + 1, 10, 64), (1000, 5, 24)]
)
def test_bytes_of_a_record(settings: StoreMeta, classes: int, top_k: int, size: int) -> None:
    assert replace(settings, num_classes=classes, top_k=top_k).dtype.itemsize == size


def test_further_epochs_leave_the_blocks_that_are_there(settings: StoreMeta) -> None:
    meta = settings.extend(25, 10)
    assert meta.blocks == [0, 10, 20, 25]
    assert meta.extend(20, 10) == meta
    assert meta.extend(45, 10).blocks == [0, 10, 20, 25, 30, 40, 45]


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (None, 'holds no soft labels: there is no meta.json'),
        ('{"format": 3}', 'has format 3, this timm_mealv2 reads format 2: record it again'),
        ('{"format": 2}', 'is damaged'),
        ('{', 'is damaged'),
    ],
)
def test_what_is_no_store_of_this_format_is_refused(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / META).write_text(content)
    with pytest.raises(UserError, match=words):
        SoftLabelStore(tmp_path)


def test_a_setting_that_has_changed_is_refused(recorded: SoftLabelStore, tmp_path: Path) -> None:
    text = (recorded.path / META).read_text()
    (tmp_path / META).write_text(text.replace('"seed": 42', '"seed": 43'))
    with pytest.raises(UserError, match=r'meta.json is damaged: copy the store again'):
        StoreMeta.read(tmp_path)


def test_a_setting_that_meta_lacks_has_the_default_of_the_version_that_wrote_it(
    recorded: SoftLabelStore, tmp_path: Path
) -> None:
    values = json.loads((recorded.path / META).read_text())
    del values['crc'], values['augmentation']['mixup_off_epoch'], values['teachers_per_sample']
    (tmp_path / META).write_text(json.dumps({**values, 'crc': zlib.crc32(json.dumps(values).encode())}))
    assert StoreMeta.read(tmp_path) == recorded.meta


def test_an_epoch_is_read_in_any_order(recorded: SoftLabelStore) -> None:
    whole = np.concatenate([recorded.read_slice(11, number) for number in range(5)])
    rows = np.random.default_rng(0).permutation(21)[:13]
    assert (recorded.read_epoch(11, rows) == whole[rows]).all()
    assert len(recorded.read_epoch(3, rows[:0])) == 0


def test_each_flipped_bit_is_noticed(
    train: Dataset, teachers: EnsembleTeacher, settings: StoreMeta, tmp_path: Path
) -> None:
    meta = describe(train, teachers, settings.augmentation, top_k=1, part_images=19)
    store = record(tmp_path / 'store', train, teachers, meta, 2)
    path = store.path / 'part-00000-00001'
    data = bytearray(path.read_bytes())
    assert len(data) == 2 * (2 * 8 + 4)
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(UserError, match='part-00000-00001 is damaged'):
            store.read_slice(bit // 8 * 2 // len(data), 1)
        data[bit // 8] ^= 1 << bit % 8


def test_a_part_in_the_place_of_another_is_noticed(recorded: SoftLabelStore, tmp_path: Path) -> None:
    path = Path(shutil.copytree(recorded.path, tmp_path / 'store'))
    shutil.copy(path / 'part-00000-00001', path / 'part-00000-00002')
    with pytest.raises(UserError, match='part-00000-00002 is damaged'):
        SoftLabelStore(path).read_epoch(4, np.arange(21))


def test_opening_looks_at_sizes_and_tells_how_far_the_epochs_are_whole(
    recorded: SoftLabelStore, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(recorded.path, tmp_path / 'store'))
    for part in path.glob('part-*'):
        part.write_bytes(bytes(part.stat().st_size))  # opening does not read them
    assert (SoftLabelStore(path).epochs, SoftLabelStore(path).missing) == (12, [])
    os.truncate(path / 'part-00010-00003', 100)
    store = SoftLabelStore(path)
    assert store.epochs == 10
    assert '1 of 10 parts of' in store.incomplete()
    assert 'are missing or cut off (part-00010-00003)' in store.incomplete()
    (path / 'part-00000-00000').unlink()
    assert SoftLabelStore(path).epochs == 0


def test_images_are_found_by_name(recorded: SoftLabelStore, tmp_path: Path) -> None:
    names = recorded.names()
    assert names[0] == 'cold/000.png'
    assert recorded.match(names) is None
    rows = recorded.match([names[7], names[20], names[0]])
    assert rows is not None
    assert rows.tolist() == [7, 20, 0]
    rows = recorded.match(names[::-1])
    assert rows is not None
    assert rows.tolist() == list(range(20, -1, -1))
    with pytest.raises(UserError, match=r'2 of 3 images are not in .*, warm/009.png for one'):
        recorded.match([names[3], 'warm/009.png', 'zzz'])
    with pytest.raises(UserError, match=r'2 of 2 images are not in .*, #0 for one: give the 21 images'):
        recorded.match(['#0', '#1'])
    path = Path(shutil.copytree(recorded.path, tmp_path / 'store'))
    (path / 'names.txt').write_text('other')
    with pytest.raises(UserError, match=r'names.txt is damaged'):
        SoftLabelStore(path).match(names[1:])


def test_settings_may_be_left_out_or_equal(recorded: SoftLabelStore, mixed: SoftLabelStore) -> None:
    settings = recorded.training_settings({})
    assert (settings['aa'], settings['reprob'], settings['scale']) == ('rand-m9-mstd0.5', 0.3, [0.08, 1.0])
    assert (settings['input_size'], settings['num_classes']) == ([3, 24, 24], 3)
    assert not {'mean', 'std', 'seed', 'mixup_mode'} & set(settings)
    assert mixed.training_settings({})['mixup_mode'] == 'pair'
    given = {'aa': 'rand-m9-mstd0.5', 'reprob': 0.3, 'scale': [0.08, 1.0], 'vflip': 0, 'mean': [0.5], 'lr': 1.0}
    given |= {'cutmix': 0.0, 'num_classes': 3, 'mixup_mode': 'batch', 'img_size': 24, 'in_chans': 3}
    assert not set(given) & set(recorded.training_settings(given))


@pytest.mark.parametrize(
    ('name', 'value', 'words'),
    [
        ('aa', None, r'--aa was rand-m9-mstd0.5 when .* was recorded and is None here: leave it out, or record'),
        ('reprob', 0.25, '--reprob was 0.3'),
        ('cutmix', 1.0, '--cutmix was 0.0'),
        ('scale', [0.2, 1.0], r'--scale was 0.08 1.0 when .* and is 0.2 1.0'),
        ('train_interpolation', 'bicubic', '--train-interpolation was random'),
        ('num_classes', 4, '--num-classes was 3'),
        ('no_aug', True, '--no-aug was False'),
        ('img_size', 32, '--img-size was 24'),
        ('input_size', [3, 24, 32], r'--input-size was 3 24 24'),
        ('in_chans', 1, '--in-chans was 3'),
        ('teachers', ['resnet18'], r'--teachers was test_\w+=.* and is resnet18'),
    ],
)
def test_a_setting_that_gives_other_pixels_or_classes_is_refused_by_name(
    recorded: SoftLabelStore, name: str, value: Any, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        recorded.training_settings({name: value})


def test_pairs_are_not_mixed_otherwise(mixed: SoftLabelStore) -> None:
    with pytest.raises(UserError, match=r'--mixup-mode was pair when .* and is batch'):
        mixed.training_settings({'mixup_mode': 'batch'})


def test_a_store_is_shared_as_a_data_set_on_the_hub(
    recorded: SoftLabelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(monkeypatch, tmp_path / 'home'):
        hf(['upload', 'me/labels', str(recorded.path), '--repo-type', 'dataset'], standalone_mode=False)
        hf(
            ['download', 'me/labels', '--repo-type', 'dataset', '--local-dir', f'{tmp_path}/labels'],
            standalone_mode=False,
        )
    copy = SoftLabelStore(tmp_path / 'labels')
    assert copy.meta == recorded.meta
    for file in recorded.path.iterdir():
        assert (copy.path / file.name).read_bytes() == file.read_bytes()
