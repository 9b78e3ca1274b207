"""What the benchmarks share: arms that take turns, fresh processes, images, and results for report.py."""

import json
import multiprocessing
import platform
import random
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from PIL import Image

from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing

RESULTS = Path(__file__).resolve().parent / 'results'
WIDTH, HEIGHT = 500, 375

T = TypeVar('T')


def in_turn(arms: dict[str, Callable[[int], T]], rounds: int, warmup: int = 1) -> dict[str, list[T]]:
    """Call each arm once a round with the round's number, and return what it gave after the first `warmup` rounds.

    Whatever else the machine does meets all arms. The arm that goes first changes from round to round.
    """
    results: dict[str, list[T]] = {name: [] for name in arms}
    for number in range(warmup + rounds):
        names = list(arms)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            result = arms[name](number)
            if number >= warmup:
                results[name].append(result)
    return results


def ratios(values: Sequence[float], references: Sequence[float]) -> list[float]:
    """Divide values by those of the same rounds."""
    return [value / reference for value, reference in zip(values, references, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median and, of several values, the quartiles."""
    if len(values) < 2:
        return f'{values[0]:.{digits}f}'
    low, middle, high = statistics.quantiles(values, n=4, method='inclusive')
    return f'{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})'


def in_fresh_process(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a process that has done nothing yet."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as executor:
        return executor.submit(function, *args).result()


def memory(field: str = 'VmRSS') -> float:
    """Return a figure of this process in MiB, resident memory or its peak 'VmHWM' (Linux)."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f'{field}:'))


def machine() -> str:
    """Return what the figures hold for: hardware, versions, date."""
    path = Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    hardware = f'{len(names)} cores of {names[0]}' if names else platform.machine()
    if torch.cuda.is_available():
        hardware = f'{torch.cuda.get_device_name()}, {hardware}'
    versions = f'Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}'
    return f'{hardware}, {versions}, {date.today()}'


def publish(name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], save: bool) -> None:
    """Print a table; with `save` write it to results/NAME.json."""
    for row in [columns, *rows]:
        print(f'| {" | ".join(row)} |', flush=True)
    if save:
        words = [word for word in sys.argv[1:] if word != '--save']
        command = shlex.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *words])
        result = {'title': title, 'command': command, 'machine': machine(), 'columns': columns, 'rows': rows}
        RESULTS.mkdir(exist_ok=True)
        with replacing(RESULTS / f'{name}.json') as path:
            path.write_text(json.dumps(result, indent=2) + '\n')


def make_images(photos: Path, folder: Path, count: int) -> None:
    """Write `count` JPEG images of 500x375 pixels, random crops of the photos; what is there already stays."""
    if folder.is_dir() and len(list(folder.rglob('*.jpg'))) == count:
        return
    sources = sorted(path for path in photos.rglob('*') if path.suffix.lower() in ('.jpg', '.jpeg', '.png'))
    if not sources:
        raise UserError(f'--photos {photos}: no JPEG or PNG images there.')
    rng = random.Random(0)
    for label in ('a', 'b'):
        (folder / label).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        with Image.open(sources[number % len(sources)]) as file:
            photo = file.convert('RGB')
            scale = min(photo.width / WIDTH, photo.height / HEIGHT) * rng.uniform(0.3, 1)
            width, height = max(1, int(WIDTH * scale)), max(1, int(HEIGHT * scale))
            left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
            crop = photo.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
            crop.save(folder / 'ab'[number % 2] / f'{number:05}.jpg', quality=90)
