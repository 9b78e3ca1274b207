"""Record what an ensemble of teachers predicts for every sample of a training.

Any number of processes, on any hosts that see the folder, may start, stop and die at any time: each takes the next part
that is not there and that no other process has locked. Which samples go through the teachers together is fixed, so that
a part's bytes do not depend on who makes it.
"""

import errno
import hashlib
import logging
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from timm_mealv2.data.augmentation import Augmentation
from timm_mealv2.data.class_names import check_same_classes, class_names_of
from timm_mealv2.data.dataset import image_names, keeping_no_file_open
from timm_mealv2.data.loader import unchanged
from timm_mealv2.data.normalize import channel_stats
from timm_mealv2.data.samples import Key, Samples
from timm_mealv2.data.unreadable import BadImages, Ignored, UnreadableImage
from timm_mealv2.data.workers import ignore_signals
from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing
from timm_mealv2.models.ensemble import ClassSubset, EnsembleTeacher
from timm_mealv2.soft_labels.replay import StoredSamples
from timm_mealv2.soft_labels.store import (
    FORMAT,
    META,
    NAMES,
    Part,
    SoftLabelStore,
    StoreMeta,
    checksum,
    library_versions,
    names_sha256,
    option_text,
    pixel_crc,
    shown,
)

_logger = logging.getLogger(__name__)

BLOCK_EPOCHS = 10
"""Epochs of a part. An image is decoded once for them, unless each sample needs another partner to be mixed with."""

_LOCKS = '.locks'
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_POLL_SECONDS = 2.0


