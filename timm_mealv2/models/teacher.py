"""One teacher of an ensemble: how it describes itself, which of its classes are used, how it is copied and frozen."""

import copy
import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import get_model_input_config
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_mealv2.errors import UserError

Size = int | tuple[int, int] | None


class ClassSubset(nn.Module):
    """A model's predictions for some of its classes: the softmax of these logits is its probability, renormalized.

    Args:
        model: A model [B, chans, H, W] -> logits [B, C], with an attribute `num_classes`.
        classes: The model's class of each new one, from 0 to C - 1.

    Raises:
        UserError: If there is no class, one is there twice, or one is none of the model's.
    """

    def __init__(self, model: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        self._name = teacher_name(model)
        self._width = class_count(model, self._name)
        try:
            indices = [operator.index(index) for index in classes]
        except TypeError as error:
            raise UserError(f'Classes of a teacher must be whole numbers, got {classes!r}.') from error
        if not indices or len(set(indices)) < len(indices):
            raise UserError(f'Classes of a teacher must be at least one and differ, got {indices}.')
        if wrong := [index for index in indices if not 0 <= index < self._width]:
            raise UserError(f'Classes of a teacher must be from 0 to {self._width - 1}, got {wrong[0]}.')
        self.model = model
        self.num_classes = len(indices)
        self.pretrained_cfg = cfg_of(model)
        self.register_buffer('indices', torch.tensor(indices), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the classes taken, [B, num_classes]."""
        logits: Tensor = self.model(x)
        check_logits(logits, self._name, x, self._width)
        return logits.index_select(1, self.get_buffer('indices'))


def source_model(teacher: nn.Module) -> nn.Module:
    """The model itself, which knows its pixels and weights, whatever is around it."""
    model: nn.Module = unwrap_model(teacher)
    return source_model(model.model) if isinstance(model, ClassSubset) else model


def check_logits(logits: Any, name: str, x: Tensor, width: int) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != x.shape[0] or logits.shape[1] != width:
        got = f'a tensor of shape {list(logits.shape)}' if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f'Teacher {name} must answer with logits {[x.shape[0], width]}, got {got}: '
            'its num_classes has to be the width of its logits.'
        )


def teacher_name(teacher: nn.Module) -> str:
    """The readable name of a teacher that has none given: its architecture, and its tag if it has one."""
    cfg = cfg_of(teacher)
    name = cfg.get('architecture') or type(source_model(teacher)).__name__
    return f'{name}.{cfg["tag"]}' if cfg.get('tag') else name


def cfg_of(teacher: nn.Module) -> dict[str, Any]:
    return getattr(source_model(teacher), 'pretrained_cfg', None) or {}


def class_count(teacher: nn.Module, name: str) -> int:
    num_classes: int | None = getattr(unwrap_model(teacher), 'num_classes', None)
    if not num_classes:
        raise UserError(f'Teacher {name} has no num_classes: set it to the width of its logits.')
    return num_classes


def seen_size(teacher: nn.Module, name: str, asked: Size) -> tuple[int, int] | None:
    """The one size (H, W) that the teacher is to see; None if it takes any and none is asked for."""
    model = source_model(teacher)
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


def copy_sharing_weights(module: nn.Module) -> nn.Module:
    """Return a copy of a module with buffers of its own and parameters that share the memory of the module's."""
    shared = {id(p): nn.Parameter(p.detach(), False) for p in module.parameters() if type(p) is nn.Parameter}
    return copy.deepcopy(module, shared)


def freeze(module: nn.Module) -> None:
    """Put a module into eval mode for good, without gradient."""
    module.eval().requires_grad_(False)
    for inner in module.modules():
        inner.__dict__['train'] = functools.partial(_stay_in_eval_mode, inner)


def _stay_in_eval_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def is_channels_last(module: nn.Module) -> bool:
    """Whether a 2d convolution's weights are laid out channels_last, and hence the images are to be."""
    weights = (inner.weight for inner in module.modules() if isinstance(inner, nn.Conv2d))
    return any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)
