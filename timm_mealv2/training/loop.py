"""One epoch of training. Knows a task, a loader and an optimizer, never the command line."""

import logging
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import AverageMeter, NativeScaler, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from timm_mealv2.data.loader import StreamLoader, TrainLoader
from timm_mealv2.data.seed import Stream, counted_seed, seed_all
from timm_mealv2.task import MealV2Task
from timm_mealv2.training.checkpoint_saver import Progress
from timm_mealv2.training.signals import Watch

_logger = logging.getLogger(__name__)


@dataclass
class Stepper:
    """Forward, backward and update: what one step is made of, the same for every task.

    An update whose loss or gradient is not finite is skipped on all processes: weights, optimizer, moving average and
    the statistics of batch norm stay as they were. The device is asked once for that, between backward and update, as
    torch's loss scaler does it. With the scaler only the loss counts: a gradient that overflows is the scaler's affair.

    Attributes:
        task: The task; its result's 'loss' is minimised.
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
        agree: Told whether this process's update is finite; returns whether that of all processes is.
    """

    task: TrainingTask
    optimizer: torch.optim.Optimizer
    accumulate: int = 1
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    scaler: NativeScaler | None = None
    clip_grad: float | None = None
    clip_mode: str = 'norm'
    loss_weight: Callable[[int], float] | None = None
    channels_last: bool = False
    seed: int = 42
    rank: int = 0
    agree: Callable[[bool], bool] = bool

    def __post_init__(self) -> None:
        self._finite = torch.tensor(True)
        self._statistics = _Statistics(self.task.get_trainable_module())

    def step(
        self, images: Tensor, target: Tensor, *, update: int, part: int, parts: int
    ) -> tuple[dict[str, Tensor], bool]:
        """Train on one batch, the `part`th of the `parts` that make up update number `update`.

        Returns:
            The task's result, and whether the update was made (True before its last part).
        """
        last = part == parts - 1
        if not part:
            self._statistics.keep()
        # Dropout and stochastic depth are functions of where the run stands.
        seed_all(counted_seed(Stream.UPDATE, self.seed, self.rank, update, part))
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with nullcontext() if last else self.task.no_sync():
            with self.autocast():
                result = self.task(images, target)
            loss = result['loss'] / parts
            if self.loss_weight is not None:
                loss = loss * self.loss_weight(len(images))
            finite = loss.detach().isfinite()
            self._finite = self._finite & finite if part else finite
            done = self._backward(loss, last)
        if last:
            self.optimizer.zero_grad()
            if not done:
                self._statistics.put_back()
            elif self.task.has_ema():
                # Rounding of a bfloat16 average is random too, and the same on every process.
                ema = self.task.get_trainable_module(ema=True)
                ema._sr_generator.manual_seed(counted_seed(Stream.EMA_ROUNDING, self.seed, update))
                self.task.update_ema(step=update + 1)
        return result, done

    def _backward(self, loss: Tensor, update: bool) -> bool:
        create_graph = getattr(self.optimizer, 'is_second_order', False)
        parameters = self.task.get_clip_parameters(exclude_head='agc' in self.clip_mode)
        if self.scaler is not None:
            if update and not self.agree(bool(self._finite)):
                return False
            self.scaler(
                loss,
                self.optimizer,
                clip_grad=self.clip_grad,
                clip_mode=self.clip_mode,
                parameters=parameters,
                create_graph=create_graph,
                need_update=update,
            )
            return True
        loss.backward(create_graph=create_graph)
        if update:
            if not self.agree(self._all_finite()):
                return False
            if self.clip_grad is not None:
                dispatch_clip_grad(parameters, value=self.clip_grad, mode=self.clip_mode)
            self.optimizer.step()
        return True

    def _all_finite(self) -> bool:
        """Whether the losses of the update and its gradient are finite."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None]
        if self._finite & get_total_norm(gradients).isfinite().to(self._finite.device):
            return True
        # The norm's squares may overflow where the gradient does not.
        return bool(self._finite) and all(bool(gradient.isfinite().all()) for gradient in gradients)


class _Statistics:
    """What a forward pass alone changes in a module, batch norm's running statistics, and a copy of it."""

    def __init__(self, module: nn.Module) -> None:
        norms = [norm for norm in module.modules() if isinstance(norm, _NormBase)]
        self.buffers = [buffer for norm in norms for buffer in norm.buffers()]
        self.copies = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def keep(self) -> None:
        if self.buffers:
            torch._foreach_copy_(self.copies, self.buffers)

    @torch.no_grad()
    def put_back(self) -> None:
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.copies)


