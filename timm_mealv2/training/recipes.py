"""`mealv2-train recipes`: the recipes as files to look at, to copy and change, and to check."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from timm_mealv2.command_line import OneLineParser
from timm_mealv2.errors import UserError
from timm_mealv2.training.arguments import parse_args
from timm_mealv2.training.config import recipe_file, recipe_table


def build_parser() -> argparse.ArgumentParser:
    """Return a fresh parser of what follows `mealv2-train recipes`."""
    parser = OneLineParser(prog='mealv2-train recipes', description='The recipes; without a command, a table of them.')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND')
    commands.add_parser('ls', help='list them')
    show = commands.add_parser('show', help='print one')
    show.add_argument('name', metavar='NAME', help='its name in the list')
    copy = commands.add_parser('cp', help='copy one, to change it and train with -c FILE')
    copy.add_argument('name', metavar='NAME', help='its name in the list')
    copy.add_argument('file', type=Path, metavar='FILE', help='the file to write')
    check = commands.add_parser('check', help='check every entry of a YAML file of settings')
    check.add_argument('file', type=Path, metavar='FILE', help='the file')
    return parser


def main(argv: Sequence[str]) -> None:
    """Run the command line after `mealv2-train recipes`.

    Raises:
        UserError: If there is no such recipe, or a file cannot be written or has an impossible entry.
    """
    args = build_parser().parse_args(argv)
    if args.command == 'show':
        print(recipe_file(args.name).read_text(), end='')
    elif args.command == 'cp':
        text = recipe_file(args.name).read_text()
        try:
            with args.file.open('x', encoding='utf-8') as file:
                file.write(text)
        except OSError as error:
            raise UserError(f'cannot write {args.file}: {error.strerror}') from error
        print(f'{args.file}: train with mealv2-train -c {args.file}')
    elif args.command == 'check':
        parse_args(['-c', str(args.file)])
        print(f'{args.file}: every entry is possible')
    else:
        print(recipe_table())
