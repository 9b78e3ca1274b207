"""The parts of every command line: ranges, one-line errors, the nearest name, and help that fits its line."""

import argparse
import configparser
import logging.handlers
import re
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import timm
import torch

from timm_mealv2 import command_line as shared
from timm_mealv2.cli import evaluate, hub, report, soft_labels
from timm_mealv2.command_line import BELOW_1, COUNT, POSITIVE, OneLineParser, Option, add_options, flag, one_of, run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.training import run as train
from timm_mealv2.training.options import GROUPS
from timm_mealv2.training.options import build_parser as build_training_parser
from timm_mealv2.training.settings import parse_args
from timm_mealv2.version import __version__


def example() -> argparse.ArgumentParser:
    parser = OneLineParser(prog='example')
    rows = (
        Option('--epochs', COUNT, 'number of epochs', 3),
        Option('--smoothing', BELOW_1, 'smoothing'),
        Option('--rate', POSITIVE, 'rate'),
        Option('--kind', one_of('', 'a', 'b'), 'a or b', ''),
        Option('--student', shared.model_text, 'model'),
        Option('--optimizer', shared.optimizer_text, 'optimizer'),
        Option('--policy', shared.policy_text, 'policy'),
        Option('--run', shared.experiment_text, 'run folder'),
        Option('--weights', shared.file_text, 'file'),
        flag('--fast', help='fast'),
    )
    add_options(parser, rows)
    return parser


@pytest.mark.parametrize(
    ('argv', 'text'),
    [
        ('--epochs many', "argument --epochs: invalid int value: 'many'"),
        ('--epochs 0', 'argument --epochs: must be 1 or more, got 0'),
        ('--smoothing 1', 'must be 0 or more and below 1, got 1'),
        ('--rate 0', 'must be above 0'),
        ('--rate nan', 'must be a finite number'),
        ('--rate 1e999', 'must be a finite number'),
        ('--kind c', "'c': must be one of a, b"),
        ('--student resnet5o', 'the nearest is resnet50'),
        ('--student resnet50.foo', 'no such tag'),
        ('--student foo:bar', 'must be a name of timm'),
        ('--optimizer sdg', 'no such optimizer'),
        ('--policy rand-x9', 'must be such as rand-m9'),
        ('--run ../../x', 'inside --output'),
        ('--run /tmp/x', 'inside --output'),
        ('--weights /absent', 'there is no such file'),
        ('--epoch 3', 'unrecognized arguments: --epoch 3; the nearest option is --epochs'),
        ('--smoothign=0.1', 'the nearest option is --smoothing'),
    ],
)
def test_a_wrong_option_is_one_line_with_its_name(capsys: pytest.CaptureFixture[str], argv: str, text: str) -> None:
    with pytest.raises(SystemExit) as exit:
        example().parse_args(argv.split())
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.count('\n') == 1
    assert text in error
    assert 'example --help lists the options' in error


def test_the_script_ends_as_the_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parents[1] / 'train_distill.py'
    monkeypatch.setattr('sys.argv', [str(script), '--teachers', 'resnet5'])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name='__main__')
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'resnet5' is no timm model" in line


def test_a_subcommand_names_its_own_nearest_option(capsys: pytest.CaptureFixture[str]) -> None:
    parser = OneLineParser(prog='program')
    command = parser.add_subparsers().add_parser('record')
    add_options(command, shared.TEACHERS)
    with pytest.raises(SystemExit):
        parser.parse_args(['record', '--teacher-weight', '1'])
    assert 'the nearest option is --teacher-weights (program record --help' in capsys.readouterr().err


def test_what_is_given_is_typed() -> None:
    args = example().parse_args('--epochs 4 --smoothing 0.1 --rate 1e-3 --kind a --fast --run a/b'.split())
    given = {'epochs': 4, 'smoothing': 0.1, 'rate': 1e-3, 'kind': 'a', 'fast': True, 'run': 'a/b'}
    assert {name: value for name, value in vars(args).items() if value is not None} == given
    assert example().parse_args([]).kind == ''
    for model in ('resnet50', 'hf-hub:me/x', 'local-dir:x', 'resnet50.a1_in1k'):
        assert example().parse_args(['--student', model]).student == model


def assert_help_fits(parser: argparse.ArgumentParser, width: int = 120) -> None:
    """Every option of `parser` names its unit, shows its default, and its help fits one line."""
    lines = parser.format_help().splitlines()
    assert max(map(len, lines)) <= width
    for action in parser._actions:
        assert action.help, action.dest
        text = ' '.join(parser._get_formatter()._expand_help(action).split())
        assert any(line.endswith(text) for line in lines), f'{action.option_strings} does not fit: {text}'
        if action.nargs != 0:
            assert action.metavar, action.dest


