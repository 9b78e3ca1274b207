"""The whole command line: what it gives back."""

import pytest

from timm_mealv2.training.arguments import build_parser, paper_differences, parse_args

TWO_TEACHERS = ('--teachers', 'resnet18', 'resnet34')


def test_the_parser_is_public() -> None:
    assert build_parser().prog == 'mealv2-train'


def test_teachers_are_named_in_two_ways() -> None:
    assert parse_args(list(TWO_TEACHERS)).teachers == ['resnet18', 'resnet34']
    assert parse_args(['--kd-model-name', 'resnet18,resnet34']).teachers == ['resnet18', 'resnet34']
    assert parse_args(['--teachers', 'local-dir:a,b']).teachers == ['local-dir:a,b']
    assert parse_args([]).teachers == []


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse_args(['--list-recipes'])
    assert exit.value.code == 0
    assert 'quickstart' in capsys.readouterr().out


def test_differences_from_the_paper_are_named() -> None:
    texts = '; '.join(paper_differences(parse_args(list(TWO_TEACHERS)), 128, 0.01))
    for name in ('weight decay 2e-05 (paper: 0)', 'color jitter 0.4', 'interpolation of the crops random', 'schedule'):
        assert name in texts
