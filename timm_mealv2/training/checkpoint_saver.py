"""Checkpoints of a run: timm's, with the position in the run beside them, and always whole."""

import argparse
import errno
import logging
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import CheckpointSaver
from timm.utils.model import unwrap_model

from timm_mealv2.errors import UserError, blamed_on
from timm_mealv2.models.checkpoint import TrainingCheckpoint, damage

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
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

    A checkpoint has, beside timm's entries, 'progress' (see `Position`), 'data_config' (what the pixels were),
    'class_names', 'batches' (of an epoch), 'processes' (see `process_states`) and 'scheduler' (where it follows a
    metric).

    Args:
        folder: Where the files go.
        task: The task to save.
        optimizer: Its optimizer.
        args: The settings of the run.
        constant: Entries of every file: 'data_config' (the student's, resolved), 'class_names' (or None), 'batches'.
        scaler: The loss scaler, if there is one.
        decreasing: A lower metric is better.
        history: Checkpoints of epochs to keep.
    """

    def __init__(
        self,
        folder: Path,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        *,
        args: dict[str, Any],
        constant: dict[str, Any],
        scaler: Any = None,
        decreasing: bool = False,
        history: int = 10,
    ) -> None:
        self._state = _CheckpointState(task)
        self._constant = constant
        self._written: Path | None = None
        super().__init__(
            model=unwrap_model(task.get_eval_model()),
            task=self._state,
            optimizer=optimizer,
            args=argparse.Namespace(**args),
            amp_scaler=scaler,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            decreasing=decreasing,
            max_history=history,
        )
        # What a process that was killed was writing.
        for pattern in (f'*tmp{self.extension}', f'*{self.extension}.tmp', '.summary-*', '.args-*'):
            for path in folder.glob(pattern):
                path.unlink()

    def keep(
        self, progress: Position, processes: list[dict[str, Any]], scheduler: dict[str, Any] | None = None
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
        checkpoint = read_checkpoint(path, verify=False)
        here = rank_of(checkpoint)
        for other in sorted(folder.glob(f'*{self.extension}')):
            try:
                later = rank_of(read_checkpoint(other, verify=False)) > here
            except UserError:  # corrupt: it will be replaced
                continue
            if later and damage(other) is None:
                os.replace(other, f'{other}.old')
                _logger.info(f'{other} is of a later position than {path}: renamed to {other.name}.old.')
        with blamed_on(path):
            history = checkpoint.get('saver', {})
            # timm removes the files that a checkpoint names: those of epochs in this folder, and no others.
            there = {file.name for file in folder.glob(f'{self.save_prefix}-*{self.extension}')}
            files = [(name, rank) for name, rank in history.get('checkpoint_files', []) if name in there]
            epoch, metric = history.get('pending', (None, None))
            metrics = [rank for _, rank in files] + [history.get('best_metric'), metric]
            if not all(isinstance(rank, int | float | None) for rank in metrics) or not isinstance(epoch, int | None):
                raise TypeError('its history has metrics or an epoch that are no numbers')
            self.load_state_dict({**history, 'checkpoint_files': files, 'pending': (None, None)})
        if path.name.startswith(self.recovery_prefix):
            self.curr_recovery_file = str(path)
            return
        if epoch is not None:
            self._written = path
            self.save_checkpoint(epoch, metric)
            self._written = None
            self.remove_recovery()

    def save_checkpoint(self, epoch: int, metric: float | None = None) -> tuple[float | None, int | None]:
        """Save the state after an epoch; a metric that is NaN counts as none: it ranks last and is never the best."""
        result: tuple[float | None, int | None] = super().save_checkpoint(
            epoch, None if metric is None or math.isnan(metric) else metric
        )
        return result

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        if self._written is not None:
            self._duplicate(str(self._written), save_path)
            return
        try:
            super()._save(save_path, epoch, metric)
        except (OSError, RuntimeError) as error:
            Path(save_path).unlink(missing_ok=True)
            # torch's writer reports a file that cannot grow as a failed check of its own: enforce fail.
            full = isinstance(error, RuntimeError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise UserError(
                f'cannot write a checkpoint to {self.checkpoint_dir}: {"no space is left" if full else error}; the '
                'former one is as it was, free some space and continue with --resume auto.'
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
        for path in Path(self.recovery_dir).glob(f'{self.recovery_prefix}-*{self.extension}'):
            path.unlink()
        self.curr_recovery_file = self.prev_recovery_file = ''


def _rename(src: str, dst: str) -> None:
    os.replace(src, dst)
    Path(src).unlink(missing_ok=True)  # renaming one of two links to a file to the other leaves both


def read_checkpoint(path: str | os.PathLike[str], *, verify: bool = True) -> dict[str, Any]:
    """Read a training checkpoint, tensors memory-mapped on the CPU; `verify` compares it with its checksums.

    Raises:
        UserError: If it is not there, damaged, no training checkpoint, or holds anything but tensors and plain values.
    """
    if not Path(path).is_file():
        raise UserError(f'no checkpoint at {os.fspath(path)!r}.')
    contents = TrainingCheckpoint.read(path, verify=verify).contents
    if 'state_dict' not in contents:
        raise UserError(f'{os.fspath(path)} is no training checkpoint: it has no state_dict.')
    with blamed_on(path):
        rank_of(contents)
    return contents


def position(checkpoint: dict[str, Any], updates_per_epoch: int) -> Position:
    """Where the run of a checkpoint is to be continued; one of timm's own continues with the next epoch."""
    if 'progress' in checkpoint:
        progress = Position(**checkpoint['progress'])
    else:
        epoch = checkpoint.get('epoch', -1) + 1
        progress = Position(epoch=epoch, update=epoch * updates_per_epoch)
    if not all(isinstance(number, int) and number >= 0 for number in asdict(progress).values()):
        raise ValueError(f'{progress} is no position in a run')
    return progress


def rank_of(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """How far in the run a checkpoint is."""
    progress = position(checkpoint, updates_per_epoch=0)
    return progress.epoch, progress.update
