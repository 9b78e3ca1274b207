"""Take the photos out of GCompris's resource files: `gcompris.py OUT FILE.rcc...`, of Debian's gcompris-qt-data."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.errors import UserError


def extract(resources: Path, out: Path) -> int:
    """Write the opaque WebP pictures of a resource file from 150 pixels on to `out`; return how many there are."""
    try:
        data = resources.read_bytes()
    except OSError as error:
        raise UserError(f'{resources} cannot be read: {error}') from error
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    for header in re.finditer(rb'RIFF(.{4})WEBPVP8', data, re.DOTALL):
        file = data[header.start() : header.start() + 8 + int.from_bytes(header[1], 'little')]
        with Image.open(io.BytesIO(file)) as image:
            if min(image.size) >= 150 and image.mode == 'RGB':
                (out / f'{resources.stem}-{count:03}.webp').write_bytes(file)
                count += 1
    return count


def main(argv: Sequence[str] | None = None) -> None:
    """Take apart the files of the command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, help='folder to write')
    parser.add_argument('resources', type=Path, nargs='+', metavar='FILE')
    args = parser.parse_args(argv)
    for resources in args.resources:
        print(f'{resources.name}: {extract(resources, args.out)} photos')


if __name__ == '__main__':
    run_cli(main)
