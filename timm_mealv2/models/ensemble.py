"""An ensemble of teachers as one frozen model."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain, combinations
from typing import Any, Self

import torch
from timm.models import PretrainedCfg, filter_pretrained_cfg, get_model_input_config
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mealv2.data.class_names import class_names_of
from timm_mealv2.data.normalize import channel_stats, renormalize
from timm_mealv2.errors import UserError, one_line
from timm_mealv2.losses import at_least_float32
from timm_mealv2.models.fusion import fuse_model

_logger = logging.getLogger(__name__)

Size = int | tuple[int, int] | None


class ClassSubset(nn.Module):
    """A model's predictions for some of its classes: the softmax of these logits is its probability, renormalized.

    Args:
        model: A model [B, chans, H, W] -> logits [B, C].
        classes: The model's class of each new one, from 0 to C - 1.
    """

    def __init__(self, model: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        if isinstance(model, ClassSubset):
            classes = model.get_buffer('indices')[list(classes)].tolist()
            model = model.get_submodule('model')
        names = class_names_of(model)
        self.model = model
        self.num_classes = len(classes)
        self.pretrained_cfg = {**_cfg_of(model), 'label_names': names and [names[index] for index in classes]}
        device = next((parameter.device for parameter in model.parameters()), None)
        self.register_buffer('indices', torch.tensor(classes, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the classes taken, [B, num_classes]."""
        return self.model(x).index_select(1, self.get_buffer('indices'))


