"""From arguments to the parts of a run: device, student, teachers, task, data, optimizer. `args` stops here."""

import argparse
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any

import timm
import torch
from timm.data import FastCollateMixup, resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from timm.utils import NativeScaler, init_distributed_device, is_distributed_env
from torch import nn
from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous
from torch.utils.data import Dataset, IterableDataset

from timm_mealv2.data.augmentation import Augmentation, Erasing
from timm_mealv2.data.bad_images import BadImages, Collate
from timm_mealv2.data.dataset import check_classes, dataset_root, open_dataset, unlabeled
from timm_mealv2.data.deterministic import EpochSampler, Samples
from timm_mealv2.data.loader import (
    CollateMixed,
    CollatePairs,
    StreamLoader,
    TrainLoader,
    collate_labels,
    eval_loader,
)
from timm_mealv2.data.seed import Stream, counted_seed, seed_all
from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import create_ensemble, read_classes
from timm_mealv2.soft_labels.replay import replay
from timm_mealv2.soft_labels.store import SoftLabelStore
from timm_mealv2.task import MealV2Task, scale_discriminator_lr
from timm_mealv2.training.checks import mixes
from timm_mealv2.training.loop import Stepper, updates_per_epoch

_logger = logging.getLogger(__name__)

_ATTEMPT = 'mealv2-attempt'  # scheme of the rendezvous
_FLOAT_TYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16, 'float32': torch.float32}


def _rendezvous_of_attempt(url: str, **kwargs: Any) -> Iterator[tuple[Store, int, int]]:
    """Give torch's rendezvous by the environment, with keys of this attempt's own.

    torchrun's store outlives the processes. With torch's own keys (2.14) a restarted one may read the address of the
    process that died, and both then wait for a connection until they time out.
    """
    for store, rank, world_size in rendezvous(url.replace(_ATTEMPT, 'env', 1), **kwargs):
        yield PrefixStore(f'attempt-{os.environ["TORCHELASTIC_RESTART_COUNT"]}', store), rank, world_size


register_rendezvous_handler(_ATTEMPT, _rendezvous_of_attempt)


def build_device(args: argparse.Namespace) -> torch.device:
    """Choose the device, join the process group under torchrun or SLURM, and settle what depends on either.

    Sets `args.device`, `distributed`, `rank`, `local_rank`, `world_size`, and `batch_size` where a total was given.
    """
    for name in args.device_modules or ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f'--device-modules {name}: {error}') from error
    if 'device' not in args.explicit and not torch.cuda.is_available():
        args.device = 'cpu'
        _logger.info('No CUDA device: training on the CPU (--device chooses).')
    elif args.device.startswith('cuda') and not torch.cuda.is_available():
        raise UserError(f'--device {args.device}: this torch sees no CUDA device; use --device cpu.')
    elif not (args.device.startswith('cuda') and is_distributed_env()):  # all would get a context on the first GPU
        try:
            torch.empty(1, device=args.device)
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            raise UserError(f'--device {args.device}: {error}') from error
    if 'TORCHELASTIC_RESTART_COUNT' in os.environ:
        args.dist_url = f'{_ATTEMPT}://'
    device = init_distributed_device(args)
    vars(args).pop('dist_url', None)
    if not args.distributed and is_distributed_env():
        raise UserError('WORLD_SIZE is above 1 but no process group was made: start with torchrun.')
    if args.sync_bn and args.distributed and device.type == 'cpu':
        raise UserError('--sync-bn: torch synchronises batch norm on GPUs only; leave it out.')
    if args.total_batch_size:
        if args.total_batch_size % (args.world_size * args.grad_accum_steps):
            raise UserError(
                f'--total-batch-size {args.total_batch_size} cannot be divided by {args.world_size} processes times '
                f'{args.grad_accum_steps} accumulation steps.'
            )
        args.batch_size = args.total_batch_size // (args.world_size * args.grad_accum_steps)
    types = {'--amp-dtype': args.amp_dtype if args.amp else None, '--model-dtype': args.model_dtype}
    types['--teacher-dtype'] = args.teacher_dtype
    for flag, name in types.items():
        if name == 'bfloat16' and device.type == 'cpu' and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            _logger.warning(f'{flag} bfloat16: this CPU emulates it, about 30 times slower than float32.')
    return device


