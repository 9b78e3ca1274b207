"""Data sets, and a training loader that can start at any batch of any epoch.

What a sample looks like is a function of (seed, epoch, data set index), and what a batch is mixed with of (seed, epoch,
batch): the sampler hands these counters to the worker processes together with the indices, and the generators are
seeded from them there. So neither the number of workers nor the point at which a run was continued changes a pixel.

An image that cannot be read is left out of its batch and named; which ones are is a function of the data alone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    Mixup,
    create_loader,
    create_transform,
)
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.scheduled_sampler import ScheduledBatchSampler, ScheduledTransformDataset
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    default_collate,
)

from timm_mealv2.data.bad_images import (
    BadImages,
    Batch,
    Collate,
    Fetched,
    Images,
    ReadableDataset,
    ReportingLoader,
    ignore_signals,
    keep_signals_from_workers,
)
from timm_mealv2.data.dataset import UnreadableImage
from timm_mealv2.data.seed import Stream, counted_seed, preserved_generators, seed_all, seed_cpu, seeded
from timm_mealv2.errors import UserError
from timm_mealv2.soft_labels.dataset import CropSampler, MixCrops, SoftLabelDataset, collate_crops


class _Key(NamedTuple):
    """What a worker is asked for: one sample and the counters that its randomness depends on."""

    index: Any  # data set index, or (index, number of the transform) with scheduled sizes
    epoch: int
    batch: int
    turn: int | None  # with repeated augmentation, tells the repeats of one image apart


class _CountedBatches(Sampler[list[_Key]]):
    """Batches of an epoch as keys, from a given batch on; what is skipped is not loaded."""

    def __init__(
        self,
        batches: BatchSampler | ScheduledBatchSampler,
        indices: DistributedSampler[int] | RepeatAugSampler | CropSampler,
        repeats: bool,
    ) -> None:
        self.batches = batches
        self.indices = indices
        self.repeats = repeats
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return len(self.batches)

    def set_position(self, epoch: int, start: int) -> None:
        self.epoch, self.start = epoch, start
        (self.batches if isinstance(self.batches, ScheduledBatchSampler) else self.indices).set_epoch(epoch)

    def __iter__(self) -> Iterator[list[_Key]]:
        place = 0
        for batch, indices in enumerate(islice(self.batches, len(self))):
            if batch >= self.start:
                yield [
                    _Key(index, self.epoch, batch, place + i if self.repeats else None)
                    for i, index in enumerate(indices)
                ]
            place += len(indices)


class _WholeBatches(BatchSampler):
    """Batches of which the last, smaller one is kept, unless it is a single sample.

    Batch normalisation cannot train on one sample: it has no variance. Another sample is left out in the next epoch.
    """

    def __init__(self, sampler: Sampler, batch_size: int) -> None:
        lone = len(sampler) > batch_size > 1 and len(sampler) % batch_size == 1  # type: ignore[arg-type]
        super().__init__(sampler, batch_size, drop_last=lone)


class _CountedDataset(Dataset):
    """Fetches whole batches of samples, each with the generators seeded from its key.

    An image that cannot be read is left out. A batch of which less than two images are left is filled up to two with
    the next ones of the data set: every process has something to train on, and batch normalisation a variance.
    """

    def __init__(self, dataset: Dataset, seed: int, rank: int, unlabeled: bool, limit: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.rank = rank
        self.unlabeled = unlabeled
        self.limit = limit

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitems__(self, keys: list[_Key]) -> Fetched | UserError:
        fetched = Fetched([], {}, keys[0])
        try:
            with preserved_generators():
                for key in keys:
                    self._add(key, fetched)
                for key in self._substitutes(keys):
                    # Too many to go on: a folder that is gone would be searched to its end.
                    if len(fetched.samples) >= min(2, len(keys)) or len(fetched.unreadable) > self.limit:
                        break
                    self._add(key, fetched)
        except UserError as error:  # torch would add the worker's traceback to its text
            return error
        return fetched

    def _substitutes(self, keys: list[_Key]) -> Iterator[_Key]:
        asked = {_index(key) for key in keys}
        for step in range(1, len(self)):
            index = (_index(keys[-1]) + step) % len(self)
            if index not in asked:
                last = keys[-1].index
                yield keys[-1]._replace(index=(index, *last[1:]) if isinstance(last, tuple) else index)

    def _add(self, key: _Key, fetched: Fetched) -> None:
        index = _index(key)
        # The process makes only the repeats of an image differ: otherwise a sample is the same wherever it is made.
        counters = (self.seed, key.epoch, index, *(() if key.turn is None else (key.turn, self.rank)))
        seed_cpu(counted_seed(Stream.AUGMENTATION, *counters))
        try:
            image, target = self.dataset[key.index]
        except UnreadableImage as error:
            fetched.unreadable[index] = str(error)
        else:
            fetched.samples.append((image, 0 if self.unlabeled else target))


def _index(key: _Key) -> int:
    return key.index[0] if isinstance(key.index, tuple) else key.index


class _CountedCollate(Collate):
    """Collates a batch, mixed with numbers that depend on (seed, epoch, batch, rank)."""

    def __init__(self, collate: Callable, seed: int, rank: int, mixup_off_epoch: int, unlabeled: bool) -> None:
        super().__init__(collate)
        self.seed = seed
        self.rank = rank
        self.mixup_off_epoch = mixup_off_epoch
        self.unlabeled = unlabeled

    def collate_fetched(self, fetched: Fetched) -> Batch:
        key = fetched.key
        if isinstance(self.collate, FastCollateMixup):
            self.collate.mixup_enabled = not 0 < self.mixup_off_epoch <= key.epoch
        with seeded(counted_seed(Stream.MIXUP, self.seed, key.epoch, key.batch, self.rank)):
            images, target = self._mix(fetched.samples)
        if self.unlabeled:
            target = torch.full((len(images),), -1)
        return images, target

    def _mix(self, samples: list[tuple[Any, Any]]) -> Batch:
        if not isinstance(self.collate, FastCollateMixup) or len(samples) % 2 == 0:
            return self.collate(samples)
        # timm mixes pairs: the odd one of a last batch is paired, and thus mixed, with itself.
        images, target = self.collate([samples[-1], samples[-1]])
        if len(samples) > 1:
            others = self.collate(samples[:-1])
            return torch.cat([others[0], images[:1]]), torch.cat([others[1], target[:1]])
        return images[:1], target[:1]


class _CountedErasing:
    """timm's RandomErasing on the device, with numbers that depend on (seed, epoch, batch, rank)."""

    def __init__(self, erasing: Callable[[Tensor], Tensor], seed: int, rank: int) -> None:
        self.erasing = erasing
        self.seed = seed
        self.rank = rank
        self.epoch = 0
        self.batch = 0

    def __call__(self, images: Tensor) -> Tensor:
        seed = counted_seed(Stream.ERASING, self.seed, self.epoch, self.batch, self.rank)
        self.batch += 1
        with seeded(seed):
            if images.is_cuda:
                torch.cuda.manual_seed(seed)  # the training loop seeds it anew before every forward pass
            return self.erasing(images)


