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
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from timm_mealv2.arguments import build_ensemble, choose_device, teacher_dtype
from timm_mealv2.data.class_names import check_same_classes, class_names_of, index_map
from timm_mealv2.data.unreadable import BadImages
from timm_mealv2.errors import UserError
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import TeacherSpec, create_ensemble
from timm_mealv2.soft_labels.store import SoftLabelStore
from timm_mealv2.task import MealV2Task, scale_discriminator_lr
from timm_mealv2.training.build_data import Data, InputSpec, build_data, check_class_count, open_datasets
from timm_mealv2.training.build_student import build_student, reorder_classes
from timm_mealv2.training.checks import is_mealv2, mixes
from timm_mealv2.training.distributed import Processes
from timm_mealv2.training.loop import LossScaler, Schedule, Stepper, updates_per_epoch
from timm_mealv2.training.resume import check_changes, find_checkpoint
from timm_mealv2.training.run_folder import RunFolder
from timm_mealv2.training.settings import paper_differences, plain_settings, settings_text
from timm_mealv2.training.stopping import Guard, Signals
from timm_mealv2.training.trainer import Components, Plan, Trainer
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
    lr = _learning_rate(args, batch_size * processes.world_size * args.grad_accum_steps)
    resolved = {'batch_size': batch_size, 'lr': lr, 'world_size': processes.world_size, 'device': processes.device.type}
    settings = plain_settings(args) | resolved
    if 'adahessian' in args.opt and processes.distributed:
        raise UserError(f'--opt {args.opt} takes second derivatives, which DDP does not give: train in one process.')
    _warn_of_emulation(args, processes.device)
    folder = RunFolder.choose(args.output, args.experiment, args.model)
    restarted = bool(args.experiment) and int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0
    if restarted:
        _logger.info('The process group was restarted: continuing from its newest checkpoint.')
    checkpoint = find_checkpoint(folder, processes, args.resume, restarted, args.dry_run)
    live = is_mealv2(args) and not args.soft_labels
    if live:
        settings['teacher_dtype'] = _teacher_dtype(args, checkpoint)
    if checkpoint is not None:
        check_changes(checkpoint, settings, args.resume_changed)
    initial = [TeacherSpec.parse(args.initial_checkpoint)] if args.initial_checkpoint else []
    for model in (*args.teachers, *initial):
        model.check()

    bad = BadImages(args.max_bad_images)
    guard = Guard(signals, bad, processes, max(1, args.log_interval // args.grad_accum_steps))
    trained = student is not None or args.pretrained or args.pretrained_path or args.initial_checkpoint
    num_classes = args.num_classes
    if num_classes is None and student is None and not args.unlabeled:
        datasets = datasets or open_datasets(args, batch_size)
        num_classes = _count_classes(datasets[0])
    student, pixels, model_config = build_student(args, batch_size, num_classes, processes, student)
    settings['num_classes'] = pixels.num_classes
    datasets = datasets or open_datasets(args, batch_size)
    class_names = None if args.unlabeled else class_names_of(datasets[0])
    check_class_count(class_names, pixels.num_classes, one_is_enough=args.bce_loss)
    teachers = None
    if live:
        dtype = settings['teacher_dtype'] and getattr(torch, settings['teacher_dtype'])
        options = {
            **_size(pixels),
            'class_names': class_names,
            'device': choose_teacher_device(args.teacher_device, processes),
        }
        teachers = build_ensemble(args, **options, autocast_dtype=dtype)
    class_names = _class_names(args, class_names, teachers, datasets[1], student, pixels.num_classes)
    if checkpoint is not None and len(checkpoint.class_names) == pixels.num_classes:
        check_same_classes(checkpoint.class_names, class_names, str(checkpoint))
    data = build_data(args, *datasets, class_names, pixels, processes, bad, live)
    task = _build_task(args, student, teachers, class_names, pixels, processes)
    optimizer = _build_optimizer(args, task, lr)
    if args.model_ema:
        ema_device = torch.device('cpu') if args.model_ema_force_cpu else None
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device=ema_device,
            dtype=torch.float32,  # what an update adds is too small for a half type
        )
    eval_metric = data.validation.metric(args.eval_metric) if data.validation is not None else ''
    schedule = _build_schedule(args, optimizer, data, eval_metric)
    stepper = _build_stepper(args, task, optimizer, pixels, guard)
    recorded = SoftLabelStore(args.soft_labels).meta.figures if args.soft_labels else {}
    judged_by = stepper, teachers, pixels.config, guard, not args.model_ema_force_cpu, recorded
    parts = Components(
        stepper=stepper,
        schedule=schedule,
        data=data,
        validator=Validator(data.validation, *judged_by) if data.validation is not None else None,
        wrap=functools.partial(_wrap, args, processes),
    )
    if processes.primary:
        _announce(args, parts, pixels, teachers, student, processes, lr)
    kept = {'model_config': model_config, 'data_config': pixels.config, 'class_names': class_names}
    return Trainer(parts, _plan(args, settings, kept, checkpoint, eval_metric, not trained), processes, guard, folder)


def _teacher_dtype(args: argparse.Namespace, checkpoint: TrainingCheckpoint | None) -> str | None:
    """The type of the teachers' autocast, which a resumed run keeps: it was none in versions that do not name it."""
    former = checkpoint.args if checkpoint is not None else {}
    if former.get('amp') and not former.get('teacher_dtype') and not args.teacher_dtype:
        _logger.info('The teachers stay in float32, as the run began; --teacher-dtype gives them another type.')
        return None
    return teacher_dtype(args)


def choose_teacher_device(name: str | None, processes: Processes) -> torch.device:
    """Return the device of that name, `cuda:+N` being this process's own index + N; None is the student's.

    Raises:
        UserError: If there is none, or the processes would share it.
    """
    if name is None:
        return processes.device
    kind, own, offset = name.partition(':+')
    if processes.distributed and not own and name != 'cpu':
        raise UserError(
            f'--teacher-device {name}: all processes would share it; {kind.split(":")[0]}:+N is for each its own.'
        )
    if own and offset.isdecimal() and processes.device.index is not None:
        name = f'{kind}:{processes.device.index + int(offset)}'
    return choose_device(name, option='--teacher-device')


def _count_classes(train: Dataset) -> int | None:
    names = class_names_of(train)
    if names is None:
        return None
    _logger.info(f'{len(names)} classes, counted in the training split.')
    return len(names)


def _size(pixels: InputSpec) -> dict[str, Any]:
    return {'num_classes': pixels.num_classes, 'in_chans': pixels.channels}


def _class_names(
    args: argparse.Namespace,
    folders: list[str] | None,
    teachers: EnsembleTeacher | None,
    validation: Dataset | None,
    student: nn.Module,
    num_classes: int,
) -> list[str] | None:
    """Decide what the classes are called, and in which order: as the folders, or as who else knows them by name.

    The initial weights are brought into that order; stored labels have to be in it.
    """
    recorded = SoftLabelStore(args.soft_labels).meta.class_names if args.soft_labels else None
    check_same_classes(recorded, folders, args.soft_labels)
    names = folders or recorded or (class_names_of(teachers) if teachers is not None else None)
    others = None if validation is None else class_names_of(validation)
    names = names or (others if len(others or ()) == num_classes else None)
    own = class_names_of(student)
    if own or args.initial_checkpoint:
        initial = args.initial_checkpoint or args.model
        reorder_classes(student, index_map(own, names, f'{initial} (--pretrained-path leaves its classes out)'))
    return names or own


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
        dry_run_seconds=args.dry_run_seconds if args.dry_run else None,
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
    parts: Components,
    pixels: InputSpec,
    teachers: EnsembleTeacher | None,
    student: nn.Module,
    processes: Processes,
    lr: float,
) -> None:
    """Log what the run will be."""
    images = pixels.batch_size * processes.world_size * args.grad_accum_steps
    if args.recipe or args.dry_run:
        _logger.info(f'Non-default settings:\n{settings_text(args, changed=True)}')
    if teachers is not None:
        config = pixels.config
        for name, teacher in zip(teachers.names, teachers.teachers, strict=True):
            own = getattr(teacher, 'pretrained_cfg', None) or {}
            differing = [
                f'{key} {own[key]} (here {config[key]})'
                for key in ('interpolation', 'crop_pct', 'input_size')
                if own.get(key) is not None and own[key] != config[key]
            ]
            if differing:
                _logger.info(f'Teacher {name} was evaluated with other images: {", ".join(differing)}.')
        if differences := paper_differences(args, images, lr):
            _logger.info(
                f'Differs from the paper: {", ".join(differences)}. (--recipe NAME sets the published training, '
                '--list-recipes lists them)'
            )
    parameters = sum(p.numel() for p in student.parameters()) / 1e6
    _logger.info(
        f'{args.model}: {parameters:.2f} M parameters, {len(parts.data.loader)} batches of {pixels.batch_size} '
        f'an epoch on {processes.world_size} process(es), {parts.schedule.epochs} epochs.'
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


def _learning_rate(args: argparse.Namespace, images_per_update: int) -> float:
    """The learning rate, from the images of an update where it is not given."""
    if args.lr is not None:
        return float(args.lr)
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    ratio = images_per_update / args.lr_base_size
    lr: float = args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)
    _logger.info(f'Learning rate {lr:.4g}: {args.lr_base} for {args.lr_base_size} images, scaled ({scale}).')
    return lr


