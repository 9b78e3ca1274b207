"""Record what an ensemble answers for random crops of every image of a data set.

What a record holds depends on the image and the number of the crop alone, and which crops go through the teachers
together on the data set, the crops of an image and the batch size: any number of processes and workers, and a recording
that was stopped and continued, write the same files.
"""

import logging
import math
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from timm_mealv2.data.dataset import UnreadableImage, image_names
from timm_mealv2.data.normalize import channel_stats
from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.soft_labels.crops import CropBatch, CropSource, Recipe, crop_loader, decode
from timm_mealv2.soft_labels.recording import (
    describe_teachers,
    finish,
    shard_file,
    shard_ranges,
    start,
    take_up,
)
from timm_mealv2.soft_labels.store import (
    FORMAT_VERSION,
    PIXEL_SAMPLES,
    PixelSample,
    StoreMeta,
    fill_records,
    libjpeg_version,
    names_hash,
    pixel_hash,
    record_dtype,
    shard_sizes,
    write_shard,
)

_logger = logging.getLogger(__name__)

_LOG_SECONDS = 30


def record(
    dataset: Dataset,
    teachers: EnsembleTeacher,
    out: str | Path,
    recipe: Recipe,
    *,
    top_k: int = 10,
    batch_size: int = 128,
    workers: int = 4,
    device: torch.device | str = 'cpu',
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> StoreMeta:
    """Record the teachers' answers into the folder `out`, or go on with a recording there that was stopped.

    With several processes, each calls this with its rank; the default process group must be there. The files do not
    depend on their number. A finished store of the same settings is left as it is.

    Args:
        dataset: Images with random access (`timm_mealv2.data.dataset.open_dataset` makes it); the labels are not used.
        teachers: The ensemble, on `device`.
        out: The folder of the store; made if it is not there.
        recipe: Which crops are cut.
        top_k: Classes to keep for a crop, K.
        batch_size: Most crops that go through the teachers at once.
        workers: Processes that decode images and cut crops.
        device: Where the teachers are.
        rank: Number of this process.
        world_size: Number of processes.
        progress: Show a bar, or log lines where stderr is no terminal; of several processes, the first one's.

    Returns:
        What `meta.json` says.

    Raises:
        UserError: If a setting is not possible, `out` holds a recording with other settings, no image can be read, or
            the teachers answer with NaN.
    """
    out = Path(out)
    _check(dataset, teachers, recipe, top_k, batch_size)
    names = image_names(dataset)
    settings = {
        'format_version': FORMAT_VERSION,
        'teachers': describe_teachers(teachers),
        'teacher_dtype': str(teachers.autocast_dtype).removeprefix('torch.') if teachers.autocast_dtype else None,
        'num_classes': teachers.num_classes,
        'top_k': top_k,
        'crops': recipe.crops,
        'image_size': list(recipe.image_size),
        'img_mode': recipe.img_mode,
        'interpolation': recipe.interpolation,
        'scale': list(recipe.scale),
        'ratio': list(recipe.ratio),
        'hflip': recipe.hflip,
        'seeds': [recipe.seed],
        'pillow': PIL.__version__,
        'libjpeg': libjpeg_version(),
        'images': len(names),
        'names_sha256': names_hash(names),
    }
    if take_up(out, settings):
        return StoreMeta.read(out)
    ranges = shard_ranges(len(names), recipe.crops)
    if rank == 0:
        start(out, settings)
    pending = [number for number in range(len(ranges)) if shard_sizes(out / shard_file(number)) is None]
    if rank == 0:
        there = f', {len(ranges) - len(pending)} are there' if len(pending) < len(ranges) else ''
        _logger.info(f'Recording {recipe.crops} crops of {len(names):,} images in {len(ranges)} shards{there}.')
    if world_size > 1:
        dist.barrier()  # all have seen the same shards before the first new one is written
    source = CropSource(dataset, recipe, [(n, *ranges[n]) for n in pending[rank::world_size]], batch_size)
    dtype = record_dtype(teachers.num_classes, top_k)
    shown = _Progress(source.total, progress and rank == 0, f'process 1 of {world_size}' if world_size > 1 else '')
    _record_shards(out, source, teachers, dtype, workers, torch.device(device), shown)
    if world_size > 1:
        dist.barrier()
    if rank == 0:
        meta = finish(out, names, settings, partial(_pixel_samples, dataset, names, recipe))
        if meta.unreadable:
            _logger.warning(f'{meta.unreadable} of {meta.images} images cannot be read: they are never trained on.')
    if world_size > 1:
        dist.barrier()
    return StoreMeta.read(out)


def measure(
    dataset: Dataset,
    teachers: EnsembleTeacher,
    recipe: Recipe,
    *,
    top_k: int = 10,
    batch_size: int = 128,
    workers: int = 4,
    device: torch.device | str = 'cpu',
    seconds: float = 20,
) -> float:
    """Record some images for about `seconds` without writing anything; return the crops a second of one process."""
    _check(dataset, teachers, recipe, top_k, batch_size)
    images = len(image_names(dataset))
    group = min(images, max(1, batch_size // recipe.crops))
    spread = np.linspace(0, images - group, min(1000, math.ceil(images / group))).astype(int).tolist()
    ranges = cycle((number, first, first + group) for number, first in enumerate(spread))
    source = CropSource(dataset, recipe, list(islice(ranges, max(4 * workers + 50, len(spread)))), batch_size)
    begin = since = time.perf_counter()
    count = 0
    for number, batch in enumerate(crop_loader(source, workers, torch.device(device))):
        _ask(teachers, batch, top_k, torch.device(device))
        now = time.perf_counter()
        # While the first batch waited for the device to get ready, the workers have prepared some in advance.
        if number == 0 or (number <= 2 * workers and now - begin < seconds):
            since, count = now, 0
            continue
        count += batch.total
        if now - since > seconds:
            break
    return count / (now - since)


def mean_probabilities(teachers: EnsembleTeacher, pixels: Tensor, device: torch.device) -> Tensor:
    """Return the teachers' mean probabilities [n, C] for pixels uint8 [n, chans, h, w]."""
    mean, std = (
        torch.tensor(stats, device=device).view(1, -1, 1, 1) * 255
        for stats in channel_stats(teachers.pretrained_cfg, teachers.in_chans)
    )
    x = (pixels.to(device, non_blocking=True).float() - mean) / std
    return teachers.predict(x)[0].exp()


class _OpenShard:
    """The records of a shard, as they come."""

    def __init__(self, images: int, crops: int, dtype: np.dtype) -> None:
        self.records = np.zeros(images * crops, dtype)
        self.sizes = np.zeros((images, 2), np.uint16)
        self.missing = images * crops

    def add(self, batch: CropBatch, classes: np.ndarray, probabilities: np.ndarray) -> None:
        if batch.crops:
            records = np.empty(len(batch.crops), self.records.dtype)
            fill_records(records, batch.crops, classes, probabilities)
            self.records[batch.places] = records
        for place, width, height in batch.images:
            self.sizes[place] = width, height
        self.missing -= batch.total


class _Progress:
    """A bar on a terminal, a line from time to time elsewhere."""

    def __init__(self, total: int, shown: bool, label: str) -> None:
        self.total = total
        self.lines = shown and not sys.stderr.isatty()
        self.label = f'{label}: ' if label else ''
        columns, lines = shutil.get_terminal_size()  # of a terminal that does not tell, tqdm would show nothing
        self.bar = tqdm(
            desc=label,
            total=total,
            unit=' crops',
            unit_scale=True,
            disable=not shown or self.lines,
            leave=False,
            ncols=columns,
            nrows=lines,
        )
        self.done = 0
        self.start = self.last = time.perf_counter()

    def add(self, count: int) -> None:
        self.bar.update(count)
        self.done += count
        now = time.perf_counter()
        if self.lines and (now - self.last > _LOG_SECONDS or self.done == self.total):
            self.last = now
            rate = self.done / max(now - self.start, 1e-9)
            left = tqdm.format_interval((self.total - self.done) / rate)
            _logger.info(f'{self.label}{self.done:,} of {self.total:,} crops, {rate:,.1f} crops/s, {left} left')


def _record_shards(
    out: Path,
    source: CropSource,
    teachers: EnsembleTeacher,
    dtype: np.dtype,
    workers: int,
    device: torch.device,
    shown: _Progress,
) -> None:
    """Write the shards of `source`, each when its last batch has come."""
    crops = source.recipe.crops
    images = {number: stop - start for number, start, stop in source.ranges}
    (top_k,) = dtype['classes'].shape
    if not images:
        return
    shards: dict[int, _OpenShard] = {}
    for batch in crop_loader(source, workers, device):
        for failure in batch.failures:
            _logger.warning(f'left out, cannot be read: {failure}')
        if batch.shard not in shards:
            shards[batch.shard] = _OpenShard(images[batch.shard], crops, dtype)
        shard = shards[batch.shard]
        shard.add(batch, *_ask(teachers, batch, top_k, device))
        if not shard.missing:
            write_shard(out / shard_file(batch.shard), shard.records, shard.sizes)
            del shards[batch.shard]
        shown.add(batch.total)
    shown.bar.close()
    assert not shards, 'crops are missing'


def _ask(
    teachers: EnsembleTeacher, batch: CropBatch, top_k: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """The `top_k` most probable classes of each crop and their probabilities, [n, K] each."""
    if not batch.crops:
        return np.empty((0, top_k), np.int64), np.empty((0, top_k), np.float32)
    probabilities, classes = mean_probabilities(teachers, batch.pixels, device).topk(top_k, dim=1)
    if not probabilities.isfinite().all():
        raise UserError('the teachers answer with NaN: take --teacher-dtype bfloat16 or float32, or none.')
    return classes.cpu().numpy(), probabilities.cpu().numpy()


def _pixel_samples(dataset: Dataset, names: Sequence[str], recipe: Recipe, sizes: np.ndarray) -> list[PixelSample]:
    """Crops spread over the images, to notice a decoder that gives other pixels."""
    rows = np.flatnonzero((sizes > 0).all(axis=1)).tolist()
    chosen = dict.fromkeys((rows[len(rows) * i // PIXEL_SAMPLES], i % recipe.crops) for i in range(PIXEL_SAMPLES))
    samples = []
    for row, number in chosen:
        try:
            image = decode(dataset, row, recipe.img_mode)
        except UnreadableImage as error:
            raise UserError(f'an image that was read before cannot be read any more: {error}') from error
        if image.size != tuple(sizes[row].tolist()):
            raise UserError(f'{names[row]} has changed since it was recorded: take another --out.')
        (crop,) = recipe.draw(image, row, [number])
        samples.append(
            PixelSample(names[row], number, pixel_hash(image, crop, recipe.image_size, recipe.interpolation))
        )
    return samples


def _check(dataset: Dataset, teachers: EnsembleTeacher, recipe: Recipe, top_k: int, batch_size: int) -> None:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, '__len__'):
        raise UserError('a streaming data set has no numbered images to record: take a folder, a tar or hfds/NAME.')
    if not 1 <= top_k <= teachers.num_classes:
        raise UserError(f'--top-k must be from 1 to {teachers.num_classes}, the number of classes, got {top_k}.')
    if batch_size < 1:
        raise UserError(f'--batch-size must be 1 or more, got {batch_size}.')
    channels = 1 if recipe.img_mode == 'L' else 3
    if teachers.in_chans != channels:
        raise UserError(
            f'the teachers take {teachers.in_chans} channels, images of mode {recipe.img_mode} have {channels}: '
            f'set --in-chans {channels} or --input-img-mode.'
        )