@dataclass
class Meters:
    """Means of a task's scalars over the images of an epoch. They stay on the device until they are asked for."""

    meters: dict[str, AverageMeter] = field(default_factory=dict)

    def update(self, result: dict[str, Tensor], images: int) -> None:
        """Add the scalars of a batch of `images` images."""
        for name, value in result.items():
            if name != 'output':
                self.meters.setdefault(name, AverageMeter()).update(value.detach().float(), images)

    def update_without(self, scalars: dict[str, Tensor]) -> None:
        """Take note of the names alone: of an epoch of which nothing is counted the means are NaN."""
        for name, value in scalars.items():
            if name not in self.meters:
                meter = self.meters[name] = AverageMeter()
                meter.sum = torch.zeros_like(value, dtype=torch.float32)

    def means(self, distributed: bool = False) -> dict[str, float]:
        """Return the means, over all processes if `distributed` (a collective call)."""
        if not self.meters:
            return {}
        sums = torch.stack([torch.stack([m.sum, torch.full_like(m.sum, m.count)]) for m in self.meters.values()])
        if distributed:
            dist.all_reduce(sums)
        means = zip(self.meters, sums.tolist(), strict=True)
        return {name: total / count if count else math.nan for name, (total, count) in means}

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts, for a checkpoint in the middle of an epoch."""
        return {name: {'sum': meter.sum.cpu(), 'count': meter.count} for name, meter in self.meters.items()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` returned."""
        for name, values in state.items():
            meter = self.meters[name] = AverageMeter()
            meter.sum, meter.count = values['sum'].to(device), values['count']
            meter.avg = meter.sum / max(meter.count, 1)


@dataclass
class EpochEvents:
    """What happens beside the steps.

    Attributes:
        log_interval: Batches from one line of the log to the next.
        log: Whether this process writes the log.
        distributed: Whether means are taken over several processes.
        recovery_interval: Updates from one recovery checkpoint to the next, 0 for none; none after the epoch's last.
        save_recovery: Writes one, given the position and the meters; called on every process.
        after_update: Called on every process after each update but the epoch's last, likewise; may end the run.
        save_images: Saves a batch of images, given its number and the images; called at each line of the log.
        synchronize: Wait for the device after each step.
    """

    log_interval: int = 50
    log: bool = True
    distributed: bool = False
    recovery_interval: int = 0
    save_recovery: Callable[[Progress, Meters], None] | None = None
    after_update: Callable[[Progress, Meters], None] | None = None
    save_images: Callable[[int, Tensor], None] | None = None
    synchronize: bool = False


def updates_per_epoch(loader: TrainLoader | StreamLoader, accumulate: int) -> int:
    """Optimizer updates of an epoch: the last may be made of fewer batches than the others."""
    return math.ceil(len(loader) / accumulate)


