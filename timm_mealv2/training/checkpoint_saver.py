"""Checkpoints of a run: timm's, with the position in the run beside them, and always whole."""

import argparse
import logging
import os
import shutil
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.scheduler import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import CheckpointSaver
from timm.utils.model import unwrap_model
from torch import Tensor

from timm_mealv2.errors import UserError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a run stands: what is to be done next.

    Attributes:
        epoch: Epoch of the next batch.
        batch: Number of the next batch in it.
        update: Optimizer updates done so far.
    """

    epoch: int = 0
    batch: int = 0
    update: int = 0


class _CheckpointState:
    """What timm's saver asks of a task, and what this run adds to it."""

    def __init__(self, task: TrainingTask) -> None:
        self.task = task
        self.extra: dict[str, Any] = {}

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Any = unwrap_model) -> dict[str, Any]:
        state = self.task.get_checkpoint_state(ema=ema, unwrap_fn=unwrap_fn)
        return state if ema else {**state, **self.extra}


class RunSaver(CheckpointSaver):
    """timm's checkpoint saver whose files also hold the position in the run, and are replaced in one step.

    A checkpoint has, beside timm's entries, 'progress' (see `Progress`), 'data_config' (what the pixels were),
    'class_names', 'batches' (of an epoch), 'processes' (see `process_states`) and 'scheduler' (where it follows a
    metric).

    Args:
        task: The task to save.
        constant: Entries of every file: 'data_config' (the student's, resolved), 'class_names' (or None), 'batches'.
        **kwargs: Further arguments of timm's `CheckpointSaver`.
    """

    def __init__(self, task: TrainingTask, *, constant: dict[str, Any], **kwargs: Any) -> None:
        self._state = _CheckpointState(task)
        self._constant = constant
        self._written: Path | None = None
        super().__init__(model=unwrap_model(task.get_eval_model()), task=self._state, **kwargs)
        # What a process that was killed was writing.
        for pattern in (f'*tmp{self.extension}', f'*{self.extension}.tmp', '.summary-*', '.args-*'):
            _remove(Path(self.checkpoint_dir).glob(pattern))

    def keep(
        self, progress: Progress, processes: list[dict[str, Any]], scheduler: dict[str, Any] | None = None
    ) -> None:
        """Set what the next file will hold about the position in the run."""
        self._state.extra = {'progress': asdict(progress), 'processes': processes, **self._constant}
        if scheduler:
            self._state.extra['scheduler'] = scheduler

    def restore(self, path: Path) -> None:
        """Go on with the history of a checkpoint of this folder, and finish what its process could not.

        A process that was killed may have written `last` and not yet linked it as the epoch's or as the best, or not
        yet removed what these replace. All of that is a function of the history in the file: it is done once more.
        Files of a position after that of `path` are of a continuation that is given up: they get the suffix `.old`.
        """
        folder = Path(self.checkpoint_dir)
        checkpoint = read_checkpoint(path)
        here = _rank(checkpoint)
        for other in sorted(folder.glob(f'*{self.extension}')):
            try:
                later = _rank(read_checkpoint(other)) > here
            except UserError:  # torn: it will be replaced
                continue
            if later and _damage(other) is None:
                os.replace(other, f'{other}.old')
                _logger.info(f'{other} is of a later position than {path}: renamed to {other.name}.old.')
        history = checkpoint.get('saver', {})
        self.load_state_dict({**history, 'pending': (None, None)})
        if path.name.startswith(self.recovery_prefix):
            self.curr_recovery_file = str(path)
            return
        epoch, metric = history.get('pending', (None, None))
        if epoch is not None:
            self._written = path
            self.save_checkpoint(epoch, metric)
            self._written = None
            self.remove_recovery()

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        if self._written is not None:
            self._duplicate(str(self._written), save_path)
            return
        try:
            super()._save(save_path, epoch, metric)
        except (OSError, RuntimeError) as error:  # torch's writer names a full disk with a RuntimeError
            Path(save_path).unlink(missing_ok=True)
            raise UserError(
                f'cannot write a checkpoint to {self.checkpoint_dir}: {error}; the former one is as it was, free some '
                'space and continue with --resume auto.'
            ) from error

    def _replace(self, src: str, dst: str) -> None:
        with open(src, 'rb') as file:
            os.fsync(file.fileno())
        _rename(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        temporary = f'{dst}.tmp'
        Path(temporary).unlink(missing_ok=True)
        try:
            os.link(src, temporary)
        except OSError:
            shutil.copy2(src, temporary)
        _rename(temporary, dst)

    def remove_recovery(self) -> None:
        """Remove the recovery files: an epoch's checkpoint is newer."""
        _remove(Path(self.recovery_dir).glob(f'{self.recovery_prefix}-*{self.extension}'))
        self.curr_recovery_file = self.prev_recovery_file = ''


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _rename(src: str, dst: str) -> None:
    os.replace(src, dst)
    Path(src).unlink(missing_ok=True)  # renaming one of two links to a file to the other leaves both


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a training checkpoint, tensors memory-mapped on the CPU.

    Raises:
        UserError: If it is not there, cut off, no training checkpoint, or holds anything but tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f'no checkpoint at {os.fspath(path)!r}.') from None
    except Exception as error:  # torch raises half a dozen kinds for a torn file
        raise UserError(f'{os.fspath(path)!r} is no whole training checkpoint: {str(error).splitlines()[0]}') from error
    if not isinstance(checkpoint, dict) or 'state_dict' not in checkpoint:
        raise UserError(f'{os.fspath(path)!r} is no training checkpoint: it has no state_dict.')
    return checkpoint


