"""The page of `mealv2-eval --report`: the figures, and pictures of where models are wrong."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from timm_mealv2.data.dataset import read_image
from timm_mealv2.evaluation import calibration_bins
from timm_mealv2.figures import metric_table
from timm_mealv2.files import replacing
from timm_mealv2.pages import picture, render
from timm_mealv2.predictions import Predictions

CLASSES_SHOWN = 30
GALLERY = 24


def write_page(
    path: Path,
    results: Mapping[str, Mapping[str, float]],
    models: Mapping[str, Predictions],
    data: Any,
    images: Sequence[int],
    files: Sequence[str],
) -> None:
    """Write one HTML page: metrics, confusion, accuracy by class, calibration, where model and ensemble differ.

    Without labels the ensemble's top-1 takes their place.

    Args:
        path: The file; it is written whole or not at all, and needs no other file.
        results: Model's name -> its metrics.
        models: Model's name -> its predictions.
        data: The data set.
        images: Number in the data set of each predicted image.
        files: File name of each.
    """
    shown = []
    for name, predictions in models.items():
        known = (predictions.expected >= 0) & predictions.probabilities[:, 0].isfinite()
        plots = _plots(predictions, known) if known.any() else {}
        differing, gallery = None, []
        if predictions.ensemble is not None:
            differing = int((predictions.classes[:, 0] != predictions.ensemble.classes[:, 0]).sum())
            gallery = list(_gallery(predictions, predictions.ensemble, data, images, files))
        shown.append({'name': name, 'plots': plots, 'differing': differing, 'gallery': gallery})
    page = render(
        'evaluation.html', title='Evaluation', metrics=metric_table(results), models=shown, images=len(images)
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding='utf-8', errors='backslashreplace')


def _plots(predictions: Predictions, known: Tensor) -> dict[str, str]:
    """Confusion matrix, accuracy of each class and calibration of the images `known` [N]: title -> picture."""
    expected, top1 = predictions.expected[known], predictions.classes[known, 0]
    confidence = predictions.probabilities[known, 0]
    against, measure = ('label', 'accuracy')
    if not (predictions.targets >= 0).any():
        against, measure = "ensemble's top-1", 'agreement'
    count = 1 + int(torch.maximum(expected, top1).max())
    images, right = (torch.bincount(classes, minlength=count) for classes in (expected, expected[expected == top1]))
    # Of many classes those are shown that have most errors.
    shown = (images - right).argsort(descending=True, stable=True)[:CLASSES_SHOWN].sort().values
    names = [predictions.names[index][:24] for index in shown.tolist()]
    plots = {}

    def draw(title: str, **labels: Any) -> Axes:
        plots[title] = Figure(figsize=(5, 4.6), layout='constrained')
        axes = plots[title].subplots()
        axes.set(title=title, **labels)
        axes.tick_params(labelsize=8)
        return axes

    shares = 100 * count_confusions(expected, top1, shown) / images[shown].clamp(min=1)[:, None]
    axes = draw('Confusion matrix, % of the row', xlabel="model's top-1", ylabel=against)
    axes.imshow(shares.numpy(), cmap='Blues', vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    for (row, column), share in np.ndenumerate(shares.numpy() if len(names) <= 12 else np.empty((0, 0))):
        color = 'white' if share > 50 else 'black'
        axes.text(column, row, f'{share:.0f}', ha='center', va='center', fontsize=7, color=color)

    axes = draw(f'{measure.capitalize()} of each class', xlabel=f'{measure}, %', xlim=(0, 100))
    axes.barh(range(len(names)), (100 * right / images.clamp(min=1))[shown].tolist(), color='#0072B2')
    axes.set_yticks(range(len(names)), [f'{name} ({images[i]})' for name, i in zip(names, shown, strict=True)])
    axes.invert_yaxis()

    index = calibration_bins(confidence)
    size = torch.bincount(index)
    sums = [torch.bincount(index, values.double()) for values in (confidence, expected == top1)]
    axes = draw('Calibration', xlabel='largest probability, %', ylabel=f'{measure}, %')
    axes.plot([0, 100], [0, 100], color='#666666', linestyle='--', label='perfect')
    axes.plot(*((100 * total / size)[size > 0].tolist() for total in sums), color='#D55E00', marker='o', label='model')
    axes.legend(frameon=False)
    return {title: picture(figure, dpi=120) for title, figure in plots.items()}


def count_confusions(expected: Tensor, top1: Tensor, shown: Tensor) -> Tensor:
    """Return how many images of class `shown[i]` are taken for `shown[j]`, [n, n]; needs no matrix of all classes."""
    size = len(shown)
    place = torch.full((1 + int(torch.maximum(expected, top1).max()),), -1)
    place[shown] = torch.arange(size)
    rows, columns = place[expected], place[top1]
    both = (rows >= 0) & (columns >= 0)
    return torch.bincount(rows[both] * size + columns[both], minlength=size * size).view(size, size)


def _gallery(
    predictions: Predictions,
    ensemble: Predictions,
    data: Any,
    images: Sequence[int],
    files: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """Rows of the table of images where the two differ, those first of which both are most confident."""
    confidence = torch.minimum(predictions.probabilities[:, 0], ensemble.probabilities[:, 0]).nan_to_num(0)
    differs = (predictions.classes[:, 0] != ensemble.classes[:, 0]).nonzero()[:, 0]
    for number in differs[confidence[differs].argsort(descending=True, stable=True)][:GALLERY].tolist():
        image = read_image(data, images[number], how='view')[0]
        image.thumbnail((160, 160))
        target = int(predictions.targets[number])
        tops = [
            [(predictions.names[index], 100 * p) for index, p in found.top(number)] for found in (predictions, ensemble)
        ]
        label = predictions.names[target] if target >= 0 else '-'
        yield {'file': files[number], 'picture': picture(image, 'jpeg'), 'label': label, 'tops': tops}
