"""The benchmarks' tables: docs/performance.md shows what was measured."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_shows_the_results() -> None:
    runpy.run_path(str(ROOT / 'benchmarks/report.py'))['main'](['--check'])
