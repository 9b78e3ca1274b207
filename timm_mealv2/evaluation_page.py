"""The page of `mealv2-eval --report`: the figures, and pictures of where models are wrong."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
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
    """Write one HTML page: metrics, confusion, calibration, where model and ensemble differ.

    Args:
        path: The file; it is written whole or not at all, and needs no other file.
        results: Model's name -> its metrics.
        models: Model's name -> its predictions.
        data: The data set.
        images: Number in the data set of each predicted image.
        files: File name of each.
    """
    shown = []
    for name, found in models.items():
        known = (found.targets >= 0) & found.probabilities[:, 0].isfinite()
        plots = _plots(found, known) if known.any() else {}
        rows = None if found.ensemble is None else _differing(found, found.ensemble)
        gallery = [_picture_row(found, row, data, images, files) for row in (rows or [])[:GALLERY]]
        shown.append({'name': name, 'plots': plots, 'differing': rows, 'gallery': gallery})
    page = render(
        'evaluation.html', title='Evaluation', metrics=metric_table(results), models=shown, images=len(images)
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding='utf-8', errors='backslashreplace')


def _plots(predictions: Predictions, known: Tensor) -> dict[str, str]:
    """Confusion matrix and calibration of the images `known` [N]: title -> picture."""
    labels, top1 = predictions.targets[known], predictions.classes[known, 0]
    confidence, right = predictions.probabilities[known, 0], labels == top1
    plots = {name: Figure(figsize=(5, 4.6), layout='constrained') for name in ('Confusion matrix', 'Calibration')}
    confusion, calibration = (plot.subplots() for plot in plots.values())

    # Of many classes those are shown that have most errors.
    errors = torch.bincount(labels[~right], minlength=1 + int(labels.max()))
    shown = errors.argsort(descending=True, stable=True)[:CLASSES_SHOWN].sort().values
    shares = 100 * count_confusions(labels, top1, shown) / torch.bincount(labels)[shown].clamp(min=1)[:, None]
    names = [predictions.names[index][:24] for index in shown.tolist()]
    confusion.set(title='Confusion matrix, % of the row', xlabel="model's top-1", ylabel='label')
    plots['Confusion matrix'].colorbar(confusion.imshow(shares.numpy(), cmap='Blues', vmin=0, vmax=100))
    confusion.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    confusion.set_yticks(range(len(names)), names, fontsize=8)

    index = calibration_bins(confidence)
    size = torch.bincount(index)
    means = [(100 * torch.bincount(index, values.double()) / size)[size > 0].tolist() for values in (confidence, right)]
    calibration.set(title='Calibration', xlabel='largest probability, %', ylabel='accuracy, %')
    calibration.plot([0, 100], [0, 100], color='#666666', linestyle='--', label='perfect')
    calibration.plot(*means, color='#D55E00', marker='o', label='model')
    calibration.legend()
    return {title: picture(plot, dpi=120) for title, plot in plots.items()}


def count_confusions(labels: Tensor, top1: Tensor, shown: Tensor) -> Tensor:
    """Return how many images of class `shown[i]` are taken for `shown[j]`, [n, n]; needs no matrix of all classes."""
    size = len(shown)
    place = torch.full((1 + int(torch.maximum(labels, top1).max()),), -1)
    place[shown] = torch.arange(size)
    rows, columns = place[labels], place[top1]
    both = (rows >= 0) & (columns >= 0)
    return torch.bincount(rows[both] * size + columns[both], minlength=size * size).view(size, size)


def _differing(predictions: Predictions, ensemble: Predictions) -> list[int]:
    """The images on which the two differ, those first of which both are most confident."""
    confidence = torch.minimum(predictions.probabilities[:, 0], ensemble.probabilities[:, 0]).nan_to_num(0)
    differs = (predictions.classes[:, 0] != ensemble.classes[:, 0]).nonzero()[:, 0]
    rows: list[int] = differs[confidence[differs].argsort(descending=True, stable=True)].tolist()
    return rows


def _picture_row(
    predictions: Predictions, number: int, data: Any, images: Sequence[int], files: Sequence[str]
) -> dict[str, Any]:
    image = read_image(data, images[number], how='view')[0]
    image.thumbnail((160, 160))
    target = int(predictions.targets[number])
    return {
        'file': files[number],
        'picture': picture(image, 'jpeg'),
        'label': predictions.names[target] if target >= 0 else '-',
        'tops': [
            [(name, 100 * p) for _, name, p in found.top(number)]
            for found in (predictions, predictions.ensemble)
            if found is not None
        ],
    }
