"""What models predict, image by image: the most likely classes of data sets and of pictures, and a CSV file of them."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from timm_mealv2.data.class_names import class_names_of
from timm_mealv2.files import replacing


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

    def top(self, number: int) -> list[tuple[int, str, float]]:
        """The most likely classes of one image: index, name and probability of each."""
        places = zip(self.classes[number].tolist(), self.probabilities[number].tolist(), strict=True)
        return [(index, self.names[index], probability) for index, probability in places]


def readable_names(model: nn.Module) -> list[str]:
    """Return the names of a model's classes: its own, ImageNet's for timm's ImageNet models, else their numbers."""
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

    def predictions(self, models: Mapping[str, nn.Module], ensemble: str | None = None) -> dict[str, Predictions]:
        """Return what was added, by models' names; the others are compared with the one named `ensemble`, if any."""
        found: dict[str, Predictions] = {}
        for name, batches in self._batches.items():
            targets, classes, probabilities = map(torch.cat, zip(*batches, strict=True))
            found[name] = Predictions(readable_names(models[name]), targets, classes, probabilities)
        of_ensemble = found.get(ensemble or '')
        return {name: p if name == ensemble else replace(p, ensemble=of_ensemble) for name, p in found.items()}


def write_predictions(path: Path, models: Mapping[str, Predictions], files: Sequence[str]) -> None:
    """Write a CSV file with a row for each model and image; the columns have the names of timm's inference.py.

    Args:
        path: The file; it is written whole or not at all.
        models: Model's name -> its predictions.
        files: File name of each image.
    """
    most = max(predictions.classes.shape[1] for predictions in models.values())
    with (
        replacing(path) as temporary,
        temporary.open('w', newline='', encoding='utf-8', errors='backslashreplace') as file,
    ):
        writer = csv.writer(file)
        columns = [f'{column}_{k}' for column in ('index', 'label', 'prob') for k in range(most)]
        writer.writerow(['model', 'filename', 'target', *columns])
        for model, predictions in models.items():
            for number, name in enumerate(files):
                target, top = int(predictions.targets[number]), predictions.top(number)
                empty = [('', '', '')] * (most - len(top))
                cells = chain(*zip(*top, *empty, strict=True))
                writer.writerow([model, name, '' if target < 0 else target, *cells])