def position(checkpoint: dict[str, Any], updates_per_epoch: int) -> Progress:
    """Where the run of a checkpoint is to be continued; one of timm's own continues with the next epoch."""
    if 'progress' in checkpoint:
        return Progress(**checkpoint['progress'])
    epoch = checkpoint.get('epoch', -1) + 1
    return Progress(epoch=epoch, update=epoch * updates_per_epoch)


def _rank(checkpoint: dict[str, Any]) -> tuple[int, int]:
    progress = position(checkpoint, updates_per_epoch=0)
    return progress.epoch, progress.update


def find_newest(folder: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint in a run folder that is farthest in the run and whole, None if there is none.

    File names do not tell: the name order of timm's recovery files is that of text, and a file that was being written
    when its process died, or its machine, may be torn. Whole is a file whose checksums are right.
    """
    found: list[tuple[tuple[int, int], bool, Path]] = []
    for path in Path(folder).glob('*.pth.tar'):
        if path.name.startswith(('tmp', 'recovery_tmp')):
            continue
        try:
            # `last` before its hard links: the other names may be cleaned away.
            found.append((_rank(read_checkpoint(path)), path.name.startswith('last'), path))
        except UserError as error:
            _logger.warning(f'Passed over: {error}')
    for *_, path in sorted(found, reverse=True):
        if (damage := _damage(path)) is None:
            return path
        _logger.warning(f'Passed over: {os.fspath(path)!r} is damaged (checksum of {damage}).')
    return None


def _damage(path: Path) -> str | None:
    """The part of a readable checkpoint whose checksum is wrong, None if there is none."""
    with zipfile.ZipFile(path) as file:
        return file.testzip()


def process_states(task: TrainingTask, meters: dict[str, Any] | None, distributed: bool) -> list[dict[str, Any]]:
    """Return what each process has of its own, in the order of their ranks (a collective call if `distributed`).

    That are its 'meters' (the sums of a broken-off epoch) and, where there are several processes, the 'buffers' of its
    student and its average (EMA): batch norm sees other images in each of them.
    """
    state: dict[str, Any] = {'meters': meters or {}}
    if not distributed:
        return [state]
    state['buffers'] = [{name: buffer.detach().cpu() for name, buffer in module.items()} for module in _buffers(task)]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states


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


def load_buffers(task: TrainingTask, buffers: list[dict[str, Tensor]]) -> None:
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


_COUNTED = ('best', 'num_bad_epochs', 'cooldown_counter', 'last_epoch')


def scheduler_state(scheduler: Scheduler | None) -> dict[str, Any] | None:
    """What a scheduler that follows a metric has counted; None for all others, which are functions of the position.

    The state that timm's has leaves out how long it has been waiting.
    """
    if not isinstance(scheduler, PlateauLRScheduler):
        return None
    counted = {name: getattr(scheduler.lr_scheduler, name) for name in _COUNTED}
    return {'counted': counted, 'restore_lr': scheduler.restore_lr}


def load_scheduler_state(scheduler: Scheduler | None, state: dict[str, Any]) -> None:
    """Go on from what `scheduler_state` returned."""
    if isinstance(scheduler, PlateauLRScheduler):
        for name, value in state['counted'].items():
            setattr(scheduler.lr_scheduler, name, value)
        scheduler.restore_lr = state['restore_lr']
