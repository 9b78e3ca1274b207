"""Searches for command lines and settings files that end otherwise than in a training or in one line."""

import argparse
import contextlib
import io
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from timm_mealv2.command_line import run_cli
from timm_mealv2.training.arguments import build_parser, parse_args

ACTIONS = {
    action.dest: action
    for action in build_parser()._actions
    if action.dest not in ('help', 'list_recipes', 'config', 'recipe')
}
ODD_TEXTS = [
    '',
    ' ',
    '-',
    '=',
    'a=',
    '=a',
    'a=b',
    ',',
    ':',
    '..',
    '/',
    'auto',
    'None',
    'nan',
    '1e999',
    'ä\x00',
    '{}',
    '[',
]
NUMBERS = ['-1', '0', '1', '2', '0.5', '1.5', '-0.0', '1e400', '10' * 30, '1_0', '0x10', '٣', 'inf']
words = st.one_of(
    st.sampled_from([*ODD_TEXTS, *NUMBERS]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=8),
)
# What YAML can hold: wrong types at every place.
values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.sampled_from([10**400, -(10**400)]), st.floats(), words, st.dates()
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def search(max_examples: int) -> Any:
    """The same examples in every run."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        derandomize=True, database=None, deadline=None, suppress_health_check=checks, max_examples=max_examples
    )


def assert_parsed_or_told(argv: list[str]) -> None:
    """`argv` is accepted, or ends in one line and exit code 2."""
    errors, code = io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(errors):
            run_cli(lambda argv: parse_args(argv) and None, argv)
    except SystemExit as exit:
        code = exit.code
    assert code in (0, 2)
    assert errors.getvalue().count('\n') == (1 if code else 0), errors.getvalue()


def arguments(action: argparse.Action) -> st.SearchStrategy[list[str]]:
    """Words after an option: as many as it takes, or another number of them."""
    some = words if not action.choices else st.one_of(st.sampled_from(list(action.choices)), words)
    if action.nargs == 0:
        return st.just([])
    if action.nargs is None:
        return st.lists(some, min_size=1, max_size=1)
    return st.lists(some, max_size=4)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """One to three options with words that fit in or do not."""
    argv = []
    for dest in draw(st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=3)):
        action = ACTIONS[dest]
        if action.option_strings:
            argv.append(draw(st.sampled_from(action.option_strings)))
        argv += draw(arguments(action))
    return argv


@search(300)
@given(command_lines())
def test_any_command_line_is_accepted_or_told_in_one_line(argv: list[str]) -> None:
    assert_parsed_or_told([word for word in argv if word not in ('-h', '--help', '--version', '--list-recipes')])


@search(300)
@given(st.dictionaries(st.sampled_from(sorted(ACTIONS)) | st.text(max_size=8), values, min_size=1, max_size=3))
def test_any_settings_file_is_accepted_or_told_in_one_line(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / 'settings.yaml'
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding='utf-8', errors='surrogatepass')
    assert_parsed_or_told(['-c', str(path)])


@search(100)
@given(st.text(max_size=60) | st.binary(max_size=60))
def test_any_bytes_as_a_settings_file_are_accepted_or_told_in_one_line(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / 'settings.yaml'
    path.write_bytes(content if isinstance(content, bytes) else content.encode('utf-8', 'surrogatepass'))
    assert_parsed_or_told(['-c', str(path)])
