"""Frozen ensembles from modules and from texts that name teachers.

A teacher is an `nn.Module`, or a text that names one:

- `resnet152s.gluon_in1k`: a timm model, with the pretrained weights of its tag;
- `hf-hub:USER/REPO`, `local-dir:FOLDER`: an exported model, built as its `config.json` says (`model_args` included);
- `path/to/checkpoint.pth.tar`: a file that tells its architecture, as training checkpoints do; or a model.onnx;
- `path/to/folder`: an exported model, or a run folder: its best checkpoint, `path/to/folder:last` for another;
- `resnet18=path/to/weights.pth`: bare weights in a timm architecture;
- `python:package.module:function`: what the function returns, called without arguments.
"""

import difflib
import importlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from timm.models import (
    create_model,
    get_arch_name,
    get_arch_pretrained_cfgs,
    get_deprecated_models,
    get_pretrained_cfg,
    is_model,
    list_models,
    load_model_config_from_hf,
    resolve_model_input_args,
)
from timm.utils import unwrap_model
from torch import nn

from timm_mealv2.data.class_names import class_names_of, index_map
from timm_mealv2.errors import UserError
from timm_mealv2.models.checkpoint import TrainingCheckpoint, architecture_arguments, is_ensemble, making
from timm_mealv2.models.ensemble import ClassSubset, EnsembleTeacher, teacher_name
from timm_mealv2.models.onnx_model import OnnxModel

_logger = logging.getLogger(__name__)

_FILES = ('.tar', '.pth', '.pt', '.bin', '.safetensors', '.onnx')
_PREFIXES = {'hf-hub:': 'hf-hub', 'hf_hub:': 'hf-hub', 'local-dir:': 'local-dir', 'python:': 'python'}