def _warn_of_emulation(args: argparse.Namespace, device: torch.device) -> None:
    types = {'--amp-dtype': args.amp_dtype if args.amp else None, '--model-dtype': args.model_dtype}
    types['--teacher-dtype'] = args.teacher_dtype
    for flag, name in types.items():
        if name == 'bfloat16' and device.type == 'cpu' and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            _logger.warning(f'{flag} bfloat16: this CPU emulates it, about 30 times slower than float32.')


def _build_task(
    args: argparse.Namespace,
    student: nn.Module,
    teachers: EnsembleTeacher | None,
    class_names: list[str] | None,
    pixels: InputSpec,
    processes: Processes,
) -> TrainingTask:
    """Create what computes the loss: ours with teachers or stored labels, timm's classification or its others."""
    common: dict[str, Any] = {'device': processes.device, 'dtype': pixels.dtype, 'verbose': processes.primary}
    if teachers is not None or args.soft_labels:
        return MealV2Task(
            student,
            teachers,
            discriminator_weight=args.discriminator_weight,
            discriminator_mode=args.discriminator_mode,
            discriminator_reduction=args.discriminator_reduction,
            hard_label_weight=args.hard_label_weight,
            criterion=_build_criterion(args) if args.hard_label_weight else None,
            teachers_per_sample=args.teachers_per_sample,
            label_rest=args.label_rest,
            teacher_device=choose_teacher_device(args.teacher_device, processes),
            **common,
        )
    common['criterion'] = _build_criterion(args)
    if not args.teachers:
        return ClassificationTask(student, **common)
    common |= {
        'student_model': student,
        'distill_loss_weight': args.distill_loss_weight,
        'task_loss_weight': args.task_loss_weight,
    }
    if args.kd_distill_type == 'feature':  # whatever classes the teacher has
        common['teacher_model'] = args.teachers[0].build(in_chans=pixels.channels).to(processes.device, pixels.dtype)
        common |= {'student_feature_dim': args.kd_student_feature_dim}
        return FeatureDistillationTask(teacher_feature_dim=args.kd_teacher_feature_dim, **common)
    ensemble = create_ensemble(args.teachers, **_size(pixels), class_names=class_names)
    teacher = ensemble.teachers[0] if len(ensemble.teachers) == 1 else ensemble
    common['teacher_model'] = teacher.to(processes.device, pixels.dtype)
    common['temperature'] = args.kd_temperature
    if args.kd_distill_type == 'token':
        return TokenDistillationTask(distill_type=args.kd_token_distill_type, **common)
    return LogitDistillationTask(loss_type=args.kd_loss_type, **common)