class EnsembleTeacher(nn.Module):
    """Frozen teachers that predict as one: the (weighted) mean of their probabilities.

    The input is taken as normalized with the mean and std of the ensemble's own `pretrained_cfg` as it is at the call.
    Each teacher gets it normalized with its own mean and std and, where its input size is fixed or one is asked for,
    resized (bicubic, antialias) for itself; where nothing differs, the very same values.

    The teachers are the very modules that are given: in eval mode, which `train()` here or on a module around the
    ensemble does not change, and without gradient, whatever `requires_grad` says.

    Images on another device than theirs are brought there, and the answers stay there.

    They run in the dtype of their weights whatever autocast the caller is in, so that the targets do not depend on the
    student's mixed precision; with `autocast_dtype`, under an autocast of their own.

    Attributes:
        teachers: The teachers. A member that is an `EnsembleTeacher` itself is replaced by its members.
        weights: The weight of each teacher; they sum to 1.
        names: A readable name of each teacher.
        img_sizes: The one size (H, W) that each teacher sees, None if it takes any.
        autocast_dtypes: The dtype of each teacher's autocast, None for none.
        num_classes: Number of classes C.
        in_chans: Number of input channels.
        pretrained_cfg: What the input is normalized with ('mean', 'std') and sized for; the first teacher's unless set.

    Args:
        teachers: Models [B, chans, H, W] -> logits [B, C], with an attribute `num_classes`. Without a `pretrained_cfg`,
            ImageNet's mean and std are assumed.
        weights: One per teacher, 0 or more; equal if None. A teacher of weight 0 is not run.
        names: One per teacher, for logs and tables; the architectures' names if None.
        img_sizes: One per teacher: the image size (square) that it is to see; None leaves the input's.
        autocast_dtype: Dtype of the teachers' autocast; None for none. A member that is an ensemble keeps its own.

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
            raise UserError('An ensemble needs at least one teacher: name a timm model, folder or checkpoint.')
        names = [teacher_name(teacher) for teacher in teachers] if names is None else names
        wanted = [None] * count if img_sizes is None else img_sizes
        members: list[tuple[Any, ...]] = []
        for teacher, weight, name, size in zip(teachers, _normalized(weights, count), names, wanted, strict=True):
            inner = unwrap_model(teacher)
            if isinstance(inner, EnsembleTeacher):  # its members, so that mean logits are those of all teachers
                members += [(t, weight * w, n, s or size, d or autocast_dtype) for t, w, n, s, d in inner.members]
            else:
                members.append((teacher, weight, name, size, autocast_dtype))
        modules, own_weights, own_names, own_sizes, own_dtypes = zip(*members, strict=True)
        self.teachers = nn.ModuleList(modules)
        self.weights: tuple[float, ...] = own_weights
        self.names: tuple[str, ...] = own_names
        self.img_sizes = tuple(map(_seen_size, modules, own_names, own_sizes))
        self.autocast_dtypes: tuple[torch.dtype | None, ...] = own_dtypes
        widths = [getattr(unwrap_model(teacher), 'num_classes', 0) for teacher in self.teachers]
        self.num_classes = self._common('num_classes', widths)
        sizes = [get_model_input_config(source_model(teacher))['input_size'] for teacher in self.teachers]
        self.in_chans = self._common('in_chans', [channels for channels, *_ in sizes])
        self._input_sizes = [seen or own[-2:] for seen, own in zip(self.img_sizes, sizes, strict=True)]
        self._refuse_twins()
        self.pretrained_cfg: dict[str, Any] = self._first_cfg()
        # What runs in place of a teacher, by its number: no submodules, as the teachers are the ensemble's weights.
        self._fused: dict[int, nn.Module] = {}
        self._compiled = False
        self.register_load_state_dict_post_hook(_forget_fused)
        self.requires_grad_(False).train()

    @property
    def members(self) -> list[tuple[nn.Module, float, str, tuple[int, int] | None, torch.dtype | None]]:
        """Each teacher with its weight, name, image size and dtype of autocast."""
        return list(zip(self.teachers, self.weights, self.names, self.img_sizes, self.autocast_dtypes, strict=True))

    @property
    def running(self) -> list[nn.Module]:
        """What runs for each teacher: the teacher, or its copy that is optimized for inference."""
        fused = {} if torch.compiler.is_exporting() else self._fused
        return [fused.get(index, teacher) for index, teacher in enumerate(self.teachers)]

    @property
    def default_cfg(self) -> dict[str, Any]:
        """The `pretrained_cfg`, by timm's older name."""
        return self.pretrained_cfg

    def forward(self, x: Tensor) -> Tensor:
        """Return the log of the mean probability, logits at temperature 1, at least float32 [B, C]; see `predict`."""
        return self.predict(x)[0]

    @torch.no_grad()
    def predict(self, x: Tensor, per_sample: int | None = None, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return log of the mean probability and mean logits, both [B, C], at least float32, without gradient.

        With `per_sample` = K the means are the plain ones of K teachers an image, each drawn with K times its weight as
        its probability: their expectation is that of all teachers, at K / N of the cost.

        Args:
            x: Images [B, chans, H, W], normalized with the ensemble's `pretrained_cfg`.
            per_sample: K; None takes all teachers, by their weights.
            places: Number in [0, 1) that decides an image's draw, float64 [B]. None spreads them evenly over the batch,
                in a random order, by torch's CPU generator.

        Raises:
            UserError: If K times the weight of a teacher is above 1.
        """
        x = self._moved(x)
        log_probs: Tensor | None = None
        mean_logits: Tensor | None = None
        for index, weight, rows in self._shares(x, per_sample, places):
            logits = self._logits(index, x if rows is None else x.index_select(0, rows))
            if log_probs is None or mean_logits is None:
                log_probs = logits.new_full((x.shape[0], self.num_classes), -math.inf)
                mean_logits = torch.zeros_like(log_probs)
            log_p = F.log_softmax(logits, dim=1) + math.log(weight)
            if rows is None:
                log_probs = torch.logaddexp(log_probs, log_p)
                mean_logits.add_(logits, alpha=weight)
            else:
                log_probs[rows] = torch.logaddexp(log_probs[rows], log_p)
                mean_logits.index_add_(0, rows, logits, alpha=weight)
        assert log_probs is not None  # each image has a teacher
        assert mean_logits is not None
        return log_probs, mean_logits

    def _shares(
        self, x: Tensor, per_sample: int | None, places: Tensor | None
    ) -> Iterator[tuple[int, float, Tensor | None]]:
        """Yield the number of each teacher that is run, its weight in the mean, and its images, None for all."""
        used = [(index, weight) for index, weight in enumerate(self.weights) if weight]
        if per_sample is None:
            yield from ((index, weight, None) for index, weight in used)
            return
        self.check_per_sample(per_sample)
        if places is None:
            places = (torch.randperm(len(x)) + torch.rand((), dtype=torch.float64)) / len(x)
        # Systematic sampling: on a line of length K each teacher has K times its weight, at most 1, and the points
        # place, place + 1, ... fall on K different ones.
        ends = per_sample * torch.tensor([weight for _, weight in used], dtype=torch.float64).cumsum(0)
        drawn = torch.searchsorted(ends[:-1], places[:, None] + torch.arange(per_sample), right=True)
        for number, (index, _) in enumerate(used):
            rows = (drawn == number).any(dim=1).nonzero().squeeze(1)
            if len(rows):
                yield index, 1 / per_sample, rows.to(x.device, non_blocking=True)

    def check_per_sample(self, per_sample: int) -> None:
        """Raise a `UserError` if so many teachers cannot be drawn for an image, each as often as its weight says."""
        weight, name = max(zip(self.weights, self.names, strict=True))
        if per_sample * weight > 1 + 1e-9:
            raise UserError(
                f'--teachers-per-sample {per_sample}: {name}, of weight {weight:.3g}, would be drawn '
                f'{per_sample * weight:.3g} times for an image: give at most {int(1 / weight + 1e-9)}.'
            )

    @torch.no_grad()
    def teacher_logits(self, x: Tensor) -> Tensor:
        """Return the logits of every teacher [N, B, C], at least float32, for images as in `predict`."""
        x = self._moved(x)
        return torch.stack([self._logits(index, x) for index in range(len(self.teachers))])

    def optimize_for_inference(self) -> None:
        """From now on run a copy of each teacher in channels_last, with batch norm folded into the convolutions.

        A copy is used if no probability of two seeded images, of the teacher's own size, in float32, differs by more
        than 1e-5; otherwise that teacher runs as it is. The decision is the same in every process. The teachers stay
        beside the copies: `teachers`, `state_dict()` and what is exported mean them, and loading weights goes back to
        them. `to()` and its kind move and cast the copies too.
        """
        for index, teacher in enumerate(self.teachers):
            try:
                self._fused[index] = fuse_model(teacher, (self.in_chans, *self._input_sizes[index]))
            except (AssertionError, RuntimeError, ValueError) as error:  # of a model that takes no other layout or size
                _logger.info(f'Teacher {self.names[index]} is not optimized, and runs as it is: {one_line(error)}')

    @torch.no_grad()
    def log_rounding(self, x: Tensor) -> None:
        """Log how far the teachers' autocast takes a probability from float32, for images as in `predict`.

        Above 2^-6 for the mean probability a warning names the teacher that differs most. Without autocast nothing is
        done. Compiled teachers run uncompiled here.
        """
        dtypes = self.autocast_dtypes
        names = sorted({str(dtype).removeprefix('torch.') for dtype in dtypes} - {'None', 'float32'})
        if not names:
            return
        with torch.compiler.set_stance('force_eager') if self._compiled else nullcontext():
            own = self.teacher_logits(x).softmax(dim=2)
            self.autocast_dtypes = (None,) * len(dtypes)
            exact = self.teacher_logits(x).softmax(dim=2)
            self.autocast_dtypes = dtypes
        of_each = (own - exact).abs().flatten(1).amax(dim=1)
        of_mean = torch.einsum('n,nbc->bc', own.new_tensor(self.weights), own - exact).abs().max().item()
        text = f'Teachers in {" and ".join(names)}: on the first batch their mean probability differs from float32 by'
        _logger.info(f'{text} {of_mean:.1e} at most.')
        if not of_mean <= 2**-6:
            worst = int(of_each.argmax())
            _logger.warning(
                f'Teacher {self.names[worst]} differs by {of_each[worst]:.1e} in a probability: --teacher-dtype '
                'float32 would be exact.'
            )

    def compile_each(self, **compile_kwargs: Any) -> None:
        """Compile what runs for each teacher, with arguments of `torch.compile`; the ensemble around them is not."""
        self._compiled = True
        for module in self.running:
            module.compile(**compile_kwargs)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever the mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for module in self._fused.values():
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _moved(self, x: Tensor) -> Tensor:
        """Images on the ensemble's device; between GPUs the copy is ordered by events, and nobody waits."""
        device = next(chain(self.parameters(), self.buffers()), x).device
        return x.to(device, non_blocking=device.type != 'cpu')  # memory of the host is read at once

    def _logits(self, index: int, x: Tensor) -> Tensor:
        """Logits [B, C] of one teacher, at least float32."""
        teacher, size, dtype = self.teachers[index], self.img_sizes[index], self.autocast_dtypes[index]
        mine, its = (channel_stats(cfg, self.in_chans) for cfg in (self.pretrained_cfg, _cfg_of(teacher)))
        x = renormalize(at_least_float32(x), *mine, *its)
        if size is not None and tuple(x.shape[-2:]) != size:
            x = F.interpolate(x, size, mode='bicubic', antialias=True)
        x = x.to(next((p.dtype for p in teacher.parameters() if p.is_floating_point()), x.dtype))
        running = self.running[index]
        if running is not teacher:
            x = x.contiguous(memory_format=torch.channels_last)
        mixed = dtype not in (None, torch.float32)  # torch warns of autocast to float32, which does nothing
        with torch.autocast(x.device.type, dtype=dtype, enabled=mixed):
            return at_least_float32(running(x))

    def _common(self, attribute: str, values: Sequence[int]) -> int:
        if len(set(values)) > 1 or not all(values):
            each = ', '.join(f'{name} {value}' for name, value in zip(self.names, values, strict=True))
            raise UserError(f'All teachers must have {attribute}, and the same, got {each}: leave out the others.')
        return values[0]

    def _refuse_twins(self) -> None:
        states = [source_model(teacher).state_dict() for teacher in self.teachers]
        for (name_a, a), (name_b, b) in combinations(zip(self.names, states, strict=True), 2):
            if a and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a):
                raise UserError(
                    f'Teachers must differ, but {name_a} and {name_b} have the same weights: leave one out '
                    '(pin the tags, as in resnet50.a1_in1k; --teacher-weights counts one more than another).'
                )

    def _first_cfg(self) -> dict[str, Any]:
        cfg = {**PretrainedCfg().to_dict(), **_cfg_of(self.teachers[0])}
        cfg = filter_pretrained_cfg(cfg, remove_source=True)
        cfg.update(
            architecture='mealv2_ensemble',
            num_classes=self.num_classes,
            input_size=(self.in_chans, *self._input_sizes[0]),
            fixed_input_size=False,  # each teacher's input is resized for it
            custom_load=False,
            first_conv=None,
            classifier=None,
            label_names=next(filter(None, map(class_names_of, self.teachers)), None),
        )
        cfg.pop('tag', None)
        return cfg


