"""Going on from a checkpoint: what is loaded, and which settings may differ from those of the run so far."""

import copy
import logging
from collections.abc import Mapping
from typing import Any

from timm.models import clean_state_dict
from timm.scheduler import PlateauLRScheduler

from timm_mealv2.data.loader import TrainLoader
from timm_mealv2.data.stream import StreamLoader
from timm_mealv2.errors import UserError, one_line
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.training.distributed import Processes
from timm_mealv2.training.loop import Schedule, Stepper
from timm_mealv2.training.run_folder import Position, RunFolder, position, read_checkpoint

_logger = logging.getLogger(__name__)

# Other values of these make another training of what is called the same run.
_REFUSED = ('seed', 'teachers', 'dataset', 'data_dir', 'train_split', 'val_share')
# What does not change the training, or is of the single start.
_NOT_COMPARED = {
    *'resume resume_changed no_resume_opt start_epoch output experiment config recipe data'.split(),
    *'dry_run no_preflight log_interval workers pin_mem save_images list_recipes'.split(),
    *'wandb_resume_id log_wandb log_tensorboard push_to_hub local_rank device teacher_device kd_model_name'.split(),
    *'recovery_interval checkpoint_hist max_bad_images use_multi_epochs_loader process_timeout'.split(),
}
# Another value of these makes another update of the same number.
_OF_AN_UPDATE = (
    *'batch_size world_size grad_accum_steps samples_per_decode'.split(),
    *'mixup cutmix cutmix_minmax mixup_prob mixup_switch_prob mixup_mode mixup_off_epoch'.split(),
)
# Settings of the optimizer that are taken from the command line, not from the checkpoint.
_HYPERPARAMETERS = ('lr', 'initial_lr', 'lr_scale', 'weight_decay', 'momentum', 'betas', 'eps')


def find_checkpoint(
    folder: RunFolder, processes: Processes, resume: str, restarted: bool, dry_run: bool
) -> TrainingCheckpoint | None:
    """Return what `RunFolder.checkpoint_to_resume` finds, on all processes: each reads the file once.

    Raises:
        UserError: See there.
    """
    found = folder.checkpoint_to_resume(resume, restarted, dry_run) if processes.primary else None
    path = processes.gather(None if found is None else found.path)[0]
    return found if found is not None or path is None else read_checkpoint(path, verify=False)


def _comparable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def changed_settings(former: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ from a checkpoint's, by name: its value and the present one."""
    former, now = dict(former), dict(settings)
    for values in (former, now):
        values['data_dir'] = values.get('data_dir') or values.get('data')
    if former.get('soft_labels') or now.get('soft_labels'):
        now.pop('teachers', None)  # those that recorded the labels need not be named
    return {
        name: (former[name], value)
        for name, value in now.items()
        if name in former and name not in _NOT_COMPARED and _comparable(former[name]) != _comparable(value)
    }


def check_changes(checkpoint: TrainingCheckpoint, settings: Mapping[str, Any], accepted: bool) -> None:
    """Name the settings that differ from those of a checkpoint, before anything is built.

    Args:
        checkpoint: The checkpoint.
        settings: The present settings.
        accepted: Accept a change of the seed, the teachers or the data set.

    Raises:
        UserError: If one of these has changed and is not accepted, or the optimizer is another.
    """
    path = checkpoint.path
    changes = changed_settings(checkpoint.args, settings)
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


def load_checkpoint(
    checkpoint: TrainingCheckpoint, stepper: Stepper, schedule: Schedule, resume_optimizer: bool
) -> None:
    """Load a checkpoint into task, average, optimizer, loss scaler and schedule.

    The schedule, weight decay and other settings of the optimizer are those of the present command line.

    Raises:
        UserError: If it does not fit the model or the optimizer.
    """
    contents, optimizer = checkpoint.contents, stepper.optimizer
    settings = [{name: group[name] for name in _HYPERPARAMETERS if name in group} for group in optimizer.param_groups]
    try:
        for ema in (False, True) if stepper.task.has_ema() else (False,):
            suffix = '_ema' if ema and 'state_dict_ema' in contents else ''
            state = clean_state_dict(contents[f'state_dict{suffix}'])
            stepper.task.load_checkpoint_state(state, contents.get(f'task_state{suffix}'), ema=ema)
        if resume_optimizer and 'optimizer' in contents:
            optimizer.load_state_dict(copy.deepcopy(contents['optimizer']))  # would else go on in the mapped file
        if resume_optimizer and stepper.scaler is not None and stepper.scaler.state_dict_key in contents:
            stepper.scaler.load_state_dict(contents[stepper.scaler.state_dict_key])
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f'{checkpoint} does not fit this model or optimizer: {one_line(error)}') from error
    follows_metric = isinstance(schedule.scheduler, PlateauLRScheduler) and resume_optimizer
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        if follows_metric and 'scheduler' in contents:
            values.pop('lr')
        group.update(values)
    if 'scheduler' in contents and resume_optimizer:
        schedule.load_state_dict(contents['scheduler'])


def position_to_resume(
    checkpoint: TrainingCheckpoint,
    settings: Mapping[str, Any],
    loader: TrainLoader | StreamLoader,
    updates_per_epoch: int,
) -> Position:
    """Where the run goes on: at the beginning of the epoch where an update in its middle would be another one."""
    start = position(checkpoint.contents, updates_per_epoch)
    if not start.batch:
        return start
    former = checkpoint.args
    same = all(_comparable(former.get(name)) == _comparable(settings.get(name)) for name in _OF_AN_UPDATE)
    if same and loader.resumable and checkpoint.contents.get('batches') == len(loader):
        return start
    _logger.info('The epoch begins anew: its middle cannot be entered (streaming, or an update of other images).')
    return Position(start.epoch, update=start.epoch * updates_per_epoch)


def own_state(checkpoint: TrainingCheckpoint, processes: Processes) -> dict[str, Any]:
    """Return what `process_states` had of this process; {} where there was another number of processes.

    All processes then keep the buffers of the first.
    """
    states = checkpoint.contents.get('processes', [])
    return dict(states[processes.rank]) if len(states) == processes.world_size else {}