@dataclass(frozen=True)
class TeacherSpec:
    """What a text that names a teacher says; or a teacher that is a module already.

    Attributes:
        kind: 'timm' (a timm name), 'checkpoint', 'onnx', 'hf-hub', 'local-dir', 'python' or 'module'.
        name: The timm name, USER/REPO, MODULE:FUNCTION or, of a module, its `teacher_name`; '' for a folder, and for a
            file that tells its architecture.
        path: The file or the folder; None for the other kinds.
        prefix: How the text begins where its kind has a prefix.
        module: The teacher, where it is a module.
    """

    kind: str
    name: str = ''
    path: str | None = None
    prefix: str = ''
    module: nn.Module | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what a text means; whether it leads anywhere is for `check` to say."""
        for prefix, kind in _PREFIXES.items():
            if text.startswith(prefix):
                rest = text.removeprefix(prefix)
                return cls(kind, '', rest, prefix) if kind == 'local-dir' else cls(kind, rest, None, prefix)
        name, is_checkpoint, path = text.partition('=')
        if is_checkpoint:
            return cls('checkpoint', name, path)
        if is_model(text) or not (os.path.sep in text or Path(text).exists() or text.endswith(_FILES)):
            return cls('timm', text)
        return cls._of_path(text)

    @classmethod
    def _of_path(cls, text: str) -> Self:
        """What a path leads to, which a folder tells by its content."""
        folder, file = text, ''
        if ':' in text and not Path(text).exists():
            folder, _, file = text.rpartition(':')
        if not Path(folder).is_dir():
            return cls('onnx' if text.endswith('.onnx') else 'checkpoint', '', text)
        if Path(folder, 'config.json').is_file():
            return cls('local-dir', '', folder, 'local-dir:')
        names = [file, f'{file}.pth.tar'] if file else ['model_best.pth.tar', 'last.pth.tar']
        paths = [path for path in (Path(folder, name) for name in names) if path.is_file()]
        if not paths:
            raise UserError(f'{text} is neither an export (config.json) nor a run folder with {" or ".join(names)}.')
        return cls('checkpoint', '', str(paths[0]))

    @classmethod
    def parse_all(cls, teachers: Iterable['str | TeacherSpec | nn.Module']) -> list['TeacherSpec']:
        """Parse texts, each of which may name several timm models: `A,B`. Commas in other texts belong to them.

        Modules, and what is parsed already, may be among them.
        """
        specs: list[TeacherSpec] = []
        for teacher in teachers:
            if isinstance(teacher, TeacherSpec):
                specs.append(teacher)
            elif isinstance(teacher, nn.Module):
                specs.append(cls('module', teacher_name(teacher), module=teacher))
            else:
                text = teacher
                whole = '=' in text or os.path.sep in text or text.startswith(tuple(_PREFIXES)) or Path(text).exists()
                specs += [cls.parse(part.strip()) for part in ([text] if whole else text.split(',')) if part.strip()]
        return specs

    def __str__(self) -> str:
        if self.kind == 'checkpoint' and self.name:
            return f'{self.name}={self.path}'
        return f'{self.prefix}{self.name if self.path is None else self.path}'

    def under(self, folder: str | os.PathLike[str]) -> Self:
        """Return the same teacher with its path, if it is relative, taken from a folder."""
        return self if self.path is None else replace(self, path=os.path.join(folder, self.path))

    def check(self) -> None:
        """Raise a `UserError` where the teacher cannot be built, as far as can be told without a download."""
        if self.name and self.kind in ('timm', 'checkpoint'):
            name = _known(self.name)
            if self.kind == 'timm' and not is_ensemble(name) and not get_pretrained_cfg(name).has_weights:
                tagged = [tagged for tagged, cfg in get_arch_pretrained_cfgs(name).items() if cfg.has_weights]
                remedy = f'name one that has ({", ".join(tagged)}), or ' if tagged else ''
                raise UserError(f'{self} has no pretrained weights: {remedy}give {name}=PATH.')
        if self.kind in ('checkpoint', 'onnx') and not Path(self.path or '').is_file():
            raise UserError(f'{self}: there is no such file{"" if self.name else ", and no model of timm"}.')
        if self.kind == 'local-dir' and not Path(self.path or '', 'config.json').is_file():
            raise UserError(f'{self}: there is no config.json in it (a file of yours is NAME=PATH).')
        if self.kind == 'python' and not all(self.name.partition(':')[::2]):
            raise UserError(f'{self} must be python:package.module:function.')

    def build(
        self,
        *,
        num_classes: int | None = None,
        in_chans: int | None = None,
        img_size: int | None = None,
        pretrained: bool = True,
        cache_dir: str | Path | None = None,
    ) -> nn.Module:
        """Build the teacher on the CPU; the arguments are those of `create_ensemble`, for this teacher alone."""
        if self.module is not None:
            return self.module
        if self.kind == 'checkpoint':
            arch = _known(self.name) if self.name else None
            return TrainingCheckpoint.read(self.path or '', arch).build(num_classes)
        if self.kind == 'onnx':
            return OnnxModel(self.path or '')
        with making(str(self), remedy=' (a download needs the network; a file of yours is NAME=PATH)'):
            if self.kind == 'python':
                module_name, _, function = self.name.partition(':')
                if os.getcwd() not in sys.path:  # an installed program has its own folder there in its place
                    sys.path.insert(0, os.getcwd())
                model: nn.Module = getattr(importlib.import_module(module_name), function)()
                return model
            architecture = name = _known(self.name) if self.kind == 'timm' else str(self)
            if self.kind == 'local-dir':  # timm's reader takes no config.json of an ensemble without 'pretrained_cfg'
                config = Path(self.path or '', 'config.json')
                architecture = str(json.loads(config.read_text(encoding='utf-8'))['architecture'])
            elif self.kind == 'hf-hub':
                architecture = str(load_model_config_from_hf(self.name, cache_dir)[1])
            if is_ensemble(architecture):  # its arguments are those of `create_ensemble`
                sizes = {'num_classes': None if pretrained else num_classes, 'in_chans': in_chans}
                return create_model(name, pretrained, cache_dir=cache_dir, **sizes)
            resolved = resolve_model_input_args(name, {'img_size': img_size}, cache_dir=cache_dir)
            cfg, kwargs = resolved['pretrained_cfg'], architecture_arguments(resolved)
            if pretrained:
                kwargs['num_classes'] = cfg['num_classes']  # another count would be timm's new head, of random weights
                if not cfg.get('label_names'):  # classes with names are counted when they have been mapped
                    _check_count(str(self), 'classes', cfg['num_classes'], num_classes)
            elif num_classes is not None:
                kwargs['num_classes'] = num_classes
            own_chans = kwargs.get('in_chans', cfg['input_size'][0])
            if in_chans not in (None, own_chans):
                kwargs['in_chans'] = in_chans
                _logger.info(f'{self}: the first convolution is adapted from {own_chans} to {in_chans} input channels.')
            return create_model(resolved['model_name'], pretrained, cfg, cache_dir=cache_dir, **kwargs)

    def read_checkpoint(self) -> TrainingCheckpoint:
        """Return the model's weights and metadata in the form of a checkpoint."""
        if self.kind == 'checkpoint':
            return TrainingCheckpoint.read(self.path or '', self.name or None)
        model: Any = self.build()
        contents = {'state_dict': model.state_dict(), 'class_names': class_names_of(model)}
        return TrainingCheckpoint(Path(str(self)), contents)


