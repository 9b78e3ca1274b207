"""What a run folder tells: summary.csv, args.yaml and preflight.json; and what its student costs."""

import csv
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.data import resolve_model_data_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_mealv2.errors import UserError

StrPath = str | os.PathLike[str]

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
        epochs: Epoch numbers, from 0.
        columns: Column -> one value per epoch, None where there is none (an epoch without evaluation).
        settings: The program's arguments (args.yaml); empty if the file is not there.
        preflight: Model -> metrics before the first step (preflight.json): 'ensemble', 'teacher NAME' and
            'student (initial)'; empty if the file is not there.
    """

    epochs: list[int]
    columns: dict[str, list[float | None]]
    settings: dict[str, Any] = field(default_factory=dict)
    preflight: dict[str, dict[str, float | None]] = field(default_factory=dict)

    def values(self, column: str) -> list[tuple[int, float]]:
        """Return (epoch, value) of a column where it has one."""
        values = self.columns.get(column, [])
        return [(epoch, value) for epoch, value in zip(self.epochs, values, strict=False) if value is not None]

    def before(self, model: str, metric: str) -> float | None:
        """Return a metric of a model before the first step, None if it was not measured."""
        return self.preflight.get(model, {}).get(metric)


def read_run(folder: StrPath) -> Run:
    """Read `summary.csv`, `args.yaml` and `preflight.json` of a run folder.

    Raises:
        UserError: If there is no summary, it is empty, or holds something else than numbers.
    """
    path = Path(folder) / 'summary.csv'
    if not path.is_file():
        raise UserError(f'no summary.csv in {folder}: expected a run folder (OUTPUT/EXPERIMENT) with a finished epoch.')
    try:
        with path.open(newline='') as file:
            rows = list(csv.DictReader(file))
        epochs = [int(float(row.pop('epoch'))) for row in rows]
        columns = {
            name: [float(row[name]) if row.get(name) else None for row in rows] for name in (rows[0] if rows else ())
        }
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f'{path} is no summary of a run: expected a column epoch and numbers ({error}).') from error
    if not rows:
        raise UserError(f'{path} has no epoch yet: wait for the first to end.')
    settings_path = Path(folder) / 'args.yaml'
    try:
        settings = yaml.safe_load(settings_path.read_text()) if settings_path.is_file() else {}
    except Exception as error:  # of YAML's as of Python's, such as RecursionError
        raise UserError(f'{settings_path} is not YAML: {error}') from error
    preflight_path = Path(folder) / 'preflight.json'
    try:
        preflight = json.loads(preflight_path.read_text()) if preflight_path.is_file() else {}
    except ValueError as error:
        raise UserError(f'{preflight_path} is not JSON: {error}') from error
    models = preflight.values() if isinstance(preflight, dict) else [None]
    if not all(
        isinstance(row, dict) and all(isinstance(v, int | float | None) for v in row.values()) for row in models
    ):
        raise UserError(f'{preflight_path} is no preflight.json of a run: expected metrics by model.')
    if not isinstance(settings or {}, dict):
        raise UserError(f'{settings_path} holds no settings: expected option names and values.')
    return Run(epochs, columns, settings or {}, preflight)


def model_cost(model: nn.Module) -> tuple[int, float]:
    """Return the number of parameters, and the billions of multiplications with an addition that an image takes."""
    pixels = torch.zeros(1, *resolve_model_data_config(model)['input_size'])
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.eval()(pixels)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 2e9
