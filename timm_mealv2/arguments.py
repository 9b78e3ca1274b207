"""From the arguments that several programs share to what they name: the device, a data set, the ensemble."""

import argparse
import os
from typing import Any

import torch
from torch.utils.data import Dataset

from timm_mealv2.data.dataset import split_is_missing
from timm_mealv2.data.own_data import TRAINING, hold_out, open_images
from timm_mealv2.errors import UserError, one_line
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import create_ensemble, read_classes


def choose_device(name: str | None, local_rank: int = 0, option: str = '--device') -> torch.device:
    """Return the device of that name; without one CUDA's, or the CPU where there is none.

    Args:
        name: Value of the option.
        local_rank: Number of this process among those of its machine, each of which has a GPU of its own.
        option: The option.

    Raises:
        UserError: If the device cannot be used.
    """
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device('cuda', local_rank) if name == 'cuda' else torch.device(name)
        torch.empty(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise UserError(f'{option} {name} cannot be used: {one_line(error)}') from error
    return device


def open_split(args: argparse.Namespace, option: str, *, or_all: bool = False, **kwargs: Any) -> Dataset:
    """Open a split of the data set that the options `DATA` name.

    Args:
        args: Has these options.
        option: The option that names the split: '--train-split', '--val-split' or '--split'.
        or_all: Where a folder, tar or table has no such split, take the whole of it, as timm does.
        **kwargs: Further arguments of `open_images`, or others than those of the options.

    Raises:
        UserError: If the split cannot be opened.
    """
    named: str | None = getattr(args, option.strip('-').replace('-', '_'))
    split = 'validation' if named is None else named
    if args.val_share:
        return open_shares(args)[split not in TRAINING]
    dataset = _open(args, split, **kwargs)
    if not or_all and split_is_missing(dataset, args.data_dir, split):
        share = '' if option == '--train-split' else ', or hold images out with --val-share 0.1'
        root = args.data_dir
        there = f', but {", ".join(sorted(os.listdir(root))[:5])}' if root and os.path.isdir(root) else ''
        raise UserError(f'no split {split!r} in {root}{there}: name a folder or .tar with {option}{share}.')
    return dataset


def open_shares(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Open the images to train on, and those that `--val-share` takes out of them for validation.

    Raises:
        UserError: If the training split cannot be opened or shared.
    """
    return hold_out(_open(args, 'train'), args.val_share)


def _open(args: argparse.Namespace, split: str, **kwargs: Any) -> Dataset:
    options = {
        'class_map': args.class_map,
        'download': args.dataset_download,
        'input_key': args.input_key,
        'target_key': args.target_key,
        'trust_remote_code': args.dataset_trust_remote_code,
    }
    return open_images(args.dataset, args.data_dir, split, **options | kwargs)


def teacher_dtype(args: argparse.Namespace) -> str | None:
    """Return the type of the teachers' autocast: `--teacher-dtype`, or that of `--amp`; None for none."""
    dtype: str | None = args.teacher_dtype or (args.amp_dtype if args.amp else None)
    return dtype


def build_ensemble(args: argparse.Namespace, device: torch.device, **kwargs: Any) -> EnsembleTeacher:
    """Build the ensemble that the options `TEACHERS` name.

    Args:
        args: Has these options; `teachers` may be parsed already.
        device: Where the teachers are put.
        **kwargs: Further arguments of `create_ensemble`.
    """
    dtype = teacher_dtype(args)
    ensemble = create_ensemble(
        args.teachers,
        weights=args.teacher_weights,
        img_sizes=args.teacher_img_size,
        classes=read_classes(args.teacher_classes or ()),
        autocast_dtype=getattr(torch, dtype) if dtype else None,
        **kwargs,
    )
    if args.teacher_optimize == 'on':
        ensemble.optimize_for_inference()
    return ensemble.to(device)
