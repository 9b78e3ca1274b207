"""What can end a run early: a signal, or too many images that cannot be read. All processes stop at the same update."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from torch import Tensor

from timm_mealv2.data.unreadable import BadImages
from timm_mealv2.training.distributed import Processes

_logger = logging.getLogger(__name__)


class Signals:
    """SIGTERM and SIGINT while the context is open: the first one ends the run in good order, others do nothing.

    Who wants the process gone at once sends SIGKILL, as torchrun, SLURM and Kubernetes do after a while. A launcher
    that hands a signal on may well send it a second time.

    Outside of `deferred` the first leaves by SystemExit. The exit code is 128 + the signal's number. Does nothing in
    another thread than the main one.

    Args:
        log: Say so when the program leaves.

    Attributes:
        received: The signal that has come, 0 if none has.
    """

    def __init__(self, log: bool = True) -> None:
        self.received = 0
        self.log = log
        self._deferred = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._former = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only remember the signal within the block."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received = number
            if not self._deferred:
                self.leave(number)

    def leave(self, number: int, text: str = '') -> None:
        """Exit as shells report a process that signal `number` has ended; `text` goes on with the line."""
        if self.log:
            _logger.warning(f'Stopped by {signal.Signals(number).name}{text}.')
        raise SystemExit(128 + number)


class EvaluationStoppedError(Exception):
    """An evaluation was given up on all processes, as a signal has come."""


class Guard:
    """What the processes of a run know of each other.

    They tell each other a few numbers after at most `interval` updates or about a second, whichever is sooner. When
    that is next is a function of the slowest process's time for an update, which is one of the numbers: so all of them
    do it, and stop, at the same update.

    Args:
        signals: The signals of this process.
        bad: The images that it could not read.
        processes: The processes.
        interval: Updates from one exchange to the next, at most; a single process looks at each.

    Attributes:
        signal: The signal that has come to any process, 0 if none has.
        stops: Whether the run is to stop after the present update, on all processes.
    """

    def __init__(self, signals: Signals, bad: BadImages, processes: Processes, interval: int = 1) -> None:
        self.signals, self.bad, self.processes = signals, bad, processes
        self.signal = 0
        self.stops = False
        self._interval = interval if processes.distributed else 1
        self._last: tuple[int, float] | None = None  # update and time of the last exchange
        self._next = 0

    def after_update(self, update: int) -> None:
        """Exchange the news where it is due (a collective call); `update` have been made."""
        if update < self._next:
            return
        now = time.perf_counter()
        seconds = 1.0 if self._last is None else (now - self._last[1]) / max(1, update - self._last[0])
        self._last = update, now
        microseconds = self.agree(int(seconds * 1e6))
        self._next = update + max(1, min(self._interval, 1_000_000 // max(1, microseconds)))

    def agree(self, number: int = 0) -> int:
        """Exchange the news now (a collective call); return the largest `number` of any process."""
        self.signal, news, largest = self.processes.maxima([self.signals.received, self.bad.news, number])
        if news:
            self.bad.share(self.processes.gather)
        self.stops = bool(self.signal) or len(self.bad.found) > self.bad.limit
        return largest


class UntilStopped:
    """The batches of an evaluation, which is given up on all processes when a signal comes to one."""

    def __init__(self, guard: Guard, loader: Any) -> None:
        self.guard = guard
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            if self.guard.signals.received:
                break
            yield batch
        # Once a pass on every process, however many batches it had.
        self.guard.agree()
        if self.guard.signal:
            raise EvaluationStoppedError
