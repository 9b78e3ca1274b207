"""Pictures of four colors, models that tell them without training, and the programs to run on them.

A model's accuracy is known beforehand: all that is asked of a program is the right figure.
"""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image

from timm_mealv2.cli.evaluate import main as evaluation_program
from timm_mealv2.training.run import main as training_program

COLORS = {'apple': (220, 20, 20), 'leaf': (20, 220, 20), 'sea': (20, 20, 220), 'sun': (220, 220, 20)}
CLASSES = tuple(COLORS)
SIZE = 32

# Nothing changes the student: what is evaluated is what the run began with.
STANDING = (
    f'--model test_resnet --num-classes 4 --img-size {SIZE} --batch-size 4 --workers 0 --epochs 1 --lr 0 --sched none '
    '--warmup-epochs 0 --weight-decay 0 --freeze-bn --no-aug --smoothing 0 --device cpu'
).split()


# The same without the class count.
UNCOUNTED = ' '.join(STANDING).replace('--num-classes 4 ', '').split()


def gray(name: str) -> int:
    """Brightness of a class's color, as Pillow converts it."""
    return Image.new('RGB', (1, 1), COLORS[name]).convert('L').getpixel((0, 0))  # type: ignore[return-value]


def picture(name: str, number: int = 0, mode: str = 'RGB', size: int = 28) -> Image.Image:
    """Return picture `number` of a class, of one color or, with mode 'L', of its brightness."""
    shift = number % 5 - 2
    color = tuple(max(0, value + shift) for value in COLORS[name])
    return Image.new('RGB', (size, size), color).convert(mode)


def write_folder(
    root: Path, per_class: int = 4, classes: Sequence[str] = CLASSES, mode: str = 'RGB', folders: Any = None
) -> Path:
    """Write a folder of pictures for each class; `folders` are other names for them, in the order of `classes`."""
    for name, folder in zip(classes, folders or classes, strict=True):
        (root / folder).mkdir(parents=True)
        for number in range(per_class):
            picture(name, number, mode).save(root / folder / f'{number:03}.png')
    return root


def write_splits(root: Path, **kwargs: Any) -> Path:
    """Write the splits train and validation, 4 and 3 pictures of each class; the arguments are `write_folder`'s."""
    write_folder(root / 'train', **kwargs)
    write_folder(root / 'validation', 3, **kwargs)
    return root


def color_model(
    classes: Sequence[str] = CLASSES, channels: int = 3, gray_pictures: bool = False, used: int | None = None
) -> torch.nn.Module:
    """Return a test_resnet whose class is that of the nearest color: `classes` are the colors of its outputs.

    All its layers pass the mean color on, the positive and the negative part in channels of their own; the last one
    measures distances. Only the first `used` classes are ever predicted.
    """
    model = timm.create_model('test_resnet', num_classes=len(classes), in_chans=channels)
    parts = 2 * channels
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.zero_()
                middle = module.weight[:, :, module.kernel_size[0] // 2, module.kernel_size[1] // 2]
                if name == 'conv1.0':
                    middle[:channels, :channels] = torch.eye(channels)
                    middle[channels:parts, :channels] = -torch.eye(channels)
                elif name.startswith('conv1') or 'downsample' in name:
                    middle[:parts, :parts] = torch.eye(parts)
        centers = torch.tensor([[gray(name)] * channels if gray_pictures else COLORS[name] for name in classes])
        if channels == 1:
            centers = torch.tensor([[gray(name)] for name in classes])
        centers = centers / 127.5 - 1  # the mean and the std of test_resnet are 0.5
        model.fc.weight.zero_()
        model.fc.weight[:, :parts] = 10 * torch.cat([centers, -centers], dim=1)
        model.fc.bias.copy_(-5 * centers.square().sum(dim=1))
        model.fc.bias[used or len(classes) :] -= 1e4
    return model


def save_model(path: Path, classes: Sequence[str] = CLASSES, names: Sequence[str] | None = None, **kwargs: Any) -> str:
    """Save a `color_model`, with `names` as its class names if there are any; return it as NAME=PATH."""
    state = color_model(classes, **kwargs).state_dict()
    torch.save({'state_dict': state, **({} if names is None else {'class_names': list(names)})}, path)
    return f'test_resnet={path}'


Program = Callable[..., Any]


def train(folder: Path, *args: Any, standing: Sequence[str] = STANDING) -> list[dict[str, str]]:
    """Train in the run folder `folder` with STANDING and further options; return the rows of summary.csv."""
    where = ['--output', folder.parent, '--experiment', folder.name]
    training_program([str(word) for word in (*standing, *where, *args)])
    return summary(folder)


def summary(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's summary.csv."""
    with open(folder / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def preflight(folder: Path) -> dict[str, dict[str, float]]:
    """Return what a run has measured before its first step."""
    rows: dict[str, dict[str, float]] = json.loads((folder / 'preflight.json').read_text())
    return rows


def evaluate(path: Path, *args: Any) -> dict[str, dict[str, Any]]:
    """Evaluate models; `path` is the JSON file that is written and returned."""
    options = ['--img-size', SIZE, '--batch-size', 4, '--workers', 0, '--device', 'cpu', '--json', path]
    evaluation_program([str(word) for word in (*args, *options)])
    results: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return results