def test_help_has_units_and_defaults_and_fits_its_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv('COLUMNS', '122')
    assert_help_fits(build_training_parser())
    for main, words in ((train.main, ['--help', 'all']), (soft_labels.main, ['record', '--help'])):
        with pytest.raises(SystemExit):
            main(words)
        shown = capsys.readouterr().out
        assert '(default: 128)' in shown
        assert '(default: 0.08 1.0)' in shown or '(default: [0.08, 1.0])' in shown


HELP = {'': 70, 'all': 480, 'mealv2': 60, 'schedule': 60, 'augmentation': 60, 'run': 60}


@pytest.mark.parametrize('group', [*HELP, *(group for group in GROUPS if group not in HELP)])
def test_help_of_a_group_is_short_and_shows_its_defaults(
    group: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv('COLUMNS', '82')
    for argv in (['--help', *group.split()], ['--epochs', '3', '--help', *group.split()]):
        with pytest.raises(SystemExit) as exit:
            train.main(argv)
        assert exit.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        assert 4 < len(lines) <= HELP.get(group, 100)
        shown = ''.join(''.join(lines).split())  # folded lines as one
        for title in GROUPS if group == 'all' else [group or 'mealv2']:
            for option in GROUPS[title]:
                assert option.flags[0] in shown
                default, text = option.kwargs.get('default'), option.kwargs['help']
                if title != 'refused' and default not in (None, '', [], {}) and 'default' not in text:
                    assert ''.join(f'{text} (default: {default})'.split()) in shown
        assert ('--opt-betas' in shown) == (group in ('all', 'optimizer'))
        assert group or all(title in shown for title in GROUPS)


def test_an_unknown_group_lists_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        train.main(['--help', 'optimiser'])
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.count('\n') == 1
    assert all(title in error for title in ('all', *GROUPS))


def test_the_package_run_as_a_program_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module('timm_mealv2', run_name='__main__')
    listed = capsys.readouterr().out
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[1] / 'setup.cfg')
    commands = re.findall(r'^([\w-]+) *=', config['options.entry_points']['console_scripts'], re.MULTILINE)
    assert sorted(re.findall(r'^mealv2-\w+', listed, re.MULTILINE)) == sorted(commands)
    assert len(listed.splitlines()) == len(commands) + 2


def test_ends_of_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: Sequence[str] | None) -> None:
        raise {'user': UserError('two\nlines'), 'interrupt': KeyboardInterrupt()}[(argv or ())[0]]

    for word, code, text in (('user', 2, 'error: two lines\n'), ('interrupt', 130, 'interrupted\n')):
        with pytest.raises(SystemExit) as exit:
            run_cli(main, [word])
        assert exit.value.code == code
        assert capsys.readouterr().err == text


@pytest.mark.parametrize(
    ('main', 'words'),
    [(train.main, ''), (train.main, 'recipes'), (evaluate.main, ''), (report.main, ''), (soft_labels.main, '')]
    + [(hub.main, words) for words in ('', 'export', 'export-ensemble', 'convert', 'push', 'pull')],
)
def test_every_program_tells_its_version(
    main: Callable[[Sequence[str]], None], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main([*words.split(), '--version'])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f'timm_mealv2 {__version__}, timm {timm.__version__}, torch {torch.__version__}\n'


def test_mealv2_train_alone_says_how_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        train.main([])
    assert exit.value.code == 2
    text = capsys.readouterr().err
    assert max(map(len, text.splitlines())) <= 120
    assert all(option in build_training_parser()._option_string_actions for option in re.findall(r'--[\w-]+', text))
    (command,) = re.findall(r'^ +mealv2-train (.+)$', text, re.MULTILINE)
    assert list(map(str, parse_args(command.split()).teachers)) == ['resnet50.a1_in1k', 'resnet101.a1_in1k']


def test_what_the_hubs_client_says_is_not_said_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    client, seen = logging.getLogger('huggingface_hub'), logging.handlers.BufferingHandler(capacity=9)
    assert client.handlers  # it shows its lines itself
    monkeypatch.setattr(client, 'propagate', True)
    monkeypatch.setattr(logging.getLogger(), 'handlers', [seen])
    run_cli(lambda argv: client.warning('Retrying in 1s'))
    assert seen.buffer == []
