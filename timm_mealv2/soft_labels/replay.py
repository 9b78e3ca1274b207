"""Train on a store: the samples of a live training, each with the record of what the teachers predicted for it."""

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from timm_mealv2.data.dataset import keeping_no_file_open
from timm_mealv2.data.loader import stack_pixels
from timm_mealv2.data.samples import EpochSampler, KeyBatch, Sample, Samples
from timm_mealv2.errors import UserError
from timm_mealv2.soft_labels.store import SoftLabelStore, pixel_crc

_logger = logging.getLogger(__name__)


class StoredSampler(EpochSampler):
    """The batches of a live training's epochs, each key with its record. After the last recorded epoch comes the first.

    The records of an epoch are read before its first batch, slice by slice; those that this process needs are kept. An
    image that could not be read when it was recorded is left out of its batch.

    Args:
        epochs: Number of its epochs to take.
        rows: The number of each image in the store; None if they are the data set's own.
        batch_size: Samples a batch and process.
        **kwargs: 'rank', 'world_size' and 'samples_per_decode' of `EpochSampler`.
    """

    def __init__(
        self, store: SoftLabelStore, epochs: int, rows: np.ndarray | None, batch_size: int, **kwargs: Any
    ) -> None:
        count = store.meta.images if rows is None else len(rows)
        super().__init__(count, batch_size, seed=store.meta.seed, pairs=store.meta.augmentation.mixes, **kwargs)
        self.store, self.epochs, self.rows = store, epochs, rows
        self._told = False

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch and the first batch of the next iteration."""
        turns = self.samples_per_decode  # epochs of a block, in which each image is decoded once
        if epoch and epoch % self.epochs == 0:
            _logger.info(f'Epoch {epoch}: the {self.epochs} recorded epochs begin again.')
        super().set_position(epoch % (math.ceil(self.epochs / turns) * turns), start)

    def __iter__(self) -> Iterator[KeyBatch]:
        epochs, rows = self.samples(self.epoch)
        if self.rows is not None:
            rows = self.rows[rows]
        epochs = epochs % self.epochs
        records = np.empty(len(rows), self.store.meta.dtype)
        for epoch in np.unique(epochs).tolist():
            places = np.flatnonzero(epochs == epoch)
            records[places] = self.store.read_epoch(epoch, rows[places])
        known = records['crc'] != 0
        if not known.all() and not self._told:
            self._told = True
            left_out = np.count_nonzero(~known)
            _logger.warning(f'Left out, not readable when recorded: {left_out:,} samples of this epoch.')
        data, size = records.tobytes(), records.itemsize
        del records
        for batch in super().__iter__():
            place = batch.number * self.batch_size
            keys = [
                key._replace(epoch=int(epochs[at]), index=int(rows[at]), label=data[at * size : (at + 1) * size])
                for at, key in enumerate(batch.keys, place)
                if known[at]
            ]
            if not keys:
                fault = f'has no record of any image of batch {batch.number}'
                raise UserError(f'{self.store.path} {fault}: mend the images.')
            if len(keys) < min(2, len(batch.keys)):
                keys *= 2  # batch norm has no variance of one sample
            yield batch._replace(keys=keys)


class CollateStored:
    """Collates samples with their records: labels float32 [B, 1 + 2K].

    A label is the hard label (-1 if unknown, or if the sample is mixed of two images), K class indices and K
    probabilities. With `check`, each sample's pixels are compared with those that the teachers saw.
    """

    def __init__(self, store: SoftLabelStore, check: bool = True) -> None:
        self.store, self.check = store, check

    def __call__(self, batch: KeyBatch, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        records = np.frombuffer(b''.join(key.label or b'' for key in batch.keys), self.store.meta.dtype)
        if self.check:
            for key, sample, crc in zip(batch.keys, samples, records['crc'].tolist(), strict=True):
                if pixel_crc(sample.pixels) != crc:
                    raise UserError(f'image {key.index}, epoch {key.epoch}: {self.store.pixels_differ()}')
        hard = [sample.target if sample.lam == 1 else -1 for sample in samples]
        labels = np.column_stack([hard, records['classes'], records['probabilities']])
        return stack_pixels(samples), torch.from_numpy(labels.astype(np.float32))


def replay(
    store: SoftLabelStore,
    dataset: Dataset,
    batch_size: int,
    *,
    labels: range | None = None,
    allow_pixel_change: bool = False,
    **kwargs: Any,
) -> tuple[Samples, StoredSampler, CollateStored]:
    """Return what a training loader needs to train on a store.

    Args:
        dataset: The images of the store, or some of them, without a transform.
        batch_size: Samples a batch and process.
        labels: The possible hard labels; None takes all.
        allow_pixel_change: Accept small differences of pixels, such as another version of a decoder makes.
        **kwargs: 'rank', 'world_size' and 'samples_per_decode' of `EpochSampler`.

    Raises:
        UserError: If the store has no complete epoch, or the images are not those of the store.
    """
    if isinstance(dataset, IterableDataset):
        raise UserError('--soft-labels needs a data set with random access: a streaming one has none.')
    epochs = store.epochs
    if dist.is_initialized():  # while recording goes on, processes may see different numbers
        shared = [epochs]
        dist.broadcast_object_list(shared)
        epochs = shared[0]
    if not epochs:
        raise UserError(store.incomplete())
    if store.missing:
        _logger.warning(f'Taking the first {epochs} of {store.meta.epochs} epochs: {store.incomplete()}')
    samples, rows = store.samples(dataset, labels)
    if rows is not None and len(rows) == store.meta.images:
        rows = None  # other places in the data set, the same numbers in the store
    elif rows is not None and store.meta.augmentation.mixes:
        raise UserError(
            f'{store.path} has {store.meta.images:,} images, which are mixed with each other, the data set '
            f'{len(rows):,} of them: give all.'
        )
    if allow_pixel_change:
        store.check_pixels(store.samples(keeping_no_file_open(dataset))[0], accept_change=True)
    sampler = StoredSampler(store, epochs, rows, batch_size, **kwargs)
    return samples, sampler, CollateStored(store, not allow_pixel_change)
