"""What can end a run early: signals, updates that are not finite, images that cannot be read.

The processes of a run agree on it with one all-reduce of three numbers at each update, on the CPU, so that all of them
skip the same updates and stop at the same one.
"""

import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from torch import Tensor

from timm_mealv2.data.bad_images import BadImages
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
        state: For a checkpoint: 'bad_images' (see `BadImages.found`), 'skipped' updates of the run, and those skipped
            'in_a_row'.
    """

    def __init__(self, signals: Signals, bad: BadImages, processes: Processes, max_nonfinite: int = 10) -> None:
        self.signals, self.bad, self.processes, self.max_nonfinite = signals, bad, processes, max_nonfinite
        self.signal = 0
        self.state: dict[str, Any] = {'bad_images': bad.found, 'skipped': 0, 'in_a_row': 0}

    @property
    def stops(self) -> bool:
        """Whether the run is to stop after the present update."""
        return bool(self.signal) or len(self.bad.found) > self.bad.limit

    def agree(self, finite: bool = True) -> bool:
        """Tell the other processes whether this one's update is finite; return whether all are (a collective call)."""
        self.signal, news, infinite = self.processes.maxima([self.signals.received, self.bad.news, not finite])
        if news:
            self.bad.share(self.processes.gather)
        return not infinite

    def count(self, update: int, finite: bool, find_teachers: Callable[[], Sequence[str]]) -> None:
        """Count update number `update` if it was skipped as not finite.

        Args:
            update: Its number.
            finite: Whether it was not skipped.
            find_teachers: Finds the teachers whose output is not finite, if any.

        Raises:
            TooManyNonFiniteError: If it is the last of too many in a row, on all processes.
        """
        if finite:
            self.state['in_a_row'] = 0
            return
        self.state['skipped'] += 1
        self.state['in_a_row'] += 1
        text = 'the loss or its gradient is not finite'
        teachers = sorted({name for names in self.processes.gather(find_teachers()) for name in names})
        if teachers:
            verb = 'predicts' if len(teachers) == 1 else 'predict'
            text += f', and so is what {" and ".join(teachers)} {verb}'
        row, skipped = self.state['in_a_row'], self.state['skipped']
        if self.processes.primary:
            _logger.warning(f'Update {update} is skipped: {text} ({row} in a row, {skipped} in all).')
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
