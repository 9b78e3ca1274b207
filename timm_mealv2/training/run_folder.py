"""The folder of a run: its files, timm's checkpoints with the position in the run, and which of them is the newest."""

import argparse
import errno
import json
import logging
import math
import os
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from timm.models import safe_model_name
from timm.task import TrainingTask
from timm.utils import CheckpointSaver
from timm.utils.model import unwrap_model

from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing
from timm_mealv2.models.checkpoint import TrainingCheckpoint

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


def position(contents: dict[str, Any], updates_per_epoch: int) -> Position:
    """Return where the run of a checkpoint goes on; one of timm's own goes on with the next epoch.

    At an epoch's start the updates are counted as they are made now.
    """
    stored = Position(**contents.get('progress', {'epoch': contents.get('epoch', -1) + 1}))
    return stored if stored.batch else Position(stored.epoch, update=stored.epoch * updates_per_epoch)


def written_order(contents: dict[str, Any]) -> tuple[int, int, int]:
    """Sort key of a run's checkpoints: the counter of its writes; of older files, which have none, (epoch, update)."""
    stored = position(contents, updates_per_epoch=0)
    return contents.get('written', 0), stored.epoch, stored.update


def read_checkpoint(path: Path, *, verify: bool = True) -> TrainingCheckpoint:
    """Read a training checkpoint; `verify` compares it with its checksums.

    Raises:
        UserError: If it is not there, damaged, or no training checkpoint.
    """
    checkpoint = TrainingCheckpoint.read(path, verify=verify)
    if 'state_dict' not in checkpoint.contents:
        raise UserError(f'{path} is no training checkpoint: it has no state_dict.')
    return checkpoint


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run; `path` is where it is, or will be."""

    path: Path

    @classmethod
    def choose(cls, output: str, experiment: str, model: str) -> 'RunFolder':
        """Return the folder `experiment` in `output`, named by date and model where there is no name.

        Raises:
            UserError: If nothing can be written there.
        """
        name = experiment or f'{datetime.now().strftime("%Y%m%d-%H%M%S")}-{safe_model_name(model)}'
        path = Path(output or './output/train') / name
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise UserError(f'--output, --experiment: {path} cannot be the run folder: {there} takes no files.')
        return cls(path)

    @property
    def summary(self) -> Path:
        """The figures of each epoch."""
        return self.path / 'summary.csv'

    @property
    def wandb_id(self) -> Path:
        """Keeps the id of the run at Weights & Biases."""
        return self.path / 'wandb_id.txt'

    @property
    def pointer(self) -> Path:
        """Names the checkpoint that was written last, and the counter that it carries."""
        return self.path / 'last_written.json'

    def holds(self, checkpoint: Path) -> bool:
        """Whether a file lies in this folder."""
        return checkpoint.absolute().parent == self.path.absolute()

    def checkpoint_to_resume(self, resume: str, restarted: bool, dry_run: bool = False) -> TrainingCheckpoint | None:
        """Return the checkpoint that a run goes on from, whose checksums are right; None to begin.

        Args:
            resume: A file, 'auto' for the newest in the folder, '' for none.
            restarted: Whether torchrun has restarted the run: the newest goes before what was asked for.
            dry_run: Nothing will be written.

        Raises:
            UserError: If the folder holds another run or later checkpoints, or the file is damaged or no checkpoint.
        """
        given = Path(resume) if resume not in ('', 'auto') else None
        if restarted or resume == 'auto':
            if (newest := self.newest()) is not None:
                return newest
            if given is None:
                _logger.info(f'No checkpoint in {self.path}: starting fresh.')
                return None
        here = given is not None and self.holds(given)
        if not restarted and resume != 'auto' and not here and not dry_run and any(self.path.glob('*.pth.tar')):
            raise UserError(
                f'{self.path} already holds a run: continue it with --resume auto, or choose another --experiment.'
            )
        if given is None:
            return None
        checkpoint = read_checkpoint(given)
        if here and not dry_run and self._order_of_newest() > written_order(checkpoint.contents):
            raise UserError(
                f'{self.path} holds checkpoints that are later than {given.name}: --resume auto continues them, '
                f'--resume {given} --experiment NEW continues from {given.name} in a folder of its own.'
            )
        return checkpoint

    def newest(self) -> TrainingCheckpoint | None:
        """Return the checkpoint that was written last and is whole, None if there is none.

        `last_written.json` names it. Only where that is missing or damaged, or names no whole file, all are opened.
        """
        name, _ = self.last_written()
        if name:
            try:
                return read_checkpoint(self.path / name)
            except UserError as error:
                _logger.warning(f'Passed over: {error}')
        found = []
        for path in self.path.glob('*.pth.tar'):
            if path.name not in (name, 'tmp.pth.tar', 'recovery_tmp.pth.tar'):
                try:
                    found.append(read_checkpoint(path))
                except UserError as error:
                    _logger.warning(f'Passed over: {error}')
        # `last` before its hard links: the other names may be cleaned away.
        return max(found, key=lambda c: (written_order(c.contents), c.path.name.startswith('last')), default=None)

    def last_written(self) -> tuple[str, int]:
        """Return name and counter of the checkpoint that was written last; ('', 0) if that is not known."""
        try:
            last = json.loads(self.pointer.read_text())
            name, count = last['file'], last['count']
        except (OSError, ValueError, TypeError, KeyError):
            return '', 0
        plain = isinstance(name, str) and name == Path(name).name and isinstance(count, int)
        return (name, count) if plain else ('', 0)

    def _order_of_newest(self) -> tuple[int, ...]:
        name, count = self.last_written()
        if name:
            return (count,)
        newest = self.newest()
        return () if newest is None else written_order(newest.contents)

    def push(self, repository: str) -> None:
        """Export the best checkpoint and push it; whatever the Hub says, the training is complete."""
        best = self.path / 'model_best.pth.tar'
        checkpoint = best if best.exists() else self.path / 'last.pth.tar'
        folder = self.path / 'hub'
        try:
            # Here, as nobody else needs the card's packages.
            from timm_mealv2.hub.card import CardOptions
            from timm_mealv2.hub.export import export_model
            from timm_mealv2.hub.hub_api import push_model

            export_model(checkpoint, folder, card=CardOptions(repo_id=repository))
            _logger.info(f'Pushed: {push_model(folder, repository)}')
        except (ImportError, OSError, UserError) as error:
            text = f'{" ".join(str(error).split())} Push later: mealv2-hub push {checkpoint} {repository}'
            _logger.warning(f'The training is complete ({self.path}), but {text}')


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

    A checkpoint has, beside timm's entries, 'progress' (see `Position`), 'written' (the counter of the run's writes),
    'data_config' (what the pixels were), 'class_names', 'batches' (of an epoch), 'processes' (see `process_states`)
    and 'scheduler' (where it follows a metric). Its 'args' are a plain dict.

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
        folder: RunFolder,
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
        self._constant = {**constant, 'args': args}
        self._folder = folder
        self._written: Path | None = None  # where the state to be saved is already
        self._count = 0  # of the run's writes
        super().__init__(
            model=unwrap_model(task.get_eval_model()),
            task=self._state,
            optimizer=optimizer,
            args=argparse.Namespace(**args),  # the saver reads the model's name from args
            amp_scaler=scaler,
            checkpoint_dir=str(folder.path),
            recovery_dir=str(folder.path),
            decreasing=decreasing,
            max_history=history,
        )
        # What a process that was killed was writing.
        temporary = ('.summary-*', '.args-*', '.preflight-*', '.last_written-*')
        for pattern in (f'*tmp{self.extension}', f'*{self.extension}.tmp', *temporary):
            for path in folder.path.glob(pattern):
                path.unlink()

    def keep(
        self, progress: Position, processes: list[dict[str, Any]], scheduler: dict[str, Any] | None = None
    ) -> None:
        """Set what the next file will hold about the position in the run."""
        self._state.extra = {'progress': asdict(progress), 'processes': processes, **self._constant}
        if scheduler:
            self._state.extra['scheduler'] = scheduler

    def restore(self, checkpoint: TrainingCheckpoint) -> None:
        """Go on with the history of a checkpoint of this folder, and finish what its process could not.

        A process that was killed may have written `last` and not yet linked it as the epoch's or as the best, or not
        yet removed what these replace. All of that is a function of the history in the file: it is done once more.
        """
        self._count = checkpoint.contents.get('written', 0)
        history = checkpoint.contents.get('saver', {})
        # timm removes the files that a checkpoint names: those of epochs in this folder, and no others.
        there = {file.name for file in self._folder.path.glob(f'{self.save_prefix}-*{self.extension}')}
        files = [(name, metric) for name, metric in history.get('checkpoint_files', []) if name in there]
        epoch, metric = history.get('pending', (None, None))
        self.load_state_dict({**history, 'checkpoint_files': files, 'pending': (None, None)})
        if checkpoint.path.name.startswith(self.recovery_prefix):
            self.curr_recovery_file = str(checkpoint.path)
        elif epoch is not None:
            self._written = checkpoint.path
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
        self._count += 1
        self._state.extra['written'] = self._count
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
        with replacing(self._folder.pointer) as path:
            path.write_text(json.dumps({'file': Path(dst).name, 'count': self._count}))

    def _duplicate(self, src: str, dst: str) -> None:
        super()._duplicate(src, f'{dst}.tmp')
        _rename(f'{dst}.tmp', dst)

    def remove_recovery(self) -> None:
        """Remove the recovery files: an epoch's checkpoint is newer."""
        for path in Path(self.recovery_dir).glob(f'{self.recovery_prefix}-*{self.extension}'):
            path.unlink()
        self.curr_recovery_file = self.prev_recovery_file = ''


def _rename(src: str, dst: str) -> None:
    os.replace(src, dst)
    Path(src).unlink(missing_ok=True)  # renaming one of two links to a file to the other leaves both
