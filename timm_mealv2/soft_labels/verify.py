"""Ask the teachers again, and compare their answers with those of a store."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from timm_mealv2.data.dataset import UnreadableImage, image_names
from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import create_ensemble
from timm_mealv2.soft_labels.crops import decode
from timm_mealv2.soft_labels.record import mean_probabilities
from timm_mealv2.soft_labels.recording import describe_teachers
from timm_mealv2.soft_labels.store import SoftLabelStore, StoreMeta, cut


@dataclass(frozen=True)
class Comparison:
    """How recomputed labels differ from the stored ones.

    Attributes:
        samples: Number of crops compared.
        max_difference: Largest difference of a stored probability.
        mean_difference: Mean difference of the stored probabilities.
        agreement: Share of crops with the same most probable class, 0..1.
    """

    samples: int
    max_difference: float
    mean_difference: float
    agreement: float


def create_teachers(
    meta: StoreMeta, names: Sequence[str] | None = None, device: torch.device | str | None = None
) -> EnsembleTeacher:
    """Create the teachers of a store.

    Args:
        meta: What the store says of them.
        names: What to load in place of the recorded names, in their order: a file may be somewhere else now.
        device: Where they are put.

    Raises:
        UserError: If one cannot be loaded, or the number of names is another.
    """
    names = [teacher['name'] for teacher in meta.teachers] if names is None else names
    if len(names) != len(meta.teachers):
        recorded = ' '.join(teacher['name'] for teacher in meta.teachers)
        raise UserError(f'--teachers must name the {len(meta.teachers)} recorded ones ({recorded}), got {len(names)}.')
    teachers = list(zip(names, meta.teachers, strict=True))
    # Where height and width differ, the size is the teacher's own.
    sizes = [size[0] if size and size[0] == size[1] else None for size in (t['img_size'] for t in meta.teachers)]
    return create_ensemble(
        names,
        num_classes=meta.num_classes,
        in_chans=1 if meta.img_mode == 'L' else 3,
        weights=[teacher['weight'] for teacher in meta.teachers],
        img_sizes=sizes,  # type: ignore[arg-type]
        classes={name: teacher['classes'] for name, teacher in teachers if teacher['classes'] is not None},
        autocast_dtype=getattr(torch, meta.teacher_dtype) if meta.teacher_dtype else None,
        device=device,
    )


def changed_teachers(meta: StoreMeta, teachers: EnsembleTeacher) -> list[str]:
    """Return the names of the recorded teachers whose weights are not those of `teachers`, in their order."""
    now = describe_teachers(teachers)
    return [a['name'] for a, b in zip(meta.teachers, now, strict=True) if a['sha256'] != b['sha256']]


def compare(
    store: SoftLabelStore,
    dataset: Dataset,
    teachers: EnsembleTeacher,
    *,
    samples: int = 256,
    batch_size: int = 128,
    device: torch.device | str = 'cpu',
    seed: int = 42,
) -> Comparison:
    """Recompute the labels of random crops of a store.

    Args:
        store: The store.
        dataset: The images, all of the store or some.
        teachers: The ensemble, on `device`.
        samples: Number of crops.
        batch_size: Most crops that go through the teachers at once.
        device: Where the teachers are.
        seed: Seed of the choice.

    Raises:
        UserError: If the store has none of the images, or one cannot be read or has another size now.
    """
    indices = {name: index for index, name in enumerate(image_names(dataset))}
    rows = [row for row, name in enumerate(store.names) if name in indices and store.sizes[row].all()]
    if not rows:
        raise UserError(f'{store.path} has labels for none of these images: give the data set that was recorded.')
    generator = np.random.default_rng(seed)
    chosen = generator.choice(rows, samples), generator.integers(store.meta.crops, size=samples)
    pairs = sorted(zip(*(array.tolist() for array in chosen), strict=True))
    differences, same = [], 0
    for start in range(0, samples, batch_size):
        pixels, classes, stored = zip(*_crops(store, dataset, indices, pairs[start : start + batch_size]), strict=True)
        batch = torch.from_numpy(np.stack(pixels))
        answers = mean_probabilities(teachers, batch, torch.device(device)).cpu().numpy()
        differences.append(np.abs(np.take_along_axis(answers, np.stack(classes), axis=1) - np.stack(stored)))
        same += int((answers.argmax(axis=1) == np.stack(classes)[:, 0]).sum())
    difference = np.concatenate(differences)
    return Comparison(samples, float(difference.max()), float(difference.mean()), same / samples)


def _crops(
    store: SoftLabelStore, dataset: Dataset, indices: dict[str, int], pairs: Sequence[tuple[int, int]]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The pixels of crops, given as (row, number), with their stored classes and probabilities."""
    height, width = store.meta.image_size
    for row, number in pairs:
        name = store.names[row]
        try:
            image = decode(dataset, indices[name], store.meta.img_mode)
        except UnreadableImage as error:
            raise UserError(f'cannot be read any more: {error}') from error
        if image.size != tuple(store.sizes[row].tolist()):
            raise UserError(f'{name} has another size than when {store.path} was recorded: these are other images.')
        (crop,), classes, probabilities = store.read(row, [number])
        yield cut(image, crop, (height, width), store.meta.interpolation), classes[0], probabilities[0]
