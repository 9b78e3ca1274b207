"""The options: timm's as they are, ours beside them, each with its range, its unit and a line of help."""

import json
from pathlib import Path
from typing import Any

import pytest

from timm_mealv2.training.options import REFUSED, build_parser

# Facts about huggingface/pytorch-image-models train.py: flags, dest, action, type, default, nargs, choices.
TIMM_OPTIONS: list[list[Any]] = json.loads((Path(__file__).parent / 'timm_train_options.json').read_text())


def test_every_option_of_timm_is_there_with_its_type_and_default() -> None:
    actions = {action.dest: action for action in build_parser()._actions}
    assert len(TIMM_OPTIONS) == 172
    for flags, dest, _, kind, default, nargs, choices in TIMM_OPTIONS:
        action = actions[dest]
        assert list(action.option_strings) == [flag for flag in flags if flag.startswith('-')]
        assert getattr(action.type, '__name__', None) == kind, dest
        assert action.nargs == nargs, dest
        if dest == 'kd_distill_type':
            assert action.default == 'mealv2'
        else:
            assert action.default == default, dest
            assert (list(action.choices) if action.choices else None) == choices, dest


def test_every_number_has_a_range() -> None:
    refused = {flag for option in REFUSED for flag in option.flags}
    for action in build_parser()._actions:
        if getattr(action.type, '__name__', '') in ('int', 'float') and not refused & {*action.option_strings}:
            assert action.type not in (int, float), action.dest


@pytest.mark.parametrize(
    ('argv', 'text'),
    [
        ('--epochs 0', 'must be 1 or more'),
        ('--lr -0.1', 'must be 0 or more'),
        ('--hflip 1.1', 'must be 0 to 1'),
        ('--smoothing 1', 'must be 0 or more and below 1'),
        ('--clip-grad 0', 'must be above 0'),
        ('--head-init-bias inf', 'must be a finite number'),
        ('--seed 4294967296', 'must be 0 to 4294967295'),
        ('--opt-betas 0.9 1', 'below 1'),
        ('--sched cosinus', 'must be one of cosine, tanh'),
        ('--lr-base-scale log', 'must be one of linear, sqrt'),
        ('--teacher-dtype int8', 'invalid choice'),
        ('--input-size 32 32', 'expected 3 arguments'),
        ('--model-kwargs channels', 'expected KEY=VALUE'),
        ('--epoch 3', 'the nearest option is --epochs'),
    ],
)
def test_what_is_out_of_range_names_the_option(capsys: pytest.CaptureFixture[str], argv: str, text: str) -> None:
    with pytest.raises(SystemExit) as exit:
        build_parser().parse_args(argv.split())
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.count('\n') == 1
    assert argv.split()[0] in error
    assert text in error


def test_parsers_are_fresh() -> None:
    build_parser().set_defaults(epochs=1)
    assert build_parser().parse_args([]).epochs == 300
    build_parser().parse_args(['--model-kwargs', 'a=1'])
    assert build_parser().parse_args([]).model_kwargs == {}
