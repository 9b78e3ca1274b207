"""From arguments to the parts of a run: student, teachers, task, optimizer, schedule. `args` stops here."""

import argparse
import functools
import inspect
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.task import TrainingTask
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from timm_mealv2.arguments import build_ensemble, teacher_dtype
from timm_mealv2.data.class_names import class_names_of
from timm_mealv2.data.unreadable import BadImages
from timm_mealv2.errors import UserError
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.models.factory import TeacherSpec
from timm_mealv2.soft_labels.store import SoftLabelStore
from timm_mealv2.task import MealV2Task
from timm_mealv2.training.build_data import Data, InputSpec, build_data, check_class_count, open_datasets
from timm_mealv2.training.build_optimizer import build_optimizer, build_schedule, resolve_lr, setup_average
from timm_mealv2.training.build_student import build_student, settle_class_names
from timm_mealv2.training.build_task import build_task, choose_teacher_device
from timm_mealv2.training.checks import is_mealv2
from timm_mealv2.training.distributed import Processes
from timm_mealv2.training.loop import LossScaler, Schedule, Stepper
from timm_mealv2.training.resume import check_changes, find_checkpoint
from timm_mealv2.training.run_folder import RunFolder
from timm_mealv2.training.settings import paper_differences, plain_settings, settings_text
from timm_mealv2.training.stopping import Guard, Signals
from timm_mealv2.training.trainer import Plan, Trainer
from timm_mealv2.training.validation import Validator

_logger = logging.getLogger(__name__)


