"""What is done to the pixels of a training sample: the settings, and the erasing that comes after mixing."""

import random
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing

from timm_mealv2.data.seed import Stream, counted_seed, seed_cpu

# Settings that timm's `create_transform` calls the same.
_TRANSFORM_OPTIONS = (
    *('input_size', 'no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter_prob'),
    *('grayscale_prob', 'gaussian_blur_prob', 'mean', 'std'),
)


@dataclass(frozen=True)
class Augmentation:
    """Every setting that decides the pixels of a training sample, named as timm's options; plain values only.

    The settings of mixing are those of `--mixup-mode pair`, where mixing belongs to the sample.

    Attributes:
        input_size: (channels, height, width).
        input_img_mode: Pillow's mode of the images, 'RGB' or 'L'.
        decode: 'view' turns images as their orientation says, and puts transparent ones over white; 'timm' does not.
        train_interpolation: An interpolation, or 'random'.
        mean: Gray of what geometric augmentation uncovers and erasing fills in, one number (0..1) per channel.
        std: Unit of the noise that erasing fills in.
    """

    input_size: tuple[int, int, int]
    input_img_mode: str = 'RGB'
    decode: str = 'timm'
    no_aug: bool = False
    train_crop_mode: str | None = None
    scale: tuple[float, float] | None = (0.08, 1.0)
    ratio: tuple[float, float] | None = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float | tuple[float, ...] | None = 0.4
    color_jitter_prob: float | None = None
    grayscale_prob: float = 0.0
    gaussian_blur_prob: float = 0.0
    aa: str | None = None
    train_interpolation: str = 'random'
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    reprob: float = 0.0
    remode: str = 'pixel'
    recount: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: tuple[float, float] | None = None
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_off_epoch: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):  # lists, as JSON gives them, would not compare equal
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))

    @property
    def mixes(self) -> bool:
        """Whether pairs of samples are mixed."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    def transform_options(self) -> dict[str, Any]:
        """Return the settings as arguments of timm's `create_transform` and `create_loader`."""
        options = {name: getattr(self, name) for name in _TRANSFORM_OPTIONS}
        jitter = self.color_jitter or None  # a jitter of 0 only takes time
        return {**options, 'color_jitter': jitter, 'auto_augment': self.aa, 'interpolation': self.train_interpolation}

    def transform(self) -> Any:
        """Return timm's transform from an image to pixels, uint8 [C, H, W]."""
        transform = create_transform(**self.transform_options(), is_training=True, use_prefetcher=True)
        transform.transforms[-1] = pixels_of
        return transform


def pixels_of(image: Image.Image) -> np.ndarray:
    """Return an image's pixels, uint8 [C, H, W]; timm's `MaybePILToTensor` takes 4 times as long to lay them out so."""
    bands = bytearray().join(image.tobytes('raw', band) for band in image.getbands())
    return np.frombuffer(bands, np.uint8).reshape(-1, image.height, image.width)


class Erasing:
    """timm's random erasing of uint8 pixels, in timm's distribution.

    timm erases normalized pixels. Its fill is brought to pixels with `mean` and `std`, rounded, and clipped to 0..255:
    noise of unit variance goes beyond white or black for a share of the pixels. The fill 'const' is the mean color.
    """

    def __init__(self, augmentation: Augmentation, seed: int) -> None:
        self.seed = seed
        self.probability = 0.0 if augmentation.no_aug else augmentation.reprob
        self.erasing = RandomErasing(1.0, mode=augmentation.remode, max_count=augmentation.recount, device='cpu')
        self.mean = 255 * np.array(augmentation.mean, dtype=np.float32)[:, None, None]
        self.std = 255 * np.array(augmentation.std, dtype=np.float32)[:, None, None]

    def __call__(self, pixels: np.ndarray, *counters: int) -> None:
        """Erase parts of a sample [C, H, W] in place, drawn by (seed, *counters)."""
        if not self.probability:
            return
        seed_cpu(counted_seed(Stream.ERASING, self.seed, *counters))
        if random.random() < self.probability:
            fill = self.erasing(torch.full(pixels.shape, torch.nan)).numpy()
            erased = np.where(np.isnan(fill), pixels, np.rint(fill * self.std + self.mean).clip(0, 255))
            pixels[:] = erased
