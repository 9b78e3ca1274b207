"""A training sample depends on (seed, epoch, image) alone, and is what timm's pieces make of it."""

import dataclasses
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import cut_off
from timm.data import create_transform
from torch.utils.data import DistributedSampler

from timm_mealv2.data.augmentation import Augmentation
from timm_mealv2.data.dataset import UnreadableImage, open_dataset, read_image
from timm_mealv2.data.samples import EpochSampler, Samples
from timm_mealv2.data.seed import Stream, counted_seed, seed_cpu
from timm_mealv2.errors import UserError

ALL = Augmentation(
    input_size=(3, 16, 20),
    scale=(0.3, 1.0),
    color_jitter=0.4,
    aa='rand-m9-mstd0.5',
    mean=(0.5,) * 3,
    std=(0.2,) * 3,
    reprob=0.5,
    recount=2,
    mixup=0.8,
    cutmix=1.0,
)


def samples(folder: Path, seed: int = 7, **changes: Any) -> Samples:
    return Samples(open_dataset('', str(folder), 'train'), dataclasses.replace(ALL, **changes), seed)


def test_a_sample_is_the_same_whatever_was_drawn_before(image_folder: Path) -> None:
    one, other = samples(image_folder), samples(image_folder)
    forward = {(epoch, index): one.sample(epoch, index) for epoch in range(3) for index in range(21)}
    for (epoch, index), sample in reversed(forward.items()):
        random.seed(index)
        again = other.sample(epoch, index)
        assert np.array_equal(sample.pixels, again.pixels)
        assert sample[1:] == again[1:]
        assert sample.pixels.shape == (3, 16, 20)
        assert sample.pixels.dtype == np.uint8
        assert sample.pixels.flags.c_contiguous
    assert len({sample.pixels.tobytes() for sample in forward.values()}) == 63
    assert not np.array_equal(forward[0, 0].pixels, samples(image_folder, seed=8).sample(0, 0).pixels)


def test_without_mixing_and_erasing_a_sample_is_what_the_transform_of_timm_draws(image_folder: Path) -> None:
    plain = {'mixup': 0.0, 'cutmix': 0.0, 'reprob': 0.0}
    made = samples(image_folder, **plain).sample(2, 5)
    transform: Any = create_transform(
        (3, 16, 20),
        is_training=True,
        scale=(0.3, 1.0),
        ratio=(3 / 4, 4 / 3),
        auto_augment='rand-m9-mstd0.5',
        interpolation='random',
        mean=(0.5,) * 3,
        use_prefetcher=True,
    )
    image, target, _ = read_image(open_dataset('', str(image_folder), 'train'), 5)
    seed_cpu(counted_seed(Stream.AUGMENTATION, 7, 2, 5))
    assert np.array_equal(made.pixels, transform(image).numpy())
    assert made[1:] == (target, target, 1.0, ())


def test_pairs_are_mixed_with_each_other(image_folder: Path) -> None:
    plain = samples(image_folder, mixup=0.0, cutmix=0.0, reprob=0.0)
    for change in ({'cutmix': 0.0}, {'mixup': 0.0}):  # Mixup alone, CutMix alone
        mixed = samples(image_folder, reprob=0.0, **change)
        order = torch.randperm(21, generator=torch.Generator().manual_seed(7 + 1)).tolist()
        for a, b in zip(order[::2], order[1::2], strict=False):
            own, other = plain.sample(1, a), plain.sample(1, b)
            first, second = mixed.sample(1, a), mixed.sample(1, b)
            share = np.float32(first.lam)
            assert (first.lam, first.target, first.mixed_target) == (second.lam, second.mixed_target, second.target)
            if 'cutmix' in change:
                expected = own.pixels.astype(np.float32) * share + other.pixels.astype(np.float32) * (1 - share)
                assert np.array_equal(first.pixels, np.rint(expected).astype(np.uint8))
            else:
                box = (first.pixels != own.pixels).any(axis=0)
                assert box.mean() <= 1 - share + 1e-6
                assert np.array_equal(first.pixels[:, box], other.pixels[:, box])
                assert np.array_equal(second.pixels[:, box], own.pixels[:, box])
        assert np.array_equal(mixed.sample(1, order[-1]).pixels, plain.sample(1, order[-1]).pixels)  # 21 is odd


def test_mixing_ends_with_its_epoch(image_folder: Path) -> None:
    mixed, plain = samples(image_folder, mixup_off_epoch=1), samples(image_folder, mixup=0.0, cutmix=0.0)
    assert [np.array_equal(mixed.sample(e, 3).pixels, plain.sample(e, 3).pixels) for e in range(3)] == [
        False,
        True,
        True,
    ]


