"""The README on a package index, which has none of the repository's files."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / 'README.md').read_text()


def targets(text: str) -> list[str]:
    return re.findall(r'\]\(([^)]+)\)', text)


def test_links_of_the_readme_lead_to_files() -> None:
    relative = [target for target in targets(README) if not target.startswith('https://')]
    assert relative
    assert all((ROOT / target.partition('#')[0]).is_file() for target in relative)


def test_links_become_absolute_below_the_repository_or_plain_text() -> None:
    long_description = runpy.run_path(str(ROOT / 'setup.py'))['long_description']
    absolute = long_description(README, 'https://example.org/repo')
    assert all(target.startswith('https://') for target in targets(absolute))
    assert 'https://example.org/repo/raw/main/docs/quickstart.png' in targets(absolute)
    assert 'https://example.org/repo/blob/main/docs/own_data.md' in targets(absolute)
    plain = long_description(README, None)
    assert targets(plain) == [target for target in targets(README) if target.startswith('https://')]
    assert 'Your own data says which teachers' in plain