def train_one_epoch(
    stepper: Stepper,
    loader: TrainLoader | StreamLoader,
    *,
    start: Progress,
    meters: Meters,
    scheduler: Scheduler | None = None,
    events: EpochEvents | None = None,
    watch: Watch | None = None,
    world_size: int = 1,
) -> dict[str, float]:
    """Train from `start` to the end of its epoch.

    Args:
        stepper: What a step is.
        loader: Gives the batches.
        start: Where to begin.
        meters: Empty, or the sums of the epoch's earlier batches.
        scheduler: Told of every update.
        events: Log, recovery checkpoints, saved images.
        watch: Counts the updates that were skipped.
        world_size: Number of processes, each with batches of its own.

    Returns:
        Means of the task's scalars over the epoch and all processes, and 'images_per_second' of all processes.
    """
    events = events or EpochEvents()
    stepper.task.train()
    batches, update = len(loader), start.update
    images_seen, began = 0, time.perf_counter()
    results: list[tuple[dict[str, Tensor], int]] = []  # of the update's batches, counted if it is made
    bar = tqdm(
        total=batches,
        initial=start.batch,
        desc=f'epoch {start.epoch}',
        unit='batch',
        leave=False,
        dynamic_ncols=True,
        disable=not (events.log and sys.stderr.isatty()),
    )
    for batch, (images, target) in enumerate(loader.batches(start.epoch, start.batch), start.batch):
        part = batch % stepper.accumulate
        parts = min(stepper.accumulate, batches - batch + part)
        result, done = stepper.step(images, target, update=update, part=part, parts=parts)
        results.append(({name: value.detach() for name, value in result.items() if name != 'output'}, len(images)))
        images_seen += len(images)
        if events.synchronize and images.is_cuda:
            torch.cuda.synchronize()

        if part == parts - 1:
            for scalars, count in results:
                if done:
                    meters.update(scalars, count)
                else:
                    meters.update_without(scalars)
            results.clear()
            if watch is not None:
                watch.count(update, done, partial(_broken_teachers, stepper, images))
            update += 1
            if scheduler is not None:
                scheduler.step_update(num_updates=update)
            position = Progress(start.epoch, batch + 1, update)
            if batch + 1 < batches:  # after the epoch's last, the run first shares the statistics of batch norm
                if events.recovery_interval and events.save_recovery and update % events.recovery_interval == 0:
                    events.save_recovery(position, meters)
                if events.after_update is not None:
                    events.after_update(position, meters)
        bar.update()
        if (batch + 1) % events.log_interval == 0 or batch + 1 == batches:
            means = meters.means(events.distributed)  # the only wait for the device
            if events.log:
                rate = images_seen * world_size / (time.perf_counter() - began)
                text = format_means(means, learning_rate(stepper.optimizer), rate)
                if bar.disable:
                    width = len(str(batches))
                    _logger.info(f'epoch {start.epoch} [{batch + 1:>{width}}/{batches}] {text}')
                else:
                    bar.set_postfix_str(text)
                if events.save_images is not None:
                    events.save_images(batch, images)
    bar.close()
    if hasattr(stepper.optimizer, 'sync_lookahead'):
        stepper.optimizer.sync_lookahead()
    rate = images_seen * world_size / (time.perf_counter() - began)
    return {**meters.means(events.distributed), 'images_per_second': rate}


def _broken_teachers(stepper: Stepper, images: Tensor) -> list[str]:
    """Names of the teachers whose output for `images` is not finite."""
    if not isinstance(stepper.task, MealV2Task):
        return []
    with stepper.autocast():
        return [f'teacher {name}' for name in stepper.task.nonfinite_teachers(images)]


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Mean learning rate of the parameter groups, as timm reports it."""
    rates = [group['lr'] for group in optimizer.param_groups]
    return sum(rates) / len(rates)


_SHORT = {
    'similarity_loss': 'similarity',
    'discriminator_loss': 'discriminator',
    'discriminator_accuracy': 'accuracy of it',
    'teacher_agreement': 'agreement',
    'hard_label_loss': 'hard labels',
}


def format_means(means: dict[str, float], rate: float, images_per_second: float) -> str:
    """One line of the log."""
    values = ', '.join(f'{_SHORT.get(name, name)} {value:.4g}' for name, value in means.items())
    return f'{values}, lr {rate:.3g}, {images_per_second:.0f} images/s'
