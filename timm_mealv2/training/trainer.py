"""The story of a run: resume or begin, preflight, epochs, evaluation, saving."""

import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from logging.handlers import MemoryHandler
from typing import Any

from timm.task import TrainingTask
from torch import Tensor
from torchvision.utils import save_image

from timm_mealv2.errors import TrainingFailedError
from timm_mealv2.evaluation import metrics_as_json
from timm_mealv2.files import replacing
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.task import MealV2Task
from timm_mealv2.training.build_data import Data
from timm_mealv2.training.distributed import load_buffers, process_states, share_batch_norm
from timm_mealv2.training.dry_run import measure_training, report
from timm_mealv2.training.logs import EpochLog, RunLog, Trackers, append_summary, named_figures, write_log
from timm_mealv2.training.loop import Schedule, Stepper, train_one_epoch
from timm_mealv2.training.meters import Meters, learning_rate
from timm_mealv2.training.resume import load_checkpoint, own_state, position_to_resume
from timm_mealv2.training.run_folder import Position, RunFolder, RunSaver
from timm_mealv2.training.stopping import EvaluationStoppedError, Guard
from timm_mealv2.training.validation import Validator, doubts

_logger = logging.getLogger(__name__)

_WATCHED_UPDATES = 100  # after which a discriminator that has not learned anything is dead
_EXPLODED = 1e6  # a weight that no useful training reaches
_MOST_SKIPPED = 20  # updates in a row that the loss scaler of float16 may skip

_CONTINUE = '--resume auto with the same --output and --experiment continues'


@dataclass(frozen=True)
class Plan:
    """What a run does, beside training.

    Attributes:
        settings: The settings, resolved, for its files.
        settings_text: The settings as they were given, for args.yaml.
        checkpoint: The checkpoint to go on from, None to begin.
        random_weights: Whether a run that begins does so with random weights.
        resume_optimizer: Load optimizer and loss scaler from it.
        start_epoch: The epoch to begin with, None for that of the checkpoint.
        dry_run: Only measure how long it takes.
        preflight: Evaluate teachers and student before the first step.
        eval_metric: Metric of the best checkpoint.
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
        kept: Further entries of every checkpoint: what the network, its pixels and its classes are.
    """

    settings: dict[str, Any]
    settings_text: str
    checkpoint: TrainingCheckpoint | None
    random_weights: bool
    resume_optimizer: bool
    start_epoch: int | None
    dry_run: bool
    preflight: bool
    eval_metric: str
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
    kept: dict[str, Any]


