"""Settings of a training: the command line over a YAML file over a recipe over the defaults.

An entry of a file is turned into words of a command line, and argparse does the rest.
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from timm_mealv2.errors import UnknownOptionError, UserError
from timm_mealv2.figures import as_text, figure
from timm_mealv2.models.factory import TeacherSpec
from timm_mealv2.soft_labels.store import SoftLabelStore
from timm_mealv2.training.checks import check_args
from timm_mealv2.training.options import build_parser

# Options that are about the command line, not about the training.
_NOT_SETTINGS = ('help', 'version', 'config', 'recipe', 'list_recipes', 'data')
_SAME_MEANING = (('batch_size', 'total_batch_size'), ('teachers', 'kd_model_name'), ('data_dir', 'data'))
_PUBLISHED = 'mealv2_resnet50_224'
_UNSET = object()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line with its recipe and YAML file, and check which settings go together.

    Args:
        argv: The command line; the process's own if None.

    Returns:
        The settings by timm's names and ours. `teachers` is a list of `TeacherSpec`, empty without any; `given` has
        the names of the settings that were given, on the command line or in a file.

    Raises:
        UserError: If a setting of a file is not possible, or settings contradict each other.
        SystemExit: From `--help` and `--list-recipes` (code 0), and from argparse on what it cannot parse (code 2).
    """
    argv = sys.argv[1:] if argv is None else argv
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument('--device-modules', nargs='*', default=())
    import_modules(early.parse_known_args(argv)[0].device_modules)
    args = parse_with_files(build_parser(), argv)
    if args.list_recipes:
        print(recipe_table())
        raise SystemExit(0)
    return complete(args)


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what some settings mean for others, parse the teachers, and check which go together.

    Raises:
        UserError: If settings contradict each other.
    """
    if args.teachers and args.kd_model_name:
        raise UserError('--teachers and --kd-model-name mean the same: give one of them.')
    args.data_dir = args.data_dir or args.data
    args.teachers = TeacherSpec.parse_all(args.teachers or [args.kd_model_name or ''])
    args.kd_model_name = None
    if args.soft_labels:
        if 'discriminator_weight' not in args.given:
            args.discriminator_weight = 0.0  # stored predictions have no logits for it to look at
        asked = {name: getattr(args, name) for name in args.given} | {'teachers': [str(s) for s in args.teachers]}
        vars(args).update(SoftLabelStore(args.soft_labels).training_settings(asked))
    check_args(args)
    return args


def import_modules(names: Sequence[str]) -> None:
    """Import modules that may register a model, a device or a compiler.

    Raises:
        UserError: If one cannot be imported.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f'--device-modules {name}: {error}') from error


def parse_with_files(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line, with its `--recipe` and its `--config` file as defaults.

    Args:
        parser: Has the options `--recipe` and `--config`; what it lacks of the training's options is left out.
        argv: The command line.

    Returns:
        The settings; `given` has the names of those that were given and, from a file, are not the default.

    Raises:
        UserError: If a file cannot be read, or an entry is no option or not possible.
        SystemExit: From argparse.
    """
    names = _defaults(parser)
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, _UNSET)))
    given = {name: getattr(args, name) for name in names if getattr(args, name) not in (_UNSET, None)}
    vars(args).update(vars(with_files(parser, given)))
    return args


def with_files(parser: argparse.ArgumentParser, given: Mapping[str, Any]) -> argparse.Namespace:
    """Return what `parse_with_files` returns where the command line has said `given`, converted already."""
    defaults = _defaults(parser)
    settings: dict[str, Any] = {}
    if 'recipe' in given:
        settings = read_settings(recipe_file(given['recipe']))
    if 'config' in given:
        settings = _over(read_settings(Path(given['config'])), settings)
    settings = {name: value for name, value in _over(given, settings).items() if name in defaults}
    names = given.keys() | {name for name, value in settings.items() if value != defaults[name]}
    return argparse.Namespace(**{**defaults, **settings}, given=names)


def read_settings(path: Any) -> dict[str, Any]:
    """Read a YAML file of settings, each as the command line would take it; null and false mean the default.

    Raises:
        UserError: If it cannot be read, or is no map; names file and key, with the nearest option where there is none
            of the name.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f'cannot read {path}: {error}') from error
    if not isinstance(content, dict):
        raise UserError(f'{path} must map option names to values, got {type(content).__name__}.')
    if isinstance(content.get('recipe'), dict):  # notes on the published training
        del content['recipe']
    return convert(content, f'{path}: ')


