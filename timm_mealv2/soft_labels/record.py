"""Record what an ensemble of teachers predicts for every sample of a training.

Any number of processes, on any hosts that see the folder, may start, stop and die at any time: each takes the next part
that is not there and that no other process has locked. Which samples go through the teachers together is fixed, so that
a part's bytes do not depend on who makes it.
"""

import errno
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from timm_mealv2.data.class_names import check_same_classes
from timm_mealv2.data.dataset import image_names
from timm_mealv2.data.loader import unchanged
from timm_mealv2.data.normalize import channel_stats
from timm_mealv2.data.samples import Key, Samples
from timm_mealv2.data.seed import Stream, counted_seed
from timm_mealv2.data.unreadable import BadImages, Ignored, UnreadableImage
from timm_mealv2.data.workers import ignore_signals
from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.soft_labels.describe import difference
from timm_mealv2.soft_labels.replay import StoredSamples
from timm_mealv2.soft_labels.store import META, NAMES, Part, SoftLabelStore, StoreMeta, checksum, pixel_crc

_logger = logging.getLogger(__name__)

BLOCK_EPOCHS = 10
"""Epochs of a part. An image is decoded once for them, unless each sample needs another partner to be mixed with."""

_LOCKS = '.locks'
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_POLL_SECONDS = 2.0


def record(
    out: Path,
    dataset: Dataset,
    teachers: EnsembleTeacher,
    meta: StoreMeta,
    epochs: int,
    *,
    workers: int = 0,
    device: torch.device | str = 'cpu',
    progress: bool = False,
    measure: Callable[[], dict[str, dict[str, float]]] = dict,
) -> SoftLabelStore:
    """Record the teachers' predictions for the epochs 0 to `epochs` - 1, together with whoever else is at it.

    What is there already stays.

    Args:
        dataset: The images, without a transform.
        teachers: The ensemble, on `device`.
        meta: What `describe` gives for these.
        epochs: Epochs to have in the end.
        workers: Worker processes that make samples; 0 makes them in this one.
        progress: Show what all processes together have done, and log what the teachers' autocast changes.
        measure: Returns the `figures` of `StoreMeta`; called by the process that makes the store.

    Raises:
        UserError: If the folder holds a recording with other settings, or other files, or no image can be read.
    """
    meta = _begin(out, meta, dataset, epochs, measure)
    samples = Samples(dataset, meta.augmentation, meta.seed)
    parts, bad = PartQueue(out, samples), BadImages()
    # Batches are asked for in advance, while parts are locked: workers go on from part to part without a pause.
    loader = _sample_loader(samples, parts, workers, torch.device(device))
    total, interval = sum(part.samples for part in meta.parts()), 0.1 if sys.stderr.isatty() else 30
    initial = total - _missing_samples(out)
    options: Any = {'unit': ' samples', 'unit_scale': True, 'leave': False, 'mininterval': interval}
    try:
        with tqdm(total=total, initial=initial, disable=not progress, **options) as bar:
            while _missing_samples(out):
                if not _record_parts(loader, teachers, meta, parts, bar, bad):  # other processes are at them
                    time.sleep(_POLL_SECONDS)
    finally:
        parts.release()
    for line in bad.tell_ignored():
        _logger.warning(line)
    shutil.rmtree(out / _LOCKS, ignore_errors=True)
    store = SoftLabelStore(out)
    unreadable = np.count_nonzero(store.read_epoch(0, np.arange(meta.images))['crc'] == 0)
    if unreadable == meta.images:
        raise UserError(f'none of the {meta.images:,} images can be read: {out} has nothing to train on.')
    if unreadable:
        _logger.warning(f'{unreadable:,} of {meta.images:,} images cannot be read: they are never trained on.')
    return store


def _missing_samples(out: Path) -> int:
    return sum(part.samples for part in SoftLabelStore(out).missing)


def _begin(out: Path, meta: StoreMeta, dataset: Dataset, epochs: int, measure: Callable[[], Any]) -> StoreMeta:
    """Make the folder, or join a recording that is there; return its settings, with blocks up to `epochs`."""
    found = {path.name for path in out.iterdir() if not path.name.startswith('.')} if out.is_dir() else set()
    if META not in found and found - {NAMES}:
        raise UserError(f'--out {out} holds other files: name a new folder.')
    while (lock := _lock(out, META)) is None:
        time.sleep(0.1)
    if not lock.is_locked:
        _logger.warning(f'{out}: this file system has no locks, so that several processes make the same parts twice.')
    try:
        if not (out / META).is_file():
            former, meta = None, replace(meta, figures=measure())
            with replacing(out / NAMES) as temporary:
                temporary.write_bytes('\0'.join(image_names(dataset)).encode('utf-8', 'surrogateescape'))
        else:
            store = SoftLabelStore(out)
            if differing := difference(store.meta, meta):
                raise UserError(f'{out} is a recording with {differing}: give the same options, or another --out.')
            check_same_classes(store.meta.class_names, meta.class_names, str(out))
            if store.epochs:
                _compare_pixels(store, dataset)
            if epochs < store.meta.epochs:
                _logger.info(f'{out} is a recording of {store.meta.epochs} epochs: all of them are recorded.')
            former = meta = store.meta
        meta = meta.extend(epochs, BLOCK_EPOCHS)
        if meta != former:
            meta.write(out)
        return meta
    finally:
        lock.release()


