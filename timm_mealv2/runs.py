"""What a run folder tells: summary.csv, args.yaml and preflight.json; and what its student costs."""

import csv
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.data import resolve_model_data_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_mealv2.errors import UserError

INITIAL = 'student (initial)'
"""What preflight.json calls the student before the first step."""

TIMES = {'time_data': 'data wait', 'time_teachers': 'teachers', 'time_student': 'student', 'time_update': 'update'}
"""Columns of summary.csv, in seconds a batch -> what the time goes into."""


def short_names(models: Iterable[str]) -> dict[str, str]:
    """Return name in preflight.json -> the same with two parts of a teacher's path, or all where two would agree."""
    full = list(dict.fromkeys(models))
    short = {}
    for name in full:
        parts = name.split('/')
        short[name] = name if len(parts) <= 2 else f'teacher {"/".join(parts[-2:])}'
    return short if len(set(short.values())) == len(full) else dict(zip(full, full, strict=True))


@dataclass(frozen=True)
class Run:
    """What a run folder tells.

    Attributes:
        folder: The folder.
        epochs: Epoch numbers, from 0.
        columns: Column -> one value per epoch, None where there is none (an epoch without evaluation).
        settings: The program's arguments (args.yaml); empty if the file is not there.
        preflight: Model -> metrics before the first step (preflight.json): 'ensemble', 'teacher NAME' and
            'student (initial)'; empty if the file is not there.
    """

    folder: Path
    epochs: list[int]
    columns: dict[str, list[float | None]]
    settings: dict[str, Any]
    preflight: dict[str, dict[str, float | None]]

    def values(self, column: str) -> list[tuple[int, float]]:
        """Return (epoch, value) of a column where it has one."""
        values = self.columns.get(column, [])
        return [(epoch, value) for epoch, value in zip(self.epochs, values, strict=False) if value is not None]

    def before(self, model: str, metric: str) -> float | None:
        """Return a metric of a model before the first step, None if it was not measured."""
        return self.preflight.get(model, {}).get(metric)


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read `summary.csv`, `args.yaml` and `preflight.json` of a run folder.

    Raises:
        UserError: If there is no summary, or no epoch in it.
    """
    folder = Path(folder)
    summary, settings, preflight = (folder / name for name in ('summary.csv', 'args.yaml', 'preflight.json'))
    rows: list[dict[str, str]] = []
    if summary.is_file():
        with summary.open(newline='') as file:
            rows = list(csv.DictReader(file))
    if not rows:
        raise UserError(f'{folder} has no finished epoch in a summary.csv: expected a run folder (OUTPUT/EXPERIMENT).')
    epochs = [int(float(row.pop('epoch'))) for row in rows]
    columns = {name: [float(row[name]) if row.get(name) else None for row in rows] for name in rows[0]}
    return Run(
        folder,
        epochs,
        columns,
        yaml.safe_load(settings.read_text()) if settings.is_file() else {},
        json.loads(preflight.read_text()) if preflight.is_file() else {},
    )


def model_cost(model: nn.Module) -> tuple[int, float]:
    """Return the number of parameters, and the billions of multiplications with an addition that an image takes."""
    pixels = torch.zeros(1, *resolve_model_data_config(model)['input_size'])
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.eval()(pixels)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 2e9