def read_classes(texts: Sequence[str]) -> dict[str, list[int]]:
    """Read the files of texts `TEACHER=FILE`, split at the last `=`, as `create_ensemble` takes `classes`.

    A file has one class index a line, but for blank lines and `#` comments.
    """
    classes: dict[str, list[int]] = {}
    for text in texts:
        name, _, path = text.rpartition('=')
        try:
            lines = [line.partition('#')[0].strip() for line in Path(path).read_text(encoding='utf-8').splitlines()]
            classes[name] = [int(line) for line in lines if line]
        except (OSError, ValueError) as error:
            fault = 'must be TEACHER=FILE, and the file a class index a line'
            raise UserError(f'--teacher-classes {text}: {fault}: {error}') from error
    return classes


def create_ensemble(
    teachers: str | TeacherSpec | nn.Module | Sequence[str | TeacherSpec | nn.Module],
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    weights: Sequence[float] | None = None,
    img_sizes: Sequence[int | None] | None = None,
    classes: Mapping[str, Sequence[int]] | None = None,
    class_names: Sequence[str] | None = None,
    autocast_dtype: torch.dtype | None = None,
    pretrained: bool = True,
    cache_dir: str | Path | None = None,
) -> EnsembleTeacher:
    """Make an ensemble from modules and from texts that name teachers (see the head of this file).

    No teacher's head is ever replaced: a teacher that knows its classes by name is mapped to those of the ensemble, by
    itself; otherwise one whose class count is not `num_classes` is refused, unless `classes` says which to take.

    Args:
        teachers: One or several modules, texts (`A,B` names two timm models), or texts parsed and checked before.
        num_classes: The class count that all must have; not checked if None.
        in_chans: Input channels; a named model whose weights have others gets timm's adapted first convolution.
        weights: One per teacher; equal if None.
        img_sizes: The image size that the teachers are to see, one for all or one per teacher. Named models of
            fixed size are built for it.
        classes: Teacher, as its text or name has it -> its class of each class of the ensemble; its probabilities are
            renormalized over these.
        class_names: The classes of the ensemble by name; None takes those of the teacher that knows the fewest.
        autocast_dtype: Dtype of the teachers' autocast; None for none.
        pretrained: False gives named models random weights and `num_classes` classes, for tests; checkpoints
            (`NAME=PATH`) are loaded all the same.
        cache_dir: Where downloads are kept; timm's place if None.

    Raises:
        UserError: If a teacher is unknown, cannot be loaded, or does not fit the others.
    """
    members: list[TeacherSpec] = []
    for teacher in [teachers] if isinstance(teachers, str | TeacherSpec | nn.Module) else teachers:
        specs = TeacherSpec.parse_all([teacher])
        if pretrained and isinstance(teacher, str):
            for spec in specs:  # all are checked before the first is built or downloaded
                spec.check()
        members += specs
    sizes: list[int | None] = [None] if img_sizes is None else list(img_sizes)
    if len(sizes) not in (1, len(members)):
        raise UserError(f'Image sizes must be one for all teachers or one for each ({len(members)}), got {sizes}.')
    sizes *= len(members) // len(sizes)
    names = [str(spec) for spec in members]
    classes = classes or {}
    if unknown := [name for name in classes if name not in names]:
        raise UserError(f'Classes are given for {unknown[0]}, which is no teacher: name one of {", ".join(names)}.')
    modules = []
    for spec, name, size in zip(members, names, sizes, strict=True):
        count = None if name in classes else num_classes
        module = spec.build(
            num_classes=count, in_chans=in_chans, img_size=size, pretrained=pretrained, cache_dir=cache_dir
        )
        modules.append(_subset(module, name, classes[name], num_classes) if name in classes else module)
    class_names = class_names or min(filter(None, map(class_names_of, modules)), key=len, default=None)
    modules = [
        module if name in classes else for_classes(module, class_names, name)
        for module, name in zip(modules, names, strict=True)
    ]
    ensemble = EnsembleTeacher(modules, weights, names=names, img_sizes=sizes, autocast_dtype=autocast_dtype)
    if class_names:
        ensemble.pretrained_cfg['label_names'] = list(class_names)
    _check_count(ensemble.names[0], 'classes', ensemble.num_classes, num_classes)
    _check_count(ensemble.names[0], 'input channels', ensemble.in_chans, in_chans)
    return ensemble


