"""Checking a store: records against the teachers, and a picture of what is in it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import Dataset

from timm_mealv2.data.samples import Samples
from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import create_ensemble
from timm_mealv2.soft_labels.replay import StoredSamples
from timm_mealv2.soft_labels.store import SoftLabelStore
from timm_mealv2.soft_labels.verify import changed_teachers, compare, create_teachers, draw_samples, read_all


@pytest.mark.parametrize('name', ['recorded', 'mixed'])
def test_the_recorded_teachers_predict_the_same_again(
    name: str, train: Dataset, request: pytest.FixtureRequest
) -> None:
    store: SoftLabelStore = request.getfixturevalue(name)
    assert read_all(store) == 0
    teachers = create_teachers(store.meta)
    assert changed_teachers(store.meta, teachers) == []
    result = compare(StoredSamples(store, train), teachers, count=70)
    assert (result['samples'], result['same top-1']) == (70, 1.0)
    assert 0 < result['mean difference'] <= result['largest difference'] < 5e-4  # float16


def test_other_teachers_predict_something_else(recorded: SoftLabelStore, train: Dataset, weights: list[str]) -> None:
    other = create_ensemble(weights[:1], img_sizes=[32])
    assert compare(StoredSamples(recorded, train), other, count=20)['largest difference'] > 1e-3
    swapped = create_teachers(recorded.meta, weights[::-1])
    assert changed_teachers(recorded.meta, swapped) == weights


def test_other_pixels_and_missing_parts_are_told(
    recorded: SoftLabelStore, train: Dataset, teachers: EnsembleTeacher, tmp_path: Path
) -> None:
    samples = StoredSamples(recorded, train)
    samples.seed = 43
    with pytest.raises(UserError, match='was recorded from other pixels'):
        compare(samples, teachers, count=3)
    path = Path(shutil.copytree(recorded.path, tmp_path / 'store'))
    (path / 'part-00010-00002').unlink()
    with pytest.raises(UserError, match='1 of 10 parts'):
        read_all(SoftLabelStore(path))


def test_a_picture_shows_samples_and_classes(mixed: SoftLabelStore, train: Dataset) -> None:
    figure = draw_samples(StoredSamples(mixed, train), 3, ['cold', 'plain', 'warm'])
    assert len(figure.axes) == 4  # of two epochs
    expected = Samples(train, mixed.meta.augmentation, 42)
    for epoch in range(2):
        left, right = figure.axes[2 * epoch : 2 * epoch + 2]
        assert (left.images[0].get_array() == expected.sample(epoch, 3).pixels.transpose(1, 2, 0)).all()
        record = mixed.read_epoch(epoch, np.array([3]))[0]
        assert [bar.get_width() for bar in right.patches] == record['probabilities'][::-1].tolist()
        names = [label.get_text() for label in right.get_yticklabels()]
        assert names == [('cold', 'plain', 'warm')[index] for index in record['classes'][::-1]]