def convert(options: Mapping[str, Any], where: str = '') -> dict[str, Any]:
    """Return options as the command line would take them; None and False mean the default.

    Args:
        options: Names, with - or _, and values.
        where: Where they are from, for messages.

    Raises:
        UnknownOptionError: If there is no option of a name, with the nearest.
        UserError: If a value is not possible.
    """
    parser = build_parser()
    parser.exit_on_error = False
    actions = {action.dest: action for action in parser._actions if action.dest not in _NOT_SETTINGS}
    settings = {}
    for key, value in options.items():
        dest = str(key).replace('-', '_')
        dest = 'data_dir' if dest == 'data' else dest
        if dest not in actions:
            near = difflib.get_close_matches(dest, actions, 1, 0.5)
            hint = f', the nearest is {near[0]!r}' if near else ''
            raise UnknownOptionError(f'{where}there is no option {key!r}{hint} (mealv2-train --help all lists them).')
        action = actions[dest]
        if isinstance(value, bool) and 'off' in (action.choices or ()):
            value = 'on' if value else 'off'  # YAML takes the two words for true and false
        if value is None or value is False or value == []:
            settings[dest] = action.default
            continue
        try:
            settings[dest] = getattr(parser.parse_args(_words(action, value)), dest)
        except argparse.ArgumentError as error:
            raise UserError(f'{where}{key}: {error.message}.') from None
    return settings


def settings_text(args: argparse.Namespace, changed: bool = False) -> str:
    """Return all settings, or those that are not the default, as YAML; `-c` on that file gives them back."""
    actions = [action for action in build_parser()._actions if action.dest not in _NOT_SETTINGS]
    plain = plain_settings(args)
    if changed:
        actions = [action for action in actions if plain[action.dest] not in (action.default, [])]
    head = f'# mealv2-train --recipe {args.recipe}\n' if args.recipe else ''
    return head + yaml.dump({a.dest: plain[a.dest] for a in actions}, Dumper=_Dumper, sort_keys=False)


def plain_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings as values that YAML and a checkpoint can hold."""
    settings = {name: value for name, value in vars(args).items() if name != 'given'}
    return settings | {'teachers': [str(spec) for spec in args.teachers]}


def paper_differences(args: argparse.Namespace, images_per_update: int, lr: float) -> list[str]:
    """Say which settings differ from those of the published training, a recipe."""
    paper = parse_with_files(build_parser(), ['--recipe', _PUBLISHED])
    names = (
        *('opt', 'momentum', 'weight_decay', 'lr', 'sched', 'warmup_epochs', 'epochs', 'total_batch_size', 'scale'),
        *('color_jitter', 'aa', 'reprob', 'mixup', 'cutmix', 'train_interpolation', 'hard_label_weight'),
        *('discriminator_weight', 'discriminator_mode', 'model_ema'),
    )
    now = {**vars(args), 'lr': lr, 'total_batch_size': images_per_update}
    pairs = [(name, now[name], getattr(paper, name)) for name in names]
    return [f'{name} {value} (paper: {published})' for name, value, published in pairs if value != published]


def _over(upper: Mapping[str, Any], lower: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of two layers. An alias given in `upper` removes its partner from `lower`."""
    hidden = {other for pair in _SAME_MEANING for name, other in (pair, pair[::-1]) if name in upper}
    return {name: value for name, value in lower.items() if name not in hidden} | dict(upper)


def _defaults(parser: argparse.ArgumentParser) -> dict[str, Any]:
    return {action.dest: action.default for action in parser._actions if action.default is not argparse.SUPPRESS}


def _words(action: argparse.Action, value: Any) -> list[str]:
    """The words of a command line that give an option a value of YAML or Python."""
    option = action.option_strings[-1]
    if isinstance(value, list | tuple | dict) and action.nargs in (None, 0, '?'):
        raise argparse.ArgumentError(action, f'must be one value, got a {type(value).__name__}')
    if isinstance(value, dict):
        return [option, *(f'{name}={item!r}' for name, item in value.items())]
    if isinstance(value, list | tuple):
        return [option, *map(str, value)]
    return [option] if value is True and action.nargs == 0 else [f'{option}={value}']


class _Dumper(yaml.SafeDumper):
    """Writes tuples, which model arguments such as widths have, as lists."""


_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(list(value)))


# Recipes


def list_recipes() -> list[str]:
    """Return the names of the recipes."""
    folder = files('timm_mealv2') / 'recipes'
    return sorted(path.name.removesuffix('.yaml') for path in folder.iterdir() if path.name.endswith('.yaml'))


def recipe_file(name: str) -> Any:
    """Return the file of a recipe.

    Raises:
        UserError: If there is none, with the nearest.
    """
    if name not in list_recipes():
        near = difflib.get_close_matches(name, list_recipes(), 1, 0)[0]
        raise UserError(f'there is no recipe {name}, the nearest is {near} (--list-recipes).')
    return files('timm_mealv2') / 'recipes' / f'{name}.yaml'


def recipe_table() -> str:
    """Return the recipes as a table: student, initial weights, teachers, epochs, images an update, paper's top-1."""
    heads = ['student', 'initial weights', 'teachers', 'epochs', 'batch', 'paper top-1']
    rows = []
    for name in list_recipes():
        content = yaml.safe_load(recipe_file(name).read_text())
        top1 = content['recipe']['expected_top1']
        cells = [
            content.get('model', 'any').split('.')[0],
            content['recipe']['start'],
            ' + '.join(content.get('teachers', ['-'])),
            str(content['epochs']),
            str(content.get('total_batch_size') or content['batch_size']),
            figure('top1', top1),
        ]
        rows.append((name, cells))
    return as_text((heads, rows), 'recipe')
