"""One step and one epoch of training. Knows a task, a loader and an optimizer, never the command line."""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from timm_mealv2.data.loader import StreamLoader, TrainLoader
from timm_mealv2.data.seed import Stream, counted_seed, seed_torch
from timm_mealv2.errors import UserError
from timm_mealv2.task import MealV2Task
from timm_mealv2.training.checkpoint_saver import Position
from timm_mealv2.training.metric_logging import Meters
from timm_mealv2.training.progress import EpochLog
from timm_mealv2.training.timing import Clock


class LossScaler(torch.amp.GradScaler):
    """torch's loss scaler for float16, under the name that timm's checkpoints give it."""

    state_dict_key = 'amp_scaler'


@dataclass
class Stepper:
    """Forward, backward and update: what one step is made of, the same for every task.

    An update whose gradient is not finite is skipped on all processes: weights, optimizer, moving average and the
    statistics of batch norm stay as they were. A loss that is not finite makes its gradient NaN, and that of the other
    processes by DDP's sum, so that nothing has to be agreed on.

    Fused optimizers of torch skip by themselves, and nothing waits for the device. All others, the first update (fused
    SGD would go on with a momentum that was never set) and a moving average need one wait an update.

    Attributes:
        task: The task; its result's 'loss' is minimized.
        optimizer: Of the task's trainable module.
        accumulate: Batches an update.
        autocast: Makes the context of the forward pass (mixed precision).
        scaler: Loss scaler for float16, None without.
        clip_grad: Bound of the gradient, None for none.
        clip_mode: 'norm', 'value' or 'agc'.
        loss_weight: Weight of a batch's loss by its number of images (batches of changing size).
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
    loss_weight: Callable[[int], float] | None = None
    channels_last: bool = False
    seed: int = 42
    rank: int = 0
    freeze_bn: bool = False

    def __post_init__(self) -> None:
        self._norms = [m for m in self.task.get_trainable_module().modules() if isinstance(m, _NormBase)]
        # What a forward pass changes before it is known whether the update is made.
        self._statistics = _Backup([buffer for norm in self._norms for buffer in norm.buffers()])
        self._parameters: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self.task.get_clip_parameters():
            self._parameters.setdefault(parameter.dtype, []).append(parameter)
        self._clipped = list(self.task.get_clip_parameters(exclude_head='agc' in self.clip_mode))
        self.clock = Clock(self.task.device)
        if isinstance(self.task, MealV2Task):
            self.task.after_teachers = functools.partial(self.clock.mark, 'teachers')
        self._first_seed = counted_seed(Stream.UPDATE, self.seed, self.rank)
        self._one = torch.ones((), device=self.task.device)
        self._loss = torch.tensor(0.0)  # of the batches of this update so far
        self._begun = False  # whether an update was made

    def train(self) -> None:
        """Set the task to training, before its first step and after each evaluation."""
        self.task.train()
        if self.freeze_bn:
            for norm in self._norms:
                norm.eval()

    def step(
        self, images: Tensor, target: Tensor, *, update: int, part: int = 0, parts: int = 1
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Train on one batch, the `part`th of the `parts` that make up update number `update`.

        Returns:
            The task's result, and whether the update was made (a scalar on the device; None before the last part).
        """
        last = part == parts - 1
        if not part:
            self._statistics.make()
        # Dropout and stochastic depth, which draw from torch, are functions of where the run stands.
        seed_torch(self._first_seed + update * self.accumulate + part, self.task.device)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with nullcontext() if last else self.task.no_sync():
            with self.autocast():
                result: dict[str, Tensor] = self.task(images, target)
            loss = result['loss'] if parts == 1 else result['loss'] / parts
            if self.loss_weight is not None:
                loss = loss * self.loss_weight(len(images))
            self._loss = self._loss + loss.detach() if part else loss.detach()
            self.backward(loss)
        self.clock.mark('student')
        return result, self.update(update) if last else None

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient to that of the update; it is NaN if the loss is not finite."""
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        one_or_nan = torch.add(self._one, loss.detach(), alpha=0)
        scaled.backward(one_or_nan, create_graph=getattr(self.optimizer, 'is_second_order', False))

    def update(self, update: int) -> Tensor:
        """Make update number `update`, unless its gradient is not finite; return whether it was made.

        A gradient that overflows by the loss scaler's factor is the scaler's affair: that update counts as made.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        found_inf = torch.zeros_like(self._one)
        # The fused check of torch's loss scaler, here with a factor of 1; a norm of many small tensors takes longer.
        for parameters in self._parameters.values():  # of one dtype, as the operator wants them on a GPU
            gradients = [p.grad for p in parameters if p.grad is not None]
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, self._one)
        finite = found_inf == 0
        if self.clip_grad is not None:
            dispatch_clip_grad(self._clipped, value=self.clip_grad, mode=self.clip_mode)
        if self._begun and self._skips_itself():
            optimizer: Any = self.optimizer
            optimizer.found_inf = found_inf
            optimizer.step()
            self._statistics.put_back(unless=finite)
        elif finite:  # the one wait for the device
            self._begun = True
            self.optimizer.step()
            if self.task.has_ema():
                self._update_average(update)
        else:
            self._statistics.put_back(unless=finite)
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad()
        return finite if self.scaler is None else self._loss.isfinite()

    def _skips_itself(self) -> bool:
        """Whether optimizer and average leave everything as it is, where the optimizer's `found_inf` says so."""
        fused = all(group.get('fused') for group in self.optimizer.param_groups)
        return fused and hasattr(self.optimizer, '_step_supports_amp_scaling') and not self.task.has_ema()

    def _update_average(self, update: int) -> None:
        # Rounding of a bfloat16 average is random too, and the same on every process.
        ema: Any = self.task.get_trainable_module(ema=True)
        ema._sr_generator.manual_seed(counted_seed(Stream.EMA_ROUNDING, self.seed, update))
        self.task.update_ema(step=update + 1)


