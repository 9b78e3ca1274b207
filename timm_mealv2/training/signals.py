"""What can end a run early: signals, updates that are not finite, images that cannot be read.

The processes of a run agree on it with one all-reduce of three numbers at each update, on the CPU, so that all of them
skip the same updates and stop at the same one.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from timm_mealv2.data.bad_images import BadImages
from timm_mealv2.errors import UserError

_logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


_open_signals = 0
_mask: set[Any] = set()


def _before_fork() -> None:
    global _mask
    if _open_signals:
        _mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _after_fork_in_parent() -> None:
    if _open_signals:
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask)


def _after_fork_in_child() -> None:
    if _open_signals:
        signal.set_wakeup_fd(-1)  # the pipe is the parent's too
        signal.signal(signal.SIGINT, signal.SIG_IGN)


# A worker process gets the signals that reach the whole group: from its first moment it leaves Ctrl-C to the training
# process, and SIGTERM blocked until it can tell who sent it (see `ignore_signals`).
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


class Signals:
    """SIGTERM and SIGINT while the context is open: the first ends the run in good order, the second at once.

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
        global _open_signals
        if threading.current_thread() is threading.main_thread():
            # Python runs a handler between two steps of its own in the main thread, which may be waiting in a
            # collective for a process that is gone: a second thread is told through the pipe.
            self._reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._former_fd = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            self._former = {number: signal.signal(number, self._receive) for number in _SIGNALS}
            _open_signals += 1
            threading.Thread(target=self._watch, args=(self._reading,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        global _open_signals
        if self._former:
            _open_signals -= 1
            for number, handler in self._former.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._former_fd)
            os.close(self._writing)  # ends the thread

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only take note of the first signal within the block."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if not self._deferred:
            self.leave(number)

    def leave(self, number: int, text: str = '') -> None:
        """Exit as shells report a process that signal `number` has ended; `text` goes on with the line."""
        if self.log:
            _logger.warning(f'Stopped by {signal.Signals(number).name}{text}.')
        raise SystemExit(128 + number)

    @staticmethod
    def _watch(reading: int) -> None:
        count = 0
        while number := os.read(reading, 1):
            if number[0] in _SIGNALS:
                count += 1
                if count == 2:
                    os._exit(128 + number[0])
        os.close(reading)


class EvaluationStoppedError(Exception):
    """An evaluation was given up on all processes, as a signal has come."""


class Watch:
    """What the processes of a run know of each other at each update.

    Attributes:
        signal: The signal that has come to any process, 0 if none has.
        state: For a checkpoint: 'bad_images' (see `BadImages.found`), 'skipped' updates of the run, and those skipped
            'in_a_row'.
    """

    def __init__(self, signals: Signals, bad: BadImages, *, max_nonfinite: int = 10, distributed: bool = False) -> None:
        self.signals = signals
        self.bad = bad
        self.max_nonfinite = max_nonfinite
        self.signal = 0
        self.state: dict[str, Any] = {'bad_images': bad.found, 'skipped': 0, 'in_a_row': 0}
        self._group: dist.ProcessGroup | None = dist.new_group(backend='gloo') if distributed else None  # type: ignore

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from the `state` of a checkpoint."""
        self.bad.found.update(state['bad_images'])
        self.state |= {'skipped': state['skipped'], 'in_a_row': state['in_a_row']}

    def agree(self, finite: bool = True) -> bool:
        """Tell the other processes whether this one's update is finite; return whether all are (a collective call)."""
        values = torch.tensor([self.signals.received, self.bad.news, not finite], dtype=torch.int64)
        if self._group is not None:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        self.signal, news, infinite = values.tolist()
        if news:
            self.bad.share(self._gather)
        return not infinite

    def count(self, update: int, finite: bool, find_teachers: Callable[[], Sequence[str]]) -> None:
        """Count update number `update` if it was skipped as not finite.

        Args:
            update: Its number.
            finite: Whether it was not skipped.
            find_teachers: Finds the teachers whose output is not finite, if any.

        Raises:
            UserError: If it is the last of too many in a row, on all processes.
        """
        if finite:
            self.state['in_a_row'] = 0
            return
        self.state['skipped'] += 1
        self.state['in_a_row'] += 1
        teachers = sorted({name for names in self._gather(find_teachers()) for name in names})
        text = f'the loss or its gradient is not finite{_because_of(teachers)}'
        row, skipped = self.state['in_a_row'], self.state['skipped']
        if self.signals.log:
            _logger.warning(f'Update {update} is skipped: {text} ({row} in a row, {skipped} in all).')
        if row >= self.max_nonfinite:
            raise TooManyNonFiniteError(f'{row} updates in a row were skipped (--max-nonfinite), {text}.')

    def until_stopped(self, loader: Iterable[tuple[Tensor, Tensor]]) -> '_UntilStopped':
        """The batches of an evaluation, which is given up on all processes when a signal comes to one."""
        return _UntilStopped(self, loader)

    def wait(self) -> None:
        """Wait for the other processes: torchrun ends all as soon as one is gone."""
        if self._group is not None:
            dist.barrier(group=self._group)

    def _gather(self, value: Any) -> list[Any]:
        """What all processes give, in the order of their ranks (a collective call)."""
        if self._group is None:
            return [value]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered


class TooManyNonFiniteError(UserError):
    """Too many updates in a row were skipped."""


def _because_of(teachers: Sequence[str]) -> str:
    if not teachers:
        return ''
    verb = 'gives' if len(teachers) == 1 else 'give'
    return f', and so is what {" and ".join(teachers)} {verb}'


class _UntilStopped:
    def __init__(self, watch: Watch, loader: Any) -> None:
        self.watch = watch
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            if self.watch.signals.received:
                break
            yield batch
        # Once a pass on every process, however many batches it had.
        self.watch.agree()
        if self.watch.signal:
            raise EvaluationStoppedError
