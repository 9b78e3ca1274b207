"""Checking a store: its records against the teachers."""

import shutil
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import create_ensemble
from timm_mealv2.soft_labels.replay import StoredSamples
from timm_mealv2.soft_labels.store import SoftLabelStore
from timm_mealv2.soft_labels.verify import compare, create_teachers, read_all


@pytest.mark.parametrize('name', ['recorded', 'mixed'])
def test_the_recorded_teachers_predict_the_same_again(
    name: str, train: Dataset, request: pytest.FixtureRequest
) -> None:
    store: SoftLabelStore = request.getfixturevalue(name)
    assert read_all(store) == 0
    teachers = create_teachers(store.meta)
    compared, largest = compare(StoredSamples(store, train), teachers, count=70)
    assert compared == 70
    assert 0 < largest < 5e-4  # float16


def test_other_teachers_predict_something_else(recorded: SoftLabelStore, train: Dataset, weights: list[str]) -> None:
    other = create_ensemble(weights[:1], img_sizes=[32])
    swapped = create_teachers(recorded.meta, weights[::-1])
    for teachers in (other, swapped):
        assert compare(StoredSamples(recorded, train), teachers, count=20)[1] > 1e-3


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