def _build_criterion(args: argparse.Namespace) -> nn.Module:
    return create_classification_loss(
        loss_type='jsd' if args.jsd_loss else 'bce' if args.bce_loss else 'ce',
        smoothing=args.smoothing,
        soft_targets=mixes(args),
        jsd_splits=args.aug_splits if args.jsd_loss else 0,
        bce_target_thresh=args.bce_target_thresh,
        bce_sum=args.bce_sum,
        pos_weight=args.bce_pos_weight if args.bce_loss else None,
    )


_FUSED = ('sgd', 'nesterov', 'momentum', 'adam', 'adamw')  # names of torch's own optimizers that can be fused


def _build_optimizer(args: argparse.Namespace, task: TrainingTask, lr: float) -> torch.optim.Optimizer:
    options = {**optimizer_kwargs(cfg=args), 'lr': lr, **args.opt_kwargs}
    if task.device.type == 'cuda' and args.opt in _FUSED and 'foreach' not in options:
        options.setdefault('fused', True)
    optimizer: torch.optim.Optimizer = create_optimizer_v2(task.get_trainable_module(), **options)
    if isinstance(task, MealV2Task):
        scale_discriminator_lr(optimizer, task, args.discriminator_lr_scale)
    return optimizer


def _build_schedule(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, data: Data, eval_metric: str
) -> Schedule:
    """Create timm's learning rate schedule and count the epochs, those of warm-up and cool-down included."""
    updates = updates_per_epoch(data.loader, args.grad_accum_steps)
    options = scheduler_kwargs(args, decreasing_metric=eval_metric in ('loss', 'kl'))
    scheduler, epochs = create_scheduler_v2(optimizer, **options, updates_per_epoch=updates)
    if scheduler is None:  # which would scale them
        for group in optimizer.param_groups:
            group['lr'] = group.get('initial_lr', group['lr']) * group.get('lr_scale', 1.0)
    elif args.warmup_epochs >= epochs:
        _logger.warning(
            f'--warmup-epochs {args.warmup_epochs} is not over in {epochs} epochs: the learning rate stays below --lr.'
        )
    return Schedule(scheduler, epochs, updates)


def _build_stepper(
    args: argparse.Namespace, task: TrainingTask, optimizer: torch.optim.Optimizer, pixels: InputSpec, guard: Guard
) -> Stepper:
    device = guard.processes.device
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    scaler = None
    if args.amp:
        autocast = functools.partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))
        scaler = LossScaler(device=device.type) if args.amp_dtype == 'float16' else None
    exponent = {'none': 0.0, 'sqrt': 0.5, 'linear': 1.0}[args.variable_batch_loss_scale]
    weight = (lambda images: (images / pixels.batch_size) ** exponent) if exponent else None
    return Stepper(
        task,
        optimizer,
        accumulate=args.grad_accum_steps,
        autocast=autocast,
        scaler=scaler,
        clip_grad=args.clip_grad,
        clip_mode=args.clip_mode,
        loss_weight=weight,
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
        # Without `device_ids`, DDP would bring the teachers' answers here before the student begins.
        task.prepare_distributed(**ddp_options)
