"""Join stores of the same teachers and images with different crops."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from timm_mealv2.errors import UserError
from timm_mealv2.soft_labels.recording import (
    difference,
    finish,
    shard_file,
    shard_ranges,
    start,
    take_up,
)
from timm_mealv2.soft_labels.store import (
    PixelSample,
    SoftLabelStore,
    StoreMeta,
    names_hash,
    shard_sizes,
    write_shard,
)

_RESULTS = ('fingerprint', 'unreadable', 'kept_mass', 'shards', 'index_sha256', 'pixel_samples')


def merge(paths: Sequence[str | Path], out: str | Path) -> StoreMeta:
    """Write a store with the crops of several: those of the first, then those of the second, and so on.

    Args:
        paths: The stores, two or more.
        out: The folder of the new one.

    Returns:
        What its `meta.json` says.

    Raises:
        UserError: If the stores do not fit each other or have a seed in common, or `out` is in use.
    """
    out = Path(out)
    if len(paths) < 2:
        raise UserError(f'merging takes two stores or more, got {len(paths)}.')
    stores = [SoftLabelStore(path) for path in paths]
    first = stores[0]
    for number, store in enumerate(stores[1:], 1):
        differing = difference(_common(first), _common(store))
        if not differing and not np.array_equal(first.sizes, store.sizes):
            row = int(np.flatnonzero((first.sizes != store.sizes).any(axis=1))[0])
            sizes = ('x'.join(map(str, each.sizes[row].tolist())) for each in (first, store))
            differing = f'the size of {first.names[row]} {", not ".join(sizes)} (0x0: could not be read)'
        if differing:
            raise UserError(f'{first.path} and {store.path} do not fit each other: {differing}.')
        for other in stores[:number]:
            shared = set(other.meta.seeds) & set(store.meta.seeds)
            if shared:
                raise UserError(
                    f'{other.path} and {store.path} hold the same crops (seed {min(shared)}): record with another '
                    '--seed.'
                )

    settings = {
        **{key: value for key, value in asdict(first.meta).items() if key not in _RESULTS},
        'crops': sum(store.meta.crops for store in stores),
        'seeds': [seed for store in stores for seed in store.meta.seeds],
        'names_sha256': names_hash(first.names),
    }
    if take_up(out, settings):
        return StoreMeta.read(out)
    start(out, settings)
    for number, (begin, end) in enumerate(shard_ranges(len(first.names), settings['crops'])):
        path = out / shard_file(number)
        if shard_sizes(path) is None:
            rows = [store.records(row, range(store.meta.crops)) for row in range(begin, end) for store in stores]
            write_shard(path, np.concatenate(rows), first.sizes[begin:end])
    return finish(out, first.names, settings, lambda sizes: _pixel_samples(stores))


def _common(store: SoftLabelStore) -> dict[str, Any]:
    """What stores to merge must have in common."""
    meta = {key: value for key, value in asdict(store.meta).items() if key not in ('crops', 'seeds')}
    return {**meta, 'names_sha256': names_hash(store.names)}


def _pixel_samples(stores: Sequence[SoftLabelStore]) -> list[PixelSample]:
    """A share of the samples of each store, with the crops' new numbers."""
    samples, offset = [], 0
    for number, store in enumerate(stores):
        samples += [
            replace(sample, crop=sample.crop + offset) for sample in store.meta.pixel_samples[number :: len(stores)]
        ]
        offset += store.meta.crops
    return samples
