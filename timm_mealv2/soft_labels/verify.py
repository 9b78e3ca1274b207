"""Check a store against its images and teachers, and show what is in it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from timm_mealv2.data.unreadable import UnreadableImage
from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import create_ensemble
from timm_mealv2.soft_labels.record import describe_teachers, predict
from timm_mealv2.soft_labels.replay import StoredSamples
from timm_mealv2.soft_labels.store import SoftLabelStore, StoreMeta


@dataclass(frozen=True)
class Comparison:
    """How predictions that were made again differ from the stored ones.

    The differences are of stored probabilities, and `agreement` is the share (0..1) of samples with the same most
    probable class.
    """

    samples: int
    max_difference: float
    mean_difference: float
    agreement: float


def create_teachers(
    meta: StoreMeta, names: Sequence[str] | None = None, device: torch.device | str | None = None
) -> EnsembleTeacher:
    """Create the teachers of a store; `names`, in their order, are loaded in place of the recorded ones.

    Raises:
        UserError: If one cannot be loaded, or the number of names is another.
    """
    names = list(names or (teacher['name'] for teacher in meta.teachers))
    # Where height and width differ, the size is the teacher's own.
    sizes = [size[0] if size and size[0] == size[1] else None for size in (t['img_size'] for t in meta.teachers)]
    ensemble = create_ensemble(
        names,
        num_classes=meta.num_classes,
        in_chans=meta.augmentation.input_size[0],
        weights=[teacher['weight'] for teacher in meta.teachers],
        img_sizes=sizes,  # type: ignore[arg-type]
        classes={name: t['classes'] for name, t in zip(names, meta.teachers, strict=False) if t['classes'] is not None},
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


def compare(
    samples: StoredSamples,
    teachers: EnsembleTeacher,
    *,
    count: int = 256,
    device: torch.device | str = 'cpu',
    seed: int = 42,
) -> Comparison:
    """Make `count` random samples of a store again, and let the teachers (on `device`) predict them.

    Samples without a record, or of images that cannot be read now, are left out.

    Raises:
        UserError: If pixels have changed.
    """
    store, generator = samples.store, np.random.default_rng(seed)
    epochs = generator.integers(store.epochs, size=count).tolist()
    images = store.meta.images if samples.rows is None else samples.rows
    records: list[np.ndarray] = []
    pixels: list[np.ndarray] = []
    for epoch, image in sorted(zip(epochs, generator.choice(images, count).tolist(), strict=True)):
        try:
            pixels.append(samples.sample(epoch, image).pixels)
        except UnreadableImage:
            continue
        records.append(store.read_epoch(epoch, np.array([image])))
    batches = torch.from_numpy(np.stack(pixels)).split(store.meta.batch_size)
    now = torch.cat([predict(teachers, batch, torch.device(device)).cpu() for batch in batches]).numpy()
    stored = np.concatenate(records)
    difference = np.abs(np.take_along_axis(now, stored['classes'], axis=1) - stored['probabilities'].astype(np.float32))
    same = now.argmax(axis=1) == stored['classes'][:, 0]
    return Comparison(len(stored), float(difference.max()), float(difference.mean()), float(same.mean()))


def draw_samples(
    samples: StoredSamples, image: int, class_names: Sequence[str] | None = None, count: int = 8
) -> Image.Image:
    """Draw the samples of an image in the first `count` epochs, each beside the classes that the teachers gave it.

    `image` is its number in the store.

    Raises:
        UserError: If pixels have changed.
    """
    font, bold = ImageFont.load_default(15), ImageFont.load_default(17)
    side, text_width, columns = 224, 236, 2
    count = min(count, samples.store.epochs)
    lines = -(-count // columns)
    picture = Image.new('RGB', (columns * (side + text_width) + 12, lines * (side + 12) + 12), 'white')
    draw = ImageDraw.Draw(picture)
    for epoch in range(count):
        left, top = 12 + epoch % columns * (side + text_width), 12 + epoch // columns * (side + 12)
        draw.text((left + side + 10, top), f'epoch {epoch}', 'black', bold)
        try:
            pixels = samples.sample(epoch, image).pixels
        except UnreadableImage:
            draw.text((left + side + 10, top + 22), 'cannot be read', 'red', font)
            continue
        drawn = pixels[0] if len(pixels) == 1 else pixels[:3].transpose(1, 2, 0)
        picture.paste(Image.fromarray(drawn).resize((side, side), Image.Resampling.NEAREST), (left, top))
        left += side + 10
        record = samples.store.read_epoch(epoch, np.array([image]))[0]
        rows = list(zip(record['classes'].tolist(), record['probabilities'].tolist(), strict=True))[:6]
        for line, (index, probability) in enumerate(rows):
            y = top + 30 + 31 * line
            name = str(index) if class_names is None else class_names[index]
            draw.rectangle((left, y + 19, left + (text_width - 30) * probability, y + 23), '#4477aa')
            draw.text((left, y), f'{100 * probability:5.1f}%  {name[:22]}', 'black', font)
    return picture