def build(
    args: argparse.Namespace,
    processes: Processes,
    signals: Signals,
    *,
    student: nn.Module | None = None,
    datasets: tuple[Dataset, Dataset | None] | None = None,
) -> Trainer:
    """Build everything that a run is made of; what needs no data is checked before the data set is opened.

    Args:
        args: The settings.
        processes: The processes of the run.
        signals: What may end it early.
        student: The model to train; None makes it of the settings.
        datasets: The images to train on and those to evaluate on; None opens those of the settings.

    Raises:
        UserError: If the parts cannot be built, or do not fit each other.
    """
    batch_size = _batch_size(args, processes)
    lr = resolve_lr(args, batch_size * processes.world_size * args.grad_accum_steps)
    resolved = {'batch_size': batch_size, 'lr': lr, 'world_size': processes.world_size, 'device': processes.device.type}
    settings = plain_settings(args) | resolved
    if 'adahessian' in args.opt and processes.distributed:
        raise UserError(f'--opt {args.opt} takes second derivatives, which DDP does not give: train in one process.')
    live = is_mealv2(args) and not args.soft_labels
    folder, checkpoint = _folder_and_checkpoint(args, processes)
    if live:
        settings['teacher_dtype'] = _resumed_teacher_dtype(args, checkpoint)
    if checkpoint is not None:
        check_changes(checkpoint, settings, args.resume_changed)
    initial = [TeacherSpec.parse(args.initial_checkpoint)] if args.initial_checkpoint else []
    for model in (*args.teachers, *initial):
        model.check()

    bad = BadImages(args.max_bad_images)
    guard = Guard(signals, bad, processes, max(1, args.log_interval // args.grad_accum_steps))
    trained = student is not None or args.pretrained or args.pretrained_path or args.initial_checkpoint
    store = SoftLabelStore(args.soft_labels) if args.soft_labels else None
    num_classes = args.num_classes
    if num_classes is None and store is not None:
        num_classes = store.meta.num_classes
    if num_classes is None and student is None and not args.unlabeled:
        datasets = datasets or open_datasets(args, batch_size)
        if names := class_names_of(datasets[0]):
            num_classes = len(names)
            _logger.info(f'{num_classes} classes, counted in the training split.')
    student, pixels, model_config = build_student(args, batch_size, num_classes, processes, student)
    settings['num_classes'] = pixels.num_classes
    datasets = datasets or open_datasets(args, batch_size)
    class_names = None if args.unlabeled else class_names_of(datasets[0])
    check_class_count(class_names, pixels.num_classes, one_is_enough=args.bce_loss)
    device = choose_teacher_device(args.teacher_device, processes)
    teachers = None
    if live:
        shape = {'num_classes': pixels.num_classes, 'in_chans': pixels.channels}
        teachers = build_ensemble(args, **shape, class_names=class_names, device=device)
    class_names = settle_class_names(args, student, class_names, datasets[1], teachers, store, checkpoint)
    data = build_data(args, *datasets, class_names, pixels, processes, bad, live, store)
    task = build_task(args, student, teachers, class_names, pixels, processes, device)
    optimizer = build_optimizer(args, task, lr)
    setup_average(args, task)
    eval_metric = data.metric(args.eval_metric)
    schedule = build_schedule(args, optimizer, data, eval_metric)
    stepper = _build_stepper(args, task, optimizer, guard)
    recorded = store.meta.figures if store is not None else {}
    judged_by = data, stepper, teachers, pixels.config, guard, not args.model_ema_force_cpu, recorded
    if processes.primary:
        _announce(args, data, schedule, pixels, live, student, processes, lr)
    kept = {'model_config': model_config, 'data_config': pixels.config, 'class_names': class_names}
    validator = None if data.evaluated is None else Validator(*judged_by)
    plan = _plan(args, settings, kept, checkpoint, eval_metric, not trained)
    return Trainer(stepper, schedule, data, validator, functools.partial(_wrap, args, processes), plan, guard, folder)


def _folder_and_checkpoint(
    args: argparse.Namespace, processes: Processes
) -> tuple[RunFolder, TrainingCheckpoint | None]:
    """Choose the run folder and the checkpoint to go on from."""
    folder = RunFolder.choose(args.output, args.experiment, args.model)
    restarted = bool(args.experiment) and int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0
    if restarted:
        _logger.info('The process group was restarted: continuing from its newest checkpoint.')
    return folder, find_checkpoint(folder, processes, args.resume, restarted, args.dry_run)


def _resumed_teacher_dtype(args: argparse.Namespace, checkpoint: TrainingCheckpoint | None) -> str | None:
    """The type of the teachers' autocast, kept from before (and in `args`): none in versions that do not name it."""
    former = checkpoint.args if checkpoint is not None else {}
    if former.get('amp') and not former.get('teacher_dtype') and not args.teacher_dtype:
        _logger.info('The teachers stay in float32, as the run began; --teacher-dtype gives them another type.')
        args.teacher_dtype = 'float32'
        return None
    return teacher_dtype(args)


def _plan(
    args: argparse.Namespace,
    settings: dict[str, Any],
    kept: dict[str, Any],
    checkpoint: TrainingCheckpoint | None,
    eval_metric: str,
    random_weights: bool,
) -> Plan:
    # A run that continues itself is past the epoch that it was told to begin with.
    begins = args.start_epoch is not None and not (checkpoint and args.resume in ('', 'auto'))
    wandb = {'project': args.wandb_project, 'tags': args.wandb_tags, 'id': args.wandb_resume_id, 'config': settings}
    return Plan(
        settings=settings,
        settings_text=settings_text(args),
        checkpoint=checkpoint,
        random_weights=random_weights,
        resume_optimizer=not args.no_resume_opt,
        start_epoch=args.start_epoch if begins else None,
        dry_run=args.dry_run,
        preflight=not args.no_preflight,
        eval_metric=eval_metric,
        val_interval=args.val_interval,
        log_interval=args.log_interval,
        recovery_interval=args.recovery_interval,
        checkpoint_hist=args.checkpoint_hist,
        dist_bn='' if args.freeze_bn else args.dist_bn,  # a mean of equal numbers may be rounded
        save_images=args.save_images,
        synchronize=args.synchronize_step,
        tensorboard=args.log_tensorboard,
        wandb=wandb if args.log_wandb else None,
        push_to_hub=args.push_to_hub,
        kept=kept,
    )


def _announce(
    args: argparse.Namespace,
    data: Data,
    schedule: Schedule,
    pixels: InputSpec,
    live: bool,
    student: nn.Module,
    processes: Processes,
    lr: float,
) -> None:
    """Log what the run will be."""
    images = pixels.batch_size * processes.world_size * args.grad_accum_steps
    if args.recipe or args.dry_run:
        _logger.info(f'Non-default settings:\n{settings_text(args, changed=True)}')
    # The recipes for own data are not the paper's training.
    of_paper = args.recipe is None or args.recipe.startswith('mealv2_')
    if live and of_paper and (differences := paper_differences(args, images, lr)):
        _logger.info(f'Differs from the paper: {", ".join(differences)} (--list-recipes: the published trainings).')
    parameters = sum(p.numel() for p in student.parameters()) / 1e6
    _logger.info(
        f'{args.model}: {parameters:.2f} M parameters, {len(data.loader)} batches of {pixels.batch_size} '
        f'an epoch on {processes.world_size} process(es), {schedule.epochs} epochs.'
    )


def _batch_size(args: argparse.Namespace, processes: Processes) -> int:
    """Images of a batch, per process."""
    batches = processes.world_size * args.grad_accum_steps
    if not args.total_batch_size:
        return int(args.batch_size)
    if args.total_batch_size % batches:
        raise UserError(
            f'--total-batch-size {args.total_batch_size} cannot be divided by {processes.world_size} processes times '
            f'{args.grad_accum_steps} accumulation steps.'
        )
    return int(args.total_batch_size // batches)


def _build_stepper(
    args: argparse.Namespace, task: TrainingTask, optimizer: torch.optim.Optimizer, guard: Guard
) -> Stepper:
    device = guard.processes.device
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    scaler = None
    if args.amp:
        autocast = functools.partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))
        scaler = LossScaler(device=device.type) if args.amp_dtype == 'float16' else None
    return Stepper(
        task,
        optimizer,
        accumulate=args.grad_accum_steps,
        autocast=autocast,
        scaler=scaler,
        clip_grad=args.clip_grad,
        clip_mode=args.clip_mode,
        channels_last=args.channels_last,
        seed=args.seed,
        rank=guard.processes.rank,
        freeze_bn=args.freeze_bn,
    )


def _wrap(args: argparse.Namespace, processes: Processes, task: TrainingTask) -> None:
    """Compile and let DDP wrap the task, where asked for; after a checkpoint is loaded."""
    if args.torchcompile is not None:
        task.compile(backend=args.torchcompile or 'inductor', mode=args.torchcompile_mode)
    elif args.teacher_compile and isinstance(task, MealV2Task) and task.teacher is not None:
        task.teacher.compile_each()
    if processes.distributed:
        ddp_options = {'gradient_as_bucket_view': True}  # the gradient is not copied for the sum
        ddp_options['find_unused_parameters'] = args.find_unused_parameters
        if args.no_ddp_bb:
            parameters = inspect.signature(DistributedDataParallel).parameters  # torch 2.14 has renamed it
            name = 'forward_sync_buffers' if 'forward_sync_buffers' in parameters else 'broadcast_buffers'
            ddp_options[name] = False
        # Without `device_ids`, DDP would bring the teachers' predictions here before the student begins.
        task.prepare_distributed(**ddp_options)
