"""What models predict, image by image: a CSV file, and one HTML page with pictures of where they are wrong."""

import base64
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from timm_mealv2.data.class_names import class_names_of
from timm_mealv2.data.dataset import read_image
from timm_mealv2.evaluation import calibration_bins
from timm_mealv2.files import replacing
from timm_mealv2.pages import render

CLASSES_SHOWN = 30
GALLERY = 24


@dataclass(frozen=True)
class Predictions:
    """The most likely classes of each image by one model, K = 5 or all if there are fewer.

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


def write_page(
    path: Path, models: Mapping[str, Predictions], data: Any, images: Sequence[int], files: Sequence[str]
) -> None:
    """Write one HTML page: confusion, accuracy of each class, calibration, and where model and ensemble differ.

    Without labels the ensemble's top-1 takes their place.

    Args:
        path: The file; it is written whole or not at all, and needs no other file.
        models: Model's name -> its predictions.
        data: The data set.
        images: Number in the data set of each predicted image.
        files: File name of each.
    """
    shown = []
    for name, predictions in models.items():
        known = (predictions.expected >= 0) & predictions.probabilities[:, 0].isfinite()
        figure = _draw(predictions, known) if known.any() else None
        differing, gallery = None, []
        if predictions.ensemble is not None:
            differing = int((predictions.classes[:, 0] != predictions.ensemble.classes[:, 0]).sum())
            gallery = list(_gallery(predictions, predictions.ensemble, data, images, files))
        shown.append({'name': name, 'figure': figure, 'differing': differing, 'gallery': gallery})
    page = render('evaluation.html', title='Predictions', models=shown, images=len(images))
    with replacing(path) as temporary:
        temporary.write_text(page, encoding='utf-8', errors='backslashreplace')


def _draw(predictions: Predictions, known: Tensor) -> str:
    """Confusion matrix, accuracy of each class and calibration of the images `known` [N], as PNG in base 64."""
    expected, top1 = predictions.expected[known], predictions.classes[known, 0]
    confidence = predictions.probabilities[known, 0]
    labeled = bool((predictions.targets >= 0).any())
    against, measure = ('label', 'accuracy') if labeled else ("ensemble's top-1", 'agreement')
    count = 1 + int(torch.maximum(expected, top1).max())
    images = torch.bincount(expected, minlength=count)
    right = torch.bincount(expected[expected == top1], minlength=count)
    # Of many classes those are shown that have most errors.
    shown = (images - right).argsort(descending=True, stable=True)[:CLASSES_SHOWN].sort().values
    names = [predictions.names[index] for index in shown.tolist()]
    figure = Figure(figsize=(16, 5.4), layout='constrained')
    FigureCanvasAgg(figure)
    matrix, bars, calibration = figure.subplots(1, 3)

    shares = 100 * count_confusions(expected, top1, shown) / images[shown].clamp(min=1)[:, None]
    matrix.set(title='Confusion matrix, % of the row', xlabel="model's top-1", ylabel=against)
    matrix.imshow(shares.numpy(), cmap='Blues', vmin=0, vmax=100)
    matrix.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    matrix.set_yticks(range(len(names)), names, fontsize=8)
    if len(names) <= 12:
        for row in range(len(names)):
            for column in range(len(names)):
                share = shares[row, column].item()
                color = 'white' if share > 50 else 'black'
                matrix.text(column, row, f'{share:.0f}', ha='center', va='center', fontsize=7, color=color)

    bars.set(title=f'{measure.capitalize()} of each class', xlabel=f'{measure}, %', xlim=(0, 100))
    bars.barh(range(len(names)), (100 * right / images.clamp(min=1))[shown].tolist(), color='#0072B2')
    bars.set_yticks(range(len(names)), [f'{name} ({images[i]})' for name, i in zip(names, shown, strict=True)])
    bars.tick_params(axis='y', labelsize=8)
    bars.invert_yaxis()

    index = calibration_bins(confidence)
    size = torch.bincount(index)
    used = size > 0
    sums = [torch.bincount(index, values.double()) for values in (confidence, expected == top1)]
    means = [(100 * total[used] / size[used]).tolist() for total in sums]
    calibration.set(title='Calibration', xlabel='largest probability, %', ylabel=f'{measure}, %')
    calibration.plot([0, 100], [0, 100], color='#666666', linestyle='--', label='perfect')
    calibration.plot(*means, color='#D55E00', marker='o', label='model')
    calibration.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=100)
    return _base64(buffer)


def count_confusions(expected: Tensor, top1: Tensor, shown: Tensor) -> Tensor:
    """Return how many images of class `shown[i]` are taken for `shown[j]`, [n, n]; needs no matrix of all classes."""
    size = len(shown)
    place = torch.full((1 + int(torch.maximum(expected, top1).max()),), -1)
    place[shown] = torch.arange(size)
    rows, columns = place[expected], place[top1]
    both = (rows >= 0) & (columns >= 0)
    return torch.bincount(rows[both] * size + columns[both], minlength=size * size).view(size, size)


def _gallery(
    predictions: Predictions, ensemble: Predictions, data: Any, images: Sequence[int], files: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Rows of the table of images where the two differ, those first of which both are most confident."""
    confidence = torch.minimum(predictions.probabilities[:, 0], ensemble.probabilities[:, 0]).nan_to_num(0)
    differs = (predictions.classes[:, 0] != ensemble.classes[:, 0]).nonzero()[:, 0]
    for number in differs[confidence[differs].argsort(descending=True, stable=True)][:GALLERY].tolist():
        image = read_image(data, images[number], how='view')[0]
        image.thumbnail((160, 160))
        buffer = io.BytesIO()
        image.save(buffer, 'JPEG')
        target = int(predictions.targets[number])
        yield {
            'file': files[number],
            'picture': _base64(buffer),
            'label': predictions.names[target] if target >= 0 else '-',
            'model': [(predictions.names[index], 100 * p) for index, p in predictions.top(number)],
            'ensemble': [(predictions.names[index], 100 * p) for index, p in ensemble.top(number)],
        }


def _base64(buffer: io.BytesIO) -> str:
    return base64.b64encode(buffer.getvalue()).decode()
