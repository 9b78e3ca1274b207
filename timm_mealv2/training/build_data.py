"""From arguments to the data of a run: data sets, training loader, and the images that a model is evaluated on."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from timm.data import FastCollateMixup
from torch.utils.data import Dataset, IterableDataset

from timm_mealv2.arguments import open_shares, open_split
from timm_mealv2.data.augmentation import Augmentation, Erasing
from timm_mealv2.data.class_names import class_names_of, has_labels, index_map, relabeled, unlabeled
from timm_mealv2.data.dataset import image_mode, select
from timm_mealv2.data.loader import (
    Collate,
    CollateMixed,
    CollatePairs,
    TrainLoader,
    collate_labels,
    eval_loader,
)
from timm_mealv2.data.samples import EpochSampler, Samples
from timm_mealv2.data.stream import StreamedImages, StreamLoader
from timm_mealv2.data.unreadable import BadImages
from timm_mealv2.errors import UserError
from timm_mealv2.soft_labels.replay import replay
from timm_mealv2.soft_labels.store import SoftLabelStore
from timm_mealv2.training.checks import is_mealv2, mixes
from timm_mealv2.training.distributed import Processes

_logger = logging.getLogger(__name__)

EVALUATED_AT_MOST = 50_000
"""Training images that stand in for a validation split."""


@dataclass(frozen=True)
class InputSpec:
    """Input size, normalization, dtype, batch size and class count of the student.

    Attributes:
        config: The resolved data configuration: 'input_size', 'mean', 'std', 'interpolation' and the like.
        num_classes: Number of classes.
        batch_size: Images of a batch, per process.
        dtype: Floating point type of the images, and of the student's weights.
    """

    config: dict[str, Any]
    num_classes: int
    batch_size: int
    dtype: torch.dtype

    @property
    def channels(self) -> int:
        """Image channels."""
        return int(self.config['input_size'][0])


@dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
        loader: Gives the training batches.
        evaluated: Gives the batches that a model is judged by, None for nothing.
        by_agreement: Judge by agreement with the teachers, not by labels.
    """

    loader: TrainLoader | StreamLoader
    evaluated: Any
    by_agreement: bool

    def metric(self, eval_metric: str) -> str:
        """The metric to rank checkpoints by where `eval_metric` is asked for."""
        if not self.by_agreement:
            return eval_metric
        return 'kl' if eval_metric == 'loss' else 'agreement'

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of summary.csv, without their prefix."""
        return ('agreement', 'kl') if self.by_agreement else ('loss', 'top1', 'top5')


def build_data(
    args: argparse.Namespace,
    train: Dataset,
    validation: Dataset | None,
    class_names: Sequence[str] | None,
    pixels: InputSpec,
    processes: Processes,
    bad: BadImages,
    live_teachers: bool,
    store: SoftLabelStore | None,
) -> Data:
    """Create the loaders.

    Args:
        args: The arguments.
        train: The training split.
        validation: The validation split, or None.
        class_names: Names of the run's classes, None if they are not known; those of the validation split are mapped.
        pixels: Input size, normalization and batch size of the student.
        processes: The processes of the run.
        bad: Told of the images that cannot be read.
        live_teachers: Whether there are teachers that a model can be compared with.
        store: The stored labels to train on.
    """
    loader = _build_train_loader(args, train, pixels, processes, bad, store)
    folders = None if validation is None else class_names_of(validation)
    by_agreement = args.unlabeled and len(folders or ()) != pixels.num_classes
    if by_agreement and not live_teachers:
        _logger.info('No validation split with labels, and no live teachers to agree with: there is no evaluation.')
        return Data(loader, None, by_agreement=False)
    if validation is None:
        validation = unlabeled(_open_split(args, '--train-split', pixels.batch_size, or_all=True))
        count = len(validation)  # type: ignore[arg-type]
        shown = min(count, EVALUATED_AT_MOST)
        if not isinstance(validation, IterableDataset):
            drawn = np.random.default_rng(args.seed).choice(count, shown, replace=False)
            validation = select(validation, np.sort(drawn).tolist())
        _logger.info(
            f'No validation split: evaluating by agreement with the teachers on {shown:,} of the {count:,} training '
            'images.'
        )
    elif by_agreement:
        validation = unlabeled(validation)
    else:
        validation = relabeled(validation, index_map(class_names, folders, 'the training', 'the validation split'))
    evaluated = eval_loader(
        validation,
        pixels.config,
        batch_size=args.validation_batch_size or pixels.batch_size,
        device=processes.device,
        bad=bad,
        num_workers=args.workers,
        distributed=processes.distributed,
        pin_memory=args.pin_mem,
        use_prefetcher=not args.no_prefetcher,
        img_dtype=pixels.dtype,
        img_mode=args.input_img_mode,
        decode=args.decode,
    )
    return Data(loader, evaluated, by_agreement)


def _open_split(args: argparse.Namespace, option: str, batch_size: int, **kwargs: Any) -> Dataset:
    return open_split(args, option, batch_size=batch_size, seed=args.seed, **kwargs)


def open_datasets(args: argparse.Namespace, batch_size: int) -> tuple[Dataset, Dataset | None]:
    """Open the training and the validation split; the second is None where a run without labels has none.

    Raises:
        UserError: If one cannot be opened or has no labels.
    """
    validation: Dataset | None = None
    if args.val_share:
        train, validation = open_shares(args)
    else:
        same = args.train_split == args.val_split
        try:
            validation = _open_split(args, '--val-split', batch_size, or_all=same, num_samples=args.val_num_samples)
        except UserError:
            if not args.unlabeled or args.val_split != 'validation':
                raise
        # Images without labels need not be in splits.
        or_all = same or (validation is None and args.train_split == 'train')
        streaming = {'is_training': True, 'num_samples': args.train_num_samples, 'repeats': args.epoch_repeats}
        train = _open_split(args, '--train-split', batch_size, or_all=or_all, **streaming)
    if not args.unlabeled and not all(has_labels(split) for split in (train, validation) if split is not None):
        raise UserError('the images lie in no class folders: put them there, or train without labels (--unlabeled).')
    return train, validation


def check_class_count(names: Sequence[str] | None, num_classes: int, one_is_enough: bool) -> None:
    """Raise a `UserError` where the training split's classes are not as many as the model's, or only one."""
    if num_classes == 1 and not one_is_enough:
        raise UserError('one class alone leaves nothing to learn: give --num-classes 2 or more, and data to match.')
    if names is not None and len(names) != num_classes:
        raise UserError(
            f'the training split has {len(names)} classes, the model {num_classes}: set --num-classes {len(names)}, or '
            'name the classes with --class-map.'
        )


def build_augmentation(args: argparse.Namespace, data_config: dict[str, Any]) -> Augmentation:
    """Collect every setting that decides the pixels of a training sample."""
    mixing = ('mixup', 'cutmix', 'cutmix_minmax', 'mixup_prob', 'mixup_switch_prob', 'mixup_off_epoch')
    left_out = () if args.mixup_mode == 'pair' and mixes(args) else mixing
    settings: dict[str, Any] = {field.name: getattr(args, field.name, None) for field in fields(Augmentation)}
    settings = {name: value for name, value in settings.items() if value is not None and name not in left_out}
    settings |= {name: data_config[name] for name in ('input_size', 'mean', 'std')}
    settings['input_img_mode'] = image_mode(args.input_img_mode, data_config['input_size'][0])
    if args.no_aug or not args.train_interpolation:
        settings['train_interpolation'] = data_config['interpolation']
    return Augmentation(**settings)


def _mixup_arguments(args: argparse.Namespace, num_classes: int) -> dict[str, Any]:
    """Arguments of timm's Mixup."""
    return {
        'mixup_alpha': args.mixup,
        'cutmix_alpha': args.cutmix,
        'cutmix_minmax': args.cutmix_minmax,
        'prob': args.mixup_prob,
        'switch_prob': args.mixup_switch_prob,
        'mode': args.mixup_mode,
        'label_smoothing': args.smoothing,
        'num_classes': num_classes,
    }


