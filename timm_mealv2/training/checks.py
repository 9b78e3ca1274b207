"""Which settings go together; told before anything is loaded or written."""

import argparse
import logging
from collections.abc import Callable
from typing import Any

import torch

from timm_mealv2.errors import UserError

_logger = logging.getLogger(__name__)

_OF_MEALV2 = (
    *('teacher_weights', 'teacher_dtype', 'teacher_img_size', 'discriminator_weight', 'discriminator_mode'),
    *('discriminator_lr_scale', 'discriminator_reduction', 'hard_label_weight', 'teacher_classes', 'teacher_compile'),
)


_OF_STORED_LABELS = ('label_rest', 'allow_pixel_change')


class OptionError(UserError):
    """A setting that is not possible, by itself or with others.

    Attributes:
        name: Its name among the settings.
    """

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


def option(name: str) -> str:
    """The option of a setting as the command line spells it."""
    return '--local_rank' if name == 'local_rank' else f'--{name.replace("_", "-")}'


def mixes(args: argparse.Namespace) -> bool:
    """Whether images are mixed, by Mixup or CutMix."""
    return bool(args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax)


def check_args(args: argparse.Namespace) -> None:
    """Check the settings that have to go together; each by itself the parser has checked.

    Raises:
        OptionError: Names the option, what it is, and what is allowed.
    """
    for check in (check_pixels, _check_refused, _check_batches, _check_losses, _check_distillation):
        check(args)
    if args.resume == 'auto' and not args.experiment:
        raise OptionError('resume', '--resume auto needs --experiment, the run folder to continue.')
    if args.opt_betas is not None and len(args.opt_betas) not in (2, 3):
        _refuse('opt_betas', args.opt_betas, 'must be two values (three for adan)')
    if args.lr_noise is not None and (len(args.lr_noise) > 2 or args.lr_noise != sorted(args.lr_noise)):
        _refuse('lr_noise', args.lr_noise, 'must be one or two values, the smaller first')
    if args.push_to_hub is not None:
        from timm_mealv2.hub.hub_api import check_repo_id  # loads the Hub's client, which few runs need

        try:
            check_repo_id(args.push_to_hub, with_namespace=True)
        except UserError:
            _refuse('push_to_hub', args.push_to_hub, "must be USER/NAME, of letters, digits, '-', '_' and '.'")


def _refuse(name: str, value: Any, text: str) -> None:
    shown = '' if value is True else f' {" ".join(map(str, value)) if isinstance(value, list) else value}'
    raise OptionError(name, f'{option(name)}{shown}: {text}.')


def check_pixels(args: argparse.Namespace) -> None:
    """Check the settings of the images, those that a recording has too.

    Raises:
        OptionError: Names the option.
    """
    channels = args.input_size[0] if args.input_size else args.in_chans
    if args.input_size and args.in_chans not in (None, channels):
        _refuse('in_chans', args.in_chans, f'--input-size says {channels} channels')
    if channels not in (None, 1, 3) and not args.input_img_mode:
        text = 'images have 3 channels, or 1; --input-img-mode RGBA or CMYK gives 4'
        _refuse('input_size' if args.input_size else 'in_chans', args.input_size or channels, text)
    for name in ('mean', 'std'):
        value = getattr(args, name)
        if value is not None and len(value) not in (1, channels or 3):
            _refuse(name, value, f'must be one value or {channels or 3}, one per channel')
    for name in ('scale', 'ratio', 'cutmix_minmax'):
        value = getattr(args, name)
        if value is not None and (len(value) != 2 or value[0] > value[1]):
            _refuse(name, value, 'must be two values, the smaller first')
    if args.train_crop_mode in (None, 'rrc') and args.scale[1] > 1:
        _refuse('scale', args.scale, 'must be at most 1, the whole image')


def _check_refused(args: argparse.Namespace) -> None:
    for name in sorted(args.given):
        if name.startswith('naflex'):
            _refuse(name, True, 'refused, teachers and loaders work on images, not on NaFlex patches; leave it out')
    if args.torchscript:
        _refuse('torchscript', True, 'refused, TorchScript cannot hold a training task; use --torchcompile')
    if args.fuser:
        _refuse('fuser', args.fuser, 'refused, only TorchScript has fusers; use --torchcompile')
    if args.tta > 1:
        _refuse('tta', args.tta, "refused, timm's loaders make no copies of an image that could be averaged")
    if args.torchcompile is not None:
        _check_compiler(args)
    elif args.torchcompile_mode:
        _refuse('torchcompile_mode', args.torchcompile_mode, 'needs --torchcompile')
    if args.amp and args.model_dtype in ('float16', 'bfloat16'):
        _refuse('amp', True, f'--model-dtype {args.model_dtype} leaves nothing to mix; give one of them')
    if args.model_dtype == 'float16':
        _logger.warning('--model-dtype float16: such weights lose small updates; --amp or bfloat16 trains better.')


