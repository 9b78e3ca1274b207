"""The processes of a run: how they meet, what they tell each other, and what each has of its own."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm.task import TrainingTask
from timm.utils import distribute_bn, unwrap_model
from timm.utils.distributed import init_distributed_device_so, is_distributed_env
from torch import Tensor
from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from timm_mealv2.arguments import choose_device

_logger = logging.getLogger(__name__)

ATTEMPT = 'mealv2-attempt'
"""Scheme of the rendezvous."""


def _rendezvous_of_attempt(url: str, **kwargs: Any) -> Iterator[tuple[Store, int, int]]:
    """Give torch's rendezvous by the environment, with keys of this attempt's own.

    torchrun's store outlives the processes. With torch's own keys (2.14) a restarted one may read the address of the
    process that died, and both then wait for a connection until they time out.
    """
    for store, rank, world_size in rendezvous(url.replace(ATTEMPT, 'env', 1), **kwargs):
        yield PrefixStore(f'attempt-{os.environ["TORCHELASTIC_RESTART_COUNT"]}', store), rank, world_size


register_rendezvous_handler(ATTEMPT, _rendezvous_of_attempt)


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        device: Where this one trains.
        rank: Its number.
        world_size: How many there are.
        group: Connects them on the CPU, whatever the device; None if there is only one.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def distributed(self) -> bool:
        """Whether there are several."""
        return self.group is not None

    @property
    def primary(self) -> bool:
        """Whether this is the one that writes files and the log."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return what all processes give, in the order of their ranks (a collective call)."""
        if self.group is None:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def maxima(self, values: Sequence[int]) -> list[int]:
        """Return the largest of each of some numbers over the processes (a collective call)."""
        return [max(of_all) for of_all in zip(*self.gather(values), strict=True)]


def join_processes(device: str | None, minutes: float = 30) -> Processes:
    """Choose the device, and join the process group under torchrun or SLURM.

    Args:
        device: The device that was asked for; None takes CUDA where there is some.
        minutes: torch's timeout: how long a process waits for the others' part in a collective call.

    Raises:
        UserError: If there is no such device.
    """
    available = torch.cuda.is_available()
    if device is None and not available:
        _logger.info('No CUDA device: training on the CPU (--device chooses).')
    device = device or ('cuda' if available else 'cpu')
    if not (available and device.startswith('cuda') and is_distributed_env()):  # all would get a context on one GPU
        choose_device(device)
    url = f'{ATTEMPT}://' if 'TORCHELASTIC_RESTART_COUNT' in os.environ else None
    joined = init_distributed_device_so(device, dist_url=url)
    place = torch.device(joined['device']), joined['global_rank'], joined['world_size']
    if not joined['distributed']:
        return Processes(*place)
    timeout = timedelta(minutes=minutes)
    if hasattr(dist, 'set_timeout'):  # of torch 2.14
        dist.set_timeout(timeout)
    group: Any = dist.new_group(backend='gloo', timeout=timeout)
    return Processes(*place, group)


def process_states(task: TrainingTask, meters: dict[str, Any], processes: Processes) -> list[dict[str, Any]]:
    """Return what each process has of its own, in the order of their ranks (a collective call).

    That is its 'meters' (the sums of an unfinished epoch) and, where there are several processes, 'statistics' of its
    student and its average (EMA): batch norm sees other images in each of them.
    """
    state: dict[str, Any] = {'meters': meters}
    if processes.distributed:
        state['statistics'] = {name: buffer.detach().cpu() for name, buffer in _buffers(task).items()}
    return processes.gather(state)


def load_buffers(task: TrainingTask, saved: dict[str, Tensor]) -> None:
    """Put back the 'statistics' of `process_states`, once DDP has given all processes those of the first."""
    buffers = _buffers(task)
    for name, value in saved.items():
        buffers[name].copy_(value)


def _buffers(task: TrainingTask) -> dict[str, Tensor]:
    """The buffers of the student and of its average."""
    modules = [unwrap_model(task.get_trainable_module(ema=ema)) for ema in _averages(task)]
    return {f'{number}.{name}': b for number, module in enumerate(modules) for name, b in module.named_buffers()}


def _averages(task: TrainingTask) -> tuple[bool, ...]:
    return (False, True) if task.has_ema() else (False,)


def share_batch_norm(task: TrainingTask, how: str, processes: Processes) -> None:
    """Give all processes the same statistics of batch norm, of student and average.

    Args:
        task: The task.
        how: 'reduce' takes the mean over the processes, 'broadcast' those of the first, '' leaves them.
        processes: The processes.
    """
    if processes.distributed and how:
        for ema in _averages(task):
            distribute_bn(task.get_trainable_module(ema=ema), processes.world_size, how == 'reduce')
