"""What a run folder tells: summary.csv, args.yaml and preflight.json; and what its student costs."""

import csv
import json
import math
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
    short = [f'teacher {"/".join(name.split("/")[-2:])}' if name.count('/') > 1 else name for name in full]
    return dict(zip(full, short if len(set(short)) == len(full) else full, strict=True))


@dataclass(frozen=True)
class Run:
    """What a run folder tells.

    Attributes:
        folder: The folder.
        rows: Column of summary.csv -> value, for each epoch; a column without a value (no evaluation) is left out.
        settings: The program's arguments (args.yaml); empty if the file is not there.
        preflight: Model -> metrics before the first step (preflight.json): 'ensemble', 'teacher NAME' and
            'student (initial)'; empty if the file is not there.
    """

    folder: Path
    rows: list[dict[str, float]]
    settings: dict[str, Any]
    preflight: dict[str, dict[str, float | None]]

    @property
    def epochs(self) -> list[int]:
        """Numbers of the epochs, from 0."""
        return [int(row['epoch']) for row in self.rows]

    def values(self, column: str) -> list[tuple[int, float]]:
        """Return (epoch, value) of a column where it has one."""
        return [(int(row['epoch']), row[column]) for row in self.rows if column in row]

    def before(self, model: str, metric: str) -> float | None:
        """Return a metric of a model before the first step, None if it was not measured."""
        return self.preflight.get(model, {}).get(metric)

    @property
    def metric(self) -> str:
        """What the best epoch is the best by: `--eval-metric`, or the agreement where there are no labels."""
        metric = self.settings.get('eval_metric') or 'top1'
        return metric if self.values(f'eval_{metric}') else 'agreement'

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the best evaluation, None without evaluation."""
        sign = -1 if self.metric in ('loss', 'kl') else 1
        # NaN ranks last.
        ranks = {epoch: -math.inf if math.isnan(v) else sign * v for epoch, v in self.values(f'eval_{self.metric}')}
        return max(ranks, key=ranks.__getitem__, default=None)


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read `summary.csv`, `args.yaml` and `preflight.json` of a run folder.

    Raises:
        UserError: If there is no summary, or no epoch in it.
    """
    folder = Path(folder)
    summary, settings, preflight = (folder / name for name in ('summary.csv', 'args.yaml', 'preflight.json'))
    rows: list[dict[str, float]] = []
    if summary.is_file():
        with summary.open(newline='') as file:
            rows = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]
    if not rows:
        raise UserError(f'{folder} has no finished epoch in a summary.csv: expected a run folder (OUTPUT/EXPERIMENT).')
    return Run(
        folder,
        rows,
        yaml.safe_load(settings.read_text()) if settings.is_file() else {},
        json.loads(preflight.read_text()) if preflight.is_file() else {},
    )


def model_cost(model: nn.Module) -> tuple[int, float]:
    """Return the number of parameters, and the billions of multiplications with an addition that an image takes."""
    pixels = torch.zeros(1, *resolve_model_data_config(model)['input_size'])
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.eval()(pixels)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 2e9