def _compare_pixels(store: SoftLabelStore, dataset: Dataset) -> None:
    """Make eight recorded samples anew: other images, or another decoder, are told before hours of recording."""
    # Of a copy, as a reader of tars keeps its file open, and workers that are forked later would share its position.
    samples = StoredSamples(store, deepcopy(dataset))
    for image in np.linspace(0, store.meta.images - 1, 8, dtype=int).tolist():
        with suppress(UnreadableImage):
            samples.sample(0, image)


def _lock(out: Path, name: str) -> FileLock | None:
    """Take a lock of a store, None if another process has it. It is not locked on a file system without `flock`.

    The kernel releases the lock of a process that dies.
    """
    lock = FileLock(out / _LOCKS / f'lock-{name}', fallback_to_soft=False)
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(blocking=False)
    except (Timeout, FileNotFoundError):  # another process has just completed the store, and removed the folder
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return lock


class PartQueue:
    """The parts still to be made. Iterating locks one after the other, and yields the batches of its samples.

    Which samples make a batch is a function of the store's settings.

    Attributes:
        locked: The parts that this process makes, the one whose batches come first at the head.
    """

    def __init__(self, out: Path, samples: Samples) -> None:
        self.out, self.samples = out, samples
        self.locked: dict[Part, FileLock] = {}

    def __iter__(self) -> Iterator[list[Key]]:
        store = SoftLabelStore(self.out)
        for part in store.missing:
            lock = _lock(self.out, part.file)
            if lock is None:
                continue
            if part not in SoftLabelStore(self.out).missing:  # made since the first look
                lock.release()
                continue
            if lock.is_locked:
                for leftover in self.out.glob(f'.{part.file}-*'):  # of a process that was killed
                    leftover.unlink()
            self.locked[part] = lock
            yield from part_batches(self.samples, part.images, part.epochs, store.meta.batch_size)

    def release(self, *parts: Part) -> None:
        """Release the locks of some parts, or of all."""
        for part in parts or list(self.locked):
            self.locked.pop(part).release()


def part_batches(
    samples: Samples, images: Sequence[int], epochs: Sequence[int], batch_size: int
) -> Iterator[list[Key]]:
    """Yield batches of the samples of some images image by image, so that an image is decoded once for all epochs.

    Where samples are mixed the pairs are looked up here, epoch by epoch: a worker, which makes samples of all epochs in
    turn, would draw an epoch's permutation for each of them.
    """
    mixes = samples.augmentation.mixes
    by_epoch = [
        [Key(epoch, image, pair=samples.pair(epoch, image) if mixes else None) for image in images] for epoch in epochs
    ]
    keys = [key for of_image in zip(*by_epoch, strict=True) for key in of_image]
    size = batch_size // len(epochs) * len(epochs) or batch_size  # whole images, if a batch holds one
    for start in range(0, len(keys), size):
        yield keys[start : start + size]


