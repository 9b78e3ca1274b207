"""The story of a run: resume or begin, preflight, epochs, evaluation, saving."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import save_image

from timm_mealv2.errors import UserError, blamed_on
from timm_mealv2.evaluation import evaluate, metrics_as_json
from timm_mealv2.files import replacing
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.runs import INITIAL
from timm_mealv2.task import MealV2Task
from timm_mealv2.training.build_data import Data, InputSpec
from timm_mealv2.training.checkpoint_saver import Position, RunSaver, position
from timm_mealv2.training.distributed import Processes, load_buffers, process_states, share_batch_norm
from timm_mealv2.training.dry_run import TimedBatches, measure_training, report
from timm_mealv2.training.loop import EpochEvents, Schedule, Stepper, learning_rate, train_one_epoch
from timm_mealv2.training.metric_logging import Meters, Trackers, append_summary
from timm_mealv2.training.progress import RunLog, TrainLog, evaluation_bar, log_evaluation
from timm_mealv2.training.resume import load_checkpoint, load_process_state, position_to_resume
from timm_mealv2.training.run_folder import RunFolder, find_newest
from timm_mealv2.training.stopping import EvaluationStoppedError, Guard, TooManyNonFiniteError

_logger = logging.getLogger(__name__)

_WATCHED_UPDATES = 100  # after which a discriminator that has not learned anything is dead

_CONTINUE = '--resume auto with the same --output and --experiment continues'


@dataclass(frozen=True)
class Parts:
    """What a run is made of.

    Attributes:
        stepper: A step, with task and optimizer.
        schedule: The learning rate.
        data: Training batches, and what a model is judged by.
        pixels: What the student sees.
        teachers: Live teachers of MEAL V2, None without.
        wrap: Compiles the task and wraps it in DDP, after a checkpoint is loaded.
    """

    stepper: Stepper
    schedule: Schedule
    data: Data
    pixels: InputSpec
    teachers: EnsembleTeacher | None
    wrap: Callable[[TrainingTask], None]


@dataclass(frozen=True)
class Plan:
    """What a run does, beside training.

    Attributes:
        settings: The settings, resolved, for its files.
        settings_text: The settings as they were given, for args.yaml.
        checkpoint: The checkpoint to go on from, None to begin.
        resume_optimizer: Load optimizer and loss scaler from it.
        start_epoch: The epoch to begin with, None for that of the checkpoint.
        dry_run_seconds: Only measure, for so long; None trains.
        preflight: Evaluate teachers and student before the first step.
        eval_metric: Metric of the best checkpoint.
        evaluate_ema: Evaluate the moving average too, and rank by it.
        val_interval: Epochs from evaluation to evaluation.
        log_interval: Batches from line to line of the log.
        recovery_interval: Updates from recovery checkpoint to recovery checkpoint, 0 for none.
        checkpoint_hist: Checkpoints of epochs to keep.
        dist_bn: How processes share statistics of batch norm after an epoch: 'reduce', 'broadcast' or ''.
        save_images: Save a batch of images with each line of the log.
        synchronize: Wait for the device after each step.
        tensorboard: Log to TensorBoard.
        wandb: Log to Weights & Biases with these arguments, None for not.
        push_to_hub: Push the best model there at the end, None for not.
        model_config: What the network is, for the checkpoints.
    """

    settings: dict[str, Any]
    settings_text: str
    checkpoint: Path | None
    resume_optimizer: bool
    start_epoch: int | None
    dry_run_seconds: float | None
    preflight: bool
    eval_metric: str
    evaluate_ema: bool
    val_interval: int
    log_interval: int
    recovery_interval: int
    checkpoint_hist: int
    dist_bn: str
    save_images: bool
    synchronize: bool
    tensorboard: bool
    wandb: dict[str, Any] | None
    push_to_hub: str | None
    model_config: dict[str, Any]


class Trainer:
    """One run.

    Args:
        parts: What it is made of.
        plan: What it does.
        processes: Its processes.
        guard: Knows when it has to stop.
        folder: Its folder.
    """

    def __init__(self, parts: Parts, plan: Plan, processes: Processes, guard: Guard, folder: RunFolder) -> None:
        self.parts, self.plan, self.processes, self.guard, self.folder = parts, plan, processes, guard, folder
        self.task = parts.stepper.task
        self.validation = parts.data.validation
        self.meters = Meters()
        self.saver: RunSaver | None = None
        self.trackers: Trackers | None = None
        self._updates = 0  # since the program began

    def run(self, log: TrainLog | None = None) -> None:
        """Train to the end; the run folder gets `log`."""
        start = self._begin() if self.plan.checkpoint is None else self._resume(self.plan.checkpoint)
        self.parts.schedule.go_to(start)
        if self.plan.dry_run_seconds is not None:
            self._dry_run(self.plan.dry_run_seconds)
            return
        rows = None
        if self.plan.checkpoint is None and self.plan.preflight and self.parts.teachers is not None:
            rows = self._preflight(self.parts.teachers)
        if self.processes.primary:
            self._open_folder(rows)
            if log is not None:
                log.write_to(self.folder.path / 'train.log')
        epochs = RunLog(start, self.parts.schedule.epochs, len(self.parts.data.loader), self.plan.eval_metric)
        with self.guard.signals.deferred():
            while start.epoch < self.parts.schedule.epochs:
                start = self._run_epoch(start, epochs)
        self._finish()

    # Before the first step

    def _begin(self) -> Position:
        self.parts.wrap(self.task)
        return self._first_epoch(Position())

    def _first_epoch(self, start: Position) -> Position:
        epoch = self.plan.start_epoch
        return start if epoch is None else Position(epoch, update=epoch * self.parts.schedule.updates_per_epoch)

    def _resume(self, path: Path) -> Position:
        """Load a checkpoint; return where the run stands."""
        parts, plan = self.parts, self.plan
        buffers: list[dict[str, Tensor]] = []
        with blamed_on(path):
            checkpoint = load_checkpoint(path, parts.stepper, parts.schedule, plan.resume_optimizer)
            start = position_to_resume(checkpoint, parts.data.loader, parts.schedule.updates_per_epoch)
            if start == position(checkpoint, parts.schedule.updates_per_epoch):
                buffers = load_process_state(checkpoint, self.processes, self.meters)
            if 'faults' in checkpoint:
                faults = checkpoint['faults']
                self.guard.state |= {'skipped': int(faults['skipped']), 'in_a_row': int(faults['in_a_row'])}
        parts.wrap(self.task)
        with blamed_on(path):
            load_buffers(self.task, buffers)
        start = self._first_epoch(start)
        _logger.info(f'Continuing from {path}: epoch {start.epoch}, batch {start.batch}, update {start.update}.')
        return start

    def _preflight(self, teachers: EnsembleTeacher) -> dict[str, dict[str, float]]:
        """Evaluate ensemble, teachers and the student's initial weights, so that a wrong teacher is seen in time."""
        if self.validation is None:
            return {}
        models = {'ensemble': teachers, INITIAL: self._student()}
        rows = self._evaluate(models, 'ensemble', self._batches(), members=True)
        self.guard.bad.check()
        rows = {name.replace('ensemble/', 'teacher '): row for name, row in rows.items()}
        width = max(map(len, rows))
        _logger.info(f'Before the first step, on {rows["ensemble"]["samples"]:.0f} images:')
        for name, metrics in rows.items():
            shown = [f'{key} {metrics[key]:.4g}' for key in ('top1', 'top5', 'agreement', 'kl') if key in metrics]
            _logger.info(f'  {name:<{width}}  {"  ".join(shown)}')
        return rows

    def _open_folder(self, preflight: dict[str, dict[str, float]] | None) -> None:
        plan, stepper = self.plan, self.parts.stepper
        self.folder.create()
        with replacing(self.folder.path / 'args.yaml') as path:
            path.write_text(plan.settings_text)
        if preflight:
            with replacing(self.folder.path / 'preflight.json') as path:
                path.write_text(metrics_as_json(preflight))
        self.saver = RunSaver(
            self.folder.path,
            self.task,
            stepper.optimizer,
            args=plan.settings,
            constant={
                'data_config': self.parts.pixels.config,
                'model_config': plan.model_config,
                'class_names': self.parts.data.class_names,
                'batches': len(self.parts.data.loader),
                'faults': self.guard.state,
            },
            scaler=stepper.scaler,
            decreasing=plan.eval_metric in ('loss', 'kl'),
            history=plan.checkpoint_hist,
        )
        if plan.checkpoint is not None and self.folder.holds(plan.checkpoint):
            self.saver.restore(plan.checkpoint)
        self.trackers = Trackers(self.folder, tensorboard=plan.tensorboard, wandb=plan.wandb)
        self.trackers.log_preflight(preflight or {})

    def _dry_run(self, seconds: float) -> None:
        """Measure the training and an evaluation; nothing is written."""
        parts = self.parts
        timing = measure_training(parts.stepper, parts.data.loader, seconds, self.processes)
        evaluation, evaluations = 0.0, 0
        if self.validation is not None:
            batches = TimedBatches(self.validation.loader, seconds / 4)
            self._evaluate(*self._evaluated(), distributed=False, loader=batches)
            evaluation = batches.seconds / batches.share
            evaluations = -(-parts.schedule.epochs // self.plan.val_interval)
        if self.processes.primary:
            length = len(parts.data.loader) * parts.schedule.epochs
            print(
                report(timing, processes=self.processes, batches=length, evaluation=evaluation, evaluations=evaluations)
            )

    # An epoch

    def _run_epoch(self, start: Position, log: RunLog) -> Position:
        """Train from `start` to the end of its epoch, evaluate, save; return where the next one starts."""
        parts, plan, epoch = self.parts, self.plan, start.epoch
        lr = learning_rate(parts.stepper.optimizer)
        trained = self._train(start)
        self.guard.agree()
        trained_to = Position(epoch, len(parts.data.loader), (epoch + 1) * parts.schedule.updates_per_epoch)
        if start.batch < len(parts.data.loader):  # of a run resumed at the epoch's end they are shared already
            share_batch_norm(self.task, plan.dist_bn, self.processes)
        self._stop_if_needed(trained_to)
        evaluated = None
        if epoch + 1 == parts.schedule.epochs or (epoch + 1) % plan.val_interval == 0:
            with contextlib.suppress(EvaluationStoppedError):
                evaluated = self._validate()
        self._stop_if_needed(trained_to)
        self.meters = Meters()
        metric = evaluated[plan.eval_metric] if evaluated else None
        parts.schedule.after_epoch(epoch + 1, metric)
        end = Position(epoch + 1, update=trained_to.update)
        self._keep(end)
        if self.saver is not None and self.trackers is not None:
            # An epoch without evaluation leaves its columns empty.
            columns = self.validation.columns if self.validation is not None else ('loss', 'top1', 'top5')
            append_summary(self.folder.summary, epoch, trained, evaluated or dict.fromkeys(columns, ''), lr)
            self.trackers.log(epoch, trained, evaluated or {}, lr)
            best, _ = self.saver.save_checkpoint(epoch, metric)
            self.saver.remove_recovery()
            _logger.info(log.line(epoch + 1, trained, evaluated, best))
            if hint := log.hint(epoch, trained):
                _logger.warning(hint)
        return end

    def _train(self, start: Position) -> dict[str, float]:
        plan = self.plan
        events = EpochEvents(
            after_update=self._after_update,
            before_next=self._before_next,
            at_line=self._at_line,
            log_interval=plan.log_interval,
            log=self.processes.primary,
            world_size=self.processes.world_size,
            synchronize=plan.synchronize,
        )
        try:
            return train_one_epoch(self.parts.stepper, self.parts.data.loader, start, self.meters, events)
        except TooManyNonFiniteError as error:
            newest = find_newest(self.folder.path)
            text = f'The last good checkpoint is {newest}.' if newest else 'No checkpoint was written before.'
            raise UserError(f'{error} {text}') from error

    def _after_update(self, position: Position, applied: Tensor) -> None:
        self.guard.note(position.update - 1, applied)
        self.guard.exchange()
        self._updates += 1
        # Asked once, and not at a learning rate of 0, which trains nothing.
        asks = self._updates == _WATCHED_UPDATES and learning_rate(self.parts.stepper.optimizer) > 0
        if asks and isinstance(self.task, MealV2Task) and (warning := self.task.discriminator_warning()):
            _logger.warning(warning)
        self.parts.schedule.after_update(position.update)

    def _at_line(self, batch: int, images: Tensor) -> None:
        def find_teachers() -> list[str]:
            if not isinstance(self.task, MealV2Task):
                return []
            with self.parts.stepper.autocast():
                return [f'teacher {name}' for name in self.task.nonfinite_teachers(images)]

        self.guard.settle(find_teachers)
        if self.plan.save_images and self.processes.primary:
            save_image(images, self.folder.path / f'train-batch-{batch}.jpg', padding=0, normalize=True)

    def _before_next(self, position: Position) -> None:
        interval = self.plan.recovery_interval
        if interval and position.update % interval == 0:
            self._save_recovery(position)
        self._stop_if_needed(position)

    def _stop_if_needed(self, position: Position) -> None:
        """End the run at `position`, on all processes, if a signal has come or too many images cannot be read."""
        guard = self.guard
        if not guard.stops:
            return
        self._save_recovery(position)
        guard.agree()  # torchrun ends all processes as soon as one is gone
        if guard.signal:
            guard.signals.leave(guard.signal, f' at epoch {position.epoch}, batch {position.batch}; {_CONTINUE}')
        guard.bad.check(f'Saved where it was; {_CONTINUE}')

    # Evaluation

    def _student(self, ema: bool = False) -> nn.Module:
        model: Any = self.task.get_eval_model(ema=ema)
        # DDP would send its buffers in each forward pass, and wait forever for a process that a signal has ended.
        return model.module if isinstance(model, DistributedDataParallel) else model

    def _evaluated(self) -> tuple[dict[str, nn.Module], str | None]:
        """What an evaluation runs, and the name of what the others are compared with."""
        models = {'student': self._student()}
        if self.task.has_ema() and self.plan.evaluate_ema:
            models['student (EMA)'] = self._student(ema=True)
        if self.validation is not None and self.validation.by_agreement and self.parts.teachers is not None:
            return {**models, 'ensemble': self.parts.teachers}, 'ensemble'
        return models, None

    def _evaluate(
        self, models: dict[str, nn.Module], reference: str | None, loader: Any, **options: Any
    ) -> dict[str, dict[str, float]]:
        with self.parts.stepper.autocast():
            return evaluate(
                models,
                loader,
                device=self.processes.device,
                reference=reference,
                data_config=self.parts.pixels.config,
                **{'distributed': self.processes.distributed, **options},
            )

    def _validate(self) -> dict[str, float] | None:
        """Metrics of the student, of its average (EMA) where that is evaluated; None with nothing to judge by."""
        if self.validation is None:
            return None
        rows = self._evaluate(*self._evaluated(), loader=self._batches())
        rows.pop('ensemble', None)
        log_evaluation(rows)
        return {key: value for key, value in list(rows.values())[-1].items() if key != 'samples'}

    def _batches(self) -> Any:
        """The batches of an evaluation, with a bar on a terminal; a signal ends them."""
        assert self.validation is not None
        return evaluation_bar(self.guard.until_stopped(self.validation.loader), self.processes.primary)

    # Saving

    def _keep(self, position: Position) -> None:
        """Gather what the next checkpoint holds of this process and the others: they all call it."""
        self.guard.settle()
        states = process_states(self.task, self.meters.state_dict(), self.processes)
        if self.saver is not None:
            self.saver.keep(position, states, self.parts.schedule.state_dict())

    def _save_recovery(self, position: Position) -> None:
        self._keep(position)
        if self.saver is not None:
            self.saver.save_recovery(position.epoch, position.batch)

    def _finish(self) -> None:
        if self.saver is None or self.trackers is None:  # not the first process
            return
        self.trackers.close()
        if self.saver.best_metric is not None:
            _logger.info(f'Best {self.plan.eval_metric}: {self.saver.best_metric:.4g} (epoch {self.saver.best_epoch}).')
        _logger.info(f'Written: {self.folder.path}')
        if self.plan.push_to_hub:
            self.folder.push(self.plan.push_to_hub)