class TrainLoader:
    """Training batches on the device, from any batch of any epoch; the last batch of an epoch is kept.

    Args:
        dataset: A data set with random access, without a transform; or one of stored labels, whose crops are given as
            they were recorded (`transform` then says how they are normalised, and no more).
        input_size: (channels, height, width) of an image.
        batch_size: Images a batch and process.
        transform: Arguments of timm's `create_transform` for training, `interpolation`, `mean` and `std` among them.
        mixup: Arguments of timm's `Mixup`; None does not mix.
        mixup_off_epoch: First epoch without mixing, 0 for never.
        crops_per_decode: With stored labels, crops of an image each time it is decoded.
        repeats: Repeated augmentation: how often an image comes in turn, 0 for not.
        splits: Augmentation splits (AugMix), 0 for none.
        sizes: Arguments of timm's `ScheduledBatchSampler` and 'input_sizes', for batches of changing image size.
        unlabeled: Discard the targets; they come as -1.
        labels: The possible targets; None takes all.
        bad: Told of the images that cannot be read.
        seed: The run's seed.
        rank: Number of this process.
        world_size: Number of processes.
        workers: Worker processes.
        pin_memory: Pin the workers' batches in memory.
        prefetch: Normalise on the device (timm's `PrefetchLoader`), otherwise in the workers.
        device: Where batches go, the CPU if None.
        dtype: Floating point type of the images.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        input_size: tuple[int, int, int],
        batch_size: int,
        transform: dict[str, Any],
        mixup: dict[str, Any] | None = None,
        mixup_off_epoch: int = 0,
        crops_per_decode: int = 1,
        repeats: float = 0,
        splits: int = 0,
        sizes: dict[str, Any] | None = None,
        unlabeled: bool = False,
        labels: range | None = None,
        bad: BadImages | None = None,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        prefetch: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        device = device or torch.device('cpu')
        self.seed, self.rank, self.device, self.dtype = seed, rank, device, dtype
        self.mixup_off_epoch = mixup_off_epoch
        self.unlabeled = unlabeled
        bad = bad or BadImages()
        transform = dict(transform, is_training=True, use_prefetcher=prefetch, separate=splits > 0)
        stored = dataset if isinstance(dataset, SoftLabelDataset) else None
        unlabeled = unlabeled and stored is None  # stored labels stay, without hard ones
        if stored is None:
            dataset = Images(dataset, None if unlabeled else labels)
        if splits:
            dataset = AugMixDataset(dataset, num_splits=splits)
        if sizes:
            choices = [create_transform(size, **transform) for size in sizes['input_sizes']]
            dataset = ScheduledTransformDataset(dataset, choices)
        elif stored is None:
            dataset.transform = create_transform(input_size, **transform)  # type: ignore[attr-defined]

        indices: DistributedSampler[int] | RepeatAugSampler | CropSampler
        if stored is not None:
            options = {'per_decode': crops_per_decode, 'seed': seed, 'rank': rank, 'world_size': world_size}
            indices = CropSampler(stored.images, stored.store.meta.crops, **options)
        elif repeats:
            indices = RepeatAugSampler(dataset, num_replicas=world_size, rank=rank, num_repeats=repeats)
        else:
            indices = DistributedSampler(dataset, num_replicas=world_size, rank=rank, seed=seed)
        batches: BatchSampler | ScheduledBatchSampler
        if sizes:
            schedule = {key: value for key, value in sizes.items() if key != 'input_sizes'}
            # As timm does it: what is left over would be a small batch in the middle of the epoch.
            try:
                batches = ScheduledBatchSampler(indices, seed=seed, drop_last=True, **schedule)
            except ValueError as error:
                raise UserError(f'--train-img-sizes: {error}') from error
        else:
            batches = _WholeBatches(indices, batch_size)
        self.batch_sampler = _CountedBatches(batches, indices, repeats=bool(repeats))

        collate: Callable = collate_crops if stored is not None else fast_collate if prefetch else default_collate
        self.mixup: Mixup | None = None
        if mixup and prefetch:
            collate = FastCollateMixup(**mixup) if stored is None else MixCrops(mixup)
        elif mixup:
            self.mixup = Mixup(**mixup)
        loader = DataLoader(
            _CountedDataset(dataset, seed, rank, unlabeled, bad.limit),
            batch_sampler=self.batch_sampler,
            collate_fn=_CountedCollate(collate, seed, rank, mixup_off_epoch, unlabeled),  # type: ignore[arg-type]
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # the workers' own seed, which nothing uses, comes out of no shared generator
        )
        self.loader: ReportingLoader | PrefetchLoader = ReportingLoader(loader, bad, 'train')
        self.erasing: _CountedErasing | None = None
        if prefetch:
            self.loader = PrefetchLoader(
                self.loader,
                mean=transform['mean'],
                std=transform['std'],
                channels=input_size[0],
                device=device,
                img_dtype=dtype,
                re_prob=0.0 if transform.get('no_aug') else transform.get('re_prob', 0.0),
                re_mode=transform.get('re_mode', 'const'),
                re_count=transform.get('re_count', 1),
                re_num_splits=transform.get('re_num_splits', 0),
            )
            if self.loader.random_erasing is not None:
                self.erasing = self.loader.random_erasing = _CountedErasing(self.loader.random_erasing, seed, rank)

    def __len__(self) -> int:
        """Batches an epoch on every process."""
        return len(self.batch_sampler)

    @property
    def resumable(self) -> bool:
        """Whether an epoch can be entered in the middle."""
        return True

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield (images [B, chans, H, W] normalised, targets) of `epoch` from batch `start` on."""
        self.batch_sampler.set_position(epoch, start)
        if self.erasing is not None:
            self.erasing.epoch, self.erasing.batch = epoch, start
        for batch, (images, target) in enumerate(self.loader, start):
            if not isinstance(self.loader, PrefetchLoader):
                images, target = images.to(self.device, self.dtype), target.to(self.device)
                if self.mixup is not None:
                    images, target = self._mix(self.mixup, images, target, epoch, batch)
            yield images, target

    def _mix(self, mixup: Mixup, images: Tensor, target: Tensor, epoch: int, batch: int) -> Batch:
        mixup.mixup_enabled = not 0 < self.mixup_off_epoch <= epoch
        classes = target.clamp(min=0)
        with seeded(counted_seed(Stream.MIXUP, self.seed, epoch, batch, self.rank)):
            if len(images) % 2:  # as in _CountedCollate
                last = mixup(images[-1:].repeat(2, 1, 1, 1), classes[-1:].repeat(2))
                others = mixup(images[:-1], classes[:-1]) if len(images) > 1 else (images[:0], last[1][:0])
                images, mixed = torch.cat([others[0], last[0][:1]]), torch.cat([others[1], last[1][:1]])
            else:
                images, mixed = mixup(images, classes)
        return images, target if self.unlabeled else mixed


