"""From arguments to what computes the loss: the teachers and the task."""

import argparse
from typing import Any

import torch
from timm.loss import create_classification_loss
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask, TrainingTask
from torch import nn

from timm_mealv2.arguments import choose_device
from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import create_ensemble
from timm_mealv2.task import MealV2Task
from timm_mealv2.training.build_data import InputSpec
from timm_mealv2.training.checks import mixes
from timm_mealv2.training.distributed import Processes


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
        return FeatureDistillationTask(
            teacher_model=teacher.to(processes.device, pixels.dtype),
            student_feature_dim=args.kd_student_feature_dim,
            teacher_feature_dim=args.kd_teacher_feature_dim,
            **common,
        )
    ensemble = create_ensemble(
        args.teachers, num_classes=pixels.num_classes, in_chans=pixels.channels, class_names=class_names
    )
    teacher = ensemble.teachers[0] if len(ensemble.teachers) == 1 else ensemble
    return LogitDistillationTask(
        teacher_model=teacher.to(processes.device, pixels.dtype),
        temperature=args.kd_temperature,
        loss_type=args.kd_loss_type,
        **common,
    )


def _build_criterion(args: argparse.Namespace) -> nn.Module:
    return create_classification_loss(
        loss_type='bce' if args.bce_loss else 'ce',
        smoothing=args.smoothing,
        soft_targets=mixes(args),
        bce_target_thresh=args.bce_target_thresh,
        bce_sum=args.bce_sum,
        pos_weight=args.bce_pos_weight if args.bce_loss else None,
    )
