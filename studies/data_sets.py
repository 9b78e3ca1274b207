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


def _color(name: str, classes: int, mean: float, std: float) -> DataSet:
    """Color images, whose folder and ensemble have the name."""
    pixels = f'--input-size 3 32 32 --num-classes {classes} --mean {mean} --std {std}'
    return DataSet(
        f'output/studies/{name}',
        teacher=f'local-dir:studies/teachers/{name}',
        options=f'--train-split train --val-split validation {pixels}',
        classes=classes,
        channels=3,
        mean=mean,
        std=std,
    )


PHOTOS = _color('photos', 242, 0.45, 0.25)
"""Squares of photos, whose class is the photo: `studies/make_data.py`."""
ICONS = _color('icons', 67, 0.73, 0.32)
"""Emoji of three vendors, and those of a fourth as test images; the class is Unicode's subgroup."""
COLOR = {'photos': PHOTOS, 'icons': ICONS}
