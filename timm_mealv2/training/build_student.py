"""From arguments to the student: the model to train, and what its pixels are."""

import argparse
import copy
import logging
from typing import Any

import timm
import torch
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from torch import nn

from timm_mealv2.data.normalize import resolve_pixels
from timm_mealv2.data.seed import Stream, counted_seed, preserved_generators, seed_cpu
from timm_mealv2.errors import UserError, one_line
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.training.build_data import InputSpec
from timm_mealv2.training.distributed import Processes

_logger = logging.getLogger(__name__)


def build_student(args: argparse.Namespace, batch_size: int, processes: Processes) -> tuple[nn.Module, InputSpec]:
    """Create the model to train, and decide what its pixels are.

    The resolved data configuration is written into the model's `pretrained_cfg`, where the task, the loaders, the
    evaluation and the exported config.json read it.
    """
    seed_cpu(counted_seed(Stream.INITIALIZATION, args.seed))
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
    except Exception as error:  # a config.json, weights and arguments are the user's, whatever timm raises
        pool = f' with --gp {args.gp}' if args.gp is not None else ''
        raise UserError(f'cannot create --model {args.model}{pool}: {error}') from error
    if args.initial_checkpoint:
        state = TrainingCheckpoint.read(args.initial_checkpoint).state_dict()
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f'--initial-checkpoint {args.initial_checkpoint} does not fit: {one_line(error)}'
            ) from error
    if args.head_init_scale is not None:
        with torch.no_grad():
            model.get_classifier().weight.mul_(args.head_init_scale)
    if args.head_init_bias is not None:
        nn.init.constant_(model.get_classifier().bias, args.head_init_bias)
    num_classes = args.num_classes or getattr(model, 'num_classes', None)
    if num_classes is None:
        raise UserError(f'--model {args.model} does not tell its class count: give --num-classes.')
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)

    config = _describe_pixels(args, model, in_chans or int(getattr(model, 'in_chans', 3)))
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    dtype = getattr(torch, args.model_dtype or 'float32')
    model.to(device=processes.device, dtype=dtype)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    _try_forward(args, model, InputSpec(config, num_classes, batch_size, dtype), processes.device)
    if processes.distributed and args.sync_bn:
        model = convert_sync_batchnorm(model)
    return model, InputSpec(config, num_classes, batch_size, dtype)


@torch.no_grad()
def _try_forward(args: argparse.Namespace, model: nn.Module, pixels: InputSpec, device: torch.device) -> None:
    """Tell at once, not in the first step, that a model does not take images of a size or a batch of one image."""
    input_size = pixels.config['input_size']
    sizes = {'--img-size': [input_size[1:]], '--train-img-sizes': [(size, size) for size in args.train_img_sizes or ()]}
    model.eval()
    for name, size in [(name, size) for name, some in sizes.items() for size in some]:
        images = torch.zeros(1, input_size[0], *size, device=device, dtype=pixels.dtype)
        try:
            output = model(images)
            if pixels.batch_size == 1 and not args.freeze_bn:  # batch norm may have a single value left
                with preserved_generators():
                    copy.deepcopy(model).train()(images)
        except (AssertionError, RuntimeError, ValueError) as error:
            shown = ' x '.join(map(str, size))
            raise UserError(f'{name}: {args.model} cannot take images of {shown}: {error}') from error
    if output.shape[1:] != (pixels.num_classes,):
        raise UserError(
            f'{args.model} gives {list(output.shape[1:])} numbers, not one for each of {pixels.num_classes} classes.'
        )
    model.train()


def _describe_pixels(args: argparse.Namespace, model: Any, in_chans: int) -> dict[str, Any]:
    config = resolve_pixels(vars(args), model.pretrained_cfg, in_chans)
    # Whatever else the weights were once tested with is not what this run measures.
    former = {
        key: value for key, value in model.pretrained_cfg.items() if key not in ('test_input_size', 'test_crop_pct')
    }
    model.pretrained_cfg = model.default_cfg = {**former, **config}
    _logger.info('Pixels: ' + ', '.join(f'{name} {value}' for name, value in config.items()))
    return config
