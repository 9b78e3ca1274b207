"""The processes of a run: how they meet, what they tell each other, and what each has of its own."""

import importlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
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

from timm_mealv2.errors import UserError

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
        roll_call: Connects them for `silent` alone: a call that timed out has broken the other connections.
        names: What the log calls each of them, by rank.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None
    roll_call: dist.ProcessGroup | None = None
    names: Sequence[str] = ()

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

    def maxima(self, values: Sequence[int]) -> Callable[[], list[int]]:
        """Begin to find the largest of each of some numbers over the processes (a collective call).

        Returns:
            Gives them, once all processes have told theirs.
        """
        tensor = torch.tensor(values, dtype=torch.int64)
        work = None if self.group is None else dist.all_reduce(tensor, dist.ReduceOp.MAX, self.group, async_op=True)

        def result() -> list[int]:
            if work is not None:
                work.wait()
            largest: list[int] = tensor.tolist()
            return largest

        return result

    def from_first(self, value: Any) -> Any:
        """Return what the first process gives (a collective call)."""
        return self.gather(value if self.primary else None)[0]

    def silent(self, seconds: float) -> list[str]:
        """Return the names of the processes that do not call this too, though they are still connected.

        It is for the processes whose collective call has failed: who hangs does not get here.
        """
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        for rank in others:
            with suppress(RuntimeError):  # it has ended
                dist.isend(torch.zeros(1), rank, self.roll_call)
        silent = []
        for rank in others:
            try:
                answer: Any = dist.irecv(torch.zeros(1), rank, self.roll_call)
                answer.wait(timedelta(seconds=seconds))
            except RuntimeError as error:
                if is_timeout(error):
                    silent.append(self.names[rank])
        return silent


def is_timeout(error: RuntimeError) -> bool:
    """Whether a call to other processes has failed because one of them did not respond in time."""
    text = str(error).lower()
    return 'timed out' in text or 'timeout' in text


def join_processes(device: str | None, modules: Sequence[str] = (), minutes: float = 30) -> Processes:
    """Choose the device, and join the process group under torchrun or SLURM.

    Args:
        device: The device that was asked for; None takes CUDA where there is some.
        modules: Modules to import first, which may register a device or a compiler.
        minutes: How long a process waits for the others' part in a collective call.

    Raises:
        UserError: If there is no such device or module, or no group.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except (ImportError, TypeError, ValueError) as error:  # '' and '.x' are no names of modules
            raise UserError(f'--device-modules {name}: {error}') from error
    available = torch.cuda.is_available()
    if device is None and not available:
        _logger.info('No CUDA device: training on the CPU (--device chooses).')
    device = device or ('cuda' if available else 'cpu')
    if device.startswith('cuda') and not available:
        raise UserError(f'--device {device}: this torch sees no CUDA device; use --device cpu.')
    if not (device.startswith('cuda') and is_distributed_env()):  # all would get a context on the first GPU
        try:
            torch.empty(1, device=device)
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            raise UserError(f'--device {device}: {error}') from error
    url = f'{ATTEMPT}://' if 'TORCHELASTIC_RESTART_COUNT' in os.environ else None
    joined = init_distributed_device_so(device, dist_url=url)
    processes = Processes(torch.device(joined['device']), joined['global_rank'], joined['world_size'])
    if not joined['distributed']:
        return processes
    timeout = timedelta(minutes=minutes)
    if processes.device.type == 'cpu' and hasattr(dist, 'set_timeout'):  # of torch 2.14; NCCL ends a process in its way
        dist.set_timeout(timeout)
    groups: dict[str, Any] = {name: dist.new_group(backend='gloo', timeout=timeout) for name in ('group', 'roll_call')}
    processes = replace(processes, **groups)
    name = f'process {processes.rank} (pid {os.getpid()} on {socket.gethostname()})'
    return replace(processes, names=processes.gather(name))


def process_states(task: TrainingTask, meters: dict[str, Any], processes: Processes) -> list[dict[str, Any]]:
    """Return what each process has of its own, in the order of their ranks (a collective call).

    That is its 'meters' (the sums of an unfinished epoch) and, where there are several processes, the 'buffers' of its
    student and its average (EMA): batch norm sees other images in each of them.
    """
    state: dict[str, Any] = {'meters': meters}
    if processes.distributed:
        modules = _buffers(task)
        state['buffers'] = [{name: buffer.detach().cpu() for name, buffer in own.items()} for own in modules]
    return processes.gather(state)


def own_state(checkpoint: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """Return what `process_states` had of this process.

    With another number of processes than the checkpoint has, there are no buffers (all keep those of the first), and
    the first process gets the sums of all meters.
    """
    states = checkpoint.get('processes', [])
    if len(states) == world_size:
        return dict(states[rank])
    meters: dict[str, dict[str, Any]] = {}
    for state in states:
        for name, values in state['meters'].items():
            sums = meters.setdefault(name, {'sum': torch.zeros_like(values['sum']), 'count': 0})
            if rank == 0:
                sums['sum'] += values['sum']
                sums['count'] += values['count']
    return {'meters': meters}


def load_buffers(task: TrainingTask, buffers: Sequence[dict[str, Tensor]]) -> None:
    """Put back the buffers of `own_state`; after DDP is made, which gives all processes those of the first."""
    for own, saved in zip(_buffers(task), buffers, strict=False):
        for name, buffer in own.items():
            buffer.copy_(saved[name])


def _buffers(task: TrainingTask) -> list[dict[str, Tensor]]:
    """The buffers that checkpoints hold, of the student and of its average."""
    modules = [unwrap_model(task.get_trainable_module(ema=ema)) for ema in (False, *([True] if task.has_ema() else []))]
    saved = [module.state_dict().keys() for module in modules]
    return [
        {name: buffer for name, buffer in module.named_buffers() if name in keys}
        for module, keys in zip(modules, saved, strict=True)
    ]


def share_batch_norm(task: TrainingTask, how: str, processes: Processes) -> None:
    """Give all processes the same statistics of batch norm, of student and average.

    Args:
        task: The task.
        how: 'reduce' takes the mean over the processes, 'broadcast' those of the first, '' leaves them.
        processes: The processes.
    """
    if processes.distributed and how:
        for ema in (False, True) if task.has_ema() else (False,):
            distribute_bn(task.get_trainable_module(ema=ema), processes.world_size, how == 'reduce')
