"""Arguments of the training program: command line over configuration file over recipe over defaults, all checked."""

import argparse
import difflib
import reprlib
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from timm.utils import ParseKwargs

from timm_mealv2.errors import UserError
from timm_mealv2.models.factory import TeacherSpec
from timm_mealv2.soft_labels.store import SoftLabelStore
from timm_mealv2.training.checks import OptionError, check_args, mixes
from timm_mealv2.training.options import build_parser

__all__ = ['args_text', 'build_parser', 'list_recipes', 'paper_differences', 'parse_args']

# What the command line says about itself, not about the training.
_NOT_SETTINGS = ('config', 'recipe', 'list_recipes', 'explicit')
_SAY_THE_SAME = (('batch_size', 'total_batch_size'), ('teachers', 'kd_model_name'))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line, with its recipe and configuration file as defaults, and check every setting.

    Args:
        argv: The command line; the process's own if None.

    Returns:
        The settings by timm's names and ours. `teachers` is a list, empty without any; `explicit` the names of the
        settings that were given, on the command line or in a file.

    Raises:
        UserError: If a setting is not possible or contradicts another.
        SystemExit: From `--help` and `--list-recipes` (code 0), and from argparse on what it cannot parse (code 2).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    given = _given(argv)
    if given.get('list_recipes'):
        print(recipe_table())
        raise SystemExit(0)
    settings: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if given.get('recipe'):
        settings = _recipe(given['recipe'])
        origins = dict.fromkeys(settings, f'the recipe {given["recipe"]}')
    if given.get('config'):
        read = _read_settings(Path(given['config']))
        settings = _over(read, settings)
        origins |= dict.fromkeys(read, given['config'])
    settings = {name: value for name, value in _over(given, settings).items() if name not in given}
    parser = build_parser()
    changed = {dest for dest, value in settings.items() if value != parser.get_default(dest)}
    parser.set_defaults(**settings)
    args = parser.parse_args(argv)
    args.explicit = frozenset(given) | changed
    if args.teachers and args.kd_model_name:
        raise UserError('--teachers and --kd-model-name mean the same: give one of them.')
    texts = args.teachers or ([args.kd_model_name] if args.kd_model_name else [])
    args.teachers = [str(spec) for spec in TeacherSpec.parse_all(texts)]
    args.kd_model_name = None
    if args.soft_labels:
        asked = {name: getattr(args, name) for name in args.explicit if hasattr(args, name)}
        asked['teachers'] = args.teachers
        vars(args).update(SoftLabelStore(args.soft_labels).training_settings(asked))
    try:
        check_args(args)
    except OptionError as error:
        where = f' (set in {origins[error.name]})' if error.name in settings else ''
        raise UserError(f'{error}{where}') from None
    return args


def _over(upper: Mapping[str, Any], lower: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of two layers; one in the upper also hides the one in the lower that says the same otherwise."""
    hidden = {
        other for pair in _SAY_THE_SAME for name, other in (pair, pair[::-1]) if name in upper and other not in upper
    }
    return {**{name: value for name, value in lower.items() if name not in hidden}, **upper}


def args_text(args: argparse.Namespace, changed: bool = False) -> str:
    """Return all settings, or those that are not the default, as YAML; `-c` on that file gives them back."""
    actions = [action for action in build_parser()._actions if action.dest not in (*_NOT_SETTINGS, 'help')]
    settings = {action.dest: getattr(args, action.dest) for action in actions}
    if changed:
        settings = {a.dest: settings[a.dest] for a in actions if settings[a.dest] not in (a.default, [])}
    if args.total_batch_size:
        settings.pop('batch_size', None)  # it was made from the total
    head = f'# mealv2-train --recipe {args.recipe}\n' if args.recipe else ''
    return head + yaml.dump(settings, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Writes tuples, which model arguments such as widths have, as lists."""


_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(list(value)))


