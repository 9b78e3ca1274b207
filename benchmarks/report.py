r"""Make the tables of docs/performance.md from benchmarks/results/*.json.

python benchmarks/report.py            # writes each table between its markers <!-- NAME --> and <!-- end -->
python benchmarks/report.py --check    # fails if a table is not that of its file, or a file has no markers
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / 'docs/performance.md'


def table(path: Path) -> str:
    """Return a result as Markdown: what it is, its table, the command, and the machine."""
    result = json.loads(path.read_text())
    columns, rows = result['columns'], result['rows']
    lines = [result['title'], '', f'| {" | ".join(columns)} |', '|---' + '|---:' * (len(columns) - 1) + '|']
    lines += [f'| {" | ".join(map(str, row))} |' for row in rows]
    return '\n'.join([*lines, '', '```sh', result['command'], '```', '', f'{result["machine"]}.'])


def fill(document: str) -> str:
    """Return the document with each table in its place."""
    for path in sorted((ROOT / 'benchmarks/results').glob('*.json')):
        head, begin, rest = document.partition(f'<!-- {path.stem} -->\n')
        _, end, tail = rest.partition('<!-- end -->')
        if not end:
            raise UserError(f'{DOCUMENT.name} has no place <!-- {path.stem} --> … <!-- end --> for {path.name}')
        document = f'{head}{begin}{table(path)}\n{end}{tail}'
    return document


def main(argv: Sequence[str] | None = None) -> None:
    """Write or check the document."""
    parser: argparse.ArgumentParser = OneLineParser(description='Make the tables of docs/performance.md.')
    parser.add_argument('--check', action='store_true', help='write nothing; fail if a table differs')
    args = parser.parse_args(argv)
    document = DOCUMENT.read_text()
    filled = fill(document)
    if args.check:
        if filled != document:
            raise UserError(f'{DOCUMENT.name} differs from benchmarks/results: python benchmarks/report.py writes it')
        return
    with replacing(DOCUMENT) as path:
        path.write_text(filled)


if __name__ == '__main__':
    run_cli(main)
