"""Record what an ensemble of teachers predicts for every sample of a training.

Any number of processes, on any hosts that see the folder, may start, stop and die at any time. Which samples go through
the teachers together is fixed, so that a part's bytes do not depend on who makes it.
"""

import functools
import logging
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from timm_mealv2.data.dataset import UnreadableImage, image_names, keeping_no_file_open
from timm_mealv2.data.loader import unchanged
from timm_mealv2.data.normalize import channel_stats
from timm_mealv2.data.samples import Key, Samples
from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.tuning import PLAIN
from timm_mealv2.soft_labels.claims import STALE, PartQueue, RecordingBar, sample_keys
from timm_mealv2.soft_labels.meta import META, Part, StoreMeta, difference
from timm_mealv2.soft_labels.store import NAMES, PIXELS, SoftLabelStore, checksum, pixel_crc

_logger = logging.getLogger(__name__)

BLOCK_EPOCHS = 10
"""Epochs of a part. An image is decoded once for them, unless each sample needs another partner to be mixed with."""

_PIXEL_SAMPLES = 8
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
    tune: bool = False,
    compile: bool = False,
    progress: bool = False,
) -> SoftLabelStore:
    """Record the teachers' predictions for the epochs 0 to `epochs` - 1, together with whoever else is at it.

    What is there already stays, but for parts with an image that could not be read and can be read now.

    Args:
        dataset: The images, without a transform.
        teachers: The ensemble, on `device`.
        meta: What `describe` gives for these.
        epochs: Epochs to have in the end.
        workers: Worker processes that make samples; 0 makes them in this one.
        tune: Tune the teachers for a new store. Which forms they run in is written before the first part, and whoever
            records takes what is written there: a part's bytes depend on neither time nor machine.
        compile: Compiled forms may be chosen too.
        progress: Show what all processes together have done.

    Raises:
        UserError: If the folder holds a recording with other settings, or other files, or no image can be read.
    """
    device = torch.device(device)
    # This process reads some images itself, and shares no open file with the workers that are started later.
    samples = Samples(keeping_no_file_open(dataset), meta.augmentation, meta.seed)
    tuned = functools.partial(_tune, samples=samples, teachers=teachers, device=device, compile=compile)
    meta = _join(out, meta, image_names(dataset), samples, epochs, tuned if tune else None)
    forms = [teacher.get('runs_as', PLAIN) for teacher in meta.teachers]
    teachers.run_as(forms, (meta.full_batch(meta.blocks[1]), *meta.augmentation.input_size))
    queue = PartQueue(out, meta, samples, _mended_parts(SoftLabelStore(out), samples))
    shown = RecordingBar(queue, progress)
    # The loader's batches are asked for while parts are claimed: workers go on from part to part without a pause.
    loader = _sample_loader(Samples(dataset, meta.augmentation, meta.seed), queue, workers, device)
    try:
        while queue.missing():
            _record_parts(loader, teachers, queue, device, shown)
            if queue.missing():  # other processes are at them
                shown.update(0)
                time.sleep(_POLL_SECONDS)
    finally:
        for part in list(queue.claims.values()):
            queue.release(part)
        shown.bar.close()
    queue.remove_stale()
    store = SoftLabelStore(out)
    unreadable = int((store.read_epoch(0, np.arange(meta.images))['crc'] == 0).sum())
    if unreadable == meta.images:
        raise UserError(f'none of the {meta.images:,} images can be read: {out} has nothing to train on.')
    if unreadable:
        _logger.warning(
            f'{unreadable:,} of {meta.images:,} images cannot be read: they are never trained on. Mend them and give '
            'the same command again to record them.'
        )
    return store


class _SampleBatch(NamedTuple):
    """Samples that go through the teachers together."""

    keys: list[Key]
    readable: list[int]  # places in `keys`
    pixels: Tensor  # uint8 [n, chans, h, w], of those that are readable
    crcs: list[int]
    failures: list[str]


