"""From arguments to the optimizer and its learning rate: timm's, with a factor for the discriminator."""

import argparse
import logging

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import TrainingTask

from timm_mealv2.task import MealV2Task, scale_discriminator_lr
from timm_mealv2.training.build_data import Data
from timm_mealv2.training.loop import Schedule, updates_per_epoch

_logger = logging.getLogger(__name__)

_FUSED = ('sgd', 'nesterov', 'momentum', 'adam', 'adamw')  # names of torch's own optimizers that can be fused


def resolve_lr(args: argparse.Namespace, images_per_update: int) -> float:
    """The learning rate, from the images of an update where it is not given."""
    if args.lr is not None:
        return float(args.lr)
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    ratio = images_per_update / args.lr_base_size
    lr: float = args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)
    _logger.info(f'Learning rate {lr:.4g}: {args.lr_base} for {args.lr_base_size} images, scaled ({scale}).')
    return lr


def build_optimizer(args: argparse.Namespace, task: TrainingTask, lr: float) -> torch.optim.Optimizer:
    """Create timm's optimizer of what the task trains; the discriminator's learning rate has a factor of its own."""
    options = {**optimizer_kwargs(cfg=args), 'lr': lr, **args.opt_kwargs}
    if task.device.type == 'cuda' and args.opt in _FUSED and 'foreach' not in options:
        options.setdefault('fused', True)
    optimizer: torch.optim.Optimizer = create_optimizer_v2(task.get_trainable_module(), **options)
    if isinstance(task, MealV2Task):
        scale_discriminator_lr(optimizer, task, args.discriminator_lr_scale)
    return optimizer


def build_schedule(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, data: Data, eval_metric: str
) -> Schedule:
    """Create timm's learning rate schedule and count the epochs, those of warm-up and cool-down included."""
    updates = updates_per_epoch(data.loader, args.grad_accum_steps)
    options = scheduler_kwargs(args, decreasing_metric=eval_metric in ('loss', 'kl'))
    scheduler, epochs = create_scheduler_v2(optimizer, **options, updates_per_epoch=updates)
    if scheduler is None:  # which would scale them
        for group in optimizer.param_groups:
            group['lr'] = group.get('initial_lr', group['lr']) * group.get('lr_scale', 1.0)
    elif args.warmup_epochs >= epochs:
        _logger.warning(
            f'--warmup-epochs {args.warmup_epochs} is not over in {epochs} epochs: the learning rate stays below --lr.'
        )
    return Schedule(scheduler, epochs, updates)


def setup_average(args: argparse.Namespace, task: TrainingTask) -> None:
    """Let the task keep a moving average (EMA) of its weights, where that is asked for."""
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device=torch.device('cpu') if args.model_ema_force_cpu else None,
            dtype=torch.float32,  # what an update adds is too small for a half type
        )
