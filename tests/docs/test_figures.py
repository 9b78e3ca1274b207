"""Figures in the documentation that a command of it gives again."""

import re
import shlex
from pathlib import Path

import pytest

from timm_mealv2.cli.evaluate import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_table_of_an_evaluation_is_what_its_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / 'docs/evaluation.md').read_text()
    found = re.search(r'```sh\nmealv2-eval (.*?)```\n\n```\n(model .*?)```', text, re.DOTALL)
    assert found is not None
    main(shlex.split(found[1].replace('\\\n', ' ')))
    printed, shown = ([line.split() for line in table.splitlines()] for table in (capsys.readouterr().out, found[2]))
    assert [line[:2] for line in printed] == [line[:2] for line in shown]
    assert printed[0] == shown[0]
    for ours, expected in zip(printed[1:], shown[1:], strict=True):
        for value, figure in zip(ours[2:], expected[2:], strict=True):
            # Another machine's rounding may turn one image of 2,000.
            assert value == figure or float(value) == pytest.approx(float(figure), abs=0.051), (ours, expected)