class _SampleBatches(Dataset):
    """Makes batches of samples, in a worker process or in this one."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitems__(self, keys: list[Key]) -> _SampleBatch:
        pixels = np.empty((len(keys), *self.samples.augmentation.input_size), np.uint8)
        batch = _SampleBatch(keys, [], torch.empty(0), [], [])
        for place, key in enumerate(keys):
            try:
                sample = self.samples[key].pixels
            except UnreadableImage as error:
                batch.failures.append(str(error))
                continue
            pixels[len(batch.readable)] = sample
            batch.readable.append(place)
            batch.crcs.append(pixel_crc(sample))
        return batch._replace(pixels=torch.from_numpy(pixels[: len(batch.readable)]))


def _sample_loader(samples: Samples, batches: Iterable[list[Key]], workers: int, device: torch.device) -> DataLoader:
    return DataLoader(
        _SampleBatches(samples),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=unchanged,
        pin_memory=device.type == 'cuda',
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # nothing here draws from it, and no shared generator moves on
    )


def _record_parts(
    loader: DataLoader, teachers: EnsembleTeacher, queue: PartQueue, device: torch.device, shown: RecordingBar
) -> None:
    """Make the parts that can be claimed, and write each when its last batch has come."""
    meta = queue.meta
    unfinished: dict[str, tuple[np.ndarray, int]] = {}  # the records of a part, and how many are to come
    for batch in loader:
        part = queue.part_of(batch.keys[0])
        shape = len(part.epochs), len(part.images)
        records, left = unfinished.get(part.file) or (np.zeros(shape, meta.dtype), shape[0] * shape[1])
        for failure in batch.failures:
            _logger.warning(f'Cannot be read: {failure}')
        if batch.readable:
            probabilities, classes = predict(teachers, batch.pixels, device).topk(meta.top_k, dim=1)
            filled = np.empty(len(batch.readable), meta.dtype)
            filled['crc'], filled['classes'] = batch.crcs, classes.cpu().numpy()
            filled['probabilities'] = probabilities.cpu().numpy()
            keys = np.array([(key.epoch, key.index) for key in (batch.keys[place] for place in batch.readable)])
            records[keys[:, 0] - part.epochs.start, keys[:, 1] - part.images.start] = filled
        unfinished[part.file] = records, left - len(batch.keys)
        shown.update(len(batch.keys))
        if left == len(batch.keys):
            del unfinished[part.file]
            with replacing(queue.out / part.file) as temporary, temporary.open('wb') as file:
                for epoch, one in zip(part.epochs, records, strict=True):
                    data = one.tobytes()
                    file.write(data + checksum(data, epoch, part.images.start))
            queue.again.discard(part.file)
            queue.release(part)
            shown.update(-records.size)
        queue.renew()


def _normalized(teachers: EnsembleTeacher, pixels: Tensor, device: torch.device) -> Tensor:
    mean, std = (
        torch.tensor(stats, device=device).view(1, -1, 1, 1) * 255
        for stats in channel_stats(teachers.pretrained_cfg, teachers.in_chans)
    )
    return (pixels.to(device, non_blocking=True).float() - mean) / std


def _tune(
    meta: StoreMeta, samples: Samples, teachers: EnsembleTeacher, device: torch.device, compile: bool
) -> StoreMeta:
    """Tune the teachers on a full batch of the first samples; return the settings with their forms."""
    keys = sample_keys(samples, range(min(meta.images, meta.batch_size)), range(meta.blocks[1]))
    size = meta.full_batch(meta.blocks[1])
    batch = _SampleBatches(samples).__getitems__(keys[:size])
    if not batch.readable:
        return meta
    pixels = batch.pixels[torch.arange(size) % len(batch.readable)]
    rows = teachers.tune(_normalized(teachers, pixels, device), compile)
    return replace(meta, teachers=[{**t, 'runs_as': row.chosen} for t, row in zip(meta.teachers, rows, strict=True)])


def predict(teachers: EnsembleTeacher, pixels: Tensor, device: torch.device) -> Tensor:
    """Return the teachers' mean probabilities [n, C] for pixels uint8 [n, chans, h, w].

    Raises:
        UserError: If they are not finite.
    """
    with torch.no_grad():
        probabilities = teachers.predict(_normalized(teachers, pixels, device))[0].exp()
    if not probabilities.isfinite().all():
        raise UserError('the teachers predict NaN: take --teacher-dtype bfloat16 or float32, or none.')
    return probabilities


def measure(
    dataset: Dataset,
    teachers: EnsembleTeacher,
    meta: StoreMeta,
    *,
    workers: int,
    device: torch.device | str,
    tune: bool = False,
    compile: bool = False,
    seconds: float = 20,
) -> float:
    """Measure how many samples a second this process records, on images that are spread over the data set.

    The arguments are those of `record`; `seconds` begin when workers and device have started.
    """
    device = torch.device(device)
    samples = Samples(dataset, meta.augmentation, meta.seed)
    meta = meta.extend(BLOCK_EPOCHS, BLOCK_EPOCHS)
    if tune:
        _tune(meta, samples, teachers, device, compile)
    size = meta.full_batch(BLOCK_EPOCHS)
    chosen = np.random.default_rng(0).choice(meta.images, min(meta.images, 4096), replace=False)
    keys = sample_keys(samples, chosen.tolist(), range(BLOCK_EPOCHS))

    def batches() -> Generator[list[Key], None, None]:
        while True:
            yield from (keys[start : start + size] for start in range(0, len(keys), size))

    with closing(batches()) as endless:
        begin = since = time.perf_counter()
        count = 0
        for number, batch in enumerate(_sample_loader(samples, endless, workers, device)):
            if batch.readable:
                predict(teachers, batch.pixels, device).topk(meta.top_k, dim=1)[0].cpu()
            now = time.perf_counter()
            # While the device got ready for the first batch, the workers have prepared some in advance.
            if number == 0 or (number <= 2 * workers and now - begin < seconds):
                since, count = now, 0
                continue
            count += len(batch.keys)
            if now - since > seconds:
                break
    return count / (now - since)


def _join(
    out: Path,
    meta: StoreMeta,
    names: Sequence[str],
    samples: Samples,
    epochs: int,
    tuned: Callable[[StoreMeta], StoreMeta] | None = None,
) -> StoreMeta:
    """Make the folder, or join a recording that is there; return its settings, with blocks up to `epochs`.

    `tuned` adds the forms of the teachers to the settings of a new recording.
    """
    if (out / META).is_file():
        former = StoreMeta.read(out)
        if differing := difference(former, meta):
            raise UserError(f'{out} is a recording with {differing}: give the same options, or another --out.')
        SoftLabelStore(out).check_pixels(samples)
        for leftover in out.glob('.*'):
            with suppress(FileNotFoundError):  # another process may just rename it
                if time.time() - leftover.stat().st_mtime > STALE:
                    leftover.unlink()
        if epochs < former.epochs:
            _logger.info(f'{out} is a recording of {former.epochs} epochs: all of them are recorded.')
        meta = former.extend(epochs, BLOCK_EPOCHS)
        if meta != former:
            meta.write(out)
        return meta
    if out.exists() and not out.is_dir():
        raise UserError(f'--out {out} is no folder.')
    # meta.json comes last: the other two may be those of a process that died, or of one that has just begun.
    if out.exists() and {path.name for path in out.iterdir() if not path.name.startswith('.')} - {NAMES, PIXELS, META}:
        raise UserError(f'--out {out} holds other files: name a new folder.')
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / NAMES) as temporary:
        temporary.write_bytes('\0'.join(names).encode('utf-8', 'surrogateescape'))
    with replacing(out / PIXELS) as temporary:
        save_file(_pixel_samples(samples, meta, epochs), temporary)
    meta = meta.extend(epochs, BLOCK_EPOCHS)
    if tuned is not None:
        meta = tuned(meta)
    meta.write(out, first=True)
    return _join(out, meta, names, samples, epochs)  # of whoever was the first


def _pixel_samples(samples: Samples, meta: StoreMeta, epochs: int) -> dict[str, np.ndarray]:
    """Samples spread over images and the first epochs, to tell another decoder from other images."""
    chosen: dict[str, np.ndarray] = {}
    for number in range(_PIXEL_SAMPLES):
        first, epoch = meta.images * number // _PIXEL_SAMPLES, number % min(epochs, BLOCK_EPOCHS)
        for image in range(first, min(first + 16, meta.images)):  # the first that can be read
            with suppress(UnreadableImage):
                chosen[f'{epoch}-{image}'] = np.ascontiguousarray(samples.sample(epoch, image).pixels)
                break
    return chosen


def _mended_parts(store: SoftLabelStore, samples: Samples) -> set[str]:
    """Parts to make anew: images in them could not be read, and one of these can be read now."""
    missing = {part.file for part in store.missing}
    parts = [part for part in store.meta.parts() if part.file not in missing]

    def unreadable(part: Part, epoch: int) -> list[int]:
        records = store.read_slice(epoch, part.images.start // store.meta.part_images)
        return [part.images.start + int(row) for row in np.flatnonzero(records['crc'] == 0)]

    def mended(epoch: int, image: int) -> bool:
        try:
            samples.sample(epoch, image)
        except UnreadableImage:
            return False
        return True

    if not any(mended(part.epochs.start, image) for part in parts for image in unreadable(part, part.epochs.start)):
        return set()
    # An image that is mixed with it in another epoch may be anywhere.
    return {part.file for part in parts if any(unreadable(part, epoch) for epoch in part.epochs)}