def _build_train_loader(
    args: argparse.Namespace,
    dataset: Dataset,
    pixels: InputSpec,
    processes: Processes,
    bad: BadImages,
    store: SoftLabelStore | None,
) -> TrainLoader | StreamLoader:
    augmentation = build_augmentation(args, pixels.config)
    if args.unlabeled:
        dataset = unlabeled(dataset)
    if isinstance(dataset, IterableDataset):
        return _build_stream_loader(args, dataset, pixels, processes, bad)
    collate: Collate = collate_labels
    if augmentation.mixes:
        collate = CollatePairs(pixels.num_classes, args.smoothing)
    elif mixes(args):
        erasing, augmentation = Erasing(augmentation, args.seed), replace(augmentation, reprob=0.0)
        mixing = _mixup_arguments(args, pixels.num_classes)
        collate = CollateMixed(mixing, erasing, seed=args.seed, rank=processes.rank, off_epoch=args.mixup_off_epoch)
    # MEAL V2 does not look at labels, or not at unknown ones (-1); mixing does.
    unknown = is_mealv2(args) and not mixes(args)
    labels = None if args.unlabeled else range(-1 if unknown else 0, pixels.num_classes)
    place: dict[str, Any] = {'rank': processes.rank, 'world_size': processes.world_size}
    place['samples_per_decode'] = args.samples_per_decode
    samples: Samples
    sampler: EpochSampler
    if store is not None:
        samples, sampler, collate = replay(
            store,
            dataset,
            pixels.batch_size,
            labels=labels,
            allow_pixel_change=args.allow_pixel_change,
            **place,
        )
    else:
        samples = Samples(dataset, augmentation, args.seed, labels=labels)
        sampler = EpochSampler(
            len(samples),
            pixels.batch_size,
            seed=args.seed,
            pairs=augmentation.mixes,
            **place,
        )
    return TrainLoader(
        samples,
        sampler,
        collate,
        normalization=(tuple(pixels.config['mean']), tuple(pixels.config['std'])),
        bad=bad,
        workers=args.workers,
        pin_memory=args.pin_mem,
        prefetch=not args.no_prefetcher,
        device=processes.device,
        dtype=pixels.dtype,
    )


