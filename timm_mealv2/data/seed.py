"""Randomness as a function of counters: what is drawn depends on where the run stands, not on what was drawn before.

So no generator's state has to be saved, and a run that is continued anywhere draws what the unbroken run draws.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What a seed is for. Equal counters of different streams give unrelated seeds."""

    AUGMENTATION = 1  # (seed, epoch, data set index)
    MIXUP = 2  # (seed, epoch, batch, rank)
    ERASING = 3  # (seed, epoch, data set index)
    UPDATE = 4  # (seed, rank), to which the number of the batch is added: dropout, stochastic depth
    TEACHERS = 5  # (seed, epoch, data set index): which teachers are recorded for a sample
    INITIALIZATION = 6  # (seed,): the same on every process
    STREAMING = 7  # (seed, rank, epoch): data sets that timm's own loader streams
    PAIR = 10  # (seed, epoch, pair): what two samples are mixed with


def counted_seed(stream: Stream, *counters: int) -> int:
    """Return a seed in [0, 2**63) for `stream` at `counters` (each >= 0)."""
    return int(np.random.SeedSequence([stream, *counters]).generate_state(1, np.uint64)[0] >> 1)


def seed_cpu(seed: int) -> None:
    """Seed Python's, NumPy's and torch's CPU generators."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's CPU generator and, if `device` is no CPU, the generators of all devices.

    Where CUDA has not been started, `torch.manual_seed` notes each seed, and who asked for it, in case that it will be.
    """
    if device.type == 'cpu':
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Put back Python's, NumPy's and torch's CPU generators after a block that seeds them.

    Thereby sample augmentation in the training process (no workers) leaves dropout's numbers as they are with workers.
    """
    former = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(former[0])
        np.random.set_state(former[1])
        torch.set_rng_state(former[2])
