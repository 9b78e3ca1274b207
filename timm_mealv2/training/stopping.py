"""What can end a run early: signals, updates that are not finite, images that cannot be read.

The processes of a run tell each other with one all-reduce of two numbers at each update, on the CPU. It is read at the
next update: none waits for another, and all of them stop at the same one.
"""

import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor

from timm_mealv2.data.unreadable import BadImages
from timm_mealv2.errors import UserError
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


class TooManyNonFiniteError(UserError):
    """Too many updates in a row were skipped."""


class Guard:
    """What the processes of a run know of each other at each update.

    Args:
        signals: The signals of this process.
        bad: The images that it could not read.
        processes: The processes.
        max_nonfinite: Skipped updates in a row that stop the run.

    Attributes:
        signal: The signal that has come to any process, 0 if none has.
        stops: Whether the run is to stop after the present update, on all processes.
        state: For a checkpoint: 'skipped' updates of the run, and those skipped 'in_a_row'.
    """

    def __init__(self, signals: Signals, bad: BadImages, processes: Processes, max_nonfinite: int = 10) -> None:
        self.signals, self.bad, self.processes, self.max_nonfinite = signals, bad, processes, max_nonfinite
        self.signal = 0
        self.stops = False
        self._told: Callable[[], list[int]] | None = None  # the news of all processes, at the last update
        self._noted: list[tuple[int, Tensor]] = []
        self.state: dict[str, Any] = {'skipped': 0, 'in_a_row': 0}

    def exchange(self) -> None:
        """Take in what the processes told each other at the last call, and tell the news (a collective call)."""
        self._hear()
        self._told = self.processes.maxima([self.signals.received, self.bad.news])

    def agree(self) -> None:
        """Exchange the news, and wait for those of all processes (a collective call)."""
        self.exchange()
        self._hear()

    def _hear(self) -> None:
        if self._told is not None:
            self.signal, news = self._told()
            self._told = None
            if news:
                self.bad.share(self.processes.gather)
                self.stops |= len(self.bad.found) > self.bad.limit  # at this moment the same on all processes
            self.stops |= bool(self.signal)

    def note(self, update: int, applied: Tensor) -> None:
        """Remember whether update number `update` was made, a scalar on the device."""
        self._noted.append((update, applied))

    def settle(self, find_teachers: Callable[[], Sequence[str]] = list) -> None:
        """Count those of the updates noted that were skipped; waits for the device (a collective call).

        Args:
            find_teachers: Finds the teachers whose output is not finite, if any.

        Raises:
            TooManyNonFiniteError: If there are too many in a row.
        """
        if not self._noted:
            return
        updates, applied = zip(*self._noted, strict=True)
        self._noted = []
        skipped = self.processes.maxima((~torch.stack(applied)).tolist())()
        text = 'the loss or its gradient is not finite'
        if any(skipped):
            teachers = sorted({name for names in self.processes.gather(find_teachers()) for name in names})
            if teachers:
                verb = 'predicts' if len(teachers) == 1 else 'predict'
                text += f', and so is what {" and ".join(teachers)} {verb}'
        for update, is_skipped in zip(updates, skipped, strict=True):
            self._count(update, bool(is_skipped), text)

    def _count(self, update: int, skipped: bool, text: str) -> None:
        if not skipped:
            self.state['in_a_row'] = 0
            return
        self.state['skipped'] += 1
        self.state['in_a_row'] += 1
        row, total = self.state['in_a_row'], self.state['skipped']
        if self.processes.primary:
            _logger.warning(f'Update {update} is skipped: {text} ({row} in a row, {total} in all).')
        if row >= self.max_nonfinite:
            raise TooManyNonFiniteError(f'{row} updates in a row were skipped (--max-nonfinite), {text}.')

    def until_stopped(self, loader: Iterable[tuple[Tensor, Tensor]]) -> '_UntilStopped':
        """The batches of an evaluation, which is given up on all processes when a signal comes to one."""
        return _UntilStopped(self, loader)


class _UntilStopped:
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
