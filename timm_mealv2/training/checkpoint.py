"""Checkpoints of a run: timm's, with the position in the run beside them, and always whole."""

import argparse
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import CheckpointSaver
from timm.utils.model import unwrap_model

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
    'class_names', 'batches' (of an epoch), 'meters' (sums of a broken-off epoch) and 'scheduler' (where it follows a
    metric).

    Args:
        task: The task to save.
        constant: Entries of every file: 'data_config' (the student's, resolved), 'class_names' (or None), 'batches'.
        **kwargs: Further arguments of timm's `CheckpointSaver`.
    """

    def __init__(self, task: TrainingTask, *, constant: dict[str, Any], **kwargs: Any) -> None:
        self._state = _CheckpointState(task)
        self._constant = constant
        super().__init__(model=unwrap_model(task.get_eval_model()), task=self._state, **kwargs)

    def keep(
        self, progress: Progress, meters: dict[str, Any] | None = None, scheduler: dict[str, Any] | None = None
    ) -> None:
        """Set what the next file will hold about the position in the run."""
        self._state.extra = {'progress': asdict(progress), **self._constant}
        if meters:
            self._state.extra['meters'] = meters
        if scheduler:
            self._state.extra['scheduler'] = scheduler

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
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
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        temporary = f'{dst}.tmp'
        Path(temporary).unlink(missing_ok=True)
        try:
            os.link(src, temporary)
        except OSError:
            shutil.copy2(src, temporary)
        os.replace(temporary, dst)

    def remove_recovery(self) -> None:
        """Remove the recovery files: an epoch's checkpoint is newer."""
        for path in Path(self.recovery_dir).glob(f'{self.recovery_prefix}-*{self.extension}'):
            path.unlink(missing_ok=True)
        self.curr_recovery_file = self.prev_recovery_file = ''


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


def find_newest(folder: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint in a run folder that is farthest in the run and whole, None if there is none.

    File names do not tell: the name order of timm's recovery files is that of text, and a file that was being written
    when its process died may be torn.
    """
    found: list[tuple[int, int, int, Path]] = []
    for path in Path(folder).glob('*.pth.tar'):
        if path.name.startswith(('tmp', 'recovery_tmp')):
            continue
        try:
            progress = position(read_checkpoint(path), updates_per_epoch=0)
        except UserError as error:
            _logger.warning(f'Passed over: {error}')
            continue
        # `last` before its hard links: the other names may be cleaned away.
        found.append((progress.epoch, progress.update, int(path.name.startswith('last')), path))
    return max(found)[3] if found else None
