"""Cut random square crops out of photos, as an image folder without labels: `crops.py OUT/train PHOTO...`."""

import argparse
import random
from pathlib import Path

from PIL import Image


def write_crops(photos: list[Path], out: Path, count: int, pixels: int, seed: int = 0) -> None:
    """Write `count` crops of each photo, `pixels` wide, to `out`/photos/*.jpg; sides are 35 to 100 % of the shorter."""
    chance = random.Random(seed)
    folder = out / 'photos'
    folder.mkdir(parents=True, exist_ok=True)
    for photo in photos:
        image = Image.open(photo).convert('RGB')
        image.thumbnail((1280, 1280))
        for number in range(count):
            side = round(min(image.size) * chance.uniform(0.35, 1))
            left, top = (chance.randint(0, length - side) for length in image.size)
            crop = image.crop((left, top, left + side, top + side)).resize((pixels, pixels), Image.Resampling.BICUBIC)
            crop.save(folder / f'{photo.stem}-{number:03}.jpg', quality=95)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, help='folder to write')
    parser.add_argument('photos', type=Path, nargs='+', metavar='PHOTO')
    parser.add_argument('--count', type=int, default=24, help='crops of each photo; default: 24')
    parser.add_argument('--pixels', type=int, default=260, help='default: 260')
    args = parser.parse_args()
    write_crops(args.photos, args.out, args.count, args.pixels)