def _build_stream_loader(
    args: argparse.Namespace, dataset: IterableDataset, pixels: InputSpec, processes: Processes, bad: BadImages
) -> StreamLoader:
    for name in ('soft_labels', 'samples_per_decode'):
        if getattr(args, name) not in (None, 0, 1):
            option = '--' + name.replace('_', '-')
            raise UserError(f'{option} needs numbered images, and a streaming data set has none: leave it out.')
    augmentation = build_augmentation(args, pixels.config)
    mixing = None
    if mixes(args):
        if args.no_prefetcher or args.unlabeled or pixels.batch_size % 2:
            raise UserError('a streaming data set is mixed by the prefetcher, in even batches and with labels only.')
        mixing = FastCollateMixup(**_mixup_arguments(args, pixels.num_classes))
    _logger.info('Streaming data set: a resumed run goes on at the start of its epoch.')
    return StreamLoader(
        StreamedImages(dataset, augmentation.input_img_mode, augmentation.decode),
        seed=args.seed,
        rank=processes.rank,
        device=processes.device,
        bad=bad,
        batch_size=pixels.batch_size,
        mixing=mixing,
        mixup_off_epoch=args.mixup_off_epoch,
        num_workers=args.workers,
        distributed=processes.distributed,
        pin_memory=args.pin_mem,
        use_prefetcher=not args.no_prefetcher,
        img_dtype=pixels.dtype,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        **augmentation.transform_options(),
    )
