"""What the studies train on: Fashion-MNIST, and the other data sets that `make_data.py` makes."""

from dataclasses import dataclass

SAMPLE = 'examples/fashion_mnist/data'
FULL = 'output/fashion_mnist_full'
LABELED, UNLABELED = 'output/studies/labeled', 'output/studies/unlabeled'
ONE, TWO = 'local-dir:studies/teachers/one', 'local-dir:studies/teachers/two'


@dataclass(frozen=True)
class DataSet:
    """Images that models are trained and measured on, 32x32 pixels.

    Args:
        folder: Where they are.
        tuning: Split that learning rates are judged on.
        test: Split of the test images.
        teacher: Ensemble that a student is compared with.
        options: Options of `train_distill.py` that tell a training on it from one on Fashion-MNIST.
        classes: Number of classes.
        channels: 1 or 3.
        mean: Mean of the pixels (0..1) in each channel.
        std: Their standard deviation.
        size: Pixels of a side in tests.
    """

    folder: str
    tuning: str = 'tuning'
    test: str = 'validation'
    teacher: str = ''
    options: str = ''
    classes: int = 10
    channels: int = 1
    mean: float = 0.286
    std: float = 0.353
    size: int = 32


FASHION = DataSet(FULL, tuning='train.tar', test='validation.tar', teacher=TWO)
"""The last twelfth of each class of its training images is what learning rates are judged on."""
DIGITS = DataSet('output/studies/digits', options='--train-split train --val-split validation --hflip 0')
PHOTOS = DataSet(
    'output/studies/photos',
    teacher='local-dir:studies/teachers/photos',
    options='--train-split train --val-split validation --input-size 3 32 32 --num-classes 242 --mean 0.45 --std 0.25',
    classes=242,
    channels=3,
    mean=0.45,
    std=0.25,
)
"""Squares of photos, whose class is the photo: `studies/make_data.py`."""
ICONS = DataSet(
    'output/studies/icons',
    teacher='local-dir:studies/teachers/icons',
    options='--train-split train --val-split validation --input-size 3 32 32 --num-classes 67 --mean 0.73 --std 0.32',
    classes=67,
    channels=3,
    mean=0.73,
    std=0.32,
)
"""Emoji of three vendors, and those of a fourth as test images; the class is Unicode's subgroup."""
COLOR = {'photos': PHOTOS, 'icons': ICONS}
