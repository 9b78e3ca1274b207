"""Make the two other data sets of the studies, as image folders: digits, and tiles of GCompris's photos.

    python studies/make_data.py digits                  # needs scikit-learn
    python studies/make_data.py photos PHOTO...         # docs/imagenet_lite.md says where the photos come from

`output/studies/digits` has 20 images of each of scikit-learn's ten digits for training, 50 to tune on, and the others
as test images. `output/studies/photos` has squares of photos, whose class is the photo that they were cut out of. The
squares of a photo are those of a chessboard: the black ones are for training (`train` has eight of them, `train_all`
all), the white ones are the test images, but for every fourth, which is to tune on. No two share a pixel.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.errors import UserError

OUT = Path('output/studies')
TILE, SHORTER_SIDE = 32, 192


def write(folder: Path, images: Sequence[Image.Image]) -> None:
    """Write images as numbered PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        image.save(folder / f'{number:04}.png')


def make_digits() -> None:
    """Write scikit-learn's digits, 8x8 and gray."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError('scikit-learn is missing: pip install scikit-learn.') from error
    pixels, labels = load_digits(return_X_y=True)
    for digit in range(10):
        rows = (pixels[labels == digit].reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
        images = [Image.fromarray(row) for row in rows]
        for split, part in (('train', images[:20]), ('tuning', images[20:70]), ('validation', images[70:])):
            write(OUT / 'digits' / split / str(digit), part)


def make_photos(photos: Sequence[Path]) -> None:
    """Write the squares of photos."""
    for path in photos:
        try:
            image = Image.open(path).convert('RGB')
        except OSError as error:
            raise UserError(f'{path} cannot be read as a picture: {error}') from error
        scale = SHORTER_SIDE / min(image.size)
        columns, rows = (round(side * scale) // TILE for side in image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        squares: tuple[list[Image.Image], list[Image.Image]] = ([], [])
        for row in range(rows):
            for column in range(columns):
                left, top = column * TILE, row * TILE
                squares[(row + column) % 2].append(image.crop((left, top, left + TILE, top + TILE)))
        black, white = squares
        for some in squares:
            random.Random(path.stem).shuffle(some)
        test = [square for number, square in enumerate(white) if number % 4]
        splits = {'train': black[:8], 'train_all': black, 'tuning': white[::4], 'validation': test}
        for split, part in splits.items():
            write(OUT / 'photos' / split / path.stem, part)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the data set that is named."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest='name')
    commands.add_parser('digits')
    commands.add_parser('photos').add_argument('photos', type=Path, nargs='+', metavar='PHOTO')
    args = parser.parse_args(argv)
    if args.name == 'digits':
        make_digits()
    else:
        make_photos(args.photos)


if __name__ == '__main__':
    run_cli(main)