def test_a_pair_with_an_unreadable_image_is_unreadable(spoilt: Path) -> None:
    cut_off(spoilt / 'train' / 'cold' / '004.png')
    made = samples(spoilt)
    pair = made.pair(0, 4)
    for index in {pair.first, pair.second} - {None}:
        with pytest.raises(UnreadableImage, match=r'004\.png') as error:
            made.sample(0, index)  # type: ignore[arg-type]
        assert error.value.index == 4


def keys_of(sampler: EpochSampler, epoch: int, start: int = 0) -> list[list[tuple[int, int]]]:
    sampler.set_position(epoch, start)
    return [[(key.epoch, key.index) for key in batch.keys] for batch in sampler]


@pytest.mark.parametrize(('count', 'world_size'), [(21, 1), (21, 2), (5, 4), (20, 3)])
def test_an_epoch_is_ordered_as_by_torch(count: int, world_size: int) -> None:
    for rank in range(world_size):
        reference = DistributedSampler(range(count), num_replicas=world_size, rank=rank, seed=3)  # type: ignore[arg-type]
        reference.set_epoch(4)
        sampler = EpochSampler(count, 4, seed=3, rank=rank, world_size=world_size)
        epochs, images = sampler.samples(4)
        assert images.tolist() == list(reference)
        assert set(epochs.tolist()) == {4}
        batches = keys_of(sampler, 4)
        assert [key for batch in batches for key in batch] == [(4, i) for i in images[: len(batches) * 4].tolist()]
        assert len(batches) == len(sampler)
        assert keys_of(sampler, 4, 1) == batches[1:]


def test_a_last_batch_of_one_sample_is_left_out() -> None:
    assert [len(batch) for batch in keys_of(EpochSampler(21, 8), 0)] == [8, 8, 5]
    assert [len(batch) for batch in keys_of(EpochSampler(21, 5), 0)] == [5] * 4
    assert [len(batch) for batch in keys_of(EpochSampler(3, 1), 0)] == [1] * 3


@pytest.mark.parametrize(('count', 'world_size'), [(21, 1), (20, 2), (21, 2), (23, 4)])
def test_partners_are_in_one_batch_of_one_process(count: int, world_size: int, image_folder: Path) -> None:
    samplers = [EpochSampler(count, 4, rank=r, world_size=world_size, pairs=True) for r in range(world_size)]
    assert len({len(sampler) for sampler in samplers}) == 1
    seen: Counter[int] = Counter()
    for sampler in samplers:
        sampler.set_position(2)
        for batch in sampler:
            here = {key.index for key in batch.keys}
            seen.update(here)
            apart = [key for key in batch.keys if key.pair and not {*key.pair[1:]} - {None} <= here]
            assert not apart or world_size > 1  # what fills up the last processes may be
            assert len(apart) <= 1
    assert len(seen) == count - (count % 4 == 1 and world_size == 1)
    assert sum(seen.values()) < count + 2 * world_size


def test_the_pair_of_a_key_is_the_one_of_its_sample(image_folder: Path) -> None:
    made = samples(image_folder)
    sampler = EpochSampler(21, 4, seed=7, pairs=True)
    sampler.set_position(5)
    for batch in sampler:
        for key in batch.keys:
            assert key.pair == made.pair(5, key.index)


@pytest.mark.parametrize(('count', 'world_size', 'per_decode'), [(24, 1, 4), (24, 2, 3), (21, 1, 4), (22, 2, 4)])
def test_several_samples_of_each_decoded_image(count: int, world_size: int, per_decode: int) -> None:
    options = {'world_size': world_size, 'samples_per_decode': per_decode}
    block: Counter[tuple[int, int]] = Counter()
    for epoch in range(per_decode, 2 * per_decode):
        taken = []
        for rank in range(world_size):
            epochs, images = EpochSampler(count, 4, rank=rank, **options).samples(epoch)
            taken += list(zip(epochs.tolist(), images.tolist(), strict=True))
            changes = np.flatnonzero(np.diff(images)) + 1
            assert (np.diff(changes) == per_decode).all()  # an image's samples come in turn
        assert len(taken) == count
        block.update(taken)
    assert {epoch for epoch, _ in block} == set(range(per_decode, 2 * per_decode))
    if count % (per_decode * world_size) == 0:
        assert set(block.values()) == {1}
        assert len(block) == count * per_decode


def test_several_samples_a_decode_exclude_pairs() -> None:
    with pytest.raises(UserError, match='--samples-per-decode cannot go with'):
        EpochSampler(20, 4, samples_per_decode=2, pairs=True)