@dataclass
class Trainer:
    """One run.

    Attributes:
        stepper: A step, with task and optimizer.
        schedule: The learning rate.
        data: Training batches, and what a model is judged by.
        validator: Evaluates; None with nothing to judge by.
        wrap: Compiles the task and wraps it in DDP, after a checkpoint is loaded.
        plan: What the run does.
        guard: Knows the processes, and when they have to stop.
        folder: The run folder.
    """

    stepper: Stepper
    schedule: Schedule
    data: Data
    validator: Validator | None
    wrap: Callable[[TrainingTask], None]
    plan: Plan
    guard: Guard
    folder: RunFolder

    def __post_init__(self) -> None:
        self.task, self.processes = self.stepper.task, self.guard.processes
        self.meters = Meters()
        self.saver: RunSaver | None = None  # of the first process
        self.trackers: Trackers | None = None
        self._updates = 0  # since the program began
        self._skipped = 0  # updates in a row

    def run(self, log: MemoryHandler | None = None) -> None:
        """Train to the end; the run folder gets the lines of `log`."""
        plan, schedule = self.plan, self.schedule
        start = self._load()
        schedule.go_to(start)
        if plan.dry_run:
            self._dry_run()
            return
        preflight = {}
        if plan.checkpoint is None and plan.preflight and self.validator is not None:
            preflight = self.validator.before_training()
        if plan.checkpoint is None and isinstance(self.task, MealV2Task):
            for line in doubts(preflight, self.task.teacher, plan.settings['num_classes'], plan.random_weights):
                _logger.warning(line)
        if self.processes.primary:
            self._open_folder(preflight, log)
        epochs = RunLog(start, schedule.epochs, len(self.data.loader), plan.eval_metric)
        with self.guard.signals.deferred():
            while start.epoch < schedule.epochs:
                start = self._run_epoch(start, epochs)
        self._finish()

    # Before the first step

    def _load(self) -> Position:
        """Load the checkpoint, where there is one; return where the run begins or goes on."""
        plan, checkpoint = self.plan, self.plan.checkpoint
        updates_per_epoch = self.schedule.updates_per_epoch
        start, state = Position(), {}
        if checkpoint is not None:
            load_checkpoint(checkpoint, self.stepper, self.schedule, plan.resume_optimizer)
            start = position_to_resume(checkpoint, plan.settings, self.data.loader, updates_per_epoch)
            state = own_state(checkpoint, self.processes)
        self.wrap(self.task)
        load_buffers(self.task, state.get('statistics', {}))
        if start.batch and 'names' in state.get('meters', {}):
            self.meters.load_state_dict(state['meters'], self.processes.device)
        if plan.start_epoch is not None:
            start = Position(plan.start_epoch, update=plan.start_epoch * updates_per_epoch)
        if checkpoint is not None:
            place = f'epoch {start.epoch + 1}, batch {start.batch}, update {start.update}'
            _logger.info(f'Continuing from {checkpoint.path}: {place}.')
        return start

    def _open_folder(self, preflight: dict[str, dict[str, float]], log: MemoryHandler | None) -> None:
        plan, path = self.plan, self.folder.path
        path.mkdir(parents=True, exist_ok=True)
        with replacing(path / 'args.yaml') as temporary:
            temporary.write_text(plan.settings_text)
        if preflight:
            with replacing(path / 'preflight.json') as temporary:
                temporary.write_text(metrics_as_json(preflight))
        self.saver = RunSaver(
            self.folder,
            self.task,
            self.stepper.optimizer,
            args=plan.settings,
            constant={**plan.kept, 'batches': len(self.data.loader)},
            scaler=self.stepper.scaler,
            decreasing=plan.eval_metric in ('loss', 'kl'),
            history=plan.checkpoint_hist,
        )
        if plan.checkpoint is not None and self.folder.holds(plan.checkpoint.path):
            self.saver.restore(plan.checkpoint)
        self.trackers = Trackers(self.folder, tensorboard=plan.tensorboard, wandb=plan.wandb)
        self.trackers.log_preflight(preflight)
        if log is not None:
            write_log(log, path / 'train.log')

    def _dry_run(self) -> None:
        """Measure the training and an evaluation; nothing is written."""
        timing = measure_training(self.stepper, self.data.loader, self.processes)
        evaluation, evaluations = 0.0, 0
        if self.validator is not None:
            evaluation = self.validator.measure()
            evaluations = -(-self.schedule.epochs // self.plan.val_interval)
        if self.processes.primary:
            length = len(self.data.loader) * self.schedule.epochs
            print(report(timing, self.processes, batches=length, evaluation=evaluation, evaluations=evaluations))

    # An epoch

    def _run_epoch(self, start: Position, log: RunLog) -> Position:
        """Train from `start` to the end of its epoch, evaluate, save; return where the next one starts."""
        plan, epoch = self.plan, start.epoch
        lr = learning_rate(self.stepper.optimizer)
        trained = self._train(start)
        self.guard.agree()
        trained_to = Position(epoch, len(self.data.loader), (epoch + 1) * self.schedule.updates_per_epoch)
        if start.batch < len(self.data.loader):  # of a run resumed at the epoch's end they are shared already
            share_batch_norm(self.task, plan.dist_bn, self.processes)
        if (largest := self.stepper.largest_weight()) > _EXPLODED:
            _logger.warning(
                f'The weights have exploded, the largest is {largest:.1e}: lower --lr or set --clip-grad 1; the column '
                'train_grad_norm of summary.csv shows where it began.'
            )
        self._stop_if_needed(trained_to)
        evaluated = None
        due = epoch + 1 == self.schedule.epochs or (epoch + 1) % plan.val_interval == 0
        if due and self.validator is not None:
            with contextlib.suppress(EvaluationStoppedError):
                evaluated = self.validator.after_epoch()
        for line in self.guard.bad.tell_ignored(self.processes.gather):
            if self.processes.primary:
                _logger.warning(line)
        self._stop_if_needed(trained_to)
        self.meters = Meters()
        metric = evaluated[plan.eval_metric] if evaluated else None
        self.schedule.after_epoch(epoch + 1, metric)
        end = Position(epoch + 1, update=trained_to.update)
        self._keep(end)
        if self.saver is not None and self.trackers is not None:
            # An epoch without evaluation leaves its columns empty.
            columns = dict.fromkeys(self.data.columns, '')
            append_summary(self.folder.summary, epoch, trained, evaluated or columns, lr)
            self.trackers.log(epoch, trained, evaluated or {}, lr)
            best, _ = self.saver.save_checkpoint(epoch, metric)
            self.saver.remove_recovery()
            _logger.info(log.line(epoch + 1, trained, evaluated, best))
            if hint := log.hint(epoch, trained):
                _logger.warning(hint)
        return end

    def _train(self, start: Position) -> dict[str, float]:
        loader, processes = self.data.loader, self.processes
        log = EpochLog(
            start,
            len(loader),
            interval=self.plan.log_interval,
            world_size=processes.world_size,
            shown=processes.primary,
        )
        return train_one_epoch(
            self.stepper,
            loader,
            start,
            self.meters,
            log,
            after_update=self._after_update,
            at_line=self._save_images if self.plan.save_images and processes.primary else None,
            synchronize=self.plan.synchronize,
        )

    def _after_update(self, position: Position, norm: float) -> None:
        """Look at the gradient norm, tell the schedule, save and stop where that is due."""
        self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        if self._skipped:
            self._fail_unless_scaled(position.update - 1, norm)
        self._updates += 1
        if self._updates == 1 and self.processes.primary:
            self.stepper.log_teacher_rounding()
        # Asked once, and not at a learning rate of 0, which trains nothing.
        asks = self._updates == _WATCHED_UPDATES and learning_rate(self.stepper.optimizer) > 0
        if asks and isinstance(self.task, MealV2Task) and (note := self.task.discriminator_warning()):
            _logger.info(note)
        self.schedule.after_update(position.update)
        self.guard.after_update(position.update)
        if position.batch < len(self.data.loader):
            interval = self.plan.recovery_interval
            if interval and position.update % interval == 0:
                self._save_recovery(position)
            self._stop_if_needed(position)

    def _fail_unless_scaled(self, update: int, norm: float) -> None:
        """End the run after an update that is not finite, on all processes, unless the loss scaler may mend it.

        A smaller scale mends a gradient that overflows in float16, but not batch norm's statistics.
        """
        stepper, gather = self.stepper, self.processes.gather
        scaled = stepper.scaler is not None and self._skipped < _MOST_SKIPPED
        if scaled and all(gather(stepper.statistics_are_finite())):
            return
        _, first = min(gather(stepper.first_nonfinite()))
        name, _ = self.folder.last_written()
        good = f'The last good checkpoint is {self.folder.path / name}.' if name else 'There is no checkpoint before.'
        times = f', {self._skipped} updates in a row' if self._skipped > 1 else ''
        text = f'the gradient norm is {norm}{times}; not finite first: {first}'
        raise TrainingFailedError(f'update {update}: {text}. {good}')

    def _save_images(self, batch: int, images: Tensor) -> None:
        save_image(images, self.folder.path / f'train-batch-{batch}.jpg', padding=0, normalize=True)

    def _stop_if_needed(self, position: Position) -> None:
        """End the run at `position`, on all processes, if a signal has come or too many images cannot be read."""
        guard = self.guard
        if not guard.stops:
            return
        self._save_recovery(position)
        guard.agree()  # torchrun ends all processes as soon as one is gone
        if guard.signal:
            guard.signals.leave(guard.signal, f' at epoch {position.epoch + 1}, batch {position.batch}; {_CONTINUE}')
        guard.bad.check(f'Saved where it was; {_CONTINUE}')

    # Saving

    def _keep(self, position: Position) -> None:
        """Gather what the next checkpoint holds of this process and the others: they all call it."""
        states = process_states(self.task, self.meters.state_dict(), self.processes)
        if self.saver is not None:
            self.saver.keep(position, states, self.schedule.state_dict())

    def _save_recovery(self, position: Position) -> None:
        self._keep(position)
        if self.saver is not None:
            self.saver.save_recovery(position.epoch, position.batch)

    def _finish(self) -> None:
        if self.saver is None or self.trackers is None:  # not the first process
            return
        self.trackers.close()
        if self.saver.best_metric is not None:
            best = named_figures({self.plan.eval_metric: self.saver.best_metric})
            _logger.info(f'Best: {best} (epoch {self.saver.best_epoch + 1}).')
        _logger.info(f'Written: {self.folder.path}')
        if self.plan.push_to_hub:
            self.folder.push(self.plan.push_to_hub)