class StreamLoader:
    """Training batches of a streaming data set (wds/, tfds/, hfids/), through timm's own loader.

    Such a set has no random access: an epoch can only be entered at its start, and its augmentation is reproducible for
    the same number of processes and workers alone.

    Args:
        dataset: timm's `IterableImageDataset`.
        seed: The run's seed.
        rank: Number of this process.
        device: Where batches go.
        unlabeled: Discard the targets; they come as -1.
        **loader: Arguments of timm's `create_loader`.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        *,
        seed: int,
        rank: int,
        device: torch.device,
        unlabeled: bool = False,
        **loader: Any,
    ) -> None:
        self.seed, self.rank, self.device, self.unlabeled = seed, rank, device, unlabeled
        self.dataset = dataset
        self.loader = create_loader(dataset, is_training=True, device=device, persistent_workers=False, **loader)
        keep_signals_from_workers(self.loader)

    def __len__(self) -> int:
        """Batches an epoch on every process, by the data set's own count."""
        return len(self.loader)

    @property
    def resumable(self) -> bool:
        """Whether an epoch can be entered in the middle."""
        return False

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield (images, targets) of `epoch`; `start` must be 0."""
        assert start == 0, 'a streaming data set is entered at the start of an epoch'
        self.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        seed_all(counted_seed(Stream.STREAMING, self.seed, self.rank, epoch))
        for images, target in self.loader:
            images = images.to(self.device)
            yield (
                images,
                torch.full((len(images),), -1, device=self.device) if self.unlabeled else target.to(self.device),
            )


def eval_loader(
    dataset: Dataset,
    data_config: dict[str, Any],
    *,
    batch_size: int,
    device: torch.device,
    bad: BadImages | None = None,
    distributed: bool = False,
    **kwargs: Any,
) -> Iterable[Batch]:
    """Return an evaluation loader: images as `data_config` says, in the data set's order.

    What cannot be read is left out, and each image comes on one process alone: the processes may have different
    numbers of batches.

    Args:
        dataset: The validation split.
        data_config: As timm's `resolve_data_config` gives it.
        batch_size: Images a batch and process.
        device: Where batches go.
        bad: Told of the images that cannot be read.
        distributed: Share the images among the processes of the default group.
        **kwargs: Further arguments of timm's `create_loader`: 'num_workers', 'pin_memory', 'use_prefetcher' and
            'img_dtype'.
    """
    names = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    config = {name: data_config[name] for name in names}
    if isinstance(dataset, IterableDataset):
        kwargs |= {'batch_size': batch_size, 'device': device, 'distributed': distributed}
        loader = create_loader(dataset, is_training=False, **config, **kwargs)
        keep_signals_from_workers(loader)
        return loader
    prefetch = kwargs.pop('use_prefetcher', True)
    dtype = kwargs.pop('img_dtype', torch.float32)
    images = Images(dataset)
    images.transform = create_transform(**config, is_training=False, use_prefetcher=prefetch)
    rank, processes = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    loader = DataLoader(
        ReadableDataset(images),
        batch_size=batch_size,
        sampler=range(rank, len(images), processes),
        collate_fn=Collate(fast_collate if prefetch else default_collate),  # type: ignore[arg-type]
        worker_init_fn=ignore_signals,
        **kwargs,
    )
    reporting = ReportingLoader(loader, bad or BadImages(), 'validation', skip_empty=True)
    if not prefetch:
        return reporting
    return PrefetchLoader(
        reporting,
        mean=config['mean'],
        std=config['std'],
        channels=config['input_size'][0],
        device=device,
        img_dtype=dtype,
    )


def image_sizes(sizes: Sequence[int], channels: int) -> list[tuple[int, int, int]]:
    """Square image sizes as (channels, height, width)."""
    return [(channels, size, size) for size in sizes]
