"""Check a store against its images and teachers, and show what is in it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from timm_mealv2.data.dataset import UnreadableImage
from timm_mealv2.data.samples import Samples
from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import create_ensemble
from timm_mealv2.soft_labels.meta import StoreMeta, describe_teachers
from timm_mealv2.soft_labels.record import predict
from timm_mealv2.soft_labels.store import SoftLabelStore, pixel_crc


@dataclass(frozen=True)
class Comparison:
    """How predictions that were made again differ from the stored ones.

    The differences are of stored probabilities, `agreement` is the share (0..1) of samples with the same most probable
    class, and `cosine` the smallest of a sample's stored and new probabilities.
    """

    samples: int
    max_difference: float
    mean_difference: float
    agreement: float
    cosine: float


def create_teachers(
    meta: StoreMeta, names: Sequence[str] | None = None, device: torch.device | str | None = None
) -> EnsembleTeacher:
    """Create the teachers of a store; `names`, in their order, are loaded in place of the recorded ones.

    Raises:
        UserError: If one cannot be loaded, or the number of names is another.
    """
    recorded = [teacher['name'] for teacher in meta.teachers]
    names = names or recorded
    if len(names) != len(recorded):
        raise UserError(
            f'--teachers must name the {len(recorded)} recorded ones ({" ".join(recorded)}), got {len(names)}.'
        )
    # Where height and width differ, the size is the teacher's own.
    sizes = [size[0] if size and size[0] == size[1] else None for size in (t['img_size'] for t in meta.teachers)]
    ensemble = create_ensemble(
        list(names),
        num_classes=meta.num_classes,
        in_chans=meta.augmentation.input_size[0],
        weights=[teacher['weight'] for teacher in meta.teachers],
        img_sizes=sizes,  # type: ignore[arg-type]
        classes={name: t['classes'] for name, t in zip(names, meta.teachers, strict=True) if t['classes'] is not None},
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
            unreadable += int((records['crc'] == 0).sum())
    store.names()
    return unreadable


def compare(
    store: SoftLabelStore,
    samples: Samples,
    teachers: EnsembleTeacher,
    rows: np.ndarray,
    *,
    count: int = 256,
    device: torch.device | str = 'cpu',
    seed: int = 42,
) -> Comparison:
    """Make `count` random samples of a store again, and let the teachers (on `device`) predict them.

    `rows` are the images that are there, by their numbers in the store, as `samples` has them too.

    Raises:
        UserError: If pixels have changed, or an image cannot be read any more.
    """
    generator = np.random.default_rng(seed)
    epochs = generator.integers(store.epochs, size=count).tolist()
    pairs = sorted(zip(epochs, generator.choice(rows, count).tolist(), strict=True))
    records: list[np.ndarray] = []
    predicted: list[np.ndarray] = []
    for start in range(0, count, store.meta.batch_size):
        pixels = []
        for epoch, row in pairs[start : start + store.meta.batch_size]:
            record = store.read_epoch(epoch, np.array([row]))[0]
            if not record['crc']:
                continue
            try:
                sample = samples.sample(epoch, row).pixels
            except UnreadableImage as error:
                raise UserError(f'cannot be read any more: {error}') from error
            if pixel_crc(sample) != record['crc']:
                raise UserError(f'image {row}, epoch {epoch}: {store.pixels_differ()}')
            pixels.append(sample)
            records.append(record)
        if pixels:
            batch = torch.from_numpy(np.stack(pixels))
            predicted.append(predict(teachers, batch, torch.device(device)).cpu().numpy())
    if not records:
        raise UserError(f'none of {count} samples of {store.path} could be read when it was recorded: give --samples.')
    stored, now = np.stack(records), np.concatenate(predicted)
    former, new = stored['probabilities'].astype(np.float32), np.take_along_axis(now, stored['classes'], axis=1)
    difference = np.abs(new - former)
    norms = np.linalg.norm(former, axis=1) * np.linalg.norm(new, axis=1)
    cosine = (former * new).sum(axis=1) / norms.clip(min=1e-12)
    same = now.argmax(axis=1) == stored['classes'][:, 0]
    return Comparison(
        len(stored), float(difference.max()), float(difference.mean()), float(same.mean()), float(cosine.min())
    )


def draw_samples(
    store: SoftLabelStore, samples: Samples, row: int, class_names: Sequence[str] | None = None, count: int = 8
) -> Image.Image:
    """Draw the samples of an image in the first `count` epochs, each beside the classes that the teachers gave it.

    `row` is the image's number in the store, as `samples` has it too.

    Raises:
        UserError: If the image cannot be read.
    """
    font, bold = ImageFont.load_default(15), ImageFont.load_default(17)
    side, text_width, columns = 224, 236, 2
    count = min(count, store.epochs)
    lines = -(-count // columns)
    picture = Image.new('RGB', (columns * (side + text_width) + 12, lines * (side + 12) + 12), 'white')
    draw = ImageDraw.Draw(picture)
    for epoch in range(count):
        record = store.read_epoch(epoch, np.array([row]))[0]
        try:
            pixels = samples.sample(epoch, row).pixels
        except UnreadableImage as error:
            raise UserError(f'cannot be read: {error}') from error
        left, top = 12 + epoch % columns * (side + text_width), 12 + epoch // columns * (side + 12)
        shown = pixels[0] if len(pixels) == 1 else pixels[:3].transpose(1, 2, 0)
        picture.paste(Image.fromarray(shown).resize((side, side), Image.Resampling.NEAREST), (left, top))
        left += side + 10
        draw.text((left, top), f'epoch {epoch}', 'black', bold)
        if pixel_crc(pixels) != record['crc']:
            draw.text((left, top + 22), 'not the recorded pixels', 'red', font)
            continue
        rows = list(zip(record['classes'].tolist(), record['probabilities'].tolist(), strict=True))[:6]
        for line, (index, probability) in enumerate(rows):
            y = top + 30 + 31 * line
            name = str(index) if class_names is None else class_names[index]
            draw.rectangle((left, y + 19, left + (text_width - 30) * probability, y + 23), '#4477aa')
            draw.text((left, y), f'{100 * probability:5.1f}%  {name[:22]}', 'black', font)
    return picture
