"""What models predict, image by image: the most likely classes of data sets and of pictures, and a CSV file of them."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_mealv2.data.class_names import class_names_of
from timm_mealv2.data.loader import eval_loader
from timm_mealv2.data.normalize import resolve_pixels
from timm_mealv2.data.unreadable import BadImages
from timm_mealv2.files import replacing
from timm_mealv2.models.ensemble import EnsembleTeacher


@dataclass(frozen=True)
class Predictions:
    """The K most likely classes of each image by one model.

    Attributes:
        names: What the model calls its classes.
        targets: Label of each image [N], -1 where it is not known.
        classes: The most likely classes [N, K], the first one first.
        probabilities: Their probabilities [N, K].
        ensemble: The same of the teachers' ensemble on the same pixels; None without teachers, or of the ensemble.
    """

    names: Sequence[str]
    targets: Tensor
    classes: Tensor
    probabilities: Tensor
    ensemble: 'Predictions | None' = None

    @property
    def expected(self) -> Tensor:
        """The class that each image [N] is compared with: its label or, without labels, the ensemble's top-1."""
        unlabeled = self.ensemble is not None and bool((self.targets < 0).all())
        return self.ensemble.classes[:, 0] if unlabeled and self.ensemble is not None else self.targets

    def top(self, number: int) -> list[tuple[int, float]]:
        """The most likely classes of one image with their probabilities."""
        return list(zip(self.classes[number].tolist(), self.probabilities[number].tolist(), strict=True))


def readable_names(model: nn.Module) -> list[str]:
    """Return the names of a model's classes: its own, ImageNet's for timm's models of it, else their numbers."""
    if names := class_names_of(model):
        return names
    subset = infer_imagenet_subset(model)
    if subset is not None:
        info = ImageNetInfo(subset)
        return [info.index_to_description(index) for index in range(info.num_classes())]
    return [str(index) for index in range(model.num_classes)]  # type: ignore[arg-type]


class TopClasses:
    """Collects the most likely `count` classes of each image, or all of fewer, while models run."""

    def __init__(self, count: int = 5) -> None:
        self.count = count
        self._batches: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)

    def add(self, model: str, output: Tensor, target: Tensor) -> None:
        """Add a model's output [B, C] for a batch, and its labels [B]."""
        probabilities, classes = output.softmax(dim=1).topk(min(self.count, output.shape[1]))
        self._batches[model].append((target.cpu(), classes.cpu(), probabilities.cpu()))

    def predictions(self, models: Mapping[str, nn.Module], ensemble: str = '') -> dict[str, Predictions]:
        """Return what was added, by models' names; the others are compared with the one named `ensemble`, if any."""
        found: dict[str, Predictions] = {}
        for name, batches in self._batches.items():
            targets, classes, probabilities = map(torch.cat, zip(*batches, strict=True))
            found[name] = Predictions(readable_names(models[name]), targets, classes, probabilities)
        return {name: p if name == ensemble else replace(p, ensemble=found.get(ensemble)) for name, p in found.items()}


class ImageFiles(Dataset):
    """Pictures by their paths, without labels."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return self.paths[index].open('rb'), -1

    def filename(self, index: int, **kwargs: Any) -> str:
        """Return the path of an image, for messages."""
        return str(self.paths[index])


@torch.inference_mode()
def predict_files(
    model: EnsembleTeacher, paths: Sequence[Path], bad: BadImages, count: int = 5, batch_size: int = 1, **options: Any
) -> Predictions | None:
    """Predict pictures that are no data set; None where none can be read.

    Args:
        model: The model, an ensemble of one.
        paths: The pictures; those that cannot be read are left out, and `bad` has them.
        bad: Told of the pictures that cannot be read.
        count: Classes of each picture.
        batch_size: Pictures of a batch.
        **options: Further arguments of `eval_loader`.
    """
    config = resolve_pixels({}, model.pretrained_cfg, model.in_chans)
    options = {'device': torch.device('cpu'), 'num_workers': 0, **options}
    loader = eval_loader(ImageFiles(paths), config, batch_size=batch_size, bad=bad, **options)
    top = TopClasses(count)
    for images, target in tqdm(loader, desc='predicting', leave=False, disable=None):
        top.add('', model(images), target)
    return top.predictions({'': model}).get('')


def write_predictions(path: Path, models: Mapping[str, Predictions], files: Sequence[str]) -> None:
    """Write a CSV file with a row for each model and image; the columns have the names of timm's inference.py.

    Args:
        path: The file; it is written whole or not at all.
        models: Model's name -> its predictions.
        files: File name of each image.
    """
    most = max(predictions.classes.shape[1] for predictions in models.values())
    columns = [f'{column}_{k}' for column in ('index', 'label', 'prob') for k in range(most)]
    with (
        replacing(path) as temporary,
        temporary.open('w', newline='', encoding='utf-8', errors='backslashreplace') as file,
    ):
        writer = csv.DictWriter(file, ['model', 'filename', 'target', *columns])
        writer.writeheader()
        for model, predictions in models.items():
            for number, name in enumerate(files):
                target = int(predictions.targets[number])
                row: dict[str, Any] = {'model': model, 'filename': name, 'target': '' if target < 0 else target}
                for k, (index, probability) in enumerate(predictions.top(number)):
                    row[f'index_{k}'], row[f'prob_{k}'] = index, probability
                    row[f'label_{k}'] = predictions.names[index]
                writer.writerow(row)
