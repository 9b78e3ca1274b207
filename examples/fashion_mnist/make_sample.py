"""Make the quick start's sample of Fashion-MNIST, and the larger sets that it was measured with.

Without options: `data/train.tar`, the first 200 training images of each class, and `data/validation.tar`, the first 200
test images of each class, beside this file. timm reads them with `--data-dir examples/fashion_mnist/data
--train-split train.tar --val-split validation.tar`. The same input gives the same bytes.

    python examples/fashion_mnist/make_sample.py
    python examples/fashion_mnist/make_sample.py --full             # all 60,000 + 10,000 images
    python examples/fashion_mnist/make_sample.py --unlabeled 6000   # images without their labels
    python examples/fashion_mnist/make_sample.py --per-class 20 --out output/fashion_mnist_200

The source is the four .gz files of Debian's package `dataset-fashion-mnist` (MIT licence, Zalando SE).
"""

import argparse
import gzip
import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from timm_mealv2.command_line import COUNT, OneLineParser, run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing

HERE = Path(__file__).resolve().parent
SOURCE = Path('/usr/share/datasets/fashion-mnist')
CLASS_NAMES = (
    *('0-t-shirt-top', '1-trouser', '2-pullover', '3-dress', '4-coat'),
    *('5-sandal', '6-shirt', '7-sneaker', '8-bag', '9-ankle-boot'),
)
"""Folder names by the source's labels 0..9; the digits have timm number the classes likewise."""
PER_CLASS = 200


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of bytes: labels [N] or images [N, 28, 28], uint8."""
    if not path.is_file():
        raise UserError(
            f'expected {path}: install the Debian package dataset-fashion-mnist, or name its folder (--source)'
        )
    with gzip.open(path) as file:
        header = np.frombuffer(file.read(4), np.uint8)
        if len(header) < 4 or tuple(header[:3]) != (0, 0, 8):
            raise UserError(f'{path} is not a gzipped IDX file of bytes: fetch it again')
        shape = np.frombuffer(file.read(4 * int(header[3])), '>u4')
        return np.frombuffer(file.read(), np.uint8).reshape(shape)


def read_split(source: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the images [N, 28, 28] and labels [N] of `prefix`, 'train' or 't10k'."""
    images = read_idx(source / f'{prefix}-images-idx3-ubyte.gz')
    return images, read_idx(source / f'{prefix}-labels-idx1-ubyte.gz')


def first_of_each_class(labels: np.ndarray, count: int = PER_CLASS) -> np.ndarray:
    """Return the indices of the first `count` images of every class, in ascending order."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(len(CLASS_NAMES))]))


def write_tar(path: Path, images: np.ndarray, folders: Sequence[str], indices: Iterable[int]) -> None:
    """Write images as lossless PNG into a tar file, as FOLDER/INDEX.png; `folders` has one name for every image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The USTAR format and TarInfo's defaults (time, owner and group 0) leave nothing of the machine in the file.
    with replacing(path) as temporary, tarfile.open(temporary, 'w', format=tarfile.USTAR_FORMAT) as tar:
        for index in sorted(indices, key=lambda index: (folders[index], index)):
            png = io.BytesIO()
            Image.fromarray(images[index]).save(png, 'PNG', optimize=True)
            member = tarfile.TarInfo(f'{folders[index]}/{index:05d}.png')
            member.size = png.tell()
            png.seek(0)
            tar.addfile(member, png)
    print(f'{path}: {path.stat().st_size / 2**20:.1f} MiB')


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = OneLineParser(description='Make the sample of Fashion-MNIST that the quick start runs on.')
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--full', action='store_true', help='write all 60,000 training and 10,000 test images')
    what.add_argument(
        '--unlabeled',
        type=int,
        metavar='N',
        help='write the first N training images that are not in the sample, in one folder, without labels',
    )
    what.add_argument(
        '--per-class', type=COUNT, metavar='N', default=PER_CLASS, help='training images of each class (default: 200)'
    )
    parser.add_argument(
        '--source', type=Path, default=SOURCE, help='folder with the four .gz files (default: %(default)s)'
    )
    parser.add_argument('--out', type=Path, help='folder to write to (default: data/ here, or under output/)')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write train.tar and validation.tar."""
    args = build_parser().parse_args(argv)
    images, labels = read_split(args.source, 'train')
    test_images, test_labels = read_split(args.source, 't10k')
    folders, test_folders = ([CLASS_NAMES[label] for label in each] for each in (labels, test_labels))
    sample, test_sample = first_of_each_class(labels), first_of_each_class(test_labels)
    if args.full:
        out = args.out or Path('output/fashion_mnist_full')
        sample, test_sample = np.arange(len(labels)), np.arange(len(test_labels))
    elif args.unlabeled is not None:
        out = args.out or Path('output/fashion_mnist_unlabeled')
        others = np.setdiff1d(np.arange(len(labels)), sample)
        if not 1 <= args.unlabeled <= len(others):
            raise UserError(f'--unlabeled: expected 1 to {len(others)} images, received {args.unlabeled}')
        sample, folders = others[: args.unlabeled], ['images'] * len(labels)
    else:
        out = args.out or HERE / 'data'
        sample = first_of_each_class(labels, args.per_class)
    write_tar(out / 'train.tar', images, folders, sample)
    write_tar(out / 'validation.tar', test_images, test_folders, test_sample)


if __name__ == '__main__':
    run_cli(main)