class _Backup:
    """A copy of tensors, made and put back without waiting for the device: all of them are one tensor of bytes."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._bytes = [tensor.detach().view(-1).view(torch.uint8) for tensor in tensors]
        self._copy = torch.cat(self._bytes) if tensors else torch.empty(0)

    def make(self) -> None:
        """Copy the tensors as they are now."""
        if self._bytes:
            torch.cat(self._bytes, out=self._copy)

    def put_back(self, *, unless: Tensor) -> None:
        """Give the tensors the values of their copies where the scalar `unless` is False."""
        if self._bytes:
            values = torch.where(unless, torch.cat(self._bytes), self._copy)
            torch._foreach_copy_(self._bytes, list(values.split([len(part) for part in self._bytes])))


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
            self._step(self.scheduler, self.scheduler.step, position.epoch)
            self._step(self.scheduler, self.scheduler.step_update, position.update)

    def after_update(self, updates: int) -> None:
        """Go on after an update; `updates` have been made."""
        if self.scheduler is not None:
            self._step(self.scheduler, self.scheduler.step_update, updates)

    def after_epoch(self, epochs: int, metric: float | None) -> None:
        """Go on after an epoch; `epochs` have been made, and `metric` is the last one's."""
        if self.scheduler is not None:
            self._step(self.scheduler, self.scheduler.step, epochs, metric)

    @staticmethod
    def _step(scheduler: Scheduler, step: Callable[..., None], *where: Any) -> None:
        try:
            step(*where)
            rates = [group['lr'] for group in scheduler.optimizer.param_groups]
        except (ArithmeticError, ValueError) as error:
            raise UserError(f'the options of the learning rate do not go together: {error}.') from error
        if not all(abs(rate) < torch.finfo(torch.float32).max for rate in rates):
            raise UserError(f'the learning rate has come to {max(rates):g}: its options do not go together.')

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


@dataclass
class EpochEvents:
    """What happens beside the steps. All functions are called on every process.

    Attributes:
        after_update: Told, after each update, where the run stands, and whether the update was made (a scalar on the
            device).
        before_next: Called between two updates of the epoch with the position; may end the run.
        at_line: Told the number of the batch and its images at each line of the log, where the device is waited for.
        log_interval: Batches from one line of the log to the next.
        log: Whether this process writes the log.
        world_size: Number of processes, each with batches of its own.
        synchronize: Wait for the device after each step.
    """

    after_update: Callable[[Position, Tensor], None] | None = None
    before_next: Callable[[Position], None] | None = None
    at_line: Callable[[int, Tensor], None] | None = None
    log_interval: int = 50
    log: bool = True
    world_size: int = 1
    synchronize: bool = False


def updates_per_epoch(loader: TrainLoader | StreamLoader, accumulate: int) -> int:
    """Optimizer updates of an epoch: the last may be made of fewer batches than the others."""
    return math.ceil(len(loader) / accumulate)


def train_one_epoch(
    stepper: Stepper,
    loader: TrainLoader | StreamLoader,
    start: Position,
    meters: Meters,
    events: EpochEvents | None = None,
) -> dict[str, float]:
    """Train from `start` to the end of its epoch.

    Args:
        stepper: What a step is.
        loader: Gives the batches.
        start: Where to begin.
        meters: Empty, or the sums of the epoch's earlier batches.
        events: What happens beside the steps.

    Returns:
        Means of the task's scalars over the epoch and all processes, 'images_per_second' of all processes, and where
        the time of this one went (see `Clock.means`).
    """
    events = events or EpochEvents()
    stepper.train()
    batches, update = len(loader), start.update
    log = EpochLog(start, batches, interval=events.log_interval, world_size=events.world_size, shown=events.log)
    clock = stepper.clock
    clock.restart()
    results: list[tuple[dict[str, Tensor], int]] = []  # of the update's batches, counted if it is made
    for batch, (images, target) in enumerate(loader.batches(start.epoch, start.batch), start.batch):
        clock.mark('data')
        part = batch % stepper.accumulate
        parts = min(stepper.accumulate, batches - batch + part)
        result, applied = stepper.step(images, target, update=update, part=part, parts=parts)
        results.append(({name: value.detach() for name, value in result.items() if name != 'output'}, len(images)))
        if events.synchronize and images.is_cuda:
            torch.cuda.synchronize()
        if applied is not None:
            for scalars, count in results:
                meters.update(scalars, count, applied)
            results.clear()
            update += 1
            position = Position(start.epoch, batch + 1, update)
            if events.after_update is not None:
                events.after_update(position, applied)
            if events.before_next is not None and batch + 1 < batches:
                events.before_next(position)
        due = log.batch(batch, len(images), meters, learning_rate(stepper.optimizer), clock)
        if due and events.at_line is not None:
            events.at_line(batch, images)
        clock.mark('update')
    log.bar.close()
    if hasattr(stepper.optimizer, 'sync_lookahead'):
        stepper.optimizer.sync_lookahead()
    means = meters.means(events.world_size > 1)
    return {**means, 'images_per_second': log.images_per_second, **clock.means()}


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Mean learning rate of the parameter groups, as timm reports it."""
    rates = [group['lr'] for group in optimizer.param_groups]
    return sum(rates) / len(rates)
