"""Training on a store: the samples of the live training, each with its own record, and nothing else."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from timm_mealv2.data.dataset import open_dataset
from timm_mealv2.data.loader import TrainLoader
from timm_mealv2.data.samples import EpochSampler, Samples
from timm_mealv2.data.unreadable import BadImages
from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.soft_labels.describe import describe
from timm_mealv2.soft_labels.record import record
from timm_mealv2.soft_labels.replay import replay
from timm_mealv2.soft_labels.store import SoftLabelStore


@pytest.mark.parametrize('name', ['recorded', 'mixed'])
@pytest.mark.parametrize('rank', [0, 1])
def test_the_samples_are_those_of_the_live_training_with_their_records(
    name: str, rank: int, train: Dataset, request: pytest.FixtureRequest
) -> None:
    store: SoftLabelStore = request.getfixturevalue(name)
    augmentation = store.meta.augmentation
    live = Samples(train, augmentation, 42)
    batches = EpochSampler(21, 4, seed=42, rank=rank, world_size=2, pairs=augmentation.mixes)
    samples, sampler, collate = replay(store, train, 4, rank=rank, world_size=2)
    assert len(sampler) == len(batches)
    for epoch in range(store.epochs + 2):
        recorded = epoch % store.epochs
        records = store.read_epoch(recorded, np.arange(21))
        batches.set_position(recorded, 1)
        sampler.set_position(epoch, 1)
        for ours, expected in zip(sampler, batches, strict=True):
            assert [key._replace(label=None) for key in ours.keys] == expected.keys
            pixels, labels = collate(ours, [samples[key] for key in ours.keys])
            assert labels.dtype == torch.float32
            for image, label, key in zip(pixels, labels.numpy(), expected.keys, strict=True):
                sample = live[key]
                assert (image.numpy() == sample.pixels).all()
                assert label[0] == (sample.target if sample.lam == 1 else -1)
                assert (label[1:4] == records[key.index]['classes']).all()
                assert (label[4:] == records[key.index]['probabilities']).all()


def test_several_samples_of_a_decoded_image_have_records_of_their_own(recorded: SoftLabelStore, train: Dataset) -> None:
    samples, sampler, collate = replay(recorded, train, 6, samples_per_decode=7)
    taken = []
    for epoch in range(14):  # two blocks of seven epochs, of which the store has 12
        sampler.set_position(epoch)
        batches = list(sampler)
        assert sum(len(batch.keys) for batch in batches) == 21
        collate(batches[0], [samples[key] for key in batches[0].keys])  # compares the pixels with the records
        taken += [(key.epoch, key.index) for batch in batches for key in batch.keys]
    assert set(taken) == {(epoch, image) for epoch in range(12) for image in range(21)}


def test_some_of_the_images_in_another_order_keep_their_records(
    recorded: SoftLabelStore, mixed: SoftLabelStore, image_folder: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(image_folder / 'train', tmp_path / 'train'))
    shutil.rmtree(root / 'plain')
    (root / 'cold' / '003.png').unlink()
    data = open_dataset('', str(root), 'train')
    samples, sampler, collate = replay(recorded, data, 5)
    sampler.set_position(3)
    found = []
    for batch in sampler:
        _, labels = collate(batch, [samples[key] for key in batch.keys])  # compares the pixels with the records
        found += [(key.index, label) for key, label in zip(batch.keys, labels[:, 0].tolist(), strict=True)]
    expected = [*range(3), *range(4, 7), *range(14, 21)]  # with the labels of the smaller data set
    assert sorted(found) == [(image, float(image > 6)) for image in expected]
    with pytest.raises(UserError, match='has 21 images, which are mixed with each other, the data set 13'):
        replay(mixed, data, 4)


def test_all_images_in_another_order_are_mixed_as_when_recorded(mixed: SoftLabelStore, image_folder: Path) -> None:
    data = open_dataset('', str(image_folder), 'train')
    order = np.random.default_rng(0).permutation(21)
    tables = data.reader.samples  # type: ignore[attr-defined]
    data.reader.samples = [tables[row] for row in order]  # type: ignore[attr-defined]
    samples, sampler, collate = replay(mixed, data, 4)
    for batch in sampler:
        collate(batch, [samples[key] for key in batch.keys])  # compares the pixels with the records


@pytest.mark.parametrize('mended', [False, True])
def test_what_could_not_be_read_when_recorded_is_left_out_as_in_live_training(
    mended: bool,
    image_folder: Path,
    teachers: EnsembleTeacher,
    mixed: SoftLabelStore,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = Path(shutil.copytree(image_folder / 'train', tmp_path / 'train'))
    whole = (root / 'plain' / '002.png').read_bytes()
    (root / 'plain' / '002.png').write_bytes(b'broken')
    data = open_dataset('', str(root), 'train')
    augmentation = mixed.meta.augmentation
    store = record(tmp_path / 'store', data, teachers, describe(data, teachers, augmentation, top_k=3), 1)
    normalization = ((0.5,) * 3, (0.5,) * 3)
    live_bad, bad = BadImages(), BadImages()
    live = TrainLoader(
        Samples(data, augmentation, 42),
        EpochSampler(21, 2, seed=42, pairs=True),
        normalization=normalization,
        bad=live_bad,
    )
    expected = [images for images, _ in live.batches(0)]
    if mended:
        (root / 'plain' / '002.png').write_bytes(whole)
    loader = TrainLoader(*replay(store, data, 2), normalization=normalization, bad=bad)
    # The two samples of the broken image are a whole batch: the next images take their place.
    for (ours, labels), theirs in zip(loader.batches(0), expected, strict=True):
        assert ours.equal(theirs)
        assert (labels[:, 4:].sum(1) > 0.99).all()
    assert (bad.found == {}) if mended else (bad.found == live_bad.found != {})
    assert 'Left out, not readable when recorded: 2 samples of this epoch' in caplog.text


def test_other_pixels_stop_the_training_or_are_counted(
    recorded: SoftLabelStore, image_folder: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(image_folder / 'train', tmp_path / 'train'))
    for path in (root / 'cold').glob('*.png'):
        Image.new('RGB', (24, 24)).save(path)
    data = open_dataset('', str(root), 'train')
    normalization = ((0.5,) * 3, (0.5,) * 3)
    with pytest.raises(UserError, match=r'image \d+, epoch 1: .* was recorded from other pixels.*Pillow'):
        list(TrainLoader(*replay(recorded, data, 4), normalization=normalization).batches(0))
    stored, bad = replay(recorded, data, 4, allow_pixel_change=True), BadImages()
    loader = TrainLoader(*stored, normalization=normalization, bad=bad, workers=2)
    taken = [key for batch in stored[1] for key in batch.keys]
    assert len(list(loader.batches(0))) == 5
    changed = sum(key.index < 7 for key in taken)
    assert bad.tell_ignored() == [
        f'train: {changed} images have other pixels than when they were recorded (--allow-pixel-change)'
    ]


def test_a_store_that_is_not_whole_gives_the_epochs_that_are(
    recorded: SoftLabelStore, train: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(shutil.copytree(recorded.path, tmp_path / 'store'))
    (path / 'part-00010-00002').unlink()
    _, sampler, _ = replay(SoftLabelStore(path), train, 4)
    assert sampler.epochs == 10
    assert 'Taking the first 10 of 12 epochs' in caplog.text
    (path / 'part-00000-00002').unlink()
    with pytest.raises(UserError, match='2 of 10 parts of'):
        replay(SoftLabelStore(path), train, 4)
