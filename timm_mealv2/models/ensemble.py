"""An ensemble of teachers as one frozen model."""

import math
import operator
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Self

import torch
from timm.models import PretrainedCfg, filter_pretrained_cfg, get_model_input_config
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mealv2.data.normalize import channel_stats, renormalize
from timm_mealv2.errors import UserError
from timm_mealv2.losses import at_least_float32

Size = int | tuple[int, int] | None


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
        self._name = teacher_name(model)
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
    student's mixed precision; with `autocast_dtype`, under an autocast of their own.

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
        autocast_dtype: Dtype of the teachers' autocast; None for none.

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
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        count = len(teachers)
        if not count:
            raise UserError(
                'An ensemble needs at least one teacher, got none: name a timm model, folder or checkpoint.'
            )
        names = [teacher_name(teacher) for teacher in teachers] if names is None else names
        sizes: Sequence[Size] = [None] * count if img_sizes is None else img_sizes
        given = zip(teachers, _normalized_weights(weights, count), names, sizes, strict=True)
        members = [inner for member in given for inner in _flat(*member)]
        self.teachers = nn.ModuleList(member[0] for member in members)
        self.weights: tuple[float, ...] = tuple(member[1] for member in members)
        self.names: tuple[str, ...] = tuple(member[2] for member in members)
        self.img_sizes: tuple[tuple[int, int] | None, ...] = tuple(
            _input_size(teacher, name, size) for teacher, _, name, size in members
        )
        self.autocast_dtype = autocast_dtype
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


def _normalized_weights(weights: Sequence[float] | None, count: int) -> list[float]:
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


def teacher_name(teacher: nn.Module) -> str:
    """The readable name of a teacher that has none given: its architecture, and its tag if it has one."""
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