def for_classes(model: nn.Module, class_names: Sequence[str] | None, name: str) -> nn.Module:
    """Return a model with the outputs that `class_names` asks for, mapped by name; the model itself where it has them.

    A side without names is taken as it is, with one line; `name` is what the line calls the model.

    Raises:
        UserError: If the model has other classes.
    """
    classes = index_map(class_names_of(model), class_names, name)
    return model if classes is None else _subset(model, name, classes)


def _subset(teacher: nn.Module, name: str, classes: Sequence[int], count: int | None = None) -> nn.Module:
    """The teacher, or each member of an ensemble, with these of its classes alone."""
    inner = unwrap_model(teacher)
    count = count or len(classes)
    if not len(classes) == len({*classes} & {*range(inner.num_classes)}) == count:
        expected = f'{count} different classes from 0 to {inner.num_classes - 1}'
        got = f'{len(classes)}: {str(list(classes))[:60]}'
        raise UserError(f'--teacher-classes of {name}: expected {expected}, got {got}.')
    if not isinstance(inner, EnsembleTeacher):
        return ClassSubset(teacher, classes)
    members = [ClassSubset(member, classes) for member in inner.teachers]
    subset = EnsembleTeacher(members, inner.weights, names=inner.names, img_sizes=inner.img_sizes)
    subset.autocast_dtypes = inner.autocast_dtypes
    changed = {key: subset.pretrained_cfg[key] for key in ('num_classes', 'label_names')}
    subset.pretrained_cfg = inner.pretrained_cfg | changed
    return subset


def _known(name: str) -> str:
    """Return timm's present name for a model name, deprecated or not."""
    name = get_deprecated_models().get(name) or name
    if any(char in name for char in '/\\:') or not is_model(name):
        close = difflib.get_close_matches(get_arch_name(name), list_models(), 3, 0.4)
        raise UserError(
            f'{name!r} is no timm model (nearest: {", ".join(close) or "none"}); '
            'a model is NAME.TAG, a checkpoint or run folder, NAME=PATH, hf-hub:USER/REPO, local-dir:FOLDER or '
            'python:MODULE:FUNCTION.'
        )
    tags = get_arch_pretrained_cfgs(name)
    if name not in tags and name != get_arch_name(name):
        close = difflib.get_close_matches(name, tags, 3, 0) or ['none']
        raise UserError(f'{name!r} is no tag of {get_arch_name(name)} (nearest: {", ".join(close)}).')
    return name


def _check_count(name: str, what: str, received: int, expected: int | None) -> None:
    if expected is not None and received != expected:
        remedy = f'take a teacher that was trained with {expected} {what}'
        if what == 'classes':
            model = name if is_model(name) or name.startswith(tuple(_PREFIXES)) else 'NAME'
            remedy += f' (mealv2-train --recipe finetune --model {model} --data-dir DIR makes one)'
        raise UserError(f'Teacher {name} has {received} {what}, but {expected} are asked for: {remedy}.')
