"""Images with something to learn. A module of its own: `conftest` is another file in the subfolders."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ('cold', 'plain', 'warm')


def write_images(root: Path, per_class: int, seed: int, size: int = 24, mode: str = 'RGB') -> None:
    """Write PNGs of three classes that differ in colour (RGB) or brightness (L), with noise."""
    generator = np.random.default_rng(seed)
    for number, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = generator.integers(0, 156, (size, size, 3))
            if mode == 'L':
                pixels = pixels[..., 0] + 45 * number
            else:
                pixels[..., number] += 60
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f'{i:03}.png')


def cut_off(path: Path) -> str:
    """Cut off a file, and return its path."""
    path.write_bytes(path.read_bytes()[:200])
    return str(path)
