"""The benchmarks' tables: docs/performance.md shows what was measured."""

import runpy
from pathlib import Path

import pytest

from timm_mealv2.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_shows_the_results() -> None:
    runpy.run_path(str(ROOT / 'benchmarks/report.py'))['main'](['--check'])


def test_a_table_that_differs_is_refused(tmp_path: Path) -> None:
    report = runpy.run_path(str(ROOT / 'benchmarks/report.py'))
    page = tmp_path / 'performance.md'
    page.write_text(report['DOCUMENT'].read_text().replace('<!-- end -->', 'more\n<!-- end -->', 1))
    report['main'].__globals__['DOCUMENT'] = page
    with pytest.raises(UserError, match=r'python benchmarks/report\.py writes it'):
        report['main'](['--check'])
    report['main']([])
    report['main'](['--check'])
