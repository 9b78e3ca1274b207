"""Arguments of the training program: command line over configuration file over recipe over defaults, all checked."""

import argparse
import sys
from collections.abc import Sequence

from timm_mealv2.errors import UserError
from timm_mealv2.models.factory import TeacherSpec
from timm_mealv2.soft_labels.store import SoftLabelStore
from timm_mealv2.training.checks import OptionError, check_args, mixes
from timm_mealv2.training.config import list_recipes, parse_with_files, recipe_table, settings_text
from timm_mealv2.training.options import build_parser

__all__ = ['args_text', 'build_parser', 'list_recipes', 'paper_differences', 'parse_args']


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line, with its recipe and configuration file as defaults, and check every setting.

    Args:
        argv: The command line; the process's own if None.

    Returns:
        The settings by timm's names and ours. `teachers` is a list, empty without any; `given` has the names of the
        settings that were given, on the command line or in a file. Nothing changes them afterwards.

    Raises:
        UserError: If a setting is not possible or contradicts another.
        SystemExit: From `--help` and `--list-recipes` (code 0), and from argparse on what it cannot parse (code 2).
    """
    args, origins = parse_with_files(build_parser(), sys.argv[1:] if argv is None else list(argv))
    if args.list_recipes:
        print(recipe_table())
        raise SystemExit(0)
    if args.teachers and args.kd_model_name:
        raise UserError('--teachers and --kd-model-name mean the same: give one of them.')
    texts = args.teachers or ([args.kd_model_name] if args.kd_model_name else [])
    args.teachers = [str(spec) for spec in TeacherSpec.parse_all(texts)]
    args.kd_model_name = None
    if args.soft_labels and 'discriminator_weight' not in args.given:
        args.discriminator_weight = 0.0  # stored predictions have no logits: a discriminator only where it is asked for
    if args.soft_labels:
        asked = {name: getattr(args, name) for name in args.given if hasattr(args, name)}
        settings = SoftLabelStore(args.soft_labels).training_settings({**asked, 'teachers': args.teachers})
        vars(args).update(settings)
    try:
        check_args(args)
    except OptionError as error:
        where = f' (set in {origins[error.name]})' if error.name in origins else ''
        raise UserError(f'{error}{where}') from None
    return args


def args_text(args: argparse.Namespace, changed: bool = False) -> str:
    """Return all settings, or those that are not the default, as YAML; `-c` on that file gives them back."""
    return settings_text(build_parser(), args, changed)


def paper_differences(args: argparse.Namespace, images_per_update: int, lr: float | None) -> list[str]:
    """Say where settings differ from the published training (facts of the paper's section 4 and the authors' code)."""
    checks = (
        ('optimizer', args.opt, 'momentum', 'SGD without Nesterov: momentum'),
        ('momentum', args.momentum, 0.9, '0.9'),
        ('learning rate', lr, 0.01, '0.01'),
        ('weight decay', args.weight_decay, 0, '0'),
        ('schedule', args.sched, 'step', 'step, tenfold down after epoch 100'),
        ('warm-up epochs', args.warmup_epochs, 0, '0'),
        ('epochs', args.epochs, 180, '180'),
        ('images an update', images_per_update, 512, '512'),
        ('crop area', tuple(args.scale), (0.08, 1.0), '0.08 to 1'),
        ('color jitter', args.color_jitter, 0, '0'),
        ('auto augment', args.aa, None, 'none'),
        ('random erasing', args.reprob, 0, '0'),
        ('mixing', mixes(args), False, 'none, CutMix in one variant'),
        ('interpolation of the crops', args.train_interpolation, 'bilinear', 'bilinear'),
        ('weight of the labels', args.hard_label_weight, 0, '0'),
        ('weight of the discriminator', args.discriminator_weight, 1, '1'),
        ('discriminator', args.discriminator_mode, 'official', 'official'),
        ('moving average', args.model_ema, False, 'none'),
    )
    return [f'{name} {value} (paper: {text})' for name, value, paper, text in checks if value != paper]