def build_autocast(
    args: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], AbstractContextManager[Any]], NativeScaler | None]:
    """Return what makes the forward pass's context, and the loss scaler that float16 needs."""
    if not args.amp:
        return nullcontext, None
    dtype = _FLOAT_TYPES[args.amp_dtype]
    scaler = NativeScaler(device=device.type) if dtype == torch.float16 else None
    return functools.partial(torch.autocast, device_type=device.type, dtype=dtype), scaler


def build_student(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """Create the model to train, and decide what its pixels are.

    The resolved data configuration is written into the model's `pretrained_cfg`, where the task, the loaders, the
    evaluation and the exported config.json read it.

    Returns:
        The model on `device`, and its data configuration.
    """
    seed_all(counted_seed(Stream.INITIALIZATION, args.seed))
    if args.fast_norm:
        set_fast_norm()
    in_chans = args.in_chans if args.in_chans is not None else args.input_size[0] if args.input_size else None
    options = {
        'num_classes': args.num_classes,
        'in_chans': in_chans,
        'drop_rate': args.drop,
        'drop_path_rate': args.drop_path if args.drop_path is not None else args.drop_connect,
        'drop_block_rate': args.drop_block,
        'global_pool': args.gp,
        'bn_momentum': args.bn_momentum,
        'bn_eps': args.bn_eps,
        'checkpoint_path': args.initial_checkpoint,
        'scriptable': None,
        **args.model_kwargs,
    }
    if args.pretrained_path:
        options['pretrained_cfg_overlay'] = {'file': args.pretrained_path, 'num_classes': -1}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        model = timm.create_model(args.model, pretrained=args.pretrained or bool(args.pretrained_path), **options)
    except UserError:
        raise
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        pool = f' with --gp {args.gp}' if args.gp is not None else ''
        raise UserError(f'cannot create --model {args.model}{pool}: {error}') from error
    if args.head_init_scale is not None:
        with torch.no_grad():
            model.get_classifier().weight.mul_(args.head_init_scale)
    if args.head_init_bias is not None:
        nn.init.constant_(model.get_classifier().bias, args.head_init_bias)
    if args.num_classes is None:
        args.num_classes = getattr(model, 'num_classes', None)
        if args.num_classes is None:
            raise UserError(f'--model {args.model} does not tell its class count: give --num-classes.')
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)

    data_config = _resolve_pixels(args, model, in_chans or int(getattr(model, 'in_chans', 3)))
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device=device, dtype=_FLOAT_TYPES[args.model_dtype or 'float32'])
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    _try_forward(args, model, data_config['input_size'], device)
    if args.distributed and args.sync_bn:
        model = convert_sync_batchnorm(model)
    return model, data_config


@torch.no_grad()
def _try_forward(
    args: argparse.Namespace, model: nn.Module, input_size: tuple[int, int, int], device: torch.device
) -> None:
    """Tell at once, not in the first step, that a model does not take images of a size."""
    sizes = {'--img-size': [input_size[1:]], '--train-img-sizes': [(size, size) for size in args.train_img_sizes or ()]}
    model.eval()
    for name, size in [(name, size) for name, some in sizes.items() for size in some]:
        images = torch.zeros(1, input_size[0], *size, device=device, dtype=_FLOAT_TYPES[args.model_dtype or 'float32'])
        try:
            model(images)
        except (AssertionError, RuntimeError, ValueError) as error:
            shown = ' x '.join(map(str, size))
            raise UserError(f'{name}: {args.model} cannot take images of {shown}: {error}') from error
    model.train()


def _resolve_pixels(args: argparse.Namespace, model: Any, in_chans: int) -> dict[str, Any]:
    try:
        config = resolve_data_config({**vars(args), 'in_chans': in_chans}, model=model)
    except AssertionError:
        raise UserError(f'--mean and --std take one value or {in_chans}, one per channel.') from None
    config['input_size'] = (in_chans, *config['input_size'][1:])
    for name in ('mean', 'std'):
        config[name] = adapt_to_chs(tuple(config[name]), in_chans)
    # Whatever else the weights were once tested with is not what this run measures.
    former = {
        key: value for key, value in model.pretrained_cfg.items() if key not in ('test_input_size', 'test_crop_pct')
    }
    model.pretrained_cfg = model.default_cfg = {**former, **config}
    _logger.info('Pixels: ' + ', '.join(f'{name} {value}' for name, value in config.items()))
    return config