def paper_differences(args: argparse.Namespace) -> list[str]:
    """Say where settings differ from the published training (facts of the paper's section 4 and the authors' code)."""
    size = args.total_batch_size or args.batch_size * getattr(args, 'world_size', 1) * args.grad_accum_steps
    checks = (
        ('optimizer', args.opt, 'momentum', 'SGD without Nesterov: momentum'),
        ('momentum', args.momentum, 0.9, '0.9'),
        ('learning rate', args.lr, 0.01, '0.01'),
        ('weight decay', args.weight_decay, 0, '0'),
        ('schedule', args.sched, 'step', 'step, tenfold down after epoch 100'),
        ('warm-up epochs', args.warmup_epochs, 0, '0'),
        ('epochs', args.epochs, 180, '180'),
        ('images an update', size, 512, '512'),
        ('crop area', tuple(args.scale), (0.08, 1.0), '0.08 to 1'),
        ('colour jitter', args.color_jitter, 0, '0'),
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


# Recipes and configuration files


def list_recipes() -> list[str]:
    """Return the names of the recipes."""
    return sorted(path.name.removesuffix('.yaml') for path in _recipes().iterdir() if path.name.endswith('.yaml'))


def recipe_table() -> str:
    """Return the recipes as a table: student, teachers, start, epochs, images an update, the paper's top-1."""
    rows = [('recipe', 'student', 'start', 'teachers', 'epochs', 'batch', 'paper top-1')]
    for name in list_recipes():
        content = _load_yaml(_recipes() / f'{name}.yaml', name)
        about = content.pop('recipe')
        expected = about.get('expected_top1')
        rows.append(
            (
                name,
                content['model'].split('.')[0],
                about['start'],
                ' + '.join(content.get('teachers', ['-'])),
                str(content['epochs']),
                str(content.get('total_batch_size') or content['batch_size']),
                f'{expected:.2f}' if expected is not None else '-',
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join('  '.join(f'{cell:<{width}}' for cell, width in zip(row, widths, strict=True)) for row in rows)


def _recipes() -> Any:
    return files('timm_mealv2') / 'recipes'


def _recipe(name: str) -> dict[str, Any]:
    if name not in list_recipes():
        near = difflib.get_close_matches(name, list_recipes(), 1, 0.3) or list_recipes()
        raise UserError(f'--recipe {name}: there is no such recipe, the nearest is {near[0]} (--list-recipes).')
    return _read_settings(_recipes() / f'{name}.yaml', recipe=True)


def _load_yaml(path: Any, name: Any) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(), Loader=_Loader)
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:  # a date that is none is a ValueError
        raise UserError(f'cannot read {name}: {error}') from error
    if not isinstance(content, dict):
        raise UserError(f'{name} must map option names to values, got {type(content).__name__}.')
    return content


class _Loader(yaml.SafeLoader):
    """Reads plain values only, and no key twice in a map."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f'{key.value!r} is there twice', problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def _read_settings(path: Any, recipe: bool = False) -> dict[str, Any]:
    """Read a YAML file entry by entry, each as the command line would take it."""
    content = _load_yaml(path, path)
    if recipe:
        content.pop('recipe')
    parser = build_parser()
    actions = {action.dest: action for action in parser._actions if action.dest not in (*_NOT_SETTINGS, 'help')}
    settings = {}
    for key, value in content.items():
        dest = str(key).replace('-', '_')
        if dest not in actions:
            near = difflib.get_close_matches(dest, actions, 1, 0.5)
            hint = f', the nearest is {near[0]!r}' if near else ''
            raise UserError(f'{path}: there is no option {key!r}{hint} (mealv2-train --help lists them).')
        settings[dest] = _entry(parser, actions[dest], value, f'{path}: {key}')
    return settings


def _entry(parser: argparse.ArgumentParser, action: argparse.Action, value: Any, where: str) -> Any:
    """One value of a YAML file, of the type that the command line gives it."""
    if isinstance(action, argparse._StoreTrueAction):
        if not isinstance(value, bool):
            raise UserError(f'{where} must be true or false, got {_shown(value)}.')
        return value
    if value is None and action.default is None:
        return None
    if isinstance(action, ParseKwargs):
        if not isinstance(value, Mapping):
            raise UserError(f'{where} must map names to values, got {_shown(value)}.')
        return dict(value)
    many = action.nargs in ('+', '*') or isinstance(action.nargs, int)
    if many != isinstance(value, list):
        raise UserError(f'{where} must be {"a list" if many else "one value"}, got {_shown(value)}.')
    if isinstance(action.nargs, int) and len(value) != action.nargs:
        raise UserError(f'{where} must be {action.nargs} values, got {_shown(value)}.')
    values = [_number_or_text(action, item, where) for item in (value if many else [value])]
    return values if many else values[0]


def _number_or_text(action: argparse.Action, value: Any, where: str) -> Any:
    wanted = action.type or str
    types = (int,) if wanted is int else (int, float) if wanted is float else (str,)
    fits = isinstance(value, types) and not isinstance(value, bool)
    if wanted is float and (fits or isinstance(value, str)):  # YAML 1.1 takes 1e-3 for text
        try:
            value, fits = float(value), True
        except (OverflowError, ValueError):
            fits = False
    if not fits or (action.choices and value not in action.choices):
        kind = 'a whole number' if wanted is int else 'a number' if wanted is float else 'text'
        raise UserError(
            f'{where} must be {f"one of {action.choices}" if action.choices else kind}, got {_shown(value)}.'
        )
    return float(value) if wanted is float else value


def _shown(value: Any) -> str:
    shown = reprlib.Repr()
    shown.maxlevel = 2  # aliases make a short file a long value
    return shown.repr(value)


def _given(argv: Sequence[str]) -> dict[str, Any]:
    """The settings that a command line itself gives, without defaults."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))
