"""One function decodes all images: as timm does, or as a viewer shows them."""

import io
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from timm_mealv2.data.decode import decode, image_endings

RANDOM = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def file_of(image: Image.Image, kind: str = 'PNG', **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


def turned(orientation: int) -> io.BytesIO:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file_of(Image.fromarray(RANDOM), exif=exif)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation(orientation: int) -> None:
    viewed, ignored = decode(turned(orientation), 'RGB', 'view')
    expected = ImageOps.exif_transpose(Image.open(turned(orientation)))
    assert (viewed.size, viewed.tobytes(), ignored) == (expected.size, expected.tobytes(), [])
    plain, ignored = decode(turned(orientation), 'RGB')
    assert plain.tobytes() == RANDOM.tobytes()
    assert ignored == (['orientation'] if orientation > 1 else [])


def test_exif_that_cannot_be_read_is_none() -> None:
    for exif in (b'Exif\0\0', b'Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12', b'nothing'):
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            image, ignored = decode(file_of(Image.fromarray(RANDOM), exif=exif), 'RGB', 'view')
        assert (image.tobytes(), ignored) == (RANDOM.tobytes(), [])


def transparent(mode: str) -> io.BytesIO:
    """A red picture, half of it transparent."""
    image = Image.new('RGB', (4, 4), (200, 0, 0))
    if mode == 'P':
        image = image.quantize(2)
        return file_of(image, transparency=bytes([0, 0]))
    if mode == 'RGB':
        return file_of(image, transparency=(200, 0, 0))
    image = image.convert(mode)
    image.putalpha(0)
    return file_of(image)


@pytest.mark.parametrize('mode', ['P', 'RGB', 'RGBA', 'LA'])
def test_transparency(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # Pillow's tear the bar
        plain, ignored = decode(transparent(mode), 'RGB')
        viewed, of_viewed = decode(transparent(mode), 'RGB', 'view')
        gray, _ = decode(transparent(mode), 'L', 'view')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        timms = Image.open(transparent(mode)).convert('RGB')
    assert (plain.tobytes(), ignored) == (timms.tobytes(), ['transparency'])
    assert (viewed.getcolors(), of_viewed) == ([(16, (255, 255, 255))], [])
    assert gray.getcolors() == [(16, 255)]


def test_transparency_is_kept_for_models_of_four_channels_and_not_told_of_opaque_images() -> None:
    image, ignored = decode(transparent('RGBA'), 'RGBA', 'view')
    assert (image.getpixel((0, 0)), ignored) == ((200, 0, 0, 0), [])
    opaque = Image.fromarray(RANDOM).convert('RGBA')
    for how in ('timm', 'view'):
        image, ignored = decode(file_of(opaque), 'RGB', how)
        assert (image.tobytes(), ignored) == (RANDOM.tobytes(), [])


@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'PPM'])
def test_gray_of_16_bits_is_scaled(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    image, _ = decode(file_of(Image.fromarray(values), kind), 'L')
    assert list(image.tobytes()) == [0, 0, 1, 1, 128, 255]


def test_endings() -> None:
    assert {'.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.gif', '.avif', '.heic'} <= set(image_endings())
    assert not {'.pdf', '.eps', '.h5', '.mpg', '.txt', '.json', '.tar'} & set(image_endings())