def build_teachers(args: argparse.Namespace, in_chans: int, device: torch.device) -> EnsembleTeacher | None:
    """Create the ensemble of --teachers; None without, with stored labels and for timm's own distillation tasks."""
    if not args.teachers or args.kd_distill_type != 'mealv2' or args.soft_labels:
        return None
    return create_ensemble(
        args.teachers,
        num_classes=args.num_classes,
        in_chans=in_chans,
        weights=args.teacher_weights,
        img_sizes=args.teacher_img_size,
        classes=read_classes(args.teacher_classes or ()),
        autocast_dtype=_FLOAT_TYPES[args.teacher_dtype] if args.teacher_dtype else None,
        device=device,
    )


def build_task(
    args: argparse.Namespace, student: nn.Module, teachers: EnsembleTeacher | None, device: torch.device
) -> TrainingTask:
    """Create what computes the loss: ours with teachers or stored labels, timm's classification or its others."""
    dtype = _FLOAT_TYPES[args.model_dtype or 'float32']
    common: dict[str, Any] = {'device': device, 'dtype': dtype, 'verbose': args.rank == 0}
    if teachers is not None or args.soft_labels:
        return MealV2Task(
            student,
            teachers,
            discriminator_weight=args.discriminator_weight,
            discriminator_mode=args.discriminator_mode,
            hard_label_weight=args.hard_label_weight,
            criterion=_build_criterion(args) if args.hard_label_weight else None,
            label_rest=args.label_rest,
            **common,
        )
    common['criterion'] = _build_criterion(args)
    if not args.teachers:
        return ClassificationTask(student, **common)
    common |= {'student_model': student, 'teacher_model': args.teachers[0]}
    common |= {'distill_loss_weight': args.distill_loss_weight, 'task_loss_weight': args.task_loss_weight}
    if args.kd_distill_type == 'feature':
        dims = {
            'student_feature_dim': args.kd_student_feature_dim,
            'teacher_feature_dim': args.kd_teacher_feature_dim,
        }
        task_class: Callable[..., TrainingTask] = functools.partial(FeatureDistillationTask, **dims)
    elif args.kd_distill_type == 'token':
        task_class = functools.partial(
            TokenDistillationTask, distill_type=args.kd_token_distill_type, temperature=args.kd_temperature
        )
    else:
        task_class = functools.partial(
            LogitDistillationTask, loss_type=args.kd_loss_type, temperature=args.kd_temperature
        )
    try:
        return task_class(**common)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f'cannot distil from {args.teachers[0]}: {error}') from error


def _mixing(args: argparse.Namespace) -> dict[str, Any] | None:
    """Arguments of timm's Mixup, None when nothing is mixed."""
    if not mixes(args):
        return None
    return {
        'mixup_alpha': args.mixup,
        'cutmix_alpha': args.cutmix,
        'cutmix_minmax': args.cutmix_minmax,
        'prob': args.mixup_prob,
        'switch_prob': args.mixup_switch_prob,
        'mode': args.mixup_mode,
        'label_smoothing': args.smoothing,
        'num_classes': args.num_classes,
    }


def _build_criterion(args: argparse.Namespace) -> nn.Module:
    return create_classification_loss(
        loss_type='jsd' if args.jsd_loss else 'bce' if args.bce_loss else 'ce',
        smoothing=args.smoothing,
        soft_targets=_mixing(args) is not None,
        jsd_splits=args.aug_splits if args.jsd_loss else 0,
        bce_target_thresh=args.bce_target_thresh,
        bce_sum=args.bce_sum,
        pos_weight=args.bce_pos_weight if args.bce_loss else None,
    )


def build_optimizer(args: argparse.Namespace, task: TrainingTask) -> torch.optim.Optimizer:
    """Create timm's optimizer over the task's trainable module; sets `args.lr` from the batch size where not given."""
    if args.lr is None:
        scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
        ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
        args.lr = args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)
        _logger.info(f'Learning rate {args.lr:.4g}: {args.lr_base} for {args.lr_base_size} images, scaled ({scale}).')
    try:
        optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f'cannot create --opt {args.opt}: {error}') from error
    if isinstance(task, MealV2Task):
        scale_discriminator_lr(optimizer, task, args.discriminator_lr_scale)
    return optimizer


