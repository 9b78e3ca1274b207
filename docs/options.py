"""Write docs/options.md from the parsers of the commands: `python docs/options.py`.

tests/docs/test_options_page.py fails where the file and the parsers differ.
"""

import argparse
import configparser
import importlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

HEAD = """\
# Options

Written by `python docs/options.py` from the programs themselves. `COMMAND --help` shows the same (`mealv2-train --help
GROUP` a group, `--help all` all), and `COMMAND --version` what is installed.

Options of timm's train.py have timm's names, types and defaults. Two differ: `--kd-distill-type` is `mealv2`, and
`--device` is the CPU where there is no CUDA device and none is asked for.
"""


def entry_points() -> dict[str, str]:
    """Return console command -> `module:function`, as in setup.cfg."""
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    lines = config['options.entry_points']['console_scripts'].strip().splitlines()
    return {command.strip(): target.strip() for command, target in (line.split('=') for line in lines)}


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return command -> parser, for each console command."""
    modules = {command: target.partition(':')[0] for command, target in entry_points().items()}
    modules['mealv2-train'] = 'timm_mealv2.training.options'
    return {command: importlib.import_module(module).build_parser() for command, module in modules.items()}


def sections(title: str, parser: argparse.ArgumentParser, level: int, text: str = '') -> Iterator[str]:
    """Yield the Markdown of a command: its description or `text`, tables of its options, and its subcommands."""
    yield f'{"#" * level} {title}\n\n{parser.description or f"{text[0].upper()}{text[1:]}."}\n'
    subcommands: dict[str, argparse.ArgumentParser] = {}
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        for action in actions:
            if isinstance(action, argparse._SubParsersAction):
                subcommands = action.choices
                helps = {choice.dest: choice.help for choice in action._choices_actions}
        rows = [
            _row(parser, action)
            for action in actions
            if action.dest not in ('help', 'version') and action.choices != subcommands
        ]
        if rows:
            name = '' if group.title in ('positional arguments', 'options') else f'**{group.title}**\n\n'
            yield f'{name}| option | default | |\n|---|---|---|\n' + '\n'.join(rows) + '\n'
    for name, subparser in subcommands.items():
        if name in helps:  # an alias has none
            yield from sections(f'{title} {name}', subparser, level + 1, helps[name])


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """One option as a row; its default in a column, so not in its help."""
    kind = 'N' if action.type is int else 'X' if action.type is float else 'TEXT'
    value = action.metavar or (f'{{{", ".join(map(str, action.choices))}}}' if action.choices else kind)
    several = ' ...' if action.nargs in ('+', '*') else ''
    names = ', '.join(action.option_strings) or f'{value}{several}'
    values = '' if action.nargs == 0 or not action.option_strings else f' {value}{several}'
    unsaid = action.default is False or action.default in (None, '', [], {}, argparse.SUPPRESS)
    default = '' if unsaid else f'`{_text(action.default)}`'
    help_text = (action.help or '').replace(' (default: %(default)s)', '') % {**vars(action), 'prog': parser.prog}
    return f'| `{names}{values}` | {default} | {_escape(help_text)} |'


def _text(default: object) -> str:
    if isinstance(default, list | tuple):
        return ' '.join(map(_text, default))
    return f'{default:.4g}' if isinstance(default, float) else str(default)


def _escape(text: str) -> str:
    return ' '.join(text.split()).replace('|', '\\|').replace('<', '&lt;')


def page() -> str:
    """Return the whole page."""
    return '\n'.join([HEAD, *(part for command, parser in parsers().items() for part in sections(command, parser, 2))])


if __name__ == '__main__':
    (ROOT / 'docs/options.md').write_text(page())
