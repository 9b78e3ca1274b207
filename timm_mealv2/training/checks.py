"""Which settings contradict each other: told before anything is loaded or written."""

import argparse
import logging
from collections.abc import Callable, Iterable
from typing import Any

from timm_mealv2.command_line import Option
from timm_mealv2.errors import UserError
from timm_mealv2.training.options import REFUSED

_logger = logging.getLogger(__name__)

# Settings, when they are refused, and why.
Rule = tuple[tuple[str, ...], Callable[[argparse.Namespace], Any], str]


def mixes(args: argparse.Namespace) -> bool:
    """Whether images are mixed, by Mixup or CutMix."""
    return bool(args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax)


def is_mealv2(args: argparse.Namespace) -> bool:
    """Whether the training is on the mean probability of teachers, live or stored."""
    return bool(args.teachers or args.soft_labels) and args.kd_distill_type == 'mealv2'


def _refused(option: Option) -> Rule:
    """The rule of an option that is refused with its help, unless it has its default, as in timm's args.yaml."""
    name = option.flags[0].removeprefix('--').replace('-', '_')
    default = option.kwargs.get('default')
    return (name,), lambda args: getattr(args, name) != default, f'refused, {option.kwargs["help"]}'


_OF_LIVE_TEACHERS = (
    *('teacher_weights', 'teacher_dtype', 'teacher_img_size', 'teacher_classes', 'teacher_compile'),
    *('teachers_per_sample', 'teacher_device'),
)
_OF_MEALV2 = (
    *_OF_LIVE_TEACHERS,
    *('discriminator_weight', 'discriminator_mode', 'discriminator_lr_scale', 'discriminator_reduction'),
    *('unlabeled', 'hard_label_weight'),
)

_RULES: tuple[Rule, ...] = (
    *map(_refused, REFUSED),
    (
        ('kd_distill_type',),
        lambda args: args.kd_distill_type == 'token',
        "refused, timm's train.py distils tokens; mealv2, logit and feature are here",
    ),
    (('torchcompile_mode',), lambda args: args.torchcompile is None, 'needs --torchcompile'),
    (
        ('amp',),
        lambda args: args.model_dtype in ('float16', 'bfloat16'),
        'leaves nothing to mix with a --model-dtype of 16 bits; give one of them',
    ),
    (
        ('train_split', 'val_split'),
        lambda args: args.val_share,
        'cannot go with --val-share, which takes the validation split out of the training images',
    ),
    (('resume',), lambda args: args.resume == 'auto' and not args.experiment, 'needs --experiment, the run folder'),
    (('total_batch_size',), lambda args: 'batch_size' in args.given, '--batch-size is given as well; give one of them'),
    (('bce_sum', 'bce_target_thresh', 'bce_pos_weight'), lambda args: not args.bce_loss, 'needs --bce-loss'),
    # Distillation.
    (('label_rest', 'allow_pixel_change'), lambda args: not args.soft_labels, 'needs --soft-labels'),
    (
        ('soft_labels',),
        lambda args: args.kd_distill_type != 'mealv2',
        'can be learned by --kd-distill-type mealv2 alone',
    ),
    (
        _OF_MEALV2,
        lambda args: not (args.teachers or args.soft_labels),
        'needs --teachers',
    ),
    (
        ('kd_distill_type',),
        # timm's default, which its args.yaml has whatever is trained
        lambda args: not (args.teachers or args.soft_labels) and args.kd_distill_type != 'logit',
        'needs --teachers',
    ),
    (_OF_MEALV2, lambda args: not is_mealv2(args), 'is an option of --kd-distill-type mealv2'),
    (
        ('kd_distill_type',),
        lambda args: not is_mealv2(args) and len(args.teachers) > 1,
        'takes one teacher; use mealv2, or name an ensemble such as mealv2_ensemble_gluon',
    ),
    (
        ('distill_loss_weight', 'task_loss_weight', 'kd_student_feature_dim', 'kd_teacher_feature_dim'),
        is_mealv2,
        "is of timm's tasks; MEAL V2 has --hard-label-weight to add the loss on the labels",
    ),
    (
        ('kd_temperature',),
        lambda args: is_mealv2(args) and args.kd_temperature != 1,
        'the temperature of MEAL V2 is 1; leave it out',
    ),
    (('hard_label_weight',), lambda args: args.unlabeled, 'cannot go with --unlabeled'),
    (
        ('hard_label_weight',),
        lambda args: args.soft_labels and mixes(args),
        'cannot go with mixed images of --soft-labels',
    ),
    (
        _OF_LIVE_TEACHERS,
        lambda args: args.soft_labels,
        'the predictions are stored: an option of mealv2-softlabels record',
    ),
)

_IMAGE_RULES: tuple[Rule, ...] = (
    (
        ('in_chans',),
        lambda args: args.input_size and args.input_size[0] != args.in_chans,
        'contradicts --input-size, which begins with the channels',
    ),
    (('scale',), lambda args: not _is_range(args.scale), 'must be two values, the smaller first'),
    (('ratio',), lambda args: not _is_range(args.ratio), 'must be two values, the smaller first'),
    (('cutmix_minmax',), lambda args: not _is_range(args.cutmix_minmax), 'must be two values, the smaller first'),
)


def _is_range(values: list[float]) -> bool:
    return len(values) == 2 and values[0] <= values[1]


def check_args(args: argparse.Namespace) -> None:
    """Check the settings that have to go together; each by itself the parser has checked.

    Raises:
        UserError: Names the option, its value, and what is allowed.
    """
    check_image_settings(args)
    _check(args, _RULES)
    if args.push_to_hub is not None:
        from timm_mealv2.hub.hub_api import check_repo_id  # loads the Hub's client, which few runs need

        check_repo_id(args.push_to_hub)
    if args.model_dtype == 'float16':
        _logger.warning('--model-dtype float16: such weights lose small updates; --amp or bfloat16 trains better.')
    for name in ('bce_loss', 'smoothing'):
        if is_mealv2(args) and not args.hard_label_weight and name in args.given and getattr(args, name):
            _logger.warning(f'{_option(name)} does nothing: --hard-label-weight is 0, the labels are not looked at.')


def check_image_settings(args: argparse.Namespace) -> None:
    """Check the settings of images and augmentation, those that a recording has too.

    Raises:
        UserError: Names the option.
    """
    _check(args, _IMAGE_RULES)


def _check(args: argparse.Namespace, rules: Iterable[Rule]) -> None:
    for names, refused, reason in rules:
        for name in names:
            value = getattr(args, name)
            if name in args.given and value and refused(args):
                shown = '' if value is True else f' {" ".join(map(str, value)) if isinstance(value, list) else value}'
                raise UserError(f'{_option(name)}{shown}: {reason}.')


def _option(name: str) -> str:
    return f'--{name.replace("_", "-")}'
