"""Settings from files: recipes and YAML files, typed by the parser of the command line."""

import argparse
import difflib
import reprlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from timm.utils import ParseKwargs

from timm_mealv2.errors import UserError

# What the command line says about itself, not about the training.
NOT_SETTINGS = ('help', 'version', 'config', 'recipe', 'list_recipes', 'given')
_SAME_MEANING = (('batch_size', 'total_batch_size'), ('teachers', 'kd_model_name'))


def parse_with_files(
    parser: argparse.ArgumentParser, argv: Sequence[str], file_parser: argparse.ArgumentParser | None = None
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Parse a command line, with its `--recipe` and its `--config` file as defaults.

    Args:
        parser: Has the options `--recipe` and `--config`.
        argv: The command line.
        file_parser: Knows the options that the files may have, those of `parser` if None; what `parser` does not have
            is then left out.

    Returns:
        The settings, with the names of those that were given and are not the default in `given`; and for each setting
        that came from a file what to call the file.

    Raises:
        UserError: If a file cannot be read, or an entry is no option or not possible.
        SystemExit: From argparse: `--help` (code 0), and what it cannot parse (code 2).
    """
    defaults = {action.dest: action.default for action in parser._actions}
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    own = parser._defaults  # of `set_defaults`, which argparse takes also where the option is not given
    given = {name: v for name, v in vars(parser.parse_args(argv)).items() if name not in own or v is not own[name]}
    for action in parser._actions:
        action.default = defaults[action.dest]

    settings: dict[str, Any] = {}
    origins: dict[str, str] = {}
    recipe, config = given.get('recipe'), given.get('config')
    if recipe:
        settings = read_settings(file_parser or parser, recipe_file(recipe))
        origins = dict.fromkeys(settings, f'the recipe {recipe}')
    if config:
        read = read_settings(file_parser or parser, Path(config))
        settings = _over(read, settings)
        origins |= dict.fromkeys(read, config)
    settings = {name: v for name, v in _over(given, settings).items() if name in defaults and name not in given}
    parser.set_defaults(**settings)
    names = frozenset(given) | {name for name, value in settings.items() if value != defaults[name]}
    args = parser.parse_args(argv, argparse.Namespace(given=names))
    return args, {name: origins[name] for name in settings}


def _over(upper: Mapping[str, Any], lower: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of two layers; one in the upper also hides the one in the lower that has the same meaning."""
    hidden = {
        other for pair in _SAME_MEANING for name, other in (pair, pair[::-1]) if name in upper and other not in upper
    }
    return {**{name: value for name, value in lower.items() if name not in hidden}, **upper}


def read_settings(parser: argparse.ArgumentParser, path: Any) -> dict[str, Any]:
    """Read a YAML file entry by entry, each as the command line would take it.

    Args:
        parser: Has the options.
        path: The file.

    Raises:
        UserError: Names file and entry, with the nearest option where there is none of the name.
    """
    content = load_yaml(path, path)
    if isinstance(content.get('recipe'), dict):  # notes on the published training, which copies of a recipe have too
        content.pop('recipe')
    parser.exit_on_error = False
    actions = {action.dest: action for action in parser._actions if action.dest not in NOT_SETTINGS}
    settings = {}
    for key, value in content.items():
        dest = str(key).replace('-', '_')
        if dest not in actions:
            near = difflib.get_close_matches(dest, actions, 1, 0.5)
            hint = f', the nearest is {near[0]!r}' if near else ''
            raise UserError(f'{path}: there is no option {key!r}{hint} ({parser.prog} --help lists them).')
        action = actions[dest]
        if (
            (isinstance(value, bool) and isinstance(action, argparse._StoreTrueAction))
            or (value == [] and action.nargs == '+')
            or (value is None and action.default is None)
        ):
            settings[dest] = value
        else:
            words = _words(action, value, f'{path}: {key}')
            try:
                settings[dest] = getattr(parser.parse_args(words), dest)
            except argparse.ArgumentError as error:
                raise UserError(f'{path}: {key}: {str(error.message)[:300]}.') from None
    parser.exit_on_error = True
    return settings


def _words(action: argparse.Action, value: Any, where: str) -> list[str]:
    """The words of a command line that set an option to a value of a YAML file."""
    flag = action.option_strings[-1:]
    if isinstance(action, argparse._StoreTrueAction):
        raise UserError(f'{where} must be true or false, got {_shown(value)}.')
    if isinstance(action, ParseKwargs):
        if not isinstance(value, Mapping):
            raise UserError(f'{where} must map names to values, got {_shown(value)}.')
        return [*flag, *(f'{name}={item!r}' for name, item in value.items())]
    if isinstance(value, bool) and tuple(action.choices or ()) == ('on', 'off'):
        value = 'on' if value else 'off'  # YAML takes the two words for true and false
    many = action.nargs == '+' or isinstance(action.nargs, int)
    items = value if isinstance(value, list) else [value]
    plain = all(isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in items)
    if many != isinstance(value, list) or not plain:
        raise UserError(f'{where} must be {"a list" if many else "one value"}, got {_shown(value)}.')
    if not flag:
        return ['--', str(value)]
    return [*flag, *map(str, items)] if many else [f'{flag[0]}={value}']


def _shown(value: Any) -> str:
    shown = reprlib.Repr()
    shown.maxlevel = 2  # aliases make a short file a long value
    return shown.repr(value)


class _Loader(yaml.SafeLoader):
    """Reads plain values only, and no key twice in a map."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f'{key.value!r} is there twice', problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(path: Any, name: Any) -> dict[str, Any]:
    """Read a YAML file of plain values.

    Raises:
        UserError: Calls the file `name`.
    """
    try:
        content = yaml.load(path.read_text(), Loader=_Loader)
    except (
        Exception
    ) as error:  # `!!timestamp x` is an AttributeError, `!!bool x` a KeyError, a deep nest a RecursionError
        raise UserError(f'cannot read {name}: {error}') from error
    if not isinstance(content, dict):
        raise UserError(f'{name} must map option names to values, got {type(content).__name__}.')
    return content


class _Dumper(yaml.SafeDumper):
    """Writes tuples, which model arguments such as widths have, as lists."""


_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(list(value)))


def settings_text(parser: argparse.ArgumentParser, args: argparse.Namespace, changed: bool = False) -> str:
    """Return all settings, or those that are not the default, as YAML; `-c` on that file gives them back."""
    actions = [action for action in parser._actions if action.dest not in NOT_SETTINGS]
    settings = {action.dest: getattr(args, action.dest) for action in actions}
    if changed:
        settings = {a.dest: settings[a.dest] for a in actions if settings[a.dest] not in (a.default, [])}
    head = f'# mealv2-train --recipe {args.recipe}\n' if args.recipe else ''
    return head + yaml.dump(settings, Dumper=_Dumper, sort_keys=False)


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
        near = difflib.get_close_matches(name, list_recipes(), 1, 0.3) or list_recipes()
        raise UserError(f'--recipe {name}: there is no such recipe, the nearest is {near[0]} (--list-recipes).')
    return files('timm_mealv2') / 'recipes' / f'{name}.yaml'


def recipe_table() -> str:
    """Return the recipes as a table: student, initial weights, teachers, epochs, images an update, paper's top-1."""
    rows = [('recipe', 'student', 'initial weights', 'teachers', 'epochs', 'batch', 'paper top-1')]
    for name in list_recipes():
        content = load_yaml(recipe_file(name), name)
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
