"""`--dry-run`: how long a training will take, measured with its own loader, task and evaluation."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from timm_mealv2.data.loader import StreamLoader, TrainLoader
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.training.distributed import Processes
from timm_mealv2.training.loop import Stepper


@dataclass
class TimedStepper(Stepper):
    """A stepper that measures its phases.

    Attributes:
        seconds: Time of each phase so far.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @classmethod
    def of(cls, stepper: Stepper) -> 'TimedStepper':
        """Return a stepper that does the same."""
        return cls(**{entry.name: getattr(stepper, entry.name) for entry in fields(Stepper)})

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        """Add the time of a block to a phase."""
        began = _now()
        yield
        self.seconds[phase] += _now() - began

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Run the task on a batch."""
        with self.timing('student'):
            return super().forward(images, target)

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient to that of the update."""
        with self.timing('student'):
            super().backward(loss)

    def update(self, update: int) -> Tensor:
        """Make an update."""
        with self.timing('update'):
            return super().update(update)

    def time_teachers(self, teachers: EnsembleTeacher) -> None:
        """Measure the teachers by themselves, apart from the student."""
        began = 0.0

        def before(*_: Any) -> None:
            nonlocal began
            began = _now()

        def after(*_: Any) -> None:
            self.seconds['teachers'] += _now() - began

        for teacher in teachers.teachers:
            teacher.register_forward_pre_hook(before)
            teacher.register_forward_hook(after)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Timing:
    """What was measured.

    Attributes:
        batches: How many.
        images: How many, in one process.
        total: Seconds for all of them.
        phases: Seconds of each part of them.
    """

    batches: int
    images: int
    total: float
    phases: dict[str, float]


def measure_training(
    stepper: Stepper,
    loader: TrainLoader | StreamLoader,
    teachers: EnsembleTeacher | None,
    seconds: float,
    processes: Processes,
) -> Timing:
    """Train for `seconds` after the first update, which also allocates memory and chooses kernels.

    The training goes through epoch after epoch, if need be, and trains the task.
    """
    timed = TimedStepper.of(stepper)
    if teachers is not None:
        timed.time_teachers(teachers)
    timed.train()
    epoch = batches = images_seen = updates = 0
    began = waited = 0.0
    while True:
        fetching = time.perf_counter()
        for number, (images, target) in enumerate(loader.batches(epoch)):
            waited += time.perf_counter() - fetching
            part = number % timed.accumulate
            parts = min(timed.accumulate, len(loader) - number + part)
            timed.step(images, target, update=updates, part=part, parts=parts)
            batches, images_seen = batches + 1, images_seen + len(images)
            if part == parts - 1:
                updates += 1
                if updates == 1:
                    timed.seconds.clear()
                    began, waited, batches, images_seen = _now(), 0.0, 0, 0
                elif not any(processes.maxima([_now() - began < seconds])()):
                    total = _now() - began
                    phases = dict(timed.seconds)
                    phases['student'] -= phases.get('teachers', 0.0)
                    return Timing(batches, images_seen, total, {'data wait': waited, **phases})
            fetching = time.perf_counter()
        epoch += 1


class TimedBatches:
    """The batches of an evaluation for a number of seconds, at least one.

    Attributes:
        share: Share of the batches that have been given.
        seconds: Time they took.
    """

    def __init__(self, loader: Any, limit: float) -> None:
        self.loader, self.limit = loader, limit
        self.share, self.seconds = 0.0, 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        began = _now()
        for number, batch in enumerate(self.loader, 1):
            yield batch
            self.share, self.seconds = number / max(len(self.loader), 1), _now() - began
            if self.seconds >= self.limit:
                return


def peak_memory(device: torch.device) -> float | None:
    """The largest memory of this process so far in GiB: the GPU's, or the machine's; None where that is not known."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == 'darwin' else 2**20)  # macOS counts bytes, Linux KiB


def report(timing: Timing, *, processes: Processes, batches: int, evaluation: float, evaluations: int) -> str:
    """Say in a few lines what a run will take.

    Args:
        timing: What was measured.
        processes: The processes of the run.
        batches: Batches of the whole run, in each process.
        evaluation: Seconds of one evaluation.
        evaluations: How many the run makes.
    """
    rate = timing.images * processes.world_size / timing.total
    batch = timing.total / timing.batches
    training = batch * batches / 3600
    parts = {
        name: timing.phases.get(name, 0.0) / timing.batches for name in ('data wait', 'teachers', 'student', 'update')
    }
    parts['other'] = batch - sum(parts.values())
    memory = peak_memory(processes.device)
    lines = [
        f'dry run: {batch:.3f} s a batch, {rate:.0f} images/s over {timing.total:.0f} s ({timing.batches} batches)',
        '  of a batch: ' + ', '.join(f'{name} {value:.3f} s' for name, value in parts.items()),
        f'  peak memory: {f"{memory:.2f} GiB" if memory is not None else "not known on this system"}',
        f'  the whole run: {training:.2f} hours without evaluation, '
        f'{training + evaluation * evaluations / 3600:.2f} hours with {evaluations} evaluations; nothing was written',
    ]
    return '\n'.join(lines)
