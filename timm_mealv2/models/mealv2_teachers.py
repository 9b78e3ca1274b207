"""Teachers: an ensemble as one frozen model, made from names, folders and checkpoints, and registered with timm.

A teacher is an `nn.Module`, or a text that names one:

- `resnet152s.gluon_in1k`: a timm model, with the pretrained weights of its tag;
- `hf-hub:USER/REPO`, `local-dir:FOLDER`: an exported model, built as its `config.json` says (`model_args` included);
- `resnet18=path/to/checkpoint.pth.tar`: weights of one's own in a timm architecture;
- `python:package.module:function`: what the function returns, called without arguments.

timm groups models by the name of the module that registers them, hence the prefix of this file's name.
"""

import argparse
import difflib
import importlib
import json
import logging
import math
import operator
import os
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Self

import torch
from timm.data import resolve_input_data_config
from timm.models import (
    PretrainedCfg,
    create_model,
    filter_pretrained_cfg,
    generate_default_cfgs,
    get_arch_name,
    get_arch_pretrained_cfgs,
    get_deprecated_models,
    get_model_input_config,
    get_pretrained_cfg,
    is_model,
    is_model_in_modules,
    list_models,
    load_model_config_from_hf,
    load_state_dict,
    parse_model_name,
    register_model,
    resolve_model_input_args,
    resolve_pretrained_cfg,
)
from timm.utils import load_checkpoint_metadata, unwrap_model
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mealv2.data.normalize import channel_stats, renormalize
from timm_mealv2.errors import UserError
from timm_mealv2.losses import at_least_float32

__all__ = [
    'ClassSubset',
    'EnsembleTeacher',
    'create_ensemble',
    'create_from_checkpoint',
    'parse_teachers',
    'read_classes',
]

_logger = logging.getLogger(__name__)

_SOURCES = ('hf-hub:', 'hf_hub:', 'local-dir:')
_PYTHON = 'python:'
Size = int | tuple[int, int] | None

_DATA_CONFIG = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')


