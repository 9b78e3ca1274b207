"""`--dry-run`: how long a training will take, measured with its own loader, task and evaluation."""

import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_mealv2.data.loader import TrainLoader
from timm_mealv2.data.stream import StreamLoader
from timm_mealv2.figures import duration, figure
from timm_mealv2.runs import TIMES
from timm_mealv2.training.distributed import Processes
from timm_mealv2.training.loop import Stepper, batches_with_parts

SECONDS = 20.0
"""How long training is measured."""


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Timing(NamedTuple):
    """What was measured: batches and images of one process, and seconds a batch of each of `TIMES`."""

    batches: int
    images: int
    phases: dict[str, float]


def measure_training(stepper: Stepper, loader: TrainLoader | StreamLoader, processes: Processes) -> Timing:
    """Train for `SECONDS` after the first update, which also allocates memory and chooses kernels.

    The training goes through epoch after epoch, if need be, and trains the task.
    """
    clock = stepper.clock
    stepper.train()
    epoch = images_seen = updates = 0
    began = 0.0
    while True:
        for _, images, target, place in batches_with_parts(loader, epoch, 0, stepper.accumulate):
            clock.mark('data')
            _, norm = stepper.step(images, target, update=updates, **place)
            clock.mark('update')
            images_seen += len(images)
            if norm is not None:
                updates += 1
                if updates == 1:
                    began, images_seen = _now(), 0
                    clock.restart()
                elif not any(processes.maxima([_now() - began < SECONDS])):
                    return Timing(clock.batches, images_seen, clock.means())
        epoch += 1


class TimedBatches:
    """The batches of an evaluation for a quarter of `SECONDS`, at least one.

    Attributes:
        share: Share of the batches that have been given.
        seconds: Time they took.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        began = _now()
        for number, batch in enumerate(self.loader, 1):
            yield batch
            self.share, self.seconds = number / len(self.loader), _now() - began
            if self.seconds >= SECONDS / 4:
                return


def peak_memory(device: torch.device) -> str:
    """The largest memory of this process so far: the GPU's, or the machine's."""
    if device.type == 'cuda':
        return f'{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB'
    if sys.platform == 'win32':
        return 'not known on this system'
    import resource  # of Unix

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f'{peak / (2**30 if sys.platform == "darwin" else 2**20):.2f} GiB'  # macOS counts bytes, Linux KiB


def report(timing: Timing, processes: Processes, *, batches: int, evaluation: float, evaluations: int) -> str:
    """Say in a few lines what a run will take.

    Args:
        timing: What was measured.
        processes: The processes of the run.
        batches: Batches of the whole run, in each process.
        evaluation: Seconds of one evaluation.
        evaluations: How many the run makes.
    """
    batch = sum(timing.phases.values())
    total = batch * timing.batches
    training = batch * batches
    rate = timing.images * processes.world_size / total
    phases = ', '.join(f'{name} {duration(timing.phases[key])}' for key, name in TIMES.items())
    return (
        f'dry run: {duration(batch)} a batch, {figure("images_per_second", rate)} images/s '
        f'over {total:.0f} s ({timing.batches} batches)\n'
        f'  of a batch: {phases}\n'
        f'  peak memory: {peak_memory(processes.device)}\n'
        f'  the whole run: {duration(training)} without evaluation, '
        f'{duration(training + evaluation * evaluations)} with {evaluations} evaluations; nothing was written'
    )
