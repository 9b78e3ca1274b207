"""docs/options.md is what the parsers say."""

import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / 'docs'


def test_options_page_is_what_the_parsers_say() -> None:
    page = runpy.run_path(str(DOCS / 'options.py'))['page']()
    assert (DOCS / 'options.md').read_text() == page, 'run: python docs/options.py'
