"""Share the parts of a store among processes that need not know each other.

Who makes a part first makes a file beside it, which the file system lets one process alone create. On a network file
system that shows such files late, two processes may make the same part: they write the same bytes.
"""

import json
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from timm_mealv2.data.samples import Key, Samples
from timm_mealv2.soft_labels.meta import Part, StoreMeta
from timm_mealv2.soft_labels.store import SoftLabelStore

_logger = logging.getLogger(__name__)

HEARTBEAT = 30.0
"""Seconds after which a process renews its claims."""
STALE = 600.0
"""Seconds after which a claim that was not renewed is that of a dead process on another host."""

_LOG_SECONDS = 30.0


def sample_keys(samples: Samples, images: Sequence[int], epochs: Sequence[int]) -> list[Key]:
    """Return the keys of samples image by image, so that an image is decoded once for all epochs.

    Where samples are mixed the pairs are looked up here, epoch by epoch: a worker, which makes samples of all epochs in
    turn, would draw an epoch's permutation for each of them.
    """
    mixes = samples.augmentation.mixes
    keys = [
        [Key(epoch, image, pair=samples.pair(epoch, image) if mixes else None) for image in images] for epoch in epochs
    ]
    return [key for of_image in zip(*keys, strict=True) for key in of_image]


class PartQueue:
    """The parts that are still to be made. Iterating claims one after the other, and yields batches of its samples.

    Which samples make a batch is a function of the store's settings. `again` names the files of parts that are there
    and are made anew.
    """

    def __init__(self, out: Path, meta: StoreMeta, samples: Samples, again: set[str]) -> None:
        self.out, self.meta, self.samples, self.again = out, meta, samples, again
        self.claims: dict[str, Part] = {}
        self.renewed = time.monotonic()

    def missing(self) -> list[Part]:
        """Return the parts that nobody has made yet."""
        missing = {part.file for part in SoftLabelStore(self.out).missing}
        return [part for part in self.meta.parts() if part.file in missing or part.file in self.again]

    def __iter__(self) -> Iterator[list[Key]]:
        for part in self.missing():
            if self._claim(part):
                keys = sample_keys(self.samples, part.images, part.epochs)
                size = self.meta.full_batch(len(part.epochs))
                yield from (keys[start : start + size] for start in range(0, len(keys), size))

    def _claim(self, part: Part) -> bool:
        claim, written = self._claim_file(part), self.out / part.file
        if part.file in self.claims:
            return False
        if _is_stale(claim):
            _logger.info(f'{part.file} was claimed by a process that is dead: recorded by this one.')
            claim.unlink(missing_ok=True)
        try:
            owner = {'host': socket.gethostname(), 'pid': os.getpid(), 'time': time.time()}
            with claim.open('xb', buffering=0) as file:
                self.claims[part.file] = part  # before a write that a full disk refuses: it is released then
                file.write(json.dumps(owner).encode())
        except FileExistsError:
            return False
        # Another process may have made the part between the look at the folder and the claim.
        if part.file not in self.again and written.exists() and written.stat().st_size == self.meta.part_bytes(part):
            self.release(part)
            return False
        return True

    def _claim_file(self, part: Part) -> Path:
        return self.out / part.file.replace('part', 'claim')

    def part_of(self, key: Key) -> Part:
        """Return the claimed part that a sample belongs to."""
        return next(part for part in self.claims.values() if key.index in part.images and key.epoch in part.epochs)

    def renew(self) -> None:
        """Show the other processes that this one is alive, if that is due."""
        if time.monotonic() - self.renewed > HEARTBEAT:
            self.renewed = time.monotonic()
            for part in self.claims.values():
                with suppress(FileNotFoundError):  # this process has been taken for dead
                    os.utime(self._claim_file(part))

    def release(self, part: Part) -> None:
        """Give up the claim on a part."""
        del self.claims[part.file]
        self._claim_file(part).unlink(missing_ok=True)

    def remove_stale(self) -> None:
        """Remove the claims of processes that died when they had just written the part."""
        for claim in self.out.glob('claim-*'):
            if _is_stale(claim):
                claim.unlink(missing_ok=True)


def _is_stale(claim: Path) -> bool:
    """Whether the process that made a claim is dead."""
    try:
        age = time.time() - claim.stat().st_mtime
        owner = json.loads(claim.read_text(encoding='utf-8'))
        host, pid = owner['host'], int(owner['pid'])
    except FileNotFoundError:
        return False
    except (KeyError, TypeError, ValueError):  # it is being written, or the process died before it was
        return age > HEARTBEAT
    if age > STALE or host != socket.gethostname():
        return age > STALE
    if pid == os.getpid():
        return True  # a former process had the same number, as the first one of a container has
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


class RecordingBar:
    """What all processes have done: a bar on a terminal, a line from time to time elsewhere."""

    def __init__(self, queue: PartQueue, shown: bool) -> None:
        self.queue, self.shown = queue, shown
        self.lines = shown and not sys.stderr.isatty()
        self.total = sum(_samples(part) for part in queue.meta.parts())
        self.unfinished = 0  # samples of parts that this process has not written yet
        self.first = self._written()
        self.start = self.looked = self.told = time.monotonic()
        columns, lines = shutil.get_terminal_size()  # of a terminal that does not tell, tqdm would show nothing
        look: Any = {'unit': ' samples', 'unit_scale': True, 'leave': False, 'ncols': columns, 'nrows': lines}
        self.bar = tqdm(total=self.total, initial=self.first, disable=not shown or self.lines, **look)

    def _written(self) -> int:
        return self.total - sum(_samples(part) for part in self.queue.missing())

    def update(self, count: int) -> None:
        """Count samples of this process's unfinished parts; look up from time to time what all have written."""
        self.unfinished += count
        now = time.monotonic()
        if not self.shown or now - self.looked < 1:
            return
        self.looked = now
        done = self._written() + self.unfinished
        self.bar.n = done
        self.bar.refresh()
        if self.lines and now - self.told > _LOG_SECONDS:
            self.told = now
            rate = (done - self.first) / (now - self.start)
            left = tqdm.format_interval((self.total - done) / rate) if rate else 'unknown time'
            _logger.info(f'{done:,} of {self.total:,} samples by all processes, {rate:,.1f}/s, {left} left')


def _samples(part: Part) -> int:
    return len(part.epochs) * len(part.images)
