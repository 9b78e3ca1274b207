"""Make the other data sets of the studies, as image folders: digits, tiles of GCompris's photos, emoji.

    python studies/make_data.py digits                  # needs scikit-learn
    python studies/make_data.py photos PHOTO...         # docs/imagenet_lite.md says where the photos come from
    python studies/make_data.py icons VENDOR...         # docs/evidence.md names the packages; fonts need fonttools

`output/studies/digits` has 20 images of each of scikit-learn's ten digits for training, 50 to tune on, and the others
as test images. `output/studies/photos` has squares of photos, whose class is the photo that they were cut out of. The
squares of a photo are those of a chessboard: the black ones are for training (`train` has eight of them, `train_all`
all), the white ones are the test images, but for every fourth, which is to tune on. No two share a pixel.

`output/studies/icons` has the emoji of several vendors, each a color font or a folder of PNG files named by code
points; their class is Unicode's subgroup. `train_all` has those of all vendors but the last, `train` one of these
vendors' pictures of each emoji; the last vendor's are the test images, but for every fourth of a class, which is to
tune on.
"""

import random
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.errors import UserError

OUT = Path('output/studies')
TILE, SHORTER_SIDE = 32, 192

EMOJI = Path('/usr/share/unicode/emoji/emoji-test.txt')
SKIN_TONES = set('\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff')
INVISIBLE = dict.fromkeys((0xFE0F, 0x200D))
"""The selector of the colored form, and the joiner of several emoji to one."""
FEWEST = 8
"""Emoji of a class."""
FONT_SIZE = 109
"""The one that Noto's bitmaps have."""


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


def emoji_classes() -> dict[str, list[str]]:
    """Return subgroup -> its emoji, from Unicode's list, without flags, skin tones and small subgroups."""
    classes: dict[str, list[str]] = {}
    group = name = ''
    for line in EMOJI.read_text(encoding='utf-8').splitlines():
        key, _, value = line.partition(': ')
        if key == '# group':
            group = value
        elif key == '# subgroup':
            name = value.replace(' & ', '-')
        elif '; fully-qualified' in line and group != 'Flags':
            emoji = ''.join(chr(int(code, 16)) for code in line.partition(';')[0].split())
            if not SKIN_TONES.intersection(emoji):
                classes.setdefault(name, []).append(emoji)
    return {name: emojis for name, emojis in classes.items() if len(emojis) >= FEWEST}


def pictures_of(vendor: Path) -> Callable[[str], Image.Image | None]:
    """Return a function from an emoji to the vendor's transparent picture, None where there is none."""
    if vendor.is_dir():

        def from_file(emoji: str) -> Image.Image | None:
            path = vendor / f'{"-".join(f"{ord(code):04X}" for code in emoji.translate(INVISIBLE))}.png'
            return Image.open(path).convert('RGBA') if path.is_file() else None

        return from_file

    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from fontTools.ttLib import TTFont

    font = TTFont(vendor)
    codes = font.getBestCmap().keys() | INVISIBLE.keys()
    file = BytesIO(vendor.read_bytes())
    if 'COLR' in font:
        # Pillow cuts the colored layers off outside the glyph's own outline, which may be empty: make it the whole em.
        low, high, em = font['hhea'].descent, font['hhea'].ascent, font['head'].unitsPerEm
        pen = TTGlyphPen(None)
        pen.moveTo((0, low))
        for corner in ((0, high), (em, high), (em, low)):
            pen.lineTo(corner)
        pen.closePath()
        whole = pen.glyph()
        for name in font['COLR'].ColorLayers:
            font['glyf'][name] = whole
        file = BytesIO()
        font.save(file)
        file.seek(0)
    drawing = ImageFont.truetype(file, FONT_SIZE)

    def from_font(emoji: str) -> Image.Image | None:
        # Several glyphs side by side stand for a sequence that the font does not know.
        if not codes >= set(map(ord, emoji)) or drawing.getlength(emoji) > 1.5 * FONT_SIZE:
            return None
        canvas = Image.new('RGBA', (2 * FONT_SIZE, 2 * FONT_SIZE))
        ImageDraw.Draw(canvas).text((FONT_SIZE // 4, FONT_SIZE // 4), emoji, font=drawing, embedded_color=True)
        return canvas

    return from_font


def make_icons(vendors: Sequence[Path]) -> None:
    """Write the emoji of vendors on white; a picture that was there already, pixel for pixel, is left out."""
    classes = emoji_classes()
    images: dict[tuple[str, str], list[Image.Image]] = {}
    seen: set[bytes] = set()
    for vendor in vendors:
        picture, counts = pictures_of(vendor), {'pictures': 0, 'doubles': 0}
        for name, emojis in classes.items():
            for emoji in emojis:
                drawn = picture(emoji)
                if drawn is None or not (box := drawn.getbbox()):
                    continue
                drawn = ImageOps.pad(drawn.crop(box), (TILE, TILE), Image.Resampling.BICUBIC)
                image = Image.alpha_composite(Image.new('RGBA', drawn.size, 'white'), drawn).convert('RGB')
                if image.tobytes() in seen:
                    counts['doubles'] += 1
                    continue
                seen.add(image.tobytes())
                counts['pictures'] += 1
                images.setdefault((name, emoji if vendor != vendors[-1] else 'test'), []).append(image)
        print(f'{vendor.name}: {counts["pictures"]} pictures, {counts["doubles"]} left out as doubles')
    for name, emojis in classes.items():
        test = images.get((name, 'test'), [])
        drawings = [images[name, emoji] for emoji in emojis if (name, emoji) in images]
        chosen = random.Random(name)
        splits = {
            'train': [chosen.choice(some) for some in drawings],
            'train_all': [image for some in drawings for image in some],
            'tuning': test[::4],
            'validation': [image for number, image in enumerate(test) if number % 4],
        }
        for split, part in splits.items():
            write(OUT / 'icons' / split / name, part)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the data set that is named."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest='name')
    commands.add_parser('digits')
    commands.add_parser('photos').add_argument('photos', type=Path, nargs='+', metavar='PHOTO')
    commands.add_parser('icons').add_argument('vendors', type=Path, nargs='+', metavar='VENDOR')
    args = parser.parse_args(argv)
    if args.name == 'digits':
        make_digits()
    elif args.name == 'photos':
        make_photos(args.photos)
    else:
        make_icons(args.vendors)


if __name__ == '__main__':
    run_cli(main)
