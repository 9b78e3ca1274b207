"""Check a store against its images and teachers, and show what is in it."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from timm_mealv2.data.unreadable import UnreadableImage
from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import create_ensemble
from timm_mealv2.soft_labels.describe import describe_teachers
from timm_mealv2.soft_labels.record import draw_places, predict
from timm_mealv2.soft_labels.replay import StoredSamples
from timm_mealv2.soft_labels.store import SoftLabelStore, StoreMeta


def create_teachers(meta: StoreMeta, names: Sequence[str] = (), device: torch.device | None = None) -> EnsembleTeacher:
    """Create the teachers of a store; `names`, in their order, are loaded in place of the recorded ones.

    Raises:
        UserError: If one cannot be loaded, or the number of names is another.
    """
    names = list(names or (teacher['name'] for teacher in meta.teachers))
    # Where height and width differ, the size is the teacher's own.
    sizes = [size[0] if size and size[0] == size[-1] else None for size in (t['img_size'] for t in meta.teachers)]
    classes = [teacher['classes'] for teacher in meta.teachers]
    ensemble = create_ensemble(
        names,
        num_classes=meta.num_classes,
        in_chans=meta.augmentation.input_size[0],
        weights=[teacher['weight'] for teacher in meta.teachers],
        img_sizes=sizes,  # type: ignore[arg-type]  # None is accepted
        classes={name: chosen for name, chosen in zip(names, classes, strict=False) if chosen is not None},
        device=device,
    )
    dtypes = (teacher['autocast_dtype'] for teacher in meta.teachers)
    ensemble.autocast_dtypes = tuple(getattr(torch, dtype) if dtype else None for dtype in dtypes)
    return ensemble


def changed_teachers(meta: StoreMeta, teachers: EnsembleTeacher) -> list[str]:
    """Return the names of the recorded teachers whose weights are not those of `teachers`, in their order."""
    now = describe_teachers(teachers)
    return [a['name'] for a, b in zip(meta.teachers, now, strict=True) if a['sha256'] != b['sha256']]


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


def compare(samples: StoredSamples, teachers: EnsembleTeacher, count: int = 256) -> dict[str, float]:
    """Make `count` random samples of a store again, let the teachers predict them, and return what differs.

    Samples without a record, or of images that cannot be read now, are left out.

    Returns:
        'samples' (their number), 'largest difference' and 'mean difference' of the stored probabilities, and 'same
        top-1', the share (0..1) of samples with the same most probable class.

    Raises:
        UserError: If pixels have changed.
    """
    store, generator = samples.store, np.random.default_rng(42)
    images = generator.choice(store.meta.images if samples.rows is None else samples.rows, count)
    records: list[np.ndarray] = []
    pixels: list[np.ndarray] = []
    made: list[tuple[int, int]] = []
    for epoch, image in sorted(
        zip(generator.integers(store.epochs, size=count).tolist(), images.tolist(), strict=True)
    ):
        with suppress(UnreadableImage):
            pixels.append(samples.sample(epoch, image).pixels)
            records.append(store.read_epoch(epoch, np.array([image])))
            made.append((epoch, image))
    batches = torch.from_numpy(np.stack(pixels)).split(store.meta.batch_size)
    places = draw_places(store.meta.seed, made).split(store.meta.batch_size)
    per_sample, pairs = store.meta.teachers_per_sample, zip(batches, places, strict=True)
    now = torch.cat([predict(teachers, batch, per_sample, place).cpu() for batch, place in pairs]).numpy()
    stored = np.concatenate(records)
    difference = np.abs(np.take_along_axis(now, stored['classes'], axis=1) - stored['probabilities'].astype(np.float32))
    return {
        'samples': len(stored),
        'largest difference': float(difference.max()),
        'mean difference': float(difference.mean()),
        'same top-1': float((now.argmax(axis=1) == stored['classes'][:, 0]).mean()),
    }


def draw_samples(samples: StoredSamples, image: int, class_names: Sequence[str] | None = None, count: int = 8) -> Any:
    """Draw a matplotlib figure: an image's samples of the first `count` epochs, each with the classes it was given.

    `image` is its number in the store.

    Raises:
        UserError: If pixels have changed, or the image cannot be read.
    """
    from matplotlib.figure import Figure  # no other command needs it

    count = min(count, samples.store.epochs)
    lines = -(-count // 2)
    figure = Figure((10, 2.4 * lines), layout='constrained')
    for epoch in range(count):
        left, right = (figure.add_subplot(lines, 4, 2 * epoch + column) for column in (1, 2))
        try:
            pixels = samples.sample(epoch, image).pixels
        except UnreadableImage as error:
            raise UserError(f'there is nothing to show: {error}') from error
        left.imshow(pixels[:3].transpose(1, 2, 0) if len(pixels) > 1 else pixels[0], cmap='gray', vmin=0, vmax=255)
        left.set_title(f'epoch {epoch + 1}')
        left.axis('off')
        record = samples.store.read_epoch(epoch, np.array([image]))[0]
        names = [class_names[index] if class_names else f'class {index}' for index in record['classes'][:6]]
        bars = right.barh(names[::-1], record['probabilities'][:6][::-1].tolist())
        right.bar_label(bars, fmt='{:.1%}', padding=2)
        right.set_xlim(0, 1.3)
        right.set_xticks([])
    return figure