class ClassSubset(nn.Module):
    """A model's answers for some of its classes: the softmax of these logits is its probability, renormalized.

    Attributes:
        model: The model.
        num_classes: Number of the classes taken.
        pretrained_cfg: The model's.

    Args:
        model: A model [B, chans, H, W] -> logits [B, C], with an attribute `num_classes`.
        classes: The model's class of each new one, from 0 to C - 1.

    Raises:
        UserError: If there is no class, one is there twice, or one is none of the model's.
    """

    def __init__(self, model: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        self._name = _default_name(model)
        self._width = _num_classes(model, self._name)
        try:
            indices = [operator.index(index) for index in classes]
        except TypeError as error:
            raise UserError(f'Classes of a teacher must be whole numbers, got {classes!r}.') from error
        if not indices:
            raise UserError('Classes of a teacher must be at least one, got none.')
        for index in indices:
            if not 0 <= index < self._width:
                raise UserError(f'Classes of a teacher must be from 0 to {self._width - 1}, got {index}.')
        if len(set(indices)) < len(indices):
            twice = next(index for index in indices if indices.count(index) > 1)
            raise UserError(f'Classes of a teacher must differ, got {twice} more than once.')
        self.model = model
        self.num_classes = len(indices)
        self.pretrained_cfg = _cfg_of(model)
        self.register_buffer('indices', torch.tensor(indices), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the classes taken, [B, num_classes]."""
        logits: Tensor = self.model(x)
        _check_logits(logits, self._name, (len(x), self._width))
        return logits.index_select(1, self.get_buffer('indices'))


class EnsembleTeacher(nn.Module):
    """Frozen teachers that answer as one: the (weighted) mean of their probabilities.

    The input is taken as normalised with the mean and std of the ensemble's own `pretrained_cfg` as it is at the call.
    Each teacher gets it normalised with its own mean and std and, where its input size is fixed or one is asked for,
    resized (bicubic, antialias) for itself; where nothing differs, the very same values.

    The teachers are taken over: eval mode, no gradient, channels_last where they have convolutions. They stay so
    whatever `train()`, `requires_grad_()` or `apply()` is called on the ensemble or a module around it. They run under
    inference mode, so that no gradient reaches them and an optimizer that holds their parameters has nothing to apply.
    (To train on one of them elsewhere, pass a deepcopy.)

    They run in the dtype of their weights whatever autocast the caller is in, so that the targets do not depend on the
    student's mixed precision; with `dtype`, under an autocast of their own.

    Attributes:
        teachers: The modules. A member that is an `EnsembleTeacher` itself is replaced by its members.
        weights: The weight of each teacher; they sum to 1.
        names: A readable name of each teacher.
        num_classes: Number of classes C.
        in_chans: Number of input channels.
        pretrained_cfg: What the input is normalised with ('mean', 'std') and sized for; the first teacher's unless set.

    Args:
        teachers: Models [B, chans, H, W] -> logits [B, C], with an attribute `num_classes`. Without a `pretrained_cfg`,
            ImageNet's mean and std are assumed.
        weights: One per teacher, 0 or more; equal if None. A teacher of weight 0 is not run.
        names: One per teacher, for logs and tables; the architectures' names if None.
        img_sizes: One per teacher: the image size (square) that it is to see; None leaves the input's.
        dtype: Dtype of the teachers' autocast; None for none.

    Raises:
        UserError: If there is no teacher, one is there twice, class counts or channels differ, or a weight or an image
            size is not possible.
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        *,
        names: Sequence[str] | None = None,
        img_sizes: Sequence[Size] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        count = len(teachers)
        if not count:
            raise UserError(
                'An ensemble needs at least one teacher, got none: name a timm model, folder or checkpoint.'
            )
        names = [_default_name(teacher) for teacher in teachers] if names is None else names
        sizes: Sequence[Size] = [None] * count if img_sizes is None else img_sizes
        given = zip(teachers, _normalised(weights, count), names, sizes, strict=True)
        members = [inner for member in given for inner in _flat(*member)]
        self.teachers = nn.ModuleList(member[0] for member in members)
        self.weights: tuple[float, ...] = tuple(member[1] for member in members)
        self.names: tuple[str, ...] = tuple(member[2] for member in members)
        self.img_sizes: tuple[tuple[int, int] | None, ...] = tuple(
            _input_size(teacher, name, size) for teacher, _, name, size in members
        )
        self.autocast_dtype = dtype
        self.num_classes = self._common('num_classes', [_num_classes(t, n) for t, _, n, _ in members])
        self.in_chans = self._common('in_chans', [_in_chans(teacher) for teacher in self.teachers])
        self._refuse_twins()

        self._channels_last = tuple(_to_channels_last(teacher) for teacher in self.teachers)
        self.pretrained_cfg: dict[str, Any] = self._first_cfg()
        self.requires_grad_(False)
        self.train()

    @property
    def default_cfg(self) -> dict[str, Any]:
        """The `pretrained_cfg`, by timm's older name."""
        return self.pretrained_cfg

    def forward(self, x: Tensor) -> Tensor:
        """Return the log of the mean probability, at least float32 [B, C], for images [B, chans, H, W].

        As logits at temperature 1 they give the mean probability itself.
        """
        return self.predict(x)[0]

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log of the mean probability and mean logits, both [B, C], at least float32, without gradient.

        Args:
            x: Images [B, chans, H, W], normalised with the ensemble's `pretrained_cfg`.
        """
        self._stay_frozen()
        log_probs: Tensor | None = None
        mean_logits: Tensor | None = None
        for index, weight in enumerate(self.weights):
            if weight == 0:
                continue
            # Outside of inference mode the first operations make ordinary tensors, which a loss can take.
            logits = self._logits(index, x)
            log_p = F.log_softmax(logits, dim=1) + math.log(weight)
            log_probs = log_p if log_probs is None else torch.logaddexp(log_probs, log_p)
            mean_logits = logits * weight if mean_logits is None else mean_logits.add_(logits, alpha=weight)
        assert log_probs is not None  # the weights sum to 1
        assert mean_logits is not None
        return log_probs, mean_logits

    @torch.no_grad()
    def teacher_logits(self, x: Tensor) -> Tensor:
        """Return the logits of every teacher [N, B, C], at least float32, for images as in `predict`."""
        self._stay_frozen()
        return torch.stack([self._logits(index, x) for index in range(len(self.teachers))])

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever the mode."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Stay without gradient, whatever is asked for."""
        return super().requires_grad_(False)

    def apply(self, fn: Callable[[nn.Module], Any]) -> Self:
        """Call `fn` on the ensemble alone: what initialises or switches the modules around does not reach teachers."""
        fn(self)
        return self

    def _logits(self, index: int, x: Tensor) -> Tensor:
        """Logits [B, C] of one teacher, at least float32; an inference tensor, or what was made of one."""
        x = self._input_for(index, x)
        with (
            torch.inference_mode(),
            torch.autocast(x.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None),
        ):
            logits = self.teachers[index](x)
        _check_logits(logits, self.names[index], (len(x), self.num_classes))
        return at_least_float32(logits)

    def _input_for(self, index: int, x: Tensor) -> Tensor:
        """The images as one teacher wants them: its mean and std, size, dtype and memory format."""
        teacher, size = self.teachers[index], self.img_sizes[index]
        mine, its = (channel_stats(cfg, self.in_chans) for cfg in (self.pretrained_cfg, _cfg_of(teacher)))
        x = renormalize(at_least_float32(x), *mine, *its)
        if size is not None and tuple(x.shape[-2:]) != size:
            x = F.interpolate(x, size, mode='bicubic', antialias=True)
        x = x.to(next((p.dtype for p in teacher.parameters() if p.is_floating_point()), x.dtype))
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last[index] else x

    def _stay_frozen(self) -> None:
        # `train()` of the ensemble cannot see a loop over the modules around it that switches each one by itself.
        if not torch.compiler.is_compiling() and any(module.training for module in self.modules()):
            self.train()

    def _common(self, attribute: str, values: Sequence[int]) -> int:
        if len(set(values)) > 1:
            each = ', '.join(f'{name} {value}' for name, value in zip(self.names, values, strict=True))
            raise UserError(f'All teachers must have the same {attribute}, got {each}: leave out those that differ.')
        return values[0]

    def _refuse_twins(self) -> None:
        for (name_a, a), (name_b, b) in combinations(zip(self.names, self.teachers, strict=True), 2):
            if a is b or _same_weights(a, b):
                raise UserError(
                    f'Teachers must differ, but {name_a} and {name_b} have the same weights: leave one out '
                    '(pin the tags, as in resnet50.a1_in1k; --teacher-weights counts one more than another).'
                )

    def _first_cfg(self) -> dict[str, Any]:
        first = _source(self.teachers[0])
        cfg = filter_pretrained_cfg({**PretrainedCfg().to_dict(), **_cfg_of(first)}, remove_source=True)
        height, width = self.img_sizes[0] or get_model_input_config(first)['input_size'][-2:]
        cfg.update(
            architecture='mealv2_ensemble',
            num_classes=self.num_classes,
            input_size=(self.in_chans, height, width),
            fixed_input_size=False,  # each teacher's input is resized for it
            custom_load=False,
            first_conv=None,
            classifier=None,
        )
        cfg.pop('tag', None)
        return cfg


def parse_teachers(texts: Sequence[str]) -> list[str]:
    """Split texts like `A,B` at the commas into teachers.

    What starts with `hf-hub:`, `local-dir:` or `python:` and what holds a `=` (`NAME=PATH`) is one teacher, whatever
    commas its path has.
    """
    teachers = []
    for text in texts:
        whole = text.startswith((*_SOURCES, _PYTHON)) or '=' in text
        teachers += [text] if whole else [part.strip() for part in text.split(',') if part.strip()]
    return teachers


def read_classes(texts: Sequence[str]) -> dict[str, list[int]]:
    """Read the files of texts `TEACHER=FILE`, split at the last `=`, as `create_ensemble` takes `classes`.

    A file has one class index a line, but for blank lines and `#` comments.

    Raises:
        UserError: If a text is none of this kind, a teacher is there twice, or a file cannot be read or holds
            anything else.
    """
    classes: dict[str, list[int]] = {}
    for text in texts:
        name, _, path = text.rpartition('=')
        if not name or name in classes:
            fault = 'the classes of this teacher are given twice' if name else 'must be TEACHER=FILE'
            raise UserError(f'--teacher-classes {text}: {fault}.')
        try:
            lines = [line.partition('#')[0].strip() for line in Path(path).read_text(encoding='utf-8').splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'--teacher-classes {text}: cannot read {path}: {error}') from error
        for number, line in enumerate(lines, 1):
            if line and not line.isdecimal():
                raise UserError(f'--teacher-classes {text}: line {number} must be one class index, got {line!r}.')
        classes[name] = [int(line) for line in lines if line]
    return classes


def create_ensemble(
    teachers: Sequence[str | nn.Module],
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    weights: Sequence[float] | None = None,
    img_sizes: Sequence[int] | None = None,
    classes: Mapping[str, Sequence[int]] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    pretrained: bool = True,
    cache_dir: str | Path | None = None,
) -> EnsembleTeacher:
    """Make an ensemble from modules and from texts that name teachers (see the head of this file).

    No teacher's head is ever replaced: one whose class count is not `num_classes` is refused, unless `classes` says
    which of its classes to take.

    Args:
        teachers: Modules, used as they are, and texts.
        num_classes: The class count that all must have; not checked if None.
        in_chans: Input channels; a named model whose weights have others gets timm's adapted first convolution.
        weights: One per teacher; equal if None.
        img_sizes: The image size that the teachers are to see, one for all or one per teacher. Named models of
            fixed size are built for it.
        classes: Teacher, as its text or name has it -> its class of each class of the ensemble; its probabilities are
            renormalized over these.
        dtype: Dtype of the teachers' autocast; None for none.
        device: Where the teachers are put.
        pretrained: False gives named models random weights and `num_classes` classes, for tests; checkpoints
            (`NAME=PATH`) are loaded all the same.
        cache_dir: Where downloads are kept; timm's place if None.

    Raises:
        UserError: If a teacher is unknown, cannot be loaded, or does not fit the others.
    """
    sizes: list[int | None] = [None] * len(teachers) if img_sizes is None else list(img_sizes)
    if len(sizes) == 1:
        sizes *= len(teachers)
    if len(sizes) != len(teachers):
        raise UserError(f'img_sizes must be one for all or one per teacher ({len(teachers)}), got {len(sizes)}.')
    names = [_default_name(teacher) if isinstance(teacher, nn.Module) else teacher for teacher in teachers]
    classes = classes or {}
    for name in classes:
        if name not in names:
            raise UserError(f'Classes are given for {name}, which is no teacher: name one of {", ".join(names)}.')
    modules = []
    for teacher, name, size in zip(teachers, names, sizes, strict=True):
        count = None if name in classes else num_classes
        if isinstance(teacher, nn.Module):
            module = teacher
        elif teacher.startswith(_PYTHON):
            module = _create_by_function(teacher)
        elif _is_checkpoint(teacher):
            arch, path = teacher.split('=', 1)
            module = create_from_checkpoint(arch, path, num_classes=count)
        else:
            module = _create_named(teacher, count, in_chans, size, pretrained, cache_dir)
        modules.append(_subset(module, name, classes[name], num_classes) if name in classes else module)
    for module, name in zip(modules, names, strict=True):
        _check_count(name, 'classes', _num_classes(module, name), num_classes)
        _check_count(name, 'input channels', _in_chans(module), in_chans)
    ensemble = EnsembleTeacher(modules, weights, names=names, img_sizes=sizes, dtype=dtype)
    return ensemble.to(device) if device is not None else ensemble


def create_from_checkpoint(arch: str, path: str | Path, *, num_classes: int | None = None) -> nn.Module:
    """Rebuild a model from a checkpoint file and load its weights strictly; EMA weights where the file has them.

    A checkpoint of `mealv2-train` or timm's train.py says how its model was built (`args`: model_kwargs, in_chans,
    global pooling, image size) and what its pixels were (`data_config`, or the `args`), which goes into the model's
    `pretrained_cfg`. For a bare state dict (.pth, .safetensors), that of `arch` and its tag is taken. The class count
    is the width of the classifier in the file.

    Args:
        arch: A timm architecture, its tag optional.
        path: The file; it is read with `weights_only=True`.
        num_classes: The class count where the file does not show it.

    Returns:
        The model on the CPU, in timm's initial mode (training).

    Raises:
        UserError: If the architecture is unknown, or the file is not there, not readable, or does not fit.
    """
    label = f'{arch}={path}'
    arch = _known(arch)
    if _is_ensemble(arch):  # the file's arguments could name code as a teacher
        raise UserError(f'{label}: an ensemble has no checkpoint of its own; give each of its teachers as NAME=PATH.')
    state, saved = _read_checkpoint(label, Path(path))
    args = _saved_args(saved, arch)
    data_config = {
        key: _tupled(value) for key, value in (saved.get('data_config') or {}).items() if key in _DATA_CONFIG
    }
    model_kwargs = {'global_pool': args.get('gp'), **(args.get('model_kwargs') or {})}
    model_kwargs['num_classes'] = _classifier_width(arch, state) or args.get('num_classes') or num_classes
    size_args = {key: args.get(key) for key in ('input_size', 'img_size', 'in_chans')}
    if not args and 'input_size' in data_config:
        size_args['input_size'] = data_config['input_size']

    def build(**changes: Any) -> nn.Module:
        try:
            model: nn.Module = create_model(**resolve_model_input_args(arch, {**size_args, **changes}, **model_kwargs))
        except Exception as error:  # the arguments come from the user's file, and any of them can be the cause
            raise UserError(f'{label} cannot be rebuilt from what the file says: {_brief(error)}') from error
        return model

    model = build()
    in_chans = _first_conv_chans(model, state)
    if in_chans != _in_chans(model):
        args = {**args, 'in_chans': in_chans, 'input_size': None}
        model = build(in_chans=in_chans, input_size=None)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f'{label} does not fit the architecture: {_misfit(model.state_dict(), state)}.') from error
    cfg = filter_pretrained_cfg(model.pretrained_cfg, remove_source=True)
    cfg.update(data_config or resolve_input_data_config(model, args))
    cfg['num_classes'] = model.num_classes
    model.pretrained_cfg = model.default_cfg = cfg
    return model


def _create_named(
    spec: str,
    num_classes: int | None,
    in_chans: int | None,
    img_size: int | None,
    pretrained: bool,
    cache_dir: str | Path | None,
) -> nn.Module:
    """A timm model by name or source, with its own class count (`num_classes` where it has no weights)."""
    name = spec if spec.startswith(_SOURCES) else _known(spec)
    try:
        if _is_ensemble(name, cache_dir):  # timm would resolve no config.json without the key 'pretrained_cfg'
            kwargs = {'model_name': name, 'num_classes': num_classes, 'in_chans': in_chans, 'cache_dir': cache_dir}
        else:
            kwargs = resolve_model_input_args(name, {'img_size': img_size}, cache_dir=cache_dir)
            cfg = kwargs['pretrained_cfg']
            if pretrained:
                if not any(cfg.get(source) for source in ('url', 'file', 'hf_hub_id', 'state_dict')):
                    raise UserError(f'{spec} has no pretrained weights: {_tags_with_weights(name)}give {name}=PATH.')
                if kwargs.get('num_classes', cfg['num_classes']) != cfg['num_classes']:  # timm would make a new head
                    raise UserError(
                        f"{spec} contradicts itself: its config's model_args say {kwargs['num_classes']} classes, "
                        f'its pretrained_cfg {cfg["num_classes"]}; export it again.'
                    )
                _check_count(spec, 'classes', cfg['num_classes'], num_classes)
            elif num_classes is not None:
                kwargs['num_classes'] = num_classes
            own_chans = kwargs.get('in_chans', cfg['input_size'][0])
            if in_chans not in (None, own_chans):
                kwargs['in_chans'] = in_chans
                _logger.info(f'{spec}: the first convolution is adapted from {own_chans} to {in_chans} input channels.')
        model: nn.Module = create_model(pretrained=pretrained, **kwargs)
    except UserError:
        raise
    except Exception as error:  # names, folders, config files and the network are all the user's, whatever they raise
        raise UserError(
            f'{spec} cannot be loaded: {_brief(error)} (a download needs the network; a file of yours is NAME=PATH)'
        ) from error
    return model


def _is_ensemble(name: str, cache_dir: str | Path | None = None) -> bool:
    """Whether a timm name, a folder or a repository is one of the ensembles registered here."""
    source, place = parse_model_name(name)
    if source == 'local-dir':
        config = Path(place, 'config.json')
        arch = json.loads(config.read_text(encoding='utf-8'))['architecture'] if config.is_file() else ''
    elif source == 'hf-hub':
        arch = load_model_config_from_hf(place, cache_dir)[1]
    else:
        arch = get_arch_name(name)
    return is_model_in_modules(arch, __name__.rpartition('.')[-1])


def _create_by_function(spec: str) -> nn.Module:
    """What the function of a `python:package.module:function` returns."""
    module_name, _, function = spec.removeprefix(_PYTHON).partition(':')
    if not function.isidentifier() or not all(part.isidentifier() for part in module_name.split('.')):
        raise UserError(f'{spec} must be python:package.module:function.')
    if os.getcwd() not in sys.path:  # an installed program has its own folder there, `python -m` the working directory
        sys.path.insert(0, os.getcwd())
    try:
        model = getattr(importlib.import_module(module_name), function)()
    except UserError:
        raise
    except Exception as error:  # the user's code, which may raise anything
        raise UserError(f'{spec} cannot be made: {type(error).__name__}: {_brief(error)}') from error
    if not isinstance(model, nn.Module):
        raise UserError(f'{spec} must return an nn.Module, got {type(model).__name__}.')
    return model


def _subset(teacher: nn.Module, name: str, classes: Sequence[int], num_classes: int | None) -> nn.Module:
    """The teacher, or each member of an ensemble, with these of its classes alone."""
    if num_classes is not None and len(classes) != num_classes:
        raise UserError(f'Teacher {name} must have one class for each of the {num_classes}, got {len(classes)}.')
    inner = unwrap_model(teacher)
    try:
        if not isinstance(inner, EnsembleTeacher):
            return ClassSubset(teacher, classes)
        members = [ClassSubset(member, classes) for member in inner.teachers]
    except UserError as error:
        raise UserError(f'Teacher {name}: {error}') from error
    return EnsembleTeacher(members, inner.weights, names=inner.names, img_sizes=inner.img_sizes)


def _known(name: str) -> str:
    """Return timm's present name for a model name, deprecated or not."""
    name = get_deprecated_models().get(name) or name
    if any(char in name for char in '/\\:') or not is_model(name):
        close = difflib.get_close_matches(name, list_models(), 3) or difflib.get_close_matches(
            get_arch_name(name), list_models(), 3, 0.4
        )
        raise UserError(
            f'{name!r} is no timm model (nearest: {", ".join(close) or "none"}); '
            'a teacher is NAME.TAG, NAME=PATH, hf-hub:USER/REPO, local-dir:FOLDER or python:MODULE:FUNCTION.'
        )
    tags = get_arch_pretrained_cfgs(name)
    if name not in tags and name != get_arch_name(name):
        close = difflib.get_close_matches(name, tags, 3, 0) or ['none']
        raise UserError(f'{name!r} is no tag of {get_arch_name(name)} (nearest: {", ".join(close)}).')
    return name


def _tags_with_weights(name: str) -> str:
    names = [tagged for tagged, cfg in get_arch_pretrained_cfgs(name).items() if cfg.has_weights]
    return f'name one that has ({", ".join(names)}), or ' if names else ''


def _is_checkpoint(text: str) -> bool:
    return '=' in text and not text.startswith((*_SOURCES, _PYTHON))


def _check_count(name: str, what: str, received: int, expected: int | None) -> None:
    if expected is not None and received != expected:
        raise UserError(
            f'Teacher {name} has {received} {what}, but {expected} are asked for: '
            f'take a teacher that was trained with {expected} {what}.'
        )


def _read_checkpoint(label: str, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a file, as timm chooses it, and the training checkpoint around it ({} if there is none)."""
    if not path.is_file():
        raise UserError(f'{label}: there is no such file.')
    try:
        state = load_state_dict(os.fspath(path), weights_only=True)
        # Files in torch's old format are none of ours, and cannot be read without reading their tensors.
        saved = load_checkpoint_metadata(os.fspath(path)) if zipfile.is_zipfile(path) else {}
    except Exception as error:  # safetensors, zip, pickle and torch each raise errors of their own on a bad file
        raise UserError(f'{label} is not a readable checkpoint: {_brief(error)}') from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f'{label} holds no state dict: expected tensors by name, as torch.save(model.state_dict()).')
    return state, saved


def _saved_args(saved: dict[str, Any], arch: str) -> dict[str, Any]:
    """The training program's arguments, where they are for this architecture."""
    args = saved.get('args') or {}
    args = vars(args) if isinstance(args, argparse.Namespace) else dict(args)
    model = str(args.get('model'))
    return args if model.startswith(_SOURCES) or get_arch_name(model) == get_arch_name(arch) else {}


def _classifier_width(arch: str, state: dict[str, Tensor]) -> int | None:
    cfg = get_pretrained_cfg(arch) or PretrainedCfg()
    classifier = cfg.classifier if isinstance(cfg.classifier, str) else next(iter(cfg.classifier or ()), None)
    weight = state.get(f'{classifier}.weight')
    return None if weight is None else weight.shape[0]


def _first_conv_chans(model: nn.Module, state: dict[str, Tensor]) -> int:
    """Input channels of the weights in `state`, from the first convolution's ratio to that of `model`."""
    first = get_model_input_config(model)['first_conv']
    first = first if isinstance(first, str) else next(iter(first or ()), None)
    weight, own = (tensors.get(f'{first}.weight') for tensors in (state, model.state_dict()))
    in_chans = _in_chans(model)
    if weight is None or own is None or weight.ndim < 2:
        return in_chans
    return max(1, weight.shape[1] * in_chans // own.shape[1])


def _misfit(expected: dict[str, Tensor], received: dict[str, Tensor]) -> str:
    """What differs between two state dicts, in one line: at most three of each kind."""
    missing = [key for key in expected if key not in received]
    unknown = [key for key in received if key not in expected]
    shapes = [
        f'{key} is {list(received[key].shape)} for {list(tensor.shape)}'
        for key, tensor in expected.items()
        if key in received and received[key].shape != tensor.shape
    ]
    kinds = (('missing', missing), ('unknown', unknown), ('of other shape', shapes))
    return '; '.join(
        f'{len(found)} {kind} ({", ".join(found[:3])}{", ..." if len(found) > 3 else ""})'
        for kind, found in kinds
        if found
    )


def _brief(error: Exception) -> str:
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f'{text[:300]}...'


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _flat(teacher: nn.Module, weight: float, name: str, size: Size) -> list[tuple[nn.Module, float, str, Size]]:
    """The members of a member: itself, unless it is an ensemble. Thus mean logits are those of all teachers."""
    inner = unwrap_model(teacher)
    if not isinstance(inner, EnsembleTeacher):
        return [(teacher, weight, name, size)]
    return [
        (member, weight * inner_weight, inner_name, inner_size or size)
        for member, inner_weight, inner_name, inner_size in zip(
            inner.teachers, inner.weights, inner.names, inner.img_sizes, strict=True
        )
    ]


def _normalised(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count
    weights = [float(weight) for weight in weights]
    if len(weights) != count:
        raise UserError(f'Teacher weights must be one per teacher ({count}), got {len(weights)}: {weights}.')
    total = sum(weights)
    if not all(weight >= 0 for weight in weights) or not 0 < total < math.inf:
        raise UserError(f'Teacher weights must be 0 or more, finite and not all 0, got {weights}.')
    return [weight / total for weight in weights]


def _source(teacher: nn.Module) -> nn.Module:
    """The model itself, which knows its pixels and weights, whatever is around it."""
    model: nn.Module = unwrap_model(teacher)
    return _source(model.model) if isinstance(model, ClassSubset) else model


def _check_logits(logits: Any, name: str, shape: tuple[int, int]) -> None:
    if not isinstance(logits, Tensor) or logits.shape != shape:
        got = f'a tensor of shape {list(logits.shape)}' if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f'Teacher {name} must answer with logits {list(shape)}, got {got}: '
            'its num_classes has to be the width of its logits.'
        )


def _default_name(teacher: nn.Module) -> str:
    cfg = _cfg_of(teacher)
    name = cfg.get('architecture') or type(_source(teacher)).__name__
    return f'{name}.{cfg["tag"]}' if cfg.get('tag') else name


def _cfg_of(teacher: nn.Module) -> dict[str, Any]:
    return getattr(_source(teacher), 'pretrained_cfg', None) or {}


def _num_classes(teacher: nn.Module, name: str) -> int:
    num_classes: int | None = getattr(unwrap_model(teacher), 'num_classes', None)
    if not num_classes:
        raise UserError(f'Teacher {name} has no num_classes: set it to the width of its logits.')
    return num_classes


def _in_chans(teacher: nn.Module) -> int:
    in_chans: int = get_model_input_config(_source(teacher))['input_size'][0]
    return in_chans


def _input_size(teacher: nn.Module, name: str, asked: Size) -> tuple[int, int] | None:
    """The one size (H, W) that the teacher is to see; None if it takes any and none is asked for."""
    model = _source(teacher)
    config = get_model_input_config(model)
    patch_embed: Any = getattr(model, 'patch_embed', None)
    fixed: tuple[int, int] | None = None
    if getattr(patch_embed, 'strict_img_size', False) and patch_embed.img_size is not None:
        fixed = tuple(patch_embed.img_size)
    elif config['fixed_input_size']:
        fixed = tuple(config['input_size'][-2:])
    size = (asked, asked) if isinstance(asked, int) else asked
    if fixed and size and size != fixed:
        raise UserError(f'Teacher {name} takes images of {fixed} only, got {size}: leave its image size out.')
    return size or fixed


def _to_channels_last(teacher: nn.Module) -> bool:
    """Lay the weights of 2d convolutions out channels_last; tells whether there are any."""
    convolutions = [module for module in teacher.modules() if isinstance(module, nn.Conv2d)]
    for convolution in convolutions:
        convolution.to(memory_format=torch.channels_last)
    return bool(convolutions)


def _same_weights(a: nn.Module, b: nn.Module) -> bool:
    a_state, b_state = _source(a).state_dict(), _source(b).state_dict()
    return (
        bool(a_state)
        and a_state.keys() == b_state.keys()
        and all(
            tensor.shape == b_state[key].shape and torch.equal(tensor, b_state[key].to(tensor.device, tensor.dtype))
            for key, tensor in a_state.items()
        )
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    """The pretrained config of an ensemble, which has no weights file of its own."""
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'crop_pct': 0.875,
        'interpolation': 'bilinear',
        'origin_url': 'https://github.com/szq0214/MEAL-V2',
        'paper_name': 'MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks',
        'paper_ids': 'arXiv:2009.08453',
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        'mealv2_ensemble': _cfg(),
        'mealv2_ensemble_gluon': _cfg(),
        'mealv2_ensemble_efficientnet_b4': _cfg(input_size=(3, 380, 380)),
    }
)


def _create(
    name: str,
    pretrained: bool,
    teachers: Sequence[str | nn.Module] | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> EnsembleTeacher:
    """Create a registered ensemble from what `timm.create_model` hands over; `kwargs` are `create_ensemble`'s.

    `dtype` is that of the weights, as for every timm model.
    """
    given = pretrained_cfg.to_dict() if isinstance(pretrained_cfg, PretrainedCfg) else pretrained_cfg
    given = {**given} if isinstance(given, dict) else {}
    # timm takes a config.json without the key 'pretrained_cfg' as one flat dict, the model's arguments included.
    model_args = dict(given.pop('model_args', None) or {})
    teachers = model_args.pop('teachers', ()) if teachers is None else teachers
    kwargs = {**model_args, **kwargs}
    folder = Path(given['file']) if given.get('source') == 'local-dir' else None
    overlay = dict(pretrained_cfg_overlay or {})
    if (given.get('file') and not folder) or any(overlay.get(key) for key in ('file', 'url', 'hf_hub_id')):
        raise UserError(f'{name} has no weights file of its own: give each teacher its file, as NAME=PATH.')
    if isinstance(teachers, str):
        teachers = parse_teachers([teachers])

    if name != 'mealv2_ensemble' or pretrained_cfg:
        given = given or resolve_pretrained_cfg(name, pretrained_cfg).to_dict()
    if given.get('source') in ('local-dir', 'hf-hub'):
        for teacher in teachers:
            if isinstance(teacher, str) and teacher.startswith(_PYTHON):
                raise UserError(f'{teacher} is refused in a config.json: code is run only where you name it yourself.')
    if kwargs.get('classes'):
        kwargs['classes'] = {_under(folder, teacher): indices for teacher, indices in kwargs['classes'].items()}
    ensemble = create_ensemble([_under(folder, teacher) for teacher in teachers], pretrained=pretrained, **kwargs)
    ensemble.pretrained_cfg.update(filter_pretrained_cfg({**given, **overlay}, remove_source=True))
    ensemble.pretrained_cfg.update(architecture=name, num_classes=ensemble.num_classes)
    ensemble.pretrained_cfg['input_size'] = (ensemble.in_chans, *ensemble.pretrained_cfg['input_size'][-2:])
    return ensemble.to(dtype=dtype) if dtype is not None else ensemble


def _under(folder: Path | None, teacher: str | nn.Module) -> str | nn.Module:
    """A teacher whose path, if relative, is taken from the folder of the config.json that names it."""
    if folder is None or isinstance(teacher, nn.Module):
        return teacher
    if teacher.startswith('local-dir:'):
        return f'local-dir:{folder / teacher.removeprefix("local-dir:")}'
    if _is_checkpoint(teacher):
        arch, path = teacher.split('=', 1)
        return f'{arch}={folder / path}'
    return teacher


@register_model
def mealv2_ensemble(pretrained: bool = False, **kwargs: Any) -> EnsembleTeacher:
    """An ensemble of the `teachers`, as `create_ensemble` takes them."""
    return _create('mealv2_ensemble', pretrained, **kwargs)


@register_model
def mealv2_ensemble_gluon(pretrained: bool = False, **kwargs: Any) -> EnsembleTeacher:
    """The teachers of most MEAL V2 students: SENet-154 and ResNet-152-s."""
    kwargs.setdefault('teachers', ('senet154.gluon_in1k', 'resnet152s.gluon_in1k'))
    return _create('mealv2_ensemble_gluon', pretrained, **kwargs)


@register_model
def mealv2_ensemble_efficientnet_b4(pretrained: bool = False, **kwargs: Any) -> EnsembleTeacher:
    """The teachers of the MEAL V2 ResNet-50 at 380x380: EfficientNet-B4, NoisyStudent and AutoAugment."""
    kwargs.setdefault('teachers', ('tf_efficientnet_b4.ns_jft_in1k', 'tf_efficientnet_b4.aa_in1k'))
    return _create('mealv2_ensemble_efficientnet_b4', pretrained, **kwargs)