def source_model(teacher: nn.Module) -> nn.Module:
    """The model itself, which knows its pixels and weights, whatever is around it."""
    model: nn.Module = unwrap_model(teacher)
    return source_model(model.model) if isinstance(model, ClassSubset) else model


def teacher_name(teacher: nn.Module) -> str:
    """The readable name of a teacher that has none given: its architecture, and its tag if it has one."""
    cfg = _cfg_of(teacher)
    name = cfg.get('architecture') or type(source_model(teacher)).__name__
    return f'{name}.{cfg["tag"]}' if cfg.get('tag') else name


def _cfg_of(teacher: nn.Module) -> dict[str, Any]:
    return getattr(source_model(teacher), 'pretrained_cfg', None) or {}


def _normalized(weights: Sequence[float] | None, count: int) -> list[float]:
    weights = [1.0] * count if weights is None else weights
    total = sum(weights)
    if len(weights) != count or not all(weight >= 0 for weight in weights) or not 0 < total < math.inf:
        raise UserError(f'Teacher weights must be one per teacher ({count}), 0 or more and not all 0, got {weights}.')
    return [weight / total for weight in weights]


def _seen_size(teacher: nn.Module, name: str, asked: Size) -> tuple[int, int] | None:
    """The one size (H, W) that a teacher is to see; None if it takes any and none is asked for."""
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


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b.to(a.device, a.dtype))


def _forget_fused(ensemble: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(ensemble, EnsembleTeacher)
    ensemble._fused.clear()
