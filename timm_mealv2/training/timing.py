"""Where the time of training goes."""

import time
from typing import Any

import torch

from timm_mealv2.runs import TIMES


class Clock:
    """Seconds of the phases of each batch; together they are all of the time.

    'data' is the wait for the batch, 'teachers' their prediction, 'student' the rest of the forward and the backward
    pass, 'update' the optimizer and what else is done before the next batch is asked for (log, recovery checkpoint).
    Only the teachers of MEAL V2 are told apart from the student.

    On a GPU these are the times between events in its queue, so that the wait for data is the time in which it has
    nothing to do. Nobody waits for an event but who asks for the times.

    Args:
        device: Where the training is done.

    Attributes:
        batches: How many there were.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == 'cuda'
        self.restart()

    def restart(self) -> None:
        """Forget all times; the first phase begins."""
        self.batches = 0
        self._seconds = dict.fromkeys(TIMES, 0.0)
        self._events: list[tuple[str, Any, Any]] = []
        self._last = self._now()

    def mark(self, phase: str) -> None:
        """Tell that a phase, all since the last mark, ends here."""
        now = self._now()
        if self._cuda:
            self._events.append((f'time_{phase}', self._last, now))
        else:
            self._seconds[f'time_{phase}'] += now - self._last
        self._last = now
        self.batches += phase == 'data'

    def means(self) -> dict[str, float]:
        """Return seconds a batch of each of `TIMES`."""
        if self._events:
            self._last.synchronize()
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        return {name: seconds / max(self.batches, 1) for name, seconds in self._seconds.items()}

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
