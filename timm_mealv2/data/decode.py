"""From an image file to pixels: one function for every kind of data set."""

import struct
import warnings
from contextlib import closing
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image
from timm.data import set_img_extensions

IGNORED = {
    'orientation': 'have an orientation that is ignored: --decode view turns them',
    'pixels': 'have other pixels than when they were recorded (--allow-pixel-change)',
    'transparency': 'are transparent, and the color beneath is taken: --decode view puts them over white',
}
"""What may be ignored of an image, by `decode` or in training on stored labels, and what the log says."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_NO_IMAGES = ('BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF')  # Pillow knows them, and decodes them with other programs

_OF_PLUGINS = ('.heic', '.heif', '.jxl')  # named as images that cannot be read where Pillow lacks the plugin


def image_endings() -> list[str]:
    """Return the endings of image files, those of timm first."""
    Image.init()
    known = [ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN.keys() - _NO_IMAGES]
    return list(dict.fromkeys(['.jpg', '.png', '.webp', '.jpeg', *known, *_OF_PLUGINS]))


def is_image_file(path: str) -> bool:
    """Whether a path ends as image files do."""
    return path.lower().endswith(tuple(image_endings()))


def find_all_images() -> None:
    """Let timm's readers of folders and tars take every image that Pillow reads, where timm takes PNG and JPEG."""
    set_img_extensions(image_endings())


def decode(source: BinaryIO | Image.Image, mode: str, how: str = 'timm') -> tuple[Image.Image, list[str]]:
    """Decode an image.

    Gray of 16 bits is scaled to 8, where Pillow would make everything above 255 white.

    Args:
        source: An open file, which is closed, or an image of Pillow's.
        mode: Pillow's mode of the result.
        how: 'view' shows an image as a viewer does: turned as its orientation says, and over white where it is
            transparent. 'timm' does neither, as timm.

    Returns:
        The image, and which of `IGNORED` is true of it.
    """
    image: Image.Image
    if isinstance(source, Image.Image):
        image = source
    else:
        with closing(source):
            image = Image.open(source)
            image.load()
    ignored = []
    turn = _TURNS.get(_orientation(image))
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.getextrema()[1] > 255):  # type: ignore[operator]
        pixels = np.asarray(image).astype(np.int32).clip(0, 65535)
        image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    if turn is not None and how == 'view':
        image = image.transpose(turn)
    elif turn is not None:
        ignored.append('orientation')
    if image.has_transparency_data and mode not in ('LA', 'RGBA'):
        with_alpha = image.convert('RGBA')
        image.info.pop('transparency', None)  # Pillow would warn that it goes
        if with_alpha.getchannel('A').getextrema()[0] == 255:  # opaque, as are many images with an alpha channel
            pass
        elif how == 'view':
            white = Image.new('RGBA', image.size, 'white')
            image = Image.alpha_composite(white, with_alpha).convert('RGB')
        else:
            ignored.append('transparency')
    if image.mode != mode:  # Pillow would copy it in any case
        image = image.convert(mode)
    return image, ignored


def _orientation(image: Image.Image) -> int:
    """Return the orientation (1 to 8) that a file tells, 1 if it tells none that can be read."""
    try:
        with warnings.catch_warnings(action='ignore'):
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (ArithmeticError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error):
        return 1
