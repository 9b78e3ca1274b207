"""One step and one epoch of training. Knows a task, a loader and an optimizer, never the command line."""

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
from torch.nn.utils import get_total_norm

from timm_mealv2.data.loader import StreamLoader, TrainLoader
from timm_mealv2.data.seed import Stream, counted_seed, seed_all
from timm_mealv2.training.checkpoint_saver import Progress
from timm_mealv2.training.metric_logging import Meters
from timm_mealv2.training.progress import EpochLog


class LossScaler(torch.amp.GradScaler):
    """torch's loss scaler for float16, under the name that timm's checkpoints give it."""

    state_dict_key = 'amp_scaler'


@dataclass
class Stepper:
    """Forward, backward and update: what one step is made of, the same for every task.

    An update whose loss or gradient is not finite is skipped on all processes: weights, optimizer, moving average and
    the statistics of batch norm stay as they were. The device is asked once for that, between backward and update, as
    torch's loss scaler does it. With the scaler only the loss counts: it deals with a gradient that overflows itself.

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
        agree: Told whether this process's update is finite; returns whether that of all processes is.
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
    agree: Callable[[bool], bool] = bool

    def __post_init__(self) -> None:
        self._finite = torch.tensor(True)
        self._norms = [m for m in self.task.get_trainable_module().modules() if isinstance(m, _NormBase)]
        # What a forward pass changes before it is known whether the update is made.
        self._statistics = [buffer for norm in self._norms for buffer in norm.buffers()]
        self._kept = [buffer.clone() for buffer in self._statistics]

    def train(self) -> None:
        """Set the task to training, before its first step and after each evaluation."""
        self.task.train()
        if self.freeze_bn:
            for norm in self._norms:
                norm.eval()

    def step(
        self, images: Tensor, target: Tensor, *, update: int, part: int = 0, parts: int = 1
    ) -> tuple[dict[str, Tensor], bool]:
        """Train on one batch, the `part`th of the `parts` that make up update number `update`.

        Returns:
            The task's result, and whether the update was made (True before its last part).
        """
        last = part == parts - 1
        if not part:
            _copy(self._statistics, self._kept)
        # Dropout and stochastic depth are functions of where the run stands.
        seed_all(counted_seed(Stream.UPDATE, self.seed, self.rank, update, part))
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with nullcontext() if last else self.task.no_sync():
            result = self.forward(images, target)
            loss = result['loss'] / parts
            if self.loss_weight is not None:
                loss = loss * self.loss_weight(len(images))
            finite = loss.detach().isfinite()
            self._finite = self._finite & finite if part else finite
            self.backward(loss)
        return result, self.update(update) if last else True

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Run the task on a batch."""
        with self.autocast():
            result: dict[str, Tensor] = self.task(images, target)
        return result

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient to that of the update."""
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward(create_graph=getattr(self.optimizer, 'is_second_order', False))

    def update(self, update: int) -> bool:
        """Make update number `update`, unless it is not finite; return whether it was made."""
        made = self.agree(bool(self._finite) if self.scaler is not None else self._all_finite())
        if made:
            if self.clip_grad is not None:
                if self.scaler is not None:
                    self.scaler.unscale_(self.optimizer)
                parameters = self.task.get_clip_parameters(exclude_head='agc' in self.clip_mode)
                dispatch_clip_grad(parameters, value=self.clip_grad, mode=self.clip_mode)
            if self.scaler is not None:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                self.optimizer.step()
        self.optimizer.zero_grad()
        if not made:
            _copy(self._kept, self._statistics)
        elif self.task.has_ema():
            # Rounding of a bfloat16 average is random too, and the same on every process.
            ema: Any = self.task.get_trainable_module(ema=True)
            ema._sr_generator.manual_seed(counted_seed(Stream.EMA_ROUNDING, self.seed, update))
            self.task.update_ema(step=update + 1)
        return made

    def _all_finite(self) -> bool:
        """Whether the losses of the update and its gradient are finite."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None]
        if self._finite & get_total_norm(gradients).isfinite().to(self._finite.device):
            return True
        # The norm's squares may overflow where the gradient does not.
        return bool(self._finite) and all(bool(gradient.isfinite().all()) for gradient in gradients)


