"""From arguments to the student: the model to train, and what its pixels are."""

import argparse
import logging
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import convert_sync_batchnorm, set_fast_norm
from timm.models import filter_pretrained_cfg, resolve_model_input_args
from torch import nn
from torch.utils.data import Dataset

from timm_mealv2.data.class_names import check_same_classes, class_names_of, index_map
from timm_mealv2.data.normalize import resolve_pixels
from timm_mealv2.data.seed import Stream, counted_seed, seed_cpu
from timm_mealv2.errors import UserError, one_line
from timm_mealv2.models.checkpoint import TrainingCheckpoint, architecture_arguments, with_test_settings
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import TeacherSpec
from timm_mealv2.soft_labels.store import SoftLabelStore
from timm_mealv2.training.build_data import InputSpec
from timm_mealv2.training.distributed import Processes

_logger = logging.getLogger(__name__)

_NOT_MODEL_ARGS = ('num_classes', 'in_chans', 'drop_rate', 'drop_path_rate', 'drop_block_rate')


def build_student(
    args: argparse.Namespace,
    batch_size: int,
    num_classes: int | None,
    processes: Processes,
    student: nn.Module | None = None,
) -> tuple[nn.Module, InputSpec, dict[str, Any]]:
    """Create the model to train, or take `student`, and decide what its pixels are.

    The resolved data configuration is written into the model's `pretrained_cfg`, where the task, the loaders, the
    evaluation and the exported config.json read it.

    Args:
        args: The arguments.
        batch_size: Images of a batch, per process.
        num_classes: The class count of option or data; None for the model's own.
        processes: The processes of the run.
        student: The model, if there is one already.

    Returns:
        The model, its input, and what checkpoints say of the network (`model_config`).
    """
    seed = counted_seed(Stream.INITIALIZATION, args.seed)
    seed_cpu(seed)
    if args.fast_norm:
        set_fast_norm()
    in_chans = args.in_chans if args.in_chans is not None else args.input_size[0] if args.input_size else None
    model: Any
    initial = TeacherSpec.parse(args.initial_checkpoint).read_checkpoint() if args.initial_checkpoint else None
    if student is None:
        if num_classes is None and initial is not None:  # of images without labels
            num_classes = len(initial.class_names) or initial.args.get('num_classes')
        model, arguments = _create(args, num_classes, in_chans)
        if args.pretrained_path:
            seed_cpu(seed)
            _check_loaded(model, timm.create_model(**arguments), args.pretrained_path)
    else:
        model, arguments = student, {'model_name': args.model, **args.model_kwargs}
    known: Sequence[str] | None = None
    if student is not None or (args.pretrained and not args.pretrained_path):
        known = class_names_of(model)
    if initial is not None:
        known = _load_initial_weights(initial, args.initial_checkpoint, model, arguments['model_name'])
    _initialize_heads(model, args.head_init_scale, args.head_init_bias)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)

    in_chans = in_chans or int(getattr(model, 'in_chans', 3))
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    config = resolve_pixels(vars(args), cfg, in_chans)
    former = with_test_settings(cfg, config['input_size'])
    model.pretrained_cfg = model.default_cfg = {**former, **config, 'label_names': known or None}
    _logger.info('Pixels: ' + ', '.join(f'{name} {value}' for name, value in config.items()))
    model_args = architecture_arguments(arguments)
    model_config = {
        'architecture': arguments['model_name'],
        'num_classes': model.num_classes,
        'in_chans': in_chans,
        'model_args': {name: value for name, value in model_args.items() if name not in _NOT_MODEL_ARGS},
        'pretrained_cfg': filter_pretrained_cfg(model.pretrained_cfg, remove_source=True),
    }

    inputs = InputSpec(config, model.num_classes, batch_size, getattr(torch, args.model_dtype or 'float32'))
    model.to(device=processes.device, dtype=inputs.dtype)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    _try_input(args.model, model, inputs, processes.device)
    if processes.distributed and args.sync_bn:
        model = convert_sync_batchnorm(model)
    return model, inputs, model_config