class SampleBatches(Dataset):
    """Makes batches of samples, in a worker process or in this one."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, keys: list[Key]) -> tuple[Tensor, Tensor, np.ndarray, list[str], set[Ignored]]:
        """Return the pixels uint8 [n, C, H, W] that could be read, and the place of each in the draw of teachers.

        Then the CRC of each key's pixels, what failed, and what was ignored of the images.
        """
        pixels = np.empty((len(keys), *self.samples.augmentation.input_size), np.uint8)
        crcs, failures = np.zeros(len(keys), np.uint32), []
        ignored: set[Ignored] = set()
        for place, key in enumerate(keys):
            try:
                sample = self.samples[key]
                pixels[place] = sample.pixels
                ignored.update(sample.ignored)
                crcs[place] = pixel_crc(pixels[place])
            except UnreadableImage as error:
                failures.append(str(error))
        places = draw_places(self.samples.seed, [(key.epoch, key.index) for key in keys])
        if failures:
            pixels, places = pixels[crcs > 0], places[crcs > 0]
        return torch.from_numpy(pixels), places, crcs, failures, ignored


def draw_places(seed: int, samples: Iterable[tuple[int, int]]) -> Tensor:
    """Return what decides which teachers are drawn for samples (epoch, image), float64 [n] in [0, 1)."""
    numbers = [counted_seed(Stream.TEACHERS, seed, *sample) >> 10 for sample in samples]  # 53 bits
    return torch.tensor(numbers, dtype=torch.float64) / 2**53


def _sample_loader(samples: Samples, batches: Iterable[list[Key]], workers: int, device: torch.device) -> DataLoader:
    return DataLoader(
        SampleBatches(samples),
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        collate_fn=unchanged,
        worker_init_fn=ignore_signals,
        pin_memory=device.type == 'cuda',
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # nothing here draws from it, and no shared generator moves on
    )


def _record_parts(
    loader: DataLoader, teachers: EnsembleTeacher, meta: StoreMeta, parts: PartQueue, bar: Any, bad: BadImages
) -> bool:
    """Make the parts that can be locked, and write each when its last batch has come; return whether there was one."""
    made: list[np.ndarray] = []  # records of a part's batches
    part = None
    for pixels, places, crcs, failures, ignored in loader:
        bad.ignored['train'].update(ignored)
        for failure in failures:
            _logger.warning(f'Cannot be read: {failure}')
        records = np.zeros(len(crcs), meta.dtype)
        records['crc'] = crcs
        if len(pixels):
            if not bar.disable and bar.n == bar.initial:
                teachers.log_rounding(normalize(teachers, pixels))
            predicted = predict(teachers, pixels, meta.teachers_per_sample, places)
            probabilities, classes = predicted.topk(meta.top_k, dim=1)
            records['classes'][crcs > 0] = classes.cpu().numpy()
            records['probabilities'][crcs > 0] = probabilities.cpu().numpy()
        made.append(records)
        bar.update(len(records))
        part = next(iter(parts.locked))
        if sum(map(len, made)) == part.samples:
            by_epoch = np.concatenate(made).reshape(len(part.images), len(part.epochs)).T
            with replacing(parts.out / part.file) as temporary, temporary.open('wb') as file:
                for epoch, one in zip(part.epochs, by_epoch, strict=True):
                    data = one.tobytes()
                    file.write(data + checksum(data, epoch, part.images.start))
            made = []
            parts.release(part)
            bar.update(bar.total - _missing_samples(parts.out) - bar.n)  # what the other processes have written
    return part is not None


def predict(
    teachers: EnsembleTeacher, pixels: Tensor, per_sample: int | None = None, places: Tensor | None = None
) -> Tensor:
    """Return the teachers' mean probabilities [n, C], on their device, for pixels uint8 [n, chans, h, w].

    `per_sample` and `places` are those of `EnsembleTeacher.predict`.

    Raises:
        UserError: If they are not finite.
    """
    probabilities = teachers.predict(normalize(teachers, pixels), per_sample, places)[0].exp()
    if not probabilities.isfinite().all():
        raise UserError('the teachers predict NaN: take --teacher-dtype bfloat16 or float32.')
    return probabilities


def normalize(teachers: EnsembleTeacher, pixels: Tensor) -> Tensor:
    """Return pixels uint8 [n, chans, h, w] as the teachers take them, on their device."""
    device = next(teachers.parameters(), torch.empty(0)).device
    mean, std = (
        torch.tensor(stats, device=device).view(1, -1, 1, 1) * 255
        for stats in channel_stats(teachers.pretrained_cfg, teachers.in_chans)
    )
    return (pixels.to(device, non_blocking=True).float() - mean) / std


def measure_rate(
    dataset: Dataset,
    teachers: EnsembleTeacher,
    meta: StoreMeta,
    *,
    workers: int = 0,
    device: torch.device | str = 'cpu',
    seconds: float = 20,
) -> float:
    """Measure how many samples a second this process records, on images that are spread over the data set.

    The arguments are those of `record`.
    """
    samples = Samples(dataset, meta.augmentation, meta.seed)
    images = np.random.default_rng(0).choice(meta.images, min(meta.images, 4096), replace=False).tolist()
    batches = list(part_batches(samples, images, range(BLOCK_EPOCHS), meta.batch_size))
    count, began, elapsed = 0, time.perf_counter(), 0.0
    loader = _sample_loader(samples, cycle(batches), workers, torch.device(device))
    for number, (pixels, places, crcs, *_) in enumerate(loader):
        predict(teachers, pixels, meta.teachers_per_sample, places).topk(meta.top_k, dim=1)[0].cpu()
        count, elapsed = count + len(crcs), time.perf_counter() - began
        if number <= 2 * workers:  # so many batches the workers have prepared while the device started
            count, began = 0, time.perf_counter()
        elif elapsed > seconds:
            break
    return count / elapsed
