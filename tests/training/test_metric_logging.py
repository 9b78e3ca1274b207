"""The figures of a run: summary.csv."""

from pathlib import Path

import pytest

from timm_mealv2.errors import UserError
from timm_mealv2.runs import TIMES
from timm_mealv2.training.metric_logging import append_summary


@pytest.mark.parametrize(
    'content', ['time,loss\n1,2\n', 'epoch,loss\nhigh,2\n', 'epoch,loss\n0,"' + 150_000 * 'x', 'epoch\n\xff']
)
def test_a_damaged_summary_is_refused_and_stays_as_it_is(content: str, tmp_path: Path) -> None:
    path = tmp_path / 'summary.csv'
    path.write_text(content, encoding='latin-1')
    with pytest.raises(UserError, match=r'summary\.csv is damaged'):
        append_summary(path, 1, {'loss': 0.5, **dict.fromkeys(TIMES, 0.1)}, {'top1': 50.0}, lr=0.1)
    assert path.read_text(encoding='latin-1') == content