def open_split(args: argparse.Namespace, split: str, channels: int, **kwargs: Any) -> Dataset:
    """Open a split of the run's data set, for images of `channels` channels."""
    return open_dataset(
        args.dataset,
        args.data_dir or args.data,
        split,
        class_map=args.class_map,
        download=args.dataset_download,
        batch_size=args.batch_size,
        seed=args.seed,
        input_img_mode=args.input_img_mode or ('L' if channels == 1 else 'RGB'),
        input_key=args.input_key,
        target_key=args.target_key,
        trust_remote_code=args.dataset_trust_remote_code,
        **kwargs,
    )


def build_datasets(args: argparse.Namespace, channels: int) -> tuple[Dataset, Dataset | None]:
    """Open the training and the validation split.

    Returns:
        Both, the second None where the run is without labels and there is no such split.
    """
    root = args.data_dir or args.data
    if args.num_classes == 1 and not args.bce_loss:
        raise UserError('one class alone leaves nothing to learn: give --num-classes 2 or more, and data to match.')
    streaming = {'is_training': True, 'num_samples': args.train_num_samples, 'repeats': args.epoch_repeats}
    train = open_split(args, args.train_split, channels, **streaming)
    validation: Dataset | None = None
    try:
        validation = open_split(args, args.val_split, channels, num_samples=args.val_num_samples)
    except UserError:
        if not args.unlabeled:
            raise
    folder = dataset_root(train)
    if validation is not None and folder is not None and args.train_split != args.val_split:
        # timm takes the folder itself where it has none of the split's name.
        other = dataset_root(validation)
        if other is not None and (other == folder or other in folder.parents):
            if not args.unlabeled:
                raise UserError(f'no split {args.val_split!r} in {root}: name its folder or .tar with --val-split.')
            validation = None
        elif other is not None and folder in other.parents:
            raise UserError(f'no split {args.train_split!r} in {root}: name its folder or .tar with --train-split.')
    if not args.unlabeled and not args.class_map:
        check_classes(train, validation, args.num_classes)
    return train, validation


def build_augmentation(args: argparse.Namespace, data_config: dict[str, Any]) -> Augmentation:
    """Collect every setting that decides the pixels of a training sample."""
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = data_config['interpolation']
    input_size = data_config['input_size']
    mixing = ('mixup', 'cutmix', 'cutmix_minmax', 'mixup_prob', 'mixup_switch_prob', 'mixup_off_epoch')
    names = [field.name for field in fields(Augmentation) if field.name not in mixing and hasattr(args, field.name)]
    if args.mixup_mode == 'pair' and mixes(args):
        names += mixing
    own = {
        'input_size': input_size,
        'input_img_mode': args.input_img_mode or ('L' if input_size[0] == 1 else 'RGB'),
        'train_interpolation': interpolation,
        'mean': data_config['mean'],
        'std': data_config['std'],
        'grayscale_prob': args.grayscale_prob or 0.0,
        'gaussian_blur_prob': args.gaussian_blur_prob or 0.0,
    }
    return Augmentation(**{**{name: getattr(args, name) for name in names}, **own})


def build_train_loader(
    args: argparse.Namespace, dataset: Dataset, data_config: dict[str, Any], device: torch.device, bad: BadImages
) -> TrainLoader | StreamLoader:
    """Create the training loader."""
    augmentation = build_augmentation(args, data_config)
    if args.unlabeled:
        dataset = unlabeled(dataset)
    dtype = _FLOAT_TYPES[args.model_dtype or 'float32']
    mixing = _mixing(args)
    if isinstance(dataset, IterableDataset):
        return _build_stream_loader(args, dataset, augmentation, device, dtype)
    sizes = input_sizes = None
    if args.train_img_sizes:
        input_sizes = [(data_config['input_size'][0], size, size) for size in args.train_img_sizes]
        sizes = {
            'batch_sizes': args.train_batch_sizes or [args.batch_size] * len(args.train_img_sizes),
            'choice_weights': args.train_size_probs,
            'num_batches': args.train_batches_per_epoch,
            'choice_schedule': args.train_size_schedule,
            'schedule_epochs': args.epochs,
            'schedule_spread': args.train_size_schedule_spread,
            'schedule_random_mix': args.train_size_random_mix,
        }
    collate: Collate = collate_labels
    if mixing and augmentation.mixes:
        collate = CollatePairs(args.num_classes, args.smoothing)
    elif mixing:
        erasing, augmentation = Erasing(augmentation, args.seed), replace(augmentation, reprob=0.0)
        collate = CollateMixed(mixing, erasing, seed=args.seed, rank=args.rank, off_epoch=args.mixup_off_epoch)
    # MEAL V2 does not look at labels, or not at unknown ones (-1); mixing does.
    unknown = args.kd_distill_type == 'mealv2' and bool(args.teachers or args.soft_labels) and not mixing
    labels = None if args.unlabeled else range(-1 if unknown else 0, args.num_classes)
    place: dict[str, Any] = {'rank': args.rank, 'world_size': args.world_size}
    place['samples_per_decode'] = args.crops_per_decode
    sampler: EpochSampler
    if args.soft_labels:
        samples, sampler, collate = replay(
            SoftLabelStore(args.soft_labels),
            dataset,
            args.batch_size,
            labels=labels,
            allow_pixel_change=args.allow_decoder_change,
            **place,
        )
    else:
        samples = Samples(dataset, augmentation, args.seed, labels=labels, input_sizes=input_sizes)
        sampler = EpochSampler(
            len(samples),
            args.batch_size,
            seed=args.seed,
            pairs=augmentation.mixes,
            repeats=args.aug_repeats,
            sizes=sizes,
            **place,
        )
    return TrainLoader(
        samples,
        sampler,
        collate,
        normalization=(tuple(data_config['mean']), tuple(data_config['std'])),
        bad=bad,
        workers=args.workers,
        pin_memory=args.pin_mem,
        prefetch=not args.no_prefetcher,
        device=device,
        dtype=dtype,
    )


