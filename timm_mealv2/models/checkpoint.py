"""A training checkpoint: read once, and its model rebuilt in one way."""

import argparse
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from timm.data import resolve_input_data_config
from timm.models import (
    PretrainedCfg,
    clean_state_dict,
    create_model,
    filter_pretrained_cfg,
    get_arch_name,
    get_model_input_config,
    get_pretrained_cfg,
    is_model,
    is_model_in_modules,
    resolve_model_input_args,
)
from torch import Tensor, nn

from timm_mealv2.errors import UserError, one_line
from timm_mealv2.models.mealv2_students import VANILLA_ARCHITECTURE

_DATA_CONFIG = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')

# Arguments of timm's factory that choose weights, places or devices. `pretrained_window_sizes` is a layer's argument.
_NOT_OF_AN_ARCHITECTURE = ('model_name', 'checkpoint_path', 'cache_dir', 'device', 'dtype', 'features_only', 'teachers')

# What torch, zip, pickle and safetensors raise for a file that is no checkpoint, or a part of one.
_UNREADABLE = (
    *(AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(pickle.UnpicklingError, safetensors.SafetensorError, zipfile.BadZipFile),
)

# Arguments of a network by the names of the training programs' options.
_BUILT_WITH = {'global_pool': 'gp', 'bn_eps': 'bn_eps', 'bn_momentum': 'bn_momentum'}


@contextmanager
def making(text: str, remedy: str = '') -> Iterator[None]:
    """Turn into a `UserError` whatever timm's factory, or a user's own function, raises for a user's text."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'{text} cannot be made: {type(error).__name__}: {one_line(error)}{remedy}') from error


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


def with_test_settings(cfg: Mapping[str, Any], input_size: Sequence[int]) -> dict[str, Any]:
    """Return a pretrained config; its test size and crop, which go with its input size, are left out at another."""
    same = tuple(cfg.get('input_size', input_size)[1:]) == tuple(input_size[1:])
    return {key: value for key, value in cfg.items() if same or not key.startswith('test_')}


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
        """
        label = f'{arch}={os.fspath(path)}' if arch else os.fspath(path)
        path = Path(path)
        if not path.is_file():
            raise UserError(f'{label}: there is no such file.')
        try:
            if verify and (part := damage(path)) is not None:
                raise ValueError(f'the checksum of {part} is wrong')
            if path.suffix == '.safetensors':
                contents = safetensors.torch.load_file(path)
            else:
                with torch.serialization.safe_globals([argparse.Namespace]):  # timm's own files have one
                    contents = torch.load(path, 'cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
        except _UNREADABLE as error:
            raise UserError(f'{label} is not a readable checkpoint: {one_line(error)}') from error
        checkpoint = cls(path, contents if isinstance(contents, dict) else {}, arch)
        state = checkpoint.state_dict()
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise UserError(
                f'{label} holds no state dict: expected tensors by name, as torch.save(model.state_dict()).'
            )
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
        return _plain({key: value for key, value in given.items() if key in _DATA_CONFIG})

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, () if the file has none."""
        return tuple(self.contents.get('class_names') or ())

    def num_classes(self, arch: str) -> int | None:
        """Return the class count that the classifier's weights tell, for timm's architecture `arch`."""
        return _classifier_width(arch, self.state_dict())

    def build(self, num_classes: int | None = None, ema: bool = True) -> nn.Module:
        """Rebuild the model on the CPU and load its weights strictly; nothing is downloaded.

        The model is made from the file's `model_config`. Files without one are timm's own, older ones and bare state
        dicts: there it is made from the training program's arguments, where they are for this architecture, and from
        the shapes of classifier and first convolution. Its `pretrained_cfg` says what its pixels were.

        Args:
            num_classes: The class count where the file does not show it.
            ema: Take the averaged weights where the file has them.
        """
        config = self.contents.get('model_config') or {}
        arch = self.arch or config.get('architecture') or self.args.get('model') or ''
        state, overlay = self.state_dict(ema), self.data_config
        model: Any
        with making(str(self)):
            if config and _same_architecture(arch, config['architecture']):
                sizes = {key: config[key] for key in ('num_classes', 'in_chans')}
                model = _create(self, arch, {**architecture_arguments(config['model_args']), **sizes})
                overlay = {**config['pretrained_cfg'], **overlay}
            else:
                model, args = self._inferred(arch, state, num_classes)
                overlay = overlay or resolve_input_data_config(model, args)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(f'{self} does not fit the architecture {arch}: {one_line(error)}') from error
        former = with_test_settings(model.pretrained_cfg, overlay.get('input_size', model.pretrained_cfg['input_size']))
        cfg = filter_pretrained_cfg({**former, **_plain(overlay)}, remove_source=True)
        cfg['num_classes'] = model.num_classes
        if len(self.class_names) == model.num_classes:
            cfg['label_names'] = list(self.class_names)
        model.pretrained_cfg = model.default_cfg = cfg
        return model

    def _inferred(self, arch: str, state: dict[str, Tensor], num_classes: int | None) -> tuple[Any, dict[str, Any]]:
        """A model from arguments and shapes, and the arguments."""
        args = self.args if _same_architecture(arch, self.args.get('model') or arch) else {}
        arguments = {name: args.get(key) for name, key in _BUILT_WITH.items()}
        if arch.startswith('local-dir:'):  # the training began with an exported model
            exported = resolve_model_input_args(arch)
            arch = exported['model_name']
            arguments |= architecture_arguments(exported)
        arguments |= architecture_arguments(args.get('model_kwargs'))
        arguments['num_classes'] = _classifier_width(arch, state) or args.get('num_classes') or num_classes
        sizes = {key: args.get(key) for key in ('input_size', 'img_size', 'in_chans')}
        if not args and 'input_size' in self.data_config:
            sizes['input_size'] = self.data_config['input_size']
        model = _create(self, arch, arguments, sizes)
        in_chans = _first_conv_chans(model, state)
        if in_chans != get_model_input_config(model)['input_size'][0]:
            sizes |= {'in_chans': in_chans, 'input_size': None}
            model = _create(self, arch, arguments, sizes)
        return model, {**args, **sizes}


def _create(
    checkpoint: TrainingCheckpoint, arch: str, arguments: dict[str, Any], sizes: dict[str, Any] | None = None
) -> nn.Module:
    """Create the model of a file, which names no other source of code, weights or configs than timm's registry."""
    if not is_model(arch) or is_ensemble(arch):
        raise UserError(f'{checkpoint} does not tell its model ({arch!r}): name its architecture, as NAME=PATH.')
    model: nn.Module = create_model(**resolve_model_input_args(arch, sizes or {}, **arguments))
    return model


def _same_architecture(a: str, b: str) -> bool:
    a, b = (get_arch_name(name) for name in (a, b))
    return VANILLA_ARCHITECTURE.get(a, a) == VANILLA_ARCHITECTURE.get(b, b)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def damage(path: Path) -> str | None:
    """Return the part of a checkpoint whose checksum is wrong, None if there is none."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as file:
        return file.testzip()


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
