"""Train on a store: the samples of a live training, each with the record of what the teachers predicted for it."""

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from timm_mealv2.data.dataset import image_names
from timm_mealv2.data.loader import Collate, stack_pixels
from timm_mealv2.data.samples import EpochSampler, Key, KeyBatch, Sample, Samples
from timm_mealv2.data.unreadable import UnreadableImage
from timm_mealv2.errors import UserError
from timm_mealv2.soft_labels.store import SoftLabelStore, library_versions, pixel_crc, shown

_logger = logging.getLogger(__name__)


class StoredSamples(Samples):
    """The recorded training's samples, numbered as in the store, each compared with its record.

    Args:
        dataset: The images of the store, or some of them, without a transform.
        labels: The possible labels; None takes all.
        allow_pixel_change: Take samples with other pixels than the recorded ones, in place of an error; their images
            are counted among what is ignored of images.

    Attributes:
        rows: The number in the store of each image of the data set; None if they are the data set's own.

    Raises:
        UserError: If the store has no complete epoch, or the images are not those of the store.
    """

    def __init__(
        self,
        store: SoftLabelStore,
        dataset: Dataset,
        labels: range | None = None,
        allow_pixel_change: bool = False,
    ) -> None:
        if not store.epochs:
            raise UserError(store.incomplete())
        self.store, self.rows, positions = store, store.match(image_names(dataset)), None
        if self.rows is not None:
            positions = np.full(store.meta.images, -1)
            positions[self.rows] = np.arange(len(self.rows))
        self.allow_pixel_change = allow_pixel_change
        super().__init__(dataset, store.meta.augmentation, store.meta.seed, labels=labels, positions=positions)

    def record(self, key: Key) -> Any:
        """Return a sample's record: that of its key, or read anew for a sample that takes the place of another."""
        if key.label is not None:
            return np.frombuffer(key.label, self.store.meta.dtype)[0]
        return self.store.read_epoch(key.epoch, np.array([key.index]))[0]

    def __getitem__(self, key: Key) -> Sample:
        """Return the sample of a key.

        Raises:
            UnreadableImage: If there is no such image, no record of it, or it cannot be read.
            UserError: If its pixels are not those that the teachers saw.
        """
        if self.positions is not None and self.positions[key.index] < 0:
            raise UnreadableImage(f'image {key.index} of the store is not in the data set')
        sample, crc = super().__getitem__(key), self.record(key)['crc']
        if not crc:
            raise UnreadableImage(f'image {key.index} could not be read when it was recorded')
        if pixel_crc(sample.pixels) != crc:
            if not self.allow_pixel_change:
                raise UserError(f'image {key.index}, epoch {key.epoch + 1}: {self._other_pixels()}')
            sample = sample._replace(ignored=(*sample.ignored, (key.index, 'pixels')))
        return sample

    def collate(self, batch: KeyBatch, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        """Collate samples with their records: labels float32 [B, 1 + 2K].

        A label is the hard label (-1 if unknown, or if the sample is mixed of two images), K class indices and K
        probabilities.
        """
        records = np.stack([self.record(key) for key in batch.keys])
        hard = [sample.target if sample.lam == 1 else -1 for sample in samples]
        labels = np.column_stack([hard, records['classes'], records['probabilities']])
        return stack_pixels(samples), torch.from_numpy(labels.astype(np.float32))

    def _other_pixels(self) -> str:
        recorded, here = (shown(versions) for versions in (self.store.meta.versions, library_versions()))
        return (
            f'{self.store.path} was recorded from other pixels. Either the image has changed, or a library: recorded '
            f'with {recorded}; here are {here}. Record again, or train on them all the same: --allow-pixel-change.'
        )


class StoredSampler(EpochSampler):
    """The batches of a live training's epochs, each key with its record. After the last recorded epoch comes the first.

    The records of an epoch are read before its first batch, slice by slice; those that this process needs are kept.

    Args:
        epochs: Number of its epochs to take.
        batch_size: Samples a batch and process.
        **kwargs: 'rank', 'world_size' and 'samples_per_decode' of `EpochSampler`.
    """

    def __init__(self, samples: StoredSamples, epochs: int, batch_size: int, **kwargs: Any) -> None:
        meta, rows = samples.store.meta, samples.rows
        if rows is not None and len(rows) == meta.images:
            rows = None  # other places in the data set, the same numbers in the store
        elif rows is not None and meta.augmentation.mixes:
            raise UserError(
                f'{samples.store.path} has {meta.images:,} images, which are mixed with each other, the data set '
                f'{len(rows):,} of them: give all.'
            )
        count = meta.images if rows is None else len(rows)
        super().__init__(count, batch_size, seed=meta.seed, pairs=meta.augmentation.mixes, **kwargs)
        self.store, self.epochs, self.rows = samples.store, epochs, rows

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
        if unrecorded := np.count_nonzero(records['crc'] == 0):
            _logger.warning(f'Left out, not readable when recorded: {unrecorded:,} samples of this epoch.')
        data, size = records.tobytes(), records.itemsize
        del records
        for batch in super().__iter__():
            place = batch.number * self.batch_size
            keys = [
                key._replace(epoch=int(epochs[at]), index=int(rows[at]), label=data[at * size : (at + 1) * size])
                for at, key in enumerate(batch.keys, place)
            ]
            yield batch._replace(keys=keys)


def replay(
    store: SoftLabelStore,
    dataset: Dataset,
    batch_size: int,
    labels: range | None = None,
    allow_pixel_change: bool = False,
    **kwargs: Any,
) -> tuple[StoredSamples, StoredSampler, Collate]:
    """Return what a training loader needs to train on a store; the arguments are those of the two classes.

    Raises:
        UserError: If the store has no complete epoch, or the images are not those of the store.
    """
    samples = StoredSamples(store, dataset, labels, allow_pixel_change)
    epochs = store.epochs
    if dist.is_initialized():  # while recording goes on, processes may see different numbers
        shared = [epochs]
        dist.broadcast_object_list(shared)
        epochs = shared[0]
    if store.missing:
        _logger.warning(f'Taking the first {epochs} of {store.meta.epochs} epochs: {store.incomplete()}')
    return samples, StoredSampler(samples, epochs, batch_size, **kwargs), samples.collate