def _create(
    args: argparse.Namespace, num_classes: int | None, in_chans: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Create the model that the arguments name; return the arguments of timm's factory too."""
    drops = {
        'drop_rate': args.drop,
        'drop_path_rate': args.drop_path if args.drop_path is not None else args.drop_connect,
        'drop_block_rate': args.drop_block,
    }
    shape = {'global_pool': args.gp, 'bn_momentum': args.bn_momentum, 'bn_eps': args.bn_eps, **args.model_kwargs}
    sizes = {'num_classes': num_classes, 'in_chans': in_chans}
    overlay = {'file': args.pretrained_path, 'num_classes': -1} if args.pretrained_path else None
    pretrained = args.pretrained or bool(args.pretrained_path)
    try:
        arguments = resolve_model_input_args(args.model, pretrained_cfg_overlay=overlay, **{**sizes, **drops, **shape})
        return timm.create_model(pretrained=pretrained, **arguments), arguments
    except (AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f'cannot create --model {args.model}: {one_line(error)}') from error


def _check_loaded(model: Any, untrained: nn.Module, path: str) -> None:
    """Raise a `UserError` if most weights are still those of the untrained model: timm only logs missing keys."""
    heads = {id(parameter) for classifier in _classifiers(model) for parameter in classifier.parameters()}
    pairs = [(p, q) for p, q in zip(model.parameters(), untrained.parameters(), strict=True) if p.dim() > 1]
    loaded = [not torch.equal(p, q) for p, q in pairs if id(p) not in heads]
    if 2 * sum(loaded) < len(loaded):
        raise UserError(
            f"--pretrained-path {path} has {sum(loaded)} of the {len(loaded)} weights under the model's names: rename "
            'its keys to those of `model.state_dict()`, without a prefix.'
        )


def _load_initial_weights(initial: TrainingCheckpoint, name: str, model: Any, architecture: str) -> Sequence[str]:
    """Load the weights of `--initial-checkpoint`; return the names of its classes."""
    try:
        model.load_state_dict(initial.state_dict())
    except RuntimeError as error:
        classes = initial.num_classes(architecture)
        fault = one_line(error)
        if classes not in (None, model.num_classes):
            fault = (
                f'it has {classes} classes, the model {model.num_classes}; --pretrained-path takes all weights but '
                'those of the classifier.'
            )
        raise UserError(f'--initial-checkpoint {name} does not fit: {fault}') from error
    return initial.class_names


@torch.no_grad()
def _initialize_heads(model: Any, scale: float | None, bias: float | None) -> None:
    """Scale the weights of the classifier, or of each of several, and set its bias."""
    if scale is None and bias is None:
        return
    for classifier in _classifiers(model):
        for parameter in classifier.parameters():
            parameter.mul_(1.0 if scale is None else scale)
        if bias is not None:
            nn.init.constant_(classifier.bias, bias)


def settle_class_names(
    args: argparse.Namespace,
    student: nn.Module,
    folders: list[str] | None,
    validation: Dataset | None,
    teachers: EnsembleTeacher | None,
    store: SoftLabelStore | None,
    checkpoint: TrainingCheckpoint | None,
) -> list[str] | None:
    """Decide what the classes are called, and in which order: as the folders, or as who else knows them by name.

    The initial weights are brought into that order; stored labels and a checkpoint to resume have to be in it.

    Args:
        args: The arguments.
        student: The model to train.
        folders: What the training split calls them; None without names, or without labels.
        validation: The validation split, if there is one.
        teachers: Live teachers, mapped to `folders`.
        store: The stored labels to train on.
        checkpoint: The checkpoint to resume.

    Returns:
        The names, None where nobody knows any.

    Raises:
        UserError: If somebody knows other classes.
    """
    recorded = store.meta.class_names if store is not None else None
    check_same_classes(recorded, folders, args.soft_labels)
    of_validation = None if validation is None else class_names_of(validation)
    if len(of_validation or ()) != student.num_classes:
        of_validation = None
    names = folders or recorded or (class_names_of(teachers) if teachers is not None else None) or of_validation
    own = class_names_of(student)
    if own or args.initial_checkpoint:
        hint = ' (--pretrained-path leaves its classes out)' if own else ''
        _reorder_classes(student, index_map(own, names, f'{args.initial_checkpoint or args.model}{hint}'))
    if checkpoint is not None and len(checkpoint.class_names) == student.num_classes:
        check_same_classes(checkpoint.class_names, names, str(checkpoint))
    return names or own


@torch.no_grad()
def _reorder_classes(model: nn.Module, classes: list[int] | None) -> None:
    """Give each class k the weights that class `classes[k]` has in the model's classifiers; None changes nothing."""
    for classifier in _classifiers(model) if classes else ():
        for parameter in classifier.parameters():
            parameter.copy_(parameter[classes])


def _classifiers(model: Any) -> tuple[Any, ...]:
    classifiers = model.get_classifier()
    return classifiers if isinstance(classifiers, tuple) else (classifiers,)


@torch.no_grad()
def _try_input(name: str, model: nn.Module, inputs: InputSpec, device: torch.device) -> None:
    """Tell before anything is loaded that a model, such as a ViT, does not take images of the size."""
    size = inputs.config['input_size'][1:]
    model.eval()
    try:
        model(torch.zeros(1, inputs.channels, *size, device=device, dtype=inputs.dtype))
    except (AssertionError, RuntimeError, ValueError) as error:
        fixed = f'a model of fixed size is built for it by --model-kwargs img_size={size[0]}'
        shown = f'{size[0]} x {size[1]} ({fixed})'
        raise UserError(f'{name} cannot take images of {shown}: {one_line(error)}') from error
    model.train()