def _check_compiler(args: argparse.Namespace) -> None:
    backend, mode = args.torchcompile or 'inductor', args.torchcompile_mode
    backends = torch._dynamo.list_backends(None)
    if backend not in backends and not args.device_modules:  # these may register one
        _refuse('torchcompile', backend, f'must be one of {", ".join(backends)}')
    if mode is None:
        return
    if backend != 'inductor':
        _refuse('torchcompile_mode', mode, 'only the backend inductor has modes; leave it out')
    modes = torch._inductor.list_mode_options()
    if mode not in modes:
        _refuse('torchcompile_mode', mode, f'must be one of {", ".join(modes)}')


def _check_batches(args: argparse.Namespace) -> None:
    if args.total_batch_size and 'batch_size' in args.given:
        _refuse('total_batch_size', args.total_batch_size, '--batch-size is given as well; give one of them')
    sizes = args.train_img_sizes
    for name in ('train_batch_sizes', 'train_size_probs', 'train_batches_per_epoch'):
        value = getattr(args, name)
        if value is None:
            continue
        if not sizes:
            _refuse(name, value, 'needs --train-img-sizes')
        if isinstance(value, list) and len(value) != len(sizes):
            _refuse(name, value, f'must be {len(sizes)} values, one per --train-img-sizes')
    if args.train_size_probs and not sum(args.train_size_probs):
        _refuse('train_size_probs', args.train_size_probs, 'must not all be 0')
    if args.train_size_schedule == 'progressive' and len(sizes or ()) < 2:
        _refuse('train_size_schedule', 'progressive', 'needs two --train-img-sizes or more')
    if sizes and args.aug_splits:
        _refuse('train_img_sizes', sizes, 'cannot go with --aug-splits')


def _check_losses(args: argparse.Namespace) -> None:
    if args.aug_splits == 1:
        _refuse('aug_splits', 1, 'must be 0, or 2 or more')
    if 0 < args.aug_repeats < 1:
        _refuse('aug_repeats', args.aug_repeats, 'must be 0, or 1 or more')
    if args.jsd_loss and not args.aug_splits:
        _refuse('jsd_loss', True, 'needs --aug-splits 2 or more')
    if args.jsd_loss and args.bce_loss:
        _refuse('jsd_loss', True, 'cannot go with --bce-loss')
    if args.split_bn and not args.aug_splits:
        _refuse('split_bn', True, 'needs --aug-splits 2 or more, or --resplit with it')
    if args.split_bn and args.sync_bn:
        _refuse('split_bn', True, 'cannot go with --sync-bn')
    if args.split_bn and args.freeze_bn:
        _refuse('split_bn', True, 'cannot go with --freeze-bn')
    if args.aug_splits and mixes(args):
        _refuse('aug_splits', args.aug_splits, 'cannot go with --mixup or --cutmix')
    if args.aug_splits and args.no_aug:
        _refuse('no_aug', True, 'cannot go with --aug-splits')
    if not args.bce_loss:
        for name in ('bce_sum', 'bce_target_thresh', 'bce_pos_weight'):
            if name in args.given:
                _refuse(name, getattr(args, name), 'needs --bce-loss')


def _check_distillation(args: argparse.Namespace) -> None:
    kind = args.kd_distill_type
    mealv2 = bool(args.teachers or args.soft_labels) and kind == 'mealv2'
    for name in _OF_STORED_LABELS:
        if name in args.given and not args.soft_labels:
            _refuse(name, getattr(args, name), 'needs --soft-labels')
    if not mealv2:
        if args.soft_labels:
            _refuse('soft_labels', args.soft_labels, f'cannot go with --kd-distill-type {kind}')
        why = 'needs --teachers' if not args.teachers else f'cannot go with --kd-distill-type {kind}'
        for name in _OF_MEALV2:
            if name in args.given:
                _refuse(name, getattr(args, name), why)
        if args.unlabeled:
            _refuse('unlabeled', True, why)
    if 'kd_distill_type' in args.given and kind != 'mealv2' and not args.teachers:
        _refuse('kd_distill_type', kind, 'needs --kd-model-name or --teachers')
    if mealv2:
        if args.soft_labels:
            _check_stored_labels(args)
        _check_mealv2(args)
    elif args.teachers:
        if len(args.teachers) > 1:
            raise OptionError(
                'kd_distill_type',
                f'--kd-distill-type {kind} takes one teacher, got {len(args.teachers)}: use mealv2, or name an '
                'ensemble such as mealv2_ensemble_gluon.',
            )
        used: dict[str, Callable[[str], bool]] = {
            'kd_loss_type': lambda kind: kind == 'logit',
            'kd_temperature': lambda kind: kind in ('logit', 'token'),
            'kd_student_feature_dim': lambda kind: kind == 'feature',
            'kd_teacher_feature_dim': lambda kind: kind == 'feature',
            'kd_token_distill_type': lambda kind: kind == 'token',
        }
        for name, uses in used.items():
            if name in args.given and not uses(kind):
                _refuse(name, getattr(args, name), f'does nothing with --kd-distill-type {kind}')