def describe(
    dataset: Dataset,
    teachers: EnsembleTeacher,
    augmentation: Augmentation,
    *,
    seed: int = 42,
    top_k: int = 10,
    batch_size: int = 128,
    part_images: int | None = None,
) -> StoreMeta:
    """Return the settings of a recording; `StoreMeta.extend` adds the epochs.

    Args:
        seed: Seed of the training.
        top_k: Classes to keep, or all where there are fewer.
        part_images: Images of a part. None for 128 parts a block of epochs, or more for very many images and fewer for
            few: a store has some thousand files at most, and a process that dies loses little.

    Raises:
        UserError: If the data set has no random access.
    """
    if isinstance(dataset, IterableDataset):
        raise UserError('a streaming data set has no numbered images to record: take a folder, a tar or hfds/NAME.')
    images = len(dataset)  # type: ignore[arg-type]
    return StoreMeta(
        format=FORMAT,
        teachers=describe_teachers(teachers),
        augmentation=augmentation,
        seed=seed,
        num_classes=teachers.num_classes,
        top_k=min(top_k, teachers.num_classes),
        images=images,
        names_sha256=names_sha256(image_names(dataset)),
        versions=library_versions(),
        batch_size=batch_size,
        part_images=part_images or min(max(-(-images // 128), 256), 2**14),
        blocks=[0],
        class_names=class_names_of(teachers),
    )


def describe_teachers(ensemble: EnsembleTeacher) -> list[dict[str, Any]]:
    """Return what `StoreMeta.teachers` says of an ensemble."""
    classes = [t.get_buffer('indices').tolist() if isinstance(t, ClassSubset) else None for t in ensemble.teachers]
    return [
        {
            'name': member.name,
            'sha256': _weights_sha256(member.teacher),
            'weight': member.weight,
            'img_size': list(size) if size else None,
            'classes': member.teacher.get_buffer('indices').tolist()
            if isinstance(member.teacher, ClassSubset)
            else None,
            'autocast_dtype': str(member.autocast_dtype).removeprefix('torch.') if member.autocast_dtype else None,
        }
        for member, size, chosen in zip(ensemble.members, ensemble.img_sizes, classes, strict=True)
    ]


def _weights_sha256(model: nn.Module) -> str:
    """The SHA-256 over names, types, shapes and values of a model's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {list(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def difference(former: StoreMeta, now: StoreMeta) -> str | None:
    """Say in a few words how two recordings differ, None if they do not.

    The texts that name the teachers may differ, as paths do: their weights count. So may the libraries' versions as
    long as the pixels are the same.
    """
    weights = [[teacher['sha256'] for teacher in meta.teachers] for meta in (former, now)]
    if weights[0] != weights[1]:
        names = [' '.join(f'{t["name"]} (SHA-256 {t["sha256"][:12]})' for t in meta.teachers) for meta in (former, now)]
        return f'--teachers {names[0]}, not {names[1]}'
    settings = _settings(former), _settings(now)
    differing = (option for option in settings[0] if settings[0][option] != settings[1][option])
    return next((f'{option} {", not ".join(shown(one[option]) for one in settings)}' for option in differing), None)


def _settings(meta: StoreMeta) -> dict[str, Any]:
    """The settings that must not change within a store, by option."""
    options = {'weight': 'weights', 'img_size': 'img-size', 'classes': 'classes', 'autocast_dtype': 'dtype'}
    return {
        **{f'--teacher-{option}': [t[key] for t in meta.teachers] for key, option in options.items()},
        '--num-classes': meta.num_classes,
        '--top-k': meta.top_k,
        '--seed': meta.seed,
        'the number of images': meta.images,
        'the SHA-256 of the names of the images': meta.names_sha256,
        **{option_text(name): value for name, value in asdict(meta.augmentation).items()},
    }


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
) -> SoftLabelStore:
    """Record the teachers' predictions for the epochs 0 to `epochs` - 1, together with whoever else is at it.

    What is there already stays.

    Args:
        dataset: The images, without a transform.
        teachers: The ensemble, on `device`.
        meta: What `describe` gives for these.
        epochs: Epochs to have in the end.
        workers: Worker processes that make samples; 0 makes them in this one.
        progress: Show what all processes together have done.

    Raises:
        UserError: If the folder holds a recording with other settings, or other files, or no image can be read.
    """
    meta = _begin(out, meta, dataset, epochs)
    samples = Samples(dataset, meta.augmentation, meta.seed)
    parts, bar, bad = PartQueue(out, samples), RecordingBar(out, progress), BadImages()
    # Batches are asked for in advance, while parts are locked: workers go on from part to part without a pause.
    loader = _sample_loader(samples, parts, workers, torch.device(device))
    try:
        while SoftLabelStore(out).missing:
            _record_parts(loader, teachers, parts, torch.device(device), bar, bad)
            if SoftLabelStore(out).missing:  # other processes are at them
                bar.update(0)
                time.sleep(_POLL_SECONDS)
    finally:
        parts.release()
        bar.bar.close()
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


def _begin(out: Path, meta: StoreMeta, dataset: Dataset, epochs: int) -> StoreMeta:
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
            with replacing(out / NAMES) as temporary:
                temporary.write_bytes('\0'.join(image_names(dataset)).encode('utf-8', 'surrogateescape'))
            meta = meta.extend(epochs, BLOCK_EPOCHS)
            meta.write(out)
            return meta
        store = SoftLabelStore(out)
        if differing := difference(store.meta, meta):
            raise UserError(f'{out} is a recording with {differing}: give the same options, or another --out.')
        check_same_classes(store.meta.class_names, meta.class_names, str(out))
        if store.epochs:
            _compare_pixels(store, dataset)
        if epochs < store.meta.epochs:
            _logger.info(f'{out} is a recording of {store.meta.epochs} epochs: all of them are recorded.')
        meta = store.meta.extend(epochs, BLOCK_EPOCHS)
        if meta != store.meta:
            meta.write(out)
        return meta
    finally:
        lock.release()


def _compare_pixels(store: SoftLabelStore, dataset: Dataset) -> None:
    """Make eight recorded samples anew: other images, or another decoder, are told before hours of recording."""
    # This process shares no open file with the workers that are started later.
    samples = StoredSamples(store, keeping_no_file_open(dataset))
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
            if self._take(part, store.meta.part_bytes(part)):
                yield from part_batches(self.samples, part.images, part.epochs, store.meta.batch_size)

    def _take(self, part: Part, size: int) -> bool:
        lock = _lock(self.out, part.file)
        if lock is None:
            return False
        path = self.out / part.file
        if path.is_file() and path.stat().st_size == size:  # made since the look at the folder
            lock.release()
            return False
        if lock.is_locked:
            for leftover in self.out.glob(f'.{part.file}-*'):  # of a process that was killed
                leftover.unlink()
        self.locked[part] = lock
        return True

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


class _SampleBatches(Dataset):
    """Makes batches of samples, in a worker process or in this one."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, keys: list[Key]) -> tuple[Tensor, np.ndarray, list[str], set[Ignored]]:
        """Return the pixels uint8 [n, C, H, W] that could be read, the CRC of each key's pixels, and what failed.

        At the end comes what was ignored of the images.
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
        return torch.from_numpy(pixels[crcs > 0] if failures else pixels), crcs, failures, ignored


def _sample_loader(samples: Samples, batches: Iterable[list[Key]], workers: int, device: torch.device) -> DataLoader:
    return DataLoader(
        _SampleBatches(samples),
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
    loader: DataLoader,
    teachers: EnsembleTeacher,
    parts: PartQueue,
    device: torch.device,
    bar: 'RecordingBar',
    bad: BadImages,
) -> None:
    """Make the parts that can be locked, and write each when its last batch has come."""
    meta = SoftLabelStore(parts.out).meta
    made: list[np.ndarray] = []  # records of a part's batches
    for pixels, crcs, failures, ignored in loader:
        bad.ignored['train'].update(ignored)
        for failure in failures:
            _logger.warning(f'Cannot be read: {failure}')
        records = np.zeros(len(crcs), meta.dtype)
        records['crc'] = crcs
        if len(pixels):
            probabilities, classes = predict(teachers, pixels, device).topk(meta.top_k, dim=1)
            records['classes'][crcs > 0] = classes.cpu().numpy()
            records['probabilities'][crcs > 0] = probabilities.cpu().numpy()
        made.append(records)
        part, count = next(iter(parts.locked)), sum(map(len, made))
        bar.update(count)
        if count == part.samples:
            by_epoch = np.concatenate(made).reshape(len(part.images), len(part.epochs)).T
            with replacing(parts.out / part.file) as temporary, temporary.open('wb') as file:
                for epoch, one in zip(part.epochs, by_epoch, strict=True):
                    data = one.tobytes()
                    file.write(data + checksum(data, epoch, part.images.start))
            made = []
            parts.release(part)


def predict(teachers: EnsembleTeacher, pixels: Tensor, device: torch.device) -> Tensor:
    """Return the teachers' mean probabilities [n, C] for pixels uint8 [n, chans, h, w].

    Raises:
        UserError: If they are not finite.
    """
    mean, std = (
        torch.tensor(stats, device=device).view(1, -1, 1, 1) * 255
        for stats in channel_stats(teachers.pretrained_cfg, teachers.in_chans)
    )
    with torch.no_grad():
        images = (pixels.to(device, non_blocking=True).float() - mean) / std
        probabilities = teachers.predict(images)[0].exp()
    if not probabilities.isfinite().all():
        raise UserError('the teachers predict NaN: take --teacher-dtype bfloat16 or float32, or none.')
    return probabilities


class RecordingBar:
    """A bar of the samples that all processes have recorded."""

    def __init__(self, out: Path, visible: bool) -> None:
        self.out, self.looked = out, time.monotonic()
        total, written = self._count()
        interval = 0.1 if sys.stderr.isatty() else 30  # of a log file
        options: Any = {'unit': ' samples', 'unit_scale': True, 'leave': False, 'mininterval': interval}
        self.bar = tqdm(total=total, initial=written, disable=not visible, **options)

    def _count(self) -> tuple[int, int]:
        store = SoftLabelStore(self.out)
        total = sum(part.samples for part in store.meta.parts())
        return total, total - sum(part.samples for part in store.missing)

    def update(self, unfinished: int) -> None:
        """Look once a second what all have written; `unfinished` samples of this process come on top."""
        if not self.bar.disable and time.monotonic() - self.looked > 1:
            self.looked = time.monotonic()
            self.bar.update(self._count()[1] + unfinished - self.bar.n)


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

    The arguments are those of `record`. The first quarter of the batches does not count.
    """
    samples = Samples(dataset, meta.augmentation, meta.seed)
    images = np.random.default_rng(0).choice(meta.images, min(meta.images, 4096), replace=False).tolist()
    batches = list(part_batches(samples, images, range(BLOCK_EPOCHS), meta.batch_size))
    times: list[float] = []
    for pixels, *_ in _sample_loader(samples, cycle(batches), workers, torch.device(device)):
        predict(teachers, pixels, torch.device(device)).topk(meta.top_k, dim=1)[0].cpu()
        times.append(time.perf_counter())
        if times[-1] - times[0] > seconds:
            break
    # The workers have prepared some batches while the device started.
    first = len(times) // 4
    return (len(times) - 1 - first) * len(batches[0]) / (times[-1] - times[first])
