"""Going on from a checkpoint: what is loaded, and which settings may differ from those of the run so far."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import PlateauLRScheduler
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from torch import Tensor

from timm_mealv2.data.loader import StreamLoader, TrainLoader
from timm_mealv2.errors import UserError, blamed_on, one_line
from timm_mealv2.training.checkpoint_saver import Position, position, read_checkpoint
from timm_mealv2.training.distributed import Processes, own_state
from timm_mealv2.training.loop import Schedule, Stepper
from timm_mealv2.training.metric_logging import Meters

_logger = logging.getLogger(__name__)

# Other values of these make another training of what is called the same run.
_REFUSED = ('seed', 'teachers', 'dataset', 'data_dir', 'train_split')
# What does not change the training, or is of the single start.
_NOT_COMPARED = {
    *('resume', 'resume_changed', 'no_resume_opt', 'start_epoch', 'output', 'experiment', 'config', 'recipe', 'data'),
    *(
        'dry_run',
        'dry_run_seconds',
        'no_preflight',
        'log_interval',
        'workers',
        'pin_mem',
        'save_images',
        'list_recipes',
    ),
    *('wandb_resume_id', 'log_wandb', 'log_tensorboard', 'push_to_hub', 'local_rank', 'device', 'kd_model_name'),
    *('recovery_interval', 'checkpoint_hist', 'max_bad_images', 'max_nonfinite', 'use_multi_epochs_loader'),
    'process_timeout',
}
# Settings of the optimizer that are taken from the command line, not from the checkpoint.
_HYPERPARAMETERS = ('lr', 'initial_lr', 'lr_scale', 'weight_decay', 'momentum', 'betas', 'eps')


def changed_settings(checkpoint: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ from a checkpoint's, by name: its value and the present one."""
    args = checkpoint.get('args') or {}
    former, now = dict(args if isinstance(args, Mapping) else vars(args)), dict(settings)
    for values in (former, now):
        values['data_dir'] = values.get('data_dir') or values.get('data')
    if former.get('soft_labels') or now.get('soft_labels'):
        now.pop('teachers', None)  # those that recorded the labels need not be named

    def comparable(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return {
        name: (former[name], value)
        for name, value in now.items()
        if name in former and name not in _NOT_COMPARED and comparable(former[name]) != comparable(value)
    }


def check_changes(path: Path, settings: Mapping[str, Any], accepted: bool) -> None:
    """Name the settings that differ from those of a checkpoint, before anything is built.

    Args:
        path: The checkpoint, whose checksums were found right.
        settings: The present settings.
        accepted: Accept a change of the seed, the teachers or the data set.

    Raises:
        UserError: If one of these has changed and is not accepted, or the optimizer is another.
    """
    checkpoint = read_checkpoint(path, verify=False)
    with blamed_on(path):
        changes = changed_settings(checkpoint, settings)
    for name, (former, now) in changes.items():
        _logger.info(f'Changed since {path.name}: --{name.replace("_", "-")} was {former} and is {now}.')
    refused = [name for name in _REFUSED if name in changes]
    if refused and not accepted:
        name = refused[0]
        former, now = changes[name]
        raise UserError(
            f'--{name.replace("_", "-")} was {former} in {path} and is {now}: that is another training; '
            '--resume-changed continues with it all the same.'
        )
    if 'opt' in changes and not settings['no_resume_opt']:
        former, now = changes['opt']
        raise UserError(
            f'--opt {now}: {path} has the state of {former}; --no-resume-opt begins with a new one of {now}.'
        )


def load_checkpoint(path: Path, stepper: Stepper, schedule: Schedule, resume_optimizer: bool) -> dict[str, Any]:
    """Load a checkpoint into task, average, optimizer, loss scaler and schedule; return what it holds.

    The schedule, weight decay and other settings of the optimizer are those of the present command line.

    Raises:
        UserError: If it does not fit the model or the optimizer.
    """
    checkpoint = read_checkpoint(path, verify=False)
    optimizer = stepper.optimizer
    settings = [{name: group[name] for name in _HYPERPARAMETERS if name in group} for group in optimizer.param_groups]
    try:
        resume_task_checkpoint(
            stepper.task,
            path,
            optimizer=optimizer if resume_optimizer else None,
            loss_scaler=stepper.scaler if resume_optimizer else None,
            log_info=False,
        )
        if stepper.task.has_ema():
            load_task_ema_checkpoint(stepper.task, path)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f'{path} does not fit this model or optimizer: {one_line(error)}') from error
    follows_metric = isinstance(schedule.scheduler, PlateauLRScheduler) and resume_optimizer
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        if follows_metric and 'scheduler' in checkpoint:
            values.pop('lr')
        group.update(values)
    if 'scheduler' in checkpoint and resume_optimizer:
        schedule.load_state_dict(checkpoint['scheduler'])
    return checkpoint


def position_to_resume(
    checkpoint: Mapping[str, Any], loader: TrainLoader | StreamLoader, updates_per_epoch: int
) -> Position:
    """Where the run goes on: at the beginning of the epoch where that cannot be entered in the middle."""
    start = position(dict(checkpoint), updates_per_epoch)
    if start.batch and not (loader.resumable and checkpoint.get('batches') == len(loader)):
        _logger.info('The epoch cannot be entered where it was left (streaming, or batches of another size).')
        return Position(start.epoch, update=start.epoch * updates_per_epoch)
    return start


def load_process_state(checkpoint: dict[str, Any], processes: Processes, meters: Meters) -> list[dict[str, Tensor]]:
    """Load the sums of the unfinished epoch into `meters`; return this process's buffers, to be loaded after DDP."""
    own = own_state(checkpoint, processes.rank, processes.world_size)
    meters.load_state_dict(own.get('meters', {}), processes.device)
    buffers: list[dict[str, torch.Tensor]] = own.get('buffers', [])
    return buffers
