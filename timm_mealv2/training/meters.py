"""Figures of an epoch: means of the scalars, the gradient norm, the learning rate, and where the time goes."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from timm_mealv2.figures import PERCENT
from timm_mealv2.runs import TIMES


class Clock:
    """Seconds of the phases of each batch; together they are all of the time.

    'data' is the wait for the batch, 'teachers' their prediction, 'student' the rest of the forward and the backward
    pass, 'update' the optimizer and what else is done before the next batch is asked for (log, recovery checkpoint).
    Only the teachers of MEAL V2 are told apart from the student.

    On a GPU these are the times between events in its queue, so that the wait for data is the time in which it has
    nothing to do. Nobody waits for an event but who asks for the times.

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


class Meters:
    """Means of a task's scalars over the images of an epoch, and of the gradient norm over its updates.

    Updates that are not finite count in neither. The scalars stay on the device until they are asked for.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums = torch.zeros(0)  # of the values times images
        self.images = self.updates = 0
        self.norms = 0.0

    def update(self, batches: Sequence[tuple[dict[str, Tensor], int]], norm: float) -> None:
        """Add the batches of an update (scalars and number of images of each) and its gradient norm."""
        if not math.isfinite(norm):
            return
        self.norms += norm
        self.updates += 1
        for scalars, images in batches:
            values = torch.stack([value.float() for value in scalars.values()])
            if not self.names:
                self.names, self.sums = list(scalars), torch.zeros_like(values)
            self.sums.add_(values, alpha=images)
            self.images += images

    def means(self, distributed: bool = False) -> dict[str, float]:
        """Return the means, shares in percent, over all processes if `distributed` (a collective call)."""
        if not self.names:
            return {}
        sums = torch.cat([self.sums, self.sums.new_tensor([self.images])])
        if distributed:
            dist.all_reduce(sums)
        *totals, images = sums.tolist()
        # The task's shares, 0..1, are shown and written in percent.
        scales = [100 / images if name in PERCENT else 1 / images for name in self.names]
        means = {name: total * scale for name, total, scale in zip(self.names, totals, scales, strict=True)}
        return {**means, 'grad_norm': self.norms / self.updates}

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts, for a checkpoint in the middle of an epoch."""
        counted = {'images': self.images, 'norms': self.norms, 'updates': self.updates}
        return {'names': self.names, 'sums': self.sums.cpu().clone(), **counted}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` returned."""
        self.names, self.sums = state['names'], state['sums'].to(device)
        self.images, self.norms, self.updates = state['images'], state['norms'], state['updates']


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Mean learning rate of the parameter groups, as timm reports it."""
    rates = [group['lr'] for group in optimizer.param_groups]
    return sum(rates) / len(rates)
