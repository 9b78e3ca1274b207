"""One step and one epoch of training. Knows a task, a loader and an optimizer, never the command line."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad, unwrap_model
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from timm_mealv2.data.loader import TrainLoader
from timm_mealv2.data.seed import Stream, counted_seed, seed_torch
from timm_mealv2.data.stream import StreamLoader
from timm_mealv2.task import MealV2Task
from timm_mealv2.training.logs import EpochLog
from timm_mealv2.training.meters import Clock, Meters
from timm_mealv2.training.run_folder import Position


class LossScaler(torch.amp.GradScaler):
    """torch's loss scaler for float16, under the name that timm's checkpoints give it."""

    state_dict_key = 'amp_scaler'


@dataclass
class Stepper:
    """Forward, backward and update: what one step is made of, the same for every task.

    An update whose gradient norm is not finite is not made: weights, optimizer and moving average stay as they were.

    Attributes:
        task: The task; its result's 'loss' is minimized.
        optimizer: Of the task's trainable module.
        accumulate: Batches an update.
        autocast: Makes the context of the forward pass (mixed precision).
        scaler: Loss scaler for float16, None without.
        clip_grad: Gradient clipping threshold, None for no clipping.
        clip_mode: 'norm', 'value' or 'agc'.
        channels_last: Memory format of the images.
        seed: The run's seed.
        rank: Number of this process.
        freeze_bn: Batch norm of what trains normalizes with its running statistics, which stay as they are; its weights
            and biases train like others.
        clock: Told the end of 'teachers' and 'student' in each step.
    """

    task: TrainingTask
    optimizer: torch.optim.Optimizer
    accumulate: int = 1
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    scaler: LossScaler | None = None
    clip_grad: float | None = None
    clip_mode: str = 'norm'
    channels_last: bool = False
    seed: int = 42
    rank: int = 0
    freeze_bn: bool = False

    def __post_init__(self) -> None:
        self._norms = [m for m in self.task.get_trainable_module().modules() if isinstance(m, _NormBase)]
        self._parameters = list(self.task.get_clip_parameters())
        self.clock = Clock(self.task.device)
        if isinstance(self.task, MealV2Task):
            self.task.after_teachers = functools.partial(self.clock.mark, 'teachers')
        self._first_seed = counted_seed(Stream.UPDATE, self.seed, self.rank)
        self._images: list[Tensor] = []  # of the update's batches, to find what is not finite

    def train(self) -> None:
        """Set the task to training, before its first step and after each evaluation."""
        self.task.train()
        if self.freeze_bn:
            for norm in self._norms:
                norm.eval()

    def step(
        self, images: Tensor, target: Tensor, *, update: int, part: int = 0, parts: int = 1, share: float | None = None
    ) -> tuple[dict[str, Tensor], float | None]:
        """Train on one batch, the `part`th of the `parts` that make up update number `update`.

        Args:
            images: Images [B, chans, H, W].
            target: What the task takes.
            update: Number of the update.
            part: Number of the batch in its update.
            parts: Batches of the update.
            share: The batch's share of the update's images, by which its loss is weighted; 1 / `parts` if None.

        Returns:
            The task's scalars, detached, and the gradient norm of the update (None before the last part).
        """
        last = part == parts - 1
        if not part:
            self._images.clear()
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        self._images.append(images)
        # Dropout and stochastic depth, which draw from torch, are functions of where the run stands.
        seed_torch(self._first_seed + update * self.accumulate + part, self.task.device)
        with nullcontext() if last else self.task.no_sync():
            with self.autocast():
                result: dict[str, Tensor] = self.task(images, target)
            loss = result['loss'] if parts == 1 else result['loss'] * (share or 1 / parts)
            self.backward(loss)
        self.clock.mark('student')
        scalars = {name: value.detach() for name, value in result.items() if name != 'output'}
        return scalars, self.update(update) if last else None

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient to that of the update."""
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward(create_graph=getattr(self.optimizer, 'is_second_order', False))

    def update(self, update: int) -> float:
        """Make update number `update` if its gradient norm is finite; return the norm, the same on all processes."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        total_norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        norm: float = total_norm.item()  # the one wait for the device
        if math.isfinite(norm):
            self._clip(total_norm)
            self.optimizer.step()
            self.task.update_ema(step=update + 1)
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad()
        return norm

    def _clip(self, total_norm: Tensor) -> None:
        if self.clip_grad is None:
            return
        if self.clip_mode == 'norm':
            clip_grads_with_norm_(self._parameters, self.clip_grad, total_norm)
        else:
            parameters = self.task.get_clip_parameters(exclude_head=self.clip_mode == 'agc')
            dispatch_clip_grad(parameters, value=self.clip_grad, mode=self.clip_mode)

    def log_teacher_rounding(self) -> None:
        """Log what the teachers' autocast changes on the last batch."""
        if isinstance(self.task, MealV2Task):
            self.task.log_teacher_rounding(self._images[-1])

    def largest_weight(self) -> float:
        """Return the largest absolute value of the weights that train."""
        largest: float = get_total_norm([p.detach() for p in self._parameters], math.inf).item()
        return largest

    def statistics_are_finite(self) -> bool:
        """Whether batch norm's running statistics are: a forward pass that overflows spoils them for good."""
        statistics = (b for norm in self._norms for b in norm.buffers() if b.is_floating_point())
        return all(bool(statistic.isfinite().all()) for statistic in statistics)

    @torch.no_grad()
    def first_nonfinite(self) -> tuple[int, str]:
        """Run the last update's batches again; return what is not finite first on this process, the order before it."""
        student = unwrap_model(self.task.get_eval_model())
        for images in self._images:
            if not images.isfinite().all():
                return 0, 'the images'
            with self.autocast():
                teachers = self.task.nonfinite_teachers(images) if isinstance(self.task, MealV2Task) else []
                if teachers:
                    return 1, f'teacher {teachers[0]}'
                if not student(images).isfinite().all():
                    return 2, 'the student'
        return 3, 'the gradient'


