"""A training checkpoint: read once, and its model rebuilt in one way."""

import argparse
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from huggingface_hub import try_to_load_from_cache
from timm.data import resolve_input_data_config
from timm.models import (
    PretrainedCfg,
    clean_state_dict,
    create_model,
    filter_pretrained_cfg,
    get_arch_name,
    get_model_input_config,
    get_pretrained_cfg,
    is_model_in_modules,
    parse_model_name,
    resolve_model_input_args,
)
from torch import Tensor, nn

from timm_mealv2.errors import UserError, blamed_on, one_line
from timm_mealv2.models.mealv2_students import VANILLA_ARCHITECTURE
from timm_mealv2.models.pretrained import misfit

_DATA_CONFIG = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')

# Arguments of timm's factory that choose weights, places or devices. `pretrained_window_sizes` is a layer's argument.
_NOT_OF_AN_ARCHITECTURE = ('model_name', 'checkpoint_path', 'cache_dir', 'device', 'dtype', 'features_only', 'teachers')


def is_ensemble(architecture: str) -> bool:
    """Whether a name of a timm model is one of this package's ensembles."""
    return is_model_in_modules(get_arch_name(architecture), 'mealv2_teachers')


def architecture_arguments(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments that shape a network, of all those that a file gives for `timm.create_model`.

    What would fetch or place weights is left out: a file does not decide what is downloaded or read.
    """
    return {
        name: value
        for name, value in (arguments or {}).items()
        if name not in _NOT_OF_AN_ARCHITECTURE
        and (not name.startswith('pretrained') or name == 'pretrained_window_sizes')
    }


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A file of weights, most often with what its training program knew about the model.

    Attributes:
        contents: What it holds; of a bare state dict, its tensors. Tensors of a zip file are memory-mapped.
        arch: The architecture that the user named; None leaves it to the file.
    """

    path: Path
    contents: dict[str, Any]
    arch: str | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str], arch: str | None = None, *, verify: bool = True) -> Self:
        """Read a file with `weights_only=True`: a checkpoint of `mealv2-train` or timm's train.py, or a state dict.

        The file is one of torch (.pth, .pth.tar) or .safetensors; `arch` is for one that does not tell it. `verify`
        compares it with its checksums first, which torch's zip files have.

        Raises:
            UserError: If the file is not there, is damaged, cannot be read, or holds no state dict.
        """
        label = f'{arch}={os.fspath(path)}' if arch else os.fspath(path)
        path = Path(path)
        if not path.is_file():
            raise UserError(f'{label}: there is no such file.')
        try:
            if verify and (part := damage(path)) is not None:
                raise UserError(f'the checksum of {part} is wrong')
            if path.suffix == '.safetensors':
                contents = safetensors.torch.load_file(path)
            else:
                with torch.serialization.safe_globals([argparse.Namespace]):
                    contents = torch.load(path, 'cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # safetensors, zip, pickle and torch each raise errors of their own on a bad file
            raise UserError(f'{label} is not a readable checkpoint: {one_line(error)}') from error
        checkpoint = cls(path, contents if isinstance(contents, dict) else {}, arch)
        state = checkpoint.state_dict()
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            expected = 'tensors by name, as torch.save(model.state_dict())'
            raise UserError(f'{label} holds no state dict: expected {expected}.')
        for key, kinds in _ENTRIES.items():
            if not isinstance(checkpoint.contents.get(key), (*kinds, type(None))):
                received = type(checkpoint.contents[key]).__name__
                raise UserError(f'{label} is no checkpoint of mealv2-train or timm: its {key} is of type {received}.')
        return checkpoint

    def __str__(self) -> str:
        return f'{self.arch}={self.path}' if self.arch else str(self.path)

    def state_dict(self, ema: bool = True) -> dict[str, Any]:
        """Return the weights by name, without wrappers' prefixes; the averaged ones where wanted and there."""
        keys = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
        held = [key for key in (keys if ema else keys[2:]) if isinstance(self.contents.get(key), dict)]
        state: dict[str, Any] = clean_state_dict(self.contents[held[0]] if held else self.contents)
        return state

    @property
    def args(self) -> dict[str, Any]:
        """The training program's arguments, {} if the file has none."""
        args = self.contents.get('args') or {}
        return dict(vars(args) if isinstance(args, argparse.Namespace) else args)

    @property
    def data_config(self) -> dict[str, Any]:
        """What the pixels of the training were: 'input_size', 'mean', 'std' and the like; {} if the file has none."""
        given = self.contents.get('data_config') or {}
        return {key: tuple(v) if isinstance(v, list) else v for key, v in given.items() if key in _DATA_CONFIG}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, () if the file has none."""
        return tuple(self.contents.get('class_names') or ())

    def build(self, num_classes: int | None = None, ema: bool = True) -> nn.Module:
        """Rebuild the model and load its weights strictly.

        Where the file has a training program's arguments for this architecture, the model is built with them
        (model_kwargs, input channels, global pooling, batch norm's epsilon and momentum, image size), and its
        `pretrained_cfg` says what its pixels were (`data_config`, or the arguments). For a bare state dict that of
        the architecture and its tag is taken. The class count is the width of the classifier in the file.

        Args:
            num_classes: The class count where the file does not show it.
            ema: Take the averaged weights where the file has them.

        Returns:
            The model on the CPU, in timm's initial mode (training).

        Raises:
            UserError: If the file does not tell its architecture, or does not fit it.
        """
        with blamed_on(str(self)):
            arch, args, arguments = self._description()
            state, data_config = self.state_dict(ema), self.data_config
            arguments['num_classes'] = _classifier_width(arch, state) or args.get('num_classes') or num_classes
        size_args = {key: args.get(key) for key in ('input_size', 'img_size', 'in_chans')}
        if not args and 'input_size' in data_config:
            size_args['input_size'] = data_config['input_size']

        def create(**changes: Any) -> nn.Module:
            try:
                kwargs = resolve_model_input_args(arch, {**size_args, **changes}, **arguments)
                model: nn.Module = create_model(**kwargs)
            except Exception as error:  # the arguments come from the user's file, and any of them can be the cause
                raise UserError(f'{self} cannot be rebuilt from what the file says: {one_line(error)}') from error
            return model

        model = create()
        in_chans = _first_conv_chans(model, state)
        if in_chans != get_model_input_config(model)['input_size'][0]:
            args = {**args, 'in_chans': in_chans, 'input_size': None}
            model = create(in_chans=in_chans, input_size=None)
        try:
            model.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise UserError(f'{self} does not fit the architecture: {misfit(model.state_dict(), state)}.') from error
        cfg = filter_pretrained_cfg(model.pretrained_cfg, remove_source=True)
        with blamed_on(str(self)):
            cfg.update(data_config or resolve_input_data_config(model, args))
        cfg['num_classes'] = model.num_classes
        model.pretrained_cfg = model.default_cfg = cfg
        return model

    def _description(self) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """The architecture, the training program's arguments where they are for it, and those of the network."""
        args = self.args
        named = str(args.get('model') or '')
        source, place = parse_model_name(named) if named else (None, '')
        trained = None if source else named or None
        model_args: dict[str, Any] = {}
        if source and self.arch is None:
            trained, model_args = self._exported_architecture(source, place)
        arch = self.arch or trained
        if arch is None:
            raise UserError(f'{self} does not tell its model: name its architecture, as NAME=PATH.')
        if is_ensemble(arch):  # the file's arguments could name code as a teacher
            remedy = 'give each of its teachers as NAME=PATH'
            raise UserError(f'{self}: an ensemble has no checkpoint of its own; {remedy}.')
        bare, trained_bare = (get_arch_name(name or arch) for name in (arch, trained))
        if VANILLA_ARCHITECTURE.get(bare, bare) != VANILLA_ARCHITECTURE.get(trained_bare, trained_bare):
            args = {}
        arguments = {name: args.get(key) for name, key in _BUILT_WITH.items()}
        return arch, args, {**arguments, **model_args, **architecture_arguments(args.get('model_kwargs'))}

    def _exported_architecture(self, source: str, place: str) -> tuple[str, dict[str, Any]]:
        """Architecture and arguments of the exported model that the training began with; nothing is downloaded."""
        folder: Any = place
        if source == 'hf-hub':
            repository, _, revision = place.partition('@')
            config = try_to_load_from_cache(repository, 'config.json', revision=revision or None)
            folder = os.path.dirname(config) if isinstance(config, str) else ''
        try:
            kwargs = resolve_model_input_args(f'local-dir:{folder}')
        except Exception as error:  # whatever a folder or its config.json may lack
            raise UserError(
                f'{self} was trained from {self.args["model"]}, whose config.json is not on this machine: '
                'name its architecture, as NAME=PATH.'
            ) from error
        return kwargs['model_name'], architecture_arguments(kwargs)


def damage(path: Path) -> str | None:
    """Return the part of a checkpoint whose checksum is wrong, None if there is none."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as file:
        return file.testzip()


_ENTRIES = {'args': (dict, argparse.Namespace), 'data_config': (dict,), 'class_names': (list, tuple)}

# Arguments of a network by the names of the training program's options.
_BUILT_WITH = {'global_pool': 'gp', 'bn_eps': 'bn_eps', 'bn_momentum': 'bn_momentum'}


def _classifier_width(arch: str, state: dict[str, Tensor]) -> int | None:
    cfg = get_pretrained_cfg(arch) or PretrainedCfg()
    classifier = cfg.classifier if isinstance(cfg.classifier, str) else next(iter(cfg.classifier or ()), None)
    weight = state.get(f'{classifier}.weight')
    return None if weight is None else weight.shape[0]


def _first_conv_chans(model: nn.Module, state: dict[str, Tensor]) -> int:
    """Input channels of the weights in `state`, from the first convolution's ratio to that of `model`."""
    config = get_model_input_config(model)
    first, in_chans = config['first_conv'], config['input_size'][0]
    first = first if isinstance(first, str) else next(iter(first or ()), None)
    weight, own = (tensors.get(f'{first}.weight') for tensors in (state, model.state_dict()))
    if weight is None or own is None or weight.ndim < 2:
        return in_chans
    return max(1, weight.shape[1] * in_chans // own.shape[1])
