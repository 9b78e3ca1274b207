"""What a store says of itself, and which other recordings go with it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from timm_mealv2.data.augmentation import Augmentation
from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import create_ensemble
from timm_mealv2.soft_labels.meta import META, StoreMeta, describe, difference
from timm_mealv2.soft_labels.store import SoftLabelStore


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


@pytest.mark.parametrize(('images', 'parts'), [(1_281_167, 128), (300, 2)])
def test_a_block_of_epochs_has_as_many_parts_as_are_worth_a_file(
    images: int, parts: int, teachers: EnsembleTeacher
) -> None:
    data = type('Many', (Dataset,), {'__len__': lambda self: images})()
    meta = describe(data, teachers, Augmentation((3, 24, 24)), top_k=3).extend(20, 10)
    assert len(list(meta.parts())) == 2 * parts


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (None, 'holds no soft labels'),
        ('{"format_version": 1}', 'has format 1, this timm_mealv2 reads format 2: record it again'),
        ('{"format": 3}', 'has format 3'),
        ('{"format": 2}', 'is damaged'),
        ('[]', 'is damaged'),
        ('{', 'is damaged'),
    ],
)
def test_what_is_no_store_of_this_format_is_refused(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / META).write_text(content)
    with pytest.raises(UserError, match=words):
        SoftLabelStore(tmp_path)


def test_a_setting_that_meta_does_not_know_is_refused(recorded: SoftLabelStore, tmp_path: Path) -> None:
    values = json.loads((recorded.path / META).read_text())
    values['augmentation']['new_setting'] = 1
    del values['crc']
    (tmp_path / META).write_text(json.dumps(values))
    with pytest.raises(UserError, match='new_setting'):
        StoreMeta.read(tmp_path)


def test_sizes_that_are_no_numbers_are_refused(recorded: SoftLabelStore, tmp_path: Path) -> None:
    values = json.loads((recorded.path / META).read_text())
    del values['crc']
    for name, value in {'blocks': 'abc', 'num_classes': '3', 'part_images': None, 'images': -1}.items():
        (tmp_path / META).write_text(json.dumps({**values, name: value}))
        with pytest.raises(UserError, match=r'is damaged: .* are not all whole numbers'):
            StoreMeta.read(tmp_path)


def test_a_setting_that_has_changed_is_refused(recorded: SoftLabelStore, tmp_path: Path) -> None:
    text = (recorded.path / META).read_text()
    (tmp_path / META).write_text(text.replace('"seed": 42', '"seed": 43'))
    with pytest.raises(UserError, match='is damaged: its checksum is wrong'):
        StoreMeta.read(tmp_path)


def test_the_first_stores_have_one_dtype_for_all_teachers(recorded: SoftLabelStore, tmp_path: Path) -> None:
    values = json.loads((recorded.path / META).read_text())
    for teacher in values['teachers']:
        del teacher['autocast_dtype']
    del values['crc']
    (tmp_path / META).write_text(json.dumps({**values, 'autocast_dtype': 'float16'}))
    assert [teacher['autocast_dtype'] for teacher in StoreMeta.read(tmp_path).teachers] == ['float16'] * 2


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
        (describe(train, in_half, settings.augmentation, top_k=3), '--teacher-dtype None for test_efficientnet='),
        (replace(settings, names_sha256=''), 'the names of the images'),
        (describe(train, teachers, Augmentation((3, 24, 24)), top_k=3), '--aa rand-m9-mstd0.5, not None'),
        (replace(settings, augmentation=mixed.meta.augmentation), '--reprob 0.3, not 0.0'),
        (describe(train, create_ensemble(weights), settings.augmentation, top_k=3), '--teacher-weights 0.66'),
        (describe(train, create_ensemble(weights[:1]), settings.augmentation, top_k=3), '--teachers test_resnet='),
        (describe(train, retrained, settings.augmentation, top_k=3), 'other weights of test_efficientnet='),
    ):
        assert words in (difference(settings, meta) or '')
    moved = [{**teacher, 'name': 'moved'} for teacher in settings.teachers]
    assert difference(settings, replace(settings, teachers=moved, batch_size=1, part_images=1)) is None


def test_what_cannot_be_recorded_is_refused(train: Dataset, teachers: EnsembleTeacher, settings: StoreMeta) -> None:
    with pytest.raises(UserError, match='--top-k must be from 1 to 3'):
        describe(train, teachers, settings.augmentation, top_k=4)
    with pytest.raises(UserError, match='the teachers take 3 channels, the samples have 1'):
        describe(train, teachers, Augmentation((1, 24, 24)), top_k=1)
    with pytest.raises(UserError, match='--aug-splits 2'):
        describe(train, teachers, Augmentation((3, 24, 24), aug_splits=2), top_k=1)
