"""Check a store against its images and teachers."""

from collections.abc import Sequence

import numpy as np
import torch

from timm_mealv2.data.samples import Key
from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import create_ensemble
from timm_mealv2.soft_labels.record import SampleBatches, predict
from timm_mealv2.soft_labels.replay import StoredSamples
from timm_mealv2.soft_labels.store import SoftLabelStore, StoreMeta


def create_teachers(meta: StoreMeta, names: Sequence[str] = ()) -> EnsembleTeacher:
    """Create the teachers of a store; `names`, in their order, are loaded in place of the recorded ones.

    Raises:
        UserError: If one cannot be loaded, or the number of names is another.
    """
    names = list(names or (teacher['name'] for teacher in meta.teachers))
    classes = [teacher['classes'] for teacher in meta.teachers]
    ensemble = create_ensemble(
        names,
        num_classes=meta.num_classes,
        in_chans=meta.augmentation.input_size[0],
        weights=[teacher['weight'] for teacher in meta.teachers],
        # Where height and width differ, the size is the teacher's own.
        img_sizes=[size[0] if size and size[0] == size[1] else None for size in (t['img_size'] for t in meta.teachers)],
        classes={name: chosen for name, chosen in zip(names, classes, strict=False) if chosen is not None},
    )
    dtypes = (teacher['autocast_dtype'] for teacher in meta.teachers)
    ensemble.autocast_dtypes = tuple(getattr(torch, dtype) if dtype else None for dtype in dtypes)
    return ensemble


def read_all(store: SoftLabelStore) -> int:
    """Read a store with all checksums; return the number of records of images that could not be read.

    Raises:
        UserError: If a part is missing or damaged.
    """
    if store.missing:
        raise UserError(store.incomplete())
    unreadable = 0
    for part in store.meta.parts():
        for epoch in part.epochs:
            records = store.read_slice(epoch, part.images.start // store.meta.part_images)
            unreadable += int(np.count_nonzero(records['crc'] == 0))
    store.names()
    return unreadable


def compare(samples: StoredSamples, teachers: EnsembleTeacher, count: int = 256) -> tuple[int, float]:
    """Make `count` random samples of a store again, and let the teachers predict them.

    Samples without a record, or of images that cannot be read now, are left out.

    Returns:
        The number of samples, and the largest difference of a probability from the record.

    Raises:
        UserError: If pixels have changed.
    """
    store, meta, generator = samples.store, samples.store.meta, np.random.default_rng(42)
    images = generator.choice(meta.images if samples.rows is None else samples.rows, count)
    drawn = sorted(zip(generator.integers(store.epochs, size=count).tolist(), images.tolist(), strict=True))
    compared, largest = 0, 0.0
    for start in range(0, count, meta.batch_size):
        keys = [Key(*place) for place in drawn[start : start + meta.batch_size]]
        pixels, places, crcs, *_ = SampleBatches(samples)[keys]
        now = predict(teachers, pixels, meta.teachers_per_sample, places).numpy(force=True)
        records = np.concatenate([store.read_epoch(key.epoch, np.array([key.index])) for key in keys])[crcs > 0]
        difference = np.take_along_axis(now, records['classes'], axis=1) - records['probabilities'].astype(np.float32)
        compared, largest = compared + len(records), float(np.abs(difference).max(initial=largest))
    return compared, largest
