"""How a run evaluates: teachers and initial student before the first step, the student after an epoch."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from timm_mealv2.evaluation import evaluate
from timm_mealv2.figures import as_text, metric_table
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.runs import INITIAL
from timm_mealv2.training.build_data import Data
from timm_mealv2.training.dry_run import TimedBatches
from timm_mealv2.training.logs import evaluation_bar, log_evaluation
from timm_mealv2.training.loop import Stepper
from timm_mealv2.training.stopping import Guard, UntilStopped

_logger = logging.getLogger(__name__)

Rows = dict[str, dict[str, float]]  # model -> metrics


@dataclass(frozen=True)
class Validator:
    """Evaluates the models of a run.

    Attributes:
        data: Has the images.
        stepper: Has the task and its mixed precision.
        teachers: Live teachers of MEAL V2, None without.
        data_config: What the pixels are normalized with.
        guard: Ends an evaluation when a signal comes.
        with_average: Evaluate the moving average too, and rank by it.
        recorded: Metrics of the teachers of a soft-label store, as it has them; empty without.
    """

    data: Data
    stepper: Stepper
    teachers: EnsembleTeacher | None
    data_config: Mapping[str, Any]
    guard: Guard
    with_average: bool
    recorded: Rows

    def before_training(self) -> Rows:
        """Evaluate ensemble, teachers and the student's initial weights, so that a wrong teacher is seen in time."""
        initial = {INITIAL: self._student()}
        if self.teachers is not None:
            rows = self._evaluate({'ensemble': self.teachers, **initial}, self._batches(), 'ensemble', members=True)
        elif self.recorded:
            rows = {**self.recorded, **self._evaluate(initial, self._batches(), None)}
        else:
            return {}
        self.guard.bad.check()
        _logger.info(f'Before the first step, on {rows["ensemble"]["samples"]:.0f} images:')
        for line in as_text(metric_table(rows)).splitlines():
            _logger.info(f'  {line}')
        return rows

    def after_epoch(self) -> dict[str, float]:
        """Return the metrics of the student, or of its average (EMA) where that is evaluated."""
        rows = self._evaluate_student(self._batches())
        log_evaluation(rows)
        return {key: value for key, value in list(rows.values())[-1].items() if key != 'samples'}

    def measure(self) -> float:
        """Return how many seconds an evaluation takes, measured on some of its batches."""
        batches = TimedBatches(self.data.evaluated)
        self._evaluate_student(batches, distributed=False)
        return batches.seconds / batches.share

    def _evaluate_student(self, batches: Any, **options: Any) -> Rows:
        models = {'student': self._student()}
        if self.stepper.task.has_ema() and self.with_average:
            models['student (EMA)'] = self._student(ema=True)
        if not self.data.by_agreement or self.teachers is None:
            return self._evaluate(models, batches, None, **options)
        rows = self._evaluate({**models, 'ensemble': self.teachers}, batches, 'ensemble', **options)
        return {name: rows[name] for name in models}

    def _evaluate(self, models: dict[str, nn.Module], batches: Any, reference: str | None, **options: Any) -> Rows:
        processes = self.guard.processes
        options = {'distributed': processes.distributed, 'data_config': self.data_config, **options}
        with self.stepper.autocast():
            return evaluate(models, batches, device=processes.device, reference=reference, **options)

    def _student(self, ema: bool = False) -> nn.Module:
        model: Any = self.stepper.task.get_eval_model(ema=ema)
        # DDP would send its buffers in each forward pass, and wait forever for a process that a signal has ended.
        return model.module if isinstance(model, DistributedDataParallel) else model

    def _batches(self) -> Any:
        """The batches of an evaluation, with a bar on a terminal; a signal ends them."""
        return evaluation_bar(UntilStopped(self.guard, self.data.evaluated), self.guard.processes.primary)


def doubts(rows: Rows, teachers: EnsembleTeacher | None, num_classes: int, random_weights: bool) -> list[str]:
    """Return what makes it doubtful, before the first step, that a distillation will gain anything.

    The costs named are those of docs/evidence.md.

    Args:
        rows: What `Validator.before_training` found; {} if it was not asked.
        teachers: The ensemble, None with stored labels.
        num_classes: Number of classes.
        random_weights: Whether the student begins with random weights.
    """
    lines = []
    if random_weights:
        lines.append(
            'The student begins with random weights, which cost 7.4 points of top-1 in our measurement: MEAL V2 goes '
            'on from a trained student. Give --pretrained, or --initial-checkpoint (--recipe student trains one).'
        )
    top1 = {name: row['top1'] for name, row in rows.items() if 'top1' in row}
    if 'ensemble' not in top1 or teachers is None:
        return lines
    ensemble, chance = top1.pop('ensemble'), 100 / num_classes
    initial = top1.pop(INITIAL)
    if ensemble < chance + (100 - chance) / 10:
        lines.append(
            f'The ensemble is near chance: top-1 {ensemble:.2f}, where guessing gives {chance:.2f}. Are its classes in '
            'another order, or its pixels not those of its training? (docs/troubleshooting.md)'
        )
        return lines
    if ensemble <= initial:
        lines.append(
            f"The ensemble (top-1 {ensemble:.2f}) is not better than the student's initial weights ({initial:.2f}): it "
            'has little to teach. Take better teachers (docs/own_data.md).'
        )
    members = [(value, weight, name) for (name, value), weight in zip(top1.items(), teachers.weights, strict=True)]
    (weak, weak_weight, name), (best, best_weight, _) = min(members), max(members)
    if weak < best and weak_weight >= best_weight and (weak <= initial or ensemble < best - 1):
        lines.append(
            f'The {name} is weak (top-1 {weak:.2f}, the best one has {best:.2f}): drop it, or give it a small '
            'weight with --teacher-weights. With equal weights such a one cost 0.45 points of top-1 in our measurement.'
        )
    return lines
