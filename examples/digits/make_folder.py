"""Write scikit-learn's handwritten digits (1,797 grey images of 8x8) as an image folder that timm reads.

Every fifth image goes to the validation split: `python examples/digits/make_folder.py output/digits`.
The images are the test set of UCI's "Optical Recognition of Handwritten Digits" (CC BY 4.0), which scikit-learn ships.
"""

import argparse
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits


def make_folder(root: Path) -> None:
    """Write `root`/train/DIGIT/*.png and `root`/validation/DIGIT/*.png."""
    images, labels = load_digits(return_X_y=True)
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / ('validation' if number % 5 == 0 else 'train') / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        # 17 grey levels, 0..16
        Image.fromarray((pixels.reshape(8, 8) * 255 / 16).round().astype('uint8')).save(folder / f'{number:04}.png')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('root', type=Path, help='folder to write')
    make_folder(parser.parse_args().root)