def _check_mealv2(args: argparse.Namespace) -> None:
    reasons = {
        'kd_loss_type': 'MEAL V2 has its own loss; leave it out',
        'distill_loss_weight': "the teachers' mean probability is the only target; --hard-label-weight adds labels",
        'task_loss_weight': 'use --hard-label-weight, which weighs the loss on the labels',
        'kd_student_feature_dim': 'MEAL V2 compares outputs alone; use --kd-distill-type feature',
        'kd_teacher_feature_dim': 'MEAL V2 compares outputs alone; use --kd-distill-type feature',
        'kd_token_distill_type': 'use --kd-distill-type token',
    }
    for name, reason in reasons.items():
        if name in args.given:
            _refuse(name, getattr(args, name), reason)
    if 'kd_temperature' in args.given and args.kd_temperature != 1:
        _refuse('kd_temperature', args.kd_temperature, 'the temperature of MEAL V2 is 1; leave it out')
    for name in ('jsd_loss', 'aug_splits', 'split_bn'):
        if getattr(args, name):
            value = getattr(args, name)
            _refuse(name, value, 'refused with MEAL V2, teachers and student see one and the same augmented image')
    if args.teacher_compile and args.teacher_tune == 'off':
        _refuse('teacher_compile', True, 'cannot go with --teacher-tune off')
    count = len(args.teachers)
    if args.teacher_weights is not None:
        if len(args.teacher_weights) != count:
            _refuse('teacher_weights', args.teacher_weights, f'must be {count} values, one per teacher')
        if not sum(args.teacher_weights):
            _refuse('teacher_weights', args.teacher_weights, 'must not all be 0')
    if args.teacher_img_size is not None and len(args.teacher_img_size) not in (1, count):
        _refuse('teacher_img_size', args.teacher_img_size, f'must be one value, or {count}, one per teacher')
    named = [text.rpartition('=')[0] for text in args.teacher_classes or ()]
    for text, name in zip(args.teacher_classes or (), named, strict=True):
        if name not in args.teachers:
            _refuse('teacher_classes', text, f'must be TEACHER=FILE, the teacher one of {", ".join(args.teachers)}')
        if named.count(name) > 1:
            _refuse('teacher_classes', text, 'the classes of this teacher are given twice')
    if args.unlabeled and args.hard_label_weight:
        _refuse('hard_label_weight', args.hard_label_weight, 'cannot go with --unlabeled')
    if not args.hard_label_weight:
        for name in ('bce_loss', 'smoothing'):
            if name in args.given and getattr(args, name):
                _logger.warning(f'{option(name)} does nothing: --hard-label-weight is 0, the labels are not looked at.')


def _check_stored_labels(args: argparse.Namespace) -> None:
    """Refuse what does not go with stored labels; what decides the pixels has been compared with the store."""
    for name in ('aug_repeats', 'train_img_sizes'):
        if getattr(args, name):
            _refuse(name, getattr(args, name), 'refused with --soft-labels, which says what an epoch shows and how big')
    for name in ('teacher_weights', 'teacher_dtype', 'teacher_img_size', 'teacher_classes', 'teacher_compile'):
        if getattr(args, name):
            _refuse(name, getattr(args, name), 'the predictions are stored: an option of mealv2-softlabels record')
    if args.discriminator_weight and args.label_rest != 'uniform':
        _refuse('label_rest', args.label_rest, 'leaves the discriminator no whole distribution; give one of the two')
    if args.hard_label_weight and mixes(args):
        _refuse('hard_label_weight', args.hard_label_weight, 'cannot go with mixed images of --soft-labels')