def _build_stream_loader(
    args: argparse.Namespace,
    dataset: IterableDataset,
    augmentation: Augmentation,
    device: torch.device,
    dtype: torch.dtype,
) -> StreamLoader:
    if _mixing(args) and (args.no_prefetcher or args.unlabeled or args.batch_size % 2):
        raise UserError('a streaming data set is mixed by the prefetcher, in even batches and with labels only.')
    _logger.info('Streaming data set: a broken-off run continues at the start of its epoch.')
    return StreamLoader(
        dataset,
        seed=args.seed,
        rank=args.rank,
        device=device,
        batch_size=args.batch_size,
        num_aug_splits=args.aug_splits,
        collate_fn=_fast_mixup(args),
        num_workers=args.workers,
        distributed=args.distributed,
        pin_memory=args.pin_mem,
        use_prefetcher=not args.no_prefetcher,
        img_dtype=dtype,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        **augmentation.transform_options(),
    )


def _fast_mixup(args: argparse.Namespace) -> Callable | None:
    mixing = _mixing(args)
    return FastCollateMixup(**mixing) if mixing else None


def build_eval_loader(
    args: argparse.Namespace, dataset: Dataset, data_config: dict[str, Any], device: torch.device, bad: BadImages
) -> Any:
    """Create the evaluation loader of `dataset`."""
    return eval_loader(
        dataset,
        data_config,
        batch_size=args.validation_batch_size or args.batch_size,
        device=device,
        bad=bad,
        num_workers=args.workers,
        distributed=args.distributed,
        pin_memory=args.pin_mem,
        use_prefetcher=not args.no_prefetcher,
        img_dtype=_FLOAT_TYPES[args.model_dtype or 'float32'],
    )


def build_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, loader: TrainLoader | StreamLoader, decreasing: bool
) -> tuple[Scheduler | None, int]:
    """Create timm's learning rate schedule and count the epochs, those of warm-up and cool-down included."""
    try:
        return create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(args, decreasing_metric=decreasing),
            updates_per_epoch=updates_per_epoch(loader, args.grad_accum_steps),
        )
    except (AssertionError, ValueError) as error:
        raise UserError(f'cannot create --sched {args.sched}: {error}') from error


def build_stepper(
    args: argparse.Namespace,
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    agree: Callable[[bool], bool],
) -> Stepper:
    """Put together what one training step is; `agree` lets the processes skip the same updates."""
    autocast, scaler = build_autocast(args, device)
    exponent = {'none': 0.0, 'sqrt': 0.5, 'linear': 1.0}[args.variable_batch_loss_scale]
    weight = (lambda images: (images / args.batch_size) ** exponent) if exponent else None
    return Stepper(
        task,
        optimizer,
        accumulate=args.grad_accum_steps,
        autocast=autocast,
        scaler=scaler,
        clip_grad=args.clip_grad,
        clip_mode=args.clip_mode,
        loss_weight=weight,
        channels_last=args.channels_last,
        seed=args.seed,
        rank=args.rank,
        agree=agree,
    )