@torch.no_grad()
def _copy(source: list[Tensor], destination: list[Tensor]) -> None:
    if source:
        torch._foreach_copy_(destination, source)


class Schedule:
    """timm's learning rate schedule, as a function of the position in the run.

    Args:
        scheduler: timm's scheduler, None for a constant learning rate.
        epochs: Length of the run, warm-up and cool-down included.
        updates_per_epoch: Updates of an epoch.
    """

    def __init__(self, scheduler: Scheduler | None, epochs: int, updates_per_epoch: int) -> None:
        self.scheduler, self.epochs, self.updates_per_epoch = scheduler, epochs, updates_per_epoch

    def go_to(self, position: Progress) -> None:
        """Set the learning rate of a position. A schedule that follows a metric keeps the one that it has come to."""
        if self.scheduler is not None and not isinstance(self.scheduler, PlateauLRScheduler):
            self.scheduler.step(position.epoch)
            self.scheduler.step_update(position.update)

    def after_update(self, updates: int) -> None:
        """Go on after an update; `updates` have been made."""
        if self.scheduler is not None:
            self.scheduler.step_update(num_updates=updates)

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


@dataclass
class EpochEvents:
    """What happens beside the steps. All functions are called on every process.

    Attributes:
        after_update: Told, after each update, where the run stands, whether the update was made, and the last images.
        before_next: Called between two updates of the epoch with the position; may end the run.
        save_images: Saves a batch of images, given its number and the images; called at each line of the log.
        log_interval: Batches from one line of the log to the next.
        log: Whether this process writes the log.
        world_size: Number of processes, each with batches of its own.
        synchronize: Wait for the device after each step.
    """

    after_update: Callable[[Progress, bool, Tensor], None] | None = None
    before_next: Callable[[Progress], None] | None = None
    save_images: Callable[[int, Tensor], None] | None = None
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
    start: Progress,
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
        Means of the task's scalars over the epoch and all processes, and 'images_per_second' of all processes.
    """
    events = events or EpochEvents()
    stepper.train()
    batches, update = len(loader), start.update
    log = EpochLog(start, batches, interval=events.log_interval, world_size=events.world_size, shown=events.log)
    results: list[tuple[dict[str, Tensor], int]] = []  # of the update's batches, counted if it is made
    for batch, (images, target) in enumerate(loader.batches(start.epoch, start.batch), start.batch):
        part = batch % stepper.accumulate
        parts = min(stepper.accumulate, batches - batch + part)
        result, made = stepper.step(images, target, update=update, part=part, parts=parts)
        results.append(({name: value.detach() for name, value in result.items() if name != 'output'}, len(images)))
        if events.synchronize and images.is_cuda:
            torch.cuda.synchronize()
        if part == parts - 1:
            for scalars, count in results:
                meters.update(scalars, count if made else 0)
            results.clear()
            update += 1
            position = Progress(start.epoch, batch + 1, update)
            if events.after_update is not None:
                events.after_update(position, made, images)
            if events.before_next is not None and batch + 1 < batches:
                events.before_next(position)
        due = log.batch(batch, len(images), meters, learning_rate(stepper.optimizer))
        if due and events.save_images is not None:
            events.save_images(batch, images)
    log.bar.close()
    if hasattr(stepper.optimizer, 'sync_lookahead'):
        stepper.optimizer.sync_lookahead()
    return {**meters.means(events.world_size > 1), 'images_per_second': log.images_per_second}


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Mean learning rate of the parameter groups, as timm reports it."""
    rates = [group['lr'] for group in optimizer.param_groups]
    return sum(rates) / len(rates)