class Schedule:
    """timm's learning rate schedule, as a function of the position in the run.

    Args:
        scheduler: timm's scheduler, None for a constant learning rate.
        epochs: Length of the run, warm-up and cool-down included.
        updates_per_epoch: Updates of an epoch.
    """

    def __init__(self, scheduler: Scheduler | None, epochs: int, updates_per_epoch: int) -> None:
        self.scheduler, self.epochs, self.updates_per_epoch = scheduler, epochs, updates_per_epoch

    def go_to(self, position: Position) -> None:
        """Set the learning rate of a position. A schedule that follows a metric keeps the one that it has come to."""
        if self.scheduler is not None and not isinstance(self.scheduler, PlateauLRScheduler):
            self.scheduler.step(position.epoch)
            self.scheduler.step_update(position.update)

    def after_update(self, updates: int) -> None:
        """Go on after an update; `updates` have been made."""
        if self.scheduler is not None:
            self.scheduler.step_update(updates)

    def after_epoch(self, epochs: int, metric: float | None) -> None:
        """Go on after an epoch; `epochs` have been made, and `metric` is the last one's."""
        if self.scheduler is not None:
            self.scheduler.step(epochs, metric)

    def state_dict(self) -> dict[str, Any] | None:
        """Return what a schedule that follows a metric has counted; None for all others.

        The state that timm's has leaves out how long it has been waiting.
        """
        if not isinstance(self.scheduler, PlateauLRScheduler):
            return None
        counted = {name: getattr(self.scheduler.lr_scheduler, name) for name in _COUNTED}
        return {'counted': counted, 'restore_lr': self.scheduler.restore_lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        if isinstance(self.scheduler, PlateauLRScheduler):
            for name in _COUNTED:
                setattr(self.scheduler.lr_scheduler, name, state['counted'][name])
            self.scheduler.restore_lr = state['restore_lr']


_COUNTED = ('best', 'num_bad_epochs', 'cooldown_counter', 'last_epoch')


def updates_per_epoch(loader: TrainLoader | StreamLoader, accumulate: int) -> int:
    """Optimizer updates of an epoch: the last may be made of fewer batches than the others."""
    return math.ceil(len(loader) / accumulate)


def batches_with_parts(
    loader: TrainLoader | StreamLoader, epoch: int, start: int, accumulate: int
) -> Iterator[tuple[int, Tensor, Tensor, dict[str, Any]]]:
    """Yield number, images and target of each batch of an epoch, and its place in its update, for `Stepper.step`.

    An update of several batches is one batch of all their images: each counts by its number of images, which is the
    same on every process.
    """
    batches = len(loader)
    sizes = loader.batch_sizes() if accumulate > 1 else [1] * batches
    for batch, (images, target) in enumerate(loader.batches(epoch, start), start):
        part = batch % accumulate
        of_update = sizes[batch - part : batch - part + accumulate]
        place = {'part': part, 'parts': len(of_update), 'share': sizes[batch] / sum(of_update)}
        yield batch, images, target, place


def train_one_epoch(
    stepper: Stepper,
    loader: TrainLoader | StreamLoader,
    start: Position,
    meters: Meters,
    log: EpochLog,
    *,
    after_update: Callable[[Position, float], None] | None = None,
    at_line: Callable[[int, Tensor], None] | None = None,
    synchronize: bool = False,
) -> dict[str, float]:
    """Train from `start` to the end of its epoch.

    Args:
        stepper: What a step is.
        loader: Gives the batches.
        start: Where to begin.
        meters: Empty, or the sums of the epoch's earlier batches.
        log: Shows the progress.
        after_update: Told, on every process, after each update where the run stands and the gradient norm; may end the
            run.
        at_line: Told the number of the batch and its images at each line of the log.
        synchronize: Wait for the device after each step.

    Returns:
        Means of the task's scalars over the epoch and all processes, 'images_per_second' of all processes, and where
        the time of this one went (see `Clock.means`).
    """
    stepper.train()
    clock, update = stepper.clock, start.update
    clock.restart()
    scalars: list[tuple[dict[str, Tensor], int]] = []  # of the update's batches, counted if it is made
    for batch, images, target, place in batches_with_parts(loader, start.epoch, start.batch, stepper.accumulate):
        clock.mark('data')
        result, norm = stepper.step(images, target, update=update, **place)
        scalars.append((result, len(images)))
        if synchronize and images.is_cuda:
            torch.cuda.synchronize()
        if norm is not None:
            meters.update(scalars, norm)
            scalars.clear()
            update += 1
            if after_update is not None:
                after_update(Position(start.epoch, batch + 1, update), norm)
        if log.batch(batch, len(images), meters, stepper.optimizer, clock) and at_line is not None:
            at_line(batch, images)
        clock.mark('update')
    log.close()
    if hasattr(stepper.optimizer, 'sync_lookahead'):
        stepper.optimizer.sync_lookahead()
    return {**meters.means(log.world_size > 1), 'images_per_second': log.images_per_second, **clock.means()}
