"""Cut random square crops out of photos, as an image folder without labels: `crops.py OUT/train PHOTO...`."""

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.errors import UserError


def open_photo(path: Path) -> Image.Image:
    """Return a photo in RGB.

    Raises:
        UserError: If it is not there or no picture.
    """
    try:
        return Image.open(path).convert('RGB')
    except OSError as error:
        raise UserError(f'{path} cannot be read as a picture: {error}') from error


def write_crops(photos: Sequence[Path], out: Path, count: int, pixels: int, seed: int = 0) -> None:
    """Write `count` crops of each photo, `pixels` wide, to `out`/photos/*.jpg; sides are 35 to 100 % of the shorter."""
    chance = random.Random(seed)
    folder = out / 'photos'
    folder.mkdir(parents=True, exist_ok=True)
    for photo in photos:
        image = open_photo(photo)
        image.thumbnail((1280, 1280))
        for number in range(count):
            side = round(min(image.size) * chance.uniform(0.35, 1))
            left, top = (chance.randint(0, length - side) for length in image.size)
            crop = image.crop((left, top, left + side, top + side)).resize((pixels, pixels), Image.Resampling.BICUBIC)
            crop.save(folder / f'{photo.stem}-{number:03}.jpg', quality=95)


def main(argv: Sequence[str] | None = None) -> None:
    """Cut up the photos of the command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, help='folder to write')
    parser.add_argument('photos', type=Path, nargs='+', metavar='PHOTO')
    parser.add_argument('--count', type=int, default=24, help='crops of each photo; default: 24')
    parser.add_argument('--pixels', type=int, default=260, help='default: 260')
    args = parser.parse_args(argv)
    write_crops(args.photos, args.out, args.count, args.pixels)


if __name__ == '__main__':
    run_cli(main)
