"""From arguments to what computes the loss: the teachers and the task."""

import argparse
import logging
from typing import Any

import torch
from timm.loss import create_classification_loss
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn

from timm_mealv2.arguments import build_ensemble, choose_device, teacher_dtype
from timm_mealv2.errors import UserError
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import create_ensemble
from timm_mealv2.task import MealV2Task
from timm_mealv2.training.build_data import InputSpec
from timm_mealv2.training.checks import mixes
from timm_mealv2.training.distributed import Processes

_logger = logging.getLogger(__name__)


def resumed_teacher_dtype(args: argparse.Namespace, checkpoint: TrainingCheckpoint | None) -> str | None:
    """The type of the teachers' autocast, which a resumed run keeps: it was none in versions that do not name it."""
    former = checkpoint.args if checkpoint is not None else {}
    if former.get('amp') and not former.get('teacher_dtype') and not args.teacher_dtype:
        _logger.info('The teachers stay in float32, as the run began; --teacher-dtype gives them another type.')
        return None
    return teacher_dtype(args)


def build_teachers(
    args: argparse.Namespace, dtype: str | None, class_names: list[str] | None, pixels: InputSpec, device: torch.device
) -> EnsembleTeacher:
    """Build the live teachers, which run in mixed precision of `dtype`; None is float32."""
    return build_ensemble(
        args,
        device,
        num_classes=pixels.num_classes,
        in_chans=pixels.channels,
        class_names=class_names,
        autocast_dtype=dtype and getattr(torch, dtype),
    )


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


def build_task(
    args: argparse.Namespace,
    student: nn.Module,
    teachers: EnsembleTeacher | None,
    class_names: list[str] | None,
    pixels: InputSpec,
    processes: Processes,
    teacher_device: torch.device,
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
            teacher_device=teacher_device,
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
        teacher = args.teachers[0].build(in_chans=pixels.channels, img_size=pixels.config['input_size'][1])
        common['teacher_model'] = teacher.to(processes.device, pixels.dtype)
        common |= {'student_feature_dim': args.kd_student_feature_dim}
        return FeatureDistillationTask(teacher_feature_dim=args.kd_teacher_feature_dim, **common)
    ensemble = create_ensemble(
        args.teachers, num_classes=pixels.num_classes, in_chans=pixels.channels, class_names=class_names
    )
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
