"""An ensemble of teachers as one frozen model."""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple, Self

import torch
from timm.models import PretrainedCfg, filter_pretrained_cfg, get_model_input_config
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mealv2.data.normalize import channel_stats, renormalize
from timm_mealv2.errors import UserError, one_line
from timm_mealv2.losses import at_least_float32
from timm_mealv2.models.teacher import (
    Size,
    cfg_of,
    check_logits,
    class_count,
    copy_sharing_weights,
    freeze,
    is_channels_last,
    seen_size,
    source_model,
    teacher_name,
)
from timm_mealv2.models.tuning import PLAIN, Form, Tuning, fastest_form, make_form, tuning_table

_logger = logging.getLogger(__name__)


class EnsembleTeacher(nn.Module):
    """Frozen teachers that predict as one: the (weighted) mean of their probabilities.

    The input is taken as normalized with the mean and std of the ensemble's own `pretrained_cfg` as it is at the call.
    Each teacher gets it normalized with its own mean and std and, where its input size is fixed or one is asked for,
    resized (bicubic, antialias) for itself; where nothing differs, the very same values.

    The teachers are copies in eval mode, without gradient. The modules given stay as they are; a copy has buffers of
    its own and shares the memory of the parameters, so that weights are held once. The copies are no submodules:
    nothing that walks over the ensemble or a module around it (`train()`, `requires_grad_()`, `modules()`, `apply()`,
    an optimizer, DDP, `state_dict()` of a parent) reaches them, also under `torch.compile`. `to()` and its kind do,
    and the ensemble's own `parameters()`, `buffers()` and `state_dict()` are the teachers'. They run under inference
    mode.

    They run in the dtype of their weights whatever autocast the caller is in, so that the targets do not depend on the
    student's mixed precision; with `autocast_dtype`, under an autocast of their own.

    Attributes:
        teachers: The copies. A member that is an `EnsembleTeacher` itself is replaced by its members.
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

    teachers: nn.ModuleList

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
        members = [inner for values in given for inner in _flat(_Member(*values, autocast_dtype))]
        # Not `self.teachers = ...`, which would register them: see above.
        self.__dict__['teachers'] = nn.ModuleList(member.teacher for member in members)
        freeze(self.teachers)
        self._forms: dict[int, Form] = {}  # what `tune` has chosen, by the teacher's place
        self.weights: tuple[float, ...] = tuple(member.weight for member in members)
        self.names: tuple[str, ...] = tuple(member.name for member in members)
        self.img_sizes = tuple(seen_size(member.teacher, member.name, member.img_size) for member in members)
        self.autocast_dtypes = tuple(member.autocast_dtype for member in members)
        self.num_classes = self._common('num_classes', [class_count(m.teacher, m.name) for m in members])
        self.in_chans = self._common(
            'in_chans', [get_model_input_config(source_model(m.teacher))['input_size'][0] for m in members]
        )
        self._refuse_twins()
        self._channels_last = tuple(is_channels_last(teacher) for teacher in self.teachers)
        self.pretrained_cfg: dict[str, Any] = self._first_cfg()
        self.train()

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype of the teachers' autocast; None for none, or where they differ."""
        dtypes = set(self.autocast_dtypes)
        return dtypes.pop() if len(dtypes) == 1 else None

    @property
    def default_cfg(self) -> dict[str, Any]:
        """The `pretrained_cfg`, by timm's older name."""
        return self.pretrained_cfg

    def forward(self, x: Tensor) -> Tensor:
        """Return the log of the mean probability, logits at temperature 1, at least float32 [B, C]; see `predict`."""
        return self.predict(x)[0]

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log of the mean probability and mean logits, both [B, C], at least float32, without gradient.

        Args:
            x: Images [B, chans, H, W], normalized with the ensemble's `pretrained_cfg`.
        """
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
        return torch.stack([self._logits(index, x) for index in range(len(self.teachers))])

    @torch.no_grad()
    def tune(self, images: Tensor, compile: bool = False) -> list[Tuning]:
        """Run each teacher from now on in the form that is fastest for these images and predicts the same.

        The forms are another memory format, batch norm folded into the convolutions, both, and with `compile` the
        fastest of them compiled. No probability may be farther from the teacher's own than `tuning.BOUND` (in half
        types `tuning.HALF_BOUNDS`), and a form has to be faster by 3 %. The teachers stay beside their forms: the
        ensemble's weights, its state dict, copies of it and what is exported are theirs, and `to()` and its kind and
        `load_state_dict()` go back to them. A compiled form is for images of this shape; others run without it.

        Args:
            images: A batch, as in `predict`.
            compile: Compile with inductor: with frozen weights on a CPU, with CUDA graphs on a GPU.

        Returns:
            What was chosen, for each teacher; it is logged too.
        """
        self._forms.clear()
        rows = []
        for index, (name, teacher) in enumerate(zip(self.names, self.teachers, strict=True)):
            x, dtype = self._input_for(index, images, None), self.autocast_dtypes[index]
            run = functools.partial(self._run, index, images)
            form, row = fastest_form(name, teacher, x, images.shape, dtype or x.dtype, run, compile)
            rows.append(row)
            if form is not None:
                self._forms[index] = form
        _logger.info(f'Teachers tuned for images of {list(images.shape)}:\n{tuning_table(rows)}')
        return rows

    @torch.no_grad()
    def run_as(self, chosen: Sequence[str], shape: Sequence[int]) -> None:
        """Run the teachers in forms that `tune` has chosen before, without measuring anything.

        Args:
            chosen: The name of each teacher's form, as `Tuning.chosen` has it.
            shape: Shape of the images that they were tuned for.
        """
        self._forms.clear()
        device = next((parameter.device for parameter in self.parameters()), None)
        images = torch.zeros(1, *shape[1:], device=device)
        for index, (name, form) in enumerate(zip(self.names, chosen, strict=True)):
            if form != PLAIN:
                try:
                    x = self._input_for(index, images, None)
                    self._forms[index] = make_form(self.teachers[index], form, x, torch.Size(shape))
                except Exception as error:  # whatever torch of this machine cannot do with a teacher
                    _logger.warning(f'Teacher {name} cannot run as {form}, and runs as it is: {one_line(error)}')

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever the mode."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Stay without gradient, whatever is asked for."""
        return self

    def named_parameters(self, prefix: str = '', *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the teachers' parameters; those of a module around the ensemble leave them out."""
        return self.teachers.named_parameters(f'{prefix}.teachers' if prefix else 'teachers', *args, **kwargs)

    def named_buffers(self, prefix: str = '', *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Yield the teachers' buffers; those of a module around the ensemble leave them out."""
        return self.teachers.named_buffers(f'{prefix}.teachers' if prefix else 'teachers', *args, **kwargs)

    def named_modules(self, memo: Any = None, prefix: str = '', remove_duplicate: bool = True) -> Iterator[Any]:
        """Yield the ensemble alone; for `torch.export`, which puts a module around it, the teachers as well."""
        yield from super().named_modules(memo, prefix, remove_duplicate)
        if torch.compiler.is_exporting():
            inner = f'{prefix}.teachers' if prefix else 'teachers'
            yield from self.teachers.named_modules(memo, inner, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the teachers' weights; the state dict of a module around the ensemble leaves them out."""
        destination: dict[str, Any] | None = kwargs.get('destination')
        if destination is not None:
            return destination
        return self.teachers.state_dict(*args, **{**kwargs, 'prefix': f'{kwargs.get("prefix", "")}teachers.'})

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned."""
        own = {key.removeprefix('teachers.'): value for key, value in state_dict.items()}
        self._forms.clear()
        return self.teachers.load_state_dict(own, strict, assign)

    def _load_from_state_dict(self, *args: Any) -> None:
        pass  # the state dict of a module around the ensemble leaves its teachers out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._forms.clear()
        self.teachers._apply(fn, recurse)  # what `to()`, `half()`, `cuda()` and the like call
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_forms': {}}  # of a copy or a pickle

    def _logits(self, index: int, x: Tensor) -> Tensor:
        """Logits [B, C] of one teacher, in the form that was chosen for it."""
        form = self._forms.get(index)
        usable = form is not None and form.shape in (None, x.shape) and not torch.compiler.is_exporting()
        return self._run(index, x, form if usable else None)

    def _run(self, index: int, x: Tensor, form: Form | None) -> Tensor:
        """Logits [B, C] of one teacher, at least float32; an inference tensor, or what was made of one."""
        x, dtype = self._input_for(index, x, form), self.autocast_dtypes[index]
        module = self.teachers[index] if form is None else form.module
        # torch 2.8 to 2.10 cannot compile what runs in inference mode.
        mode = torch.no_grad() if torch.compiler.is_compiling() else torch.inference_mode()
        mixed = dtype not in (None, torch.float32)  # torch warns of autocast to float32, which does nothing
        with mode, torch.autocast(x.device.type, dtype=dtype, enabled=mixed):
            logits = module(x)
        check_logits(logits, self.names[index], x, self.num_classes)
        return at_least_float32(logits)

    def _input_for(self, index: int, x: Tensor, form: Form | None) -> Tensor:
        """The images as one teacher wants them: its mean and std, size, dtype and memory format."""
        if x.shape[1] != self.in_chans:
            raise UserError(
                f'The teachers take images with {self.in_chans} channels, got {x.shape[1]}: teachers made by name get '
                "the student's, where it has an attribute in_chans."
            )
        teacher, size = self.teachers[index], self.img_sizes[index]
        mine, its = (channel_stats(cfg, self.in_chans) for cfg in (self.pretrained_cfg, cfg_of(teacher)))
        x = renormalize(at_least_float32(x), *mine, *its)
        if size is not None and tuple(x.shape[-2:]) != size:
            x = F.interpolate(x, size, mode='bicubic', antialias=True)
        dtypes = [parameter.dtype for parameter in teacher.parameters() if parameter.is_floating_point()]
        x = x.to(dtypes[0] if dtypes else x.dtype)
        channels_last = self._channels_last[index] if form is None else form.channels_last
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x

    def _common(self, attribute: str, values: Sequence[int]) -> int:
        if len(set(values)) > 1:
            each = ', '.join(f'{name} {value}' for name, value in zip(self.names, values, strict=True))
            raise UserError(f'All teachers must have the same {attribute}, got {each}: leave out those that differ.')
        return values[0]

    def _refuse_twins(self) -> None:
        for (name_a, a), (name_b, b) in combinations(zip(self.names, self.teachers, strict=True), 2):
            if _same_weights(a, b):
                raise UserError(
                    f'Teachers must differ, but {name_a} and {name_b} have the same weights: leave one out '
                    '(pin the tags, as in resnet50.a1_in1k; --teacher-weights counts one more than another).'
                )

    def _first_cfg(self) -> dict[str, Any]:
        first = source_model(self.teachers[0])
        cfg = filter_pretrained_cfg({**PretrainedCfg().to_dict(), **cfg_of(first)}, remove_source=True)
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


class _Member(NamedTuple):
    teacher: nn.Module
    weight: float
    name: str
    img_size: Size
    autocast_dtype: torch.dtype | None


def _flat(member: _Member) -> list[_Member]:
    """A copy of a member; of an ensemble, those of its members, so that mean logits are those of all teachers."""
    inner = unwrap_model(member.teacher)
    if not isinstance(inner, EnsembleTeacher):
        return [member._replace(teacher=_copy(member.teacher, member.name))]
    compiled = getattr(member.teacher, 'dynamo_ctx', None)  # each teacher of a compiled ensemble is compiled
    members = []
    for teacher, weight, name, size, dtype in zip(
        inner.teachers, inner.weights, inner.names, inner.img_sizes, inner.autocast_dtypes, strict=True
    ):
        if teacher._compiled_call_impl is None:  # a copy of a module that was compiled in place is not compiled
            teacher = _copy(teacher, name)
        teacher = teacher if compiled is None else compiled(teacher)
        settings = (size or member.img_size, dtype or member.autocast_dtype)
        members.append(_Member(teacher, member.weight * weight, name, *settings))
    return members


def _copy(teacher: nn.Module, name: str) -> nn.Module:
    """A copy of a module that shares the memory of its parameters."""
    try:
        return copy_sharing_weights(teacher)
    except Exception as error:  # whatever a module of the user's has that cannot be copied
        _logger.warning(f'Teacher {name} cannot be copied and is frozen itself: {one_line(error)}')
        return teacher


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


def _same_weights(a: nn.Module, b: nn.Module) -> bool:
    a_state, b_state = source_model(a).state_dict(), source_model(b).state_dict()
    return (
        bool(a_state)
        and a_state.keys() == b_state.keys()
        and all(
            tensor.shape == b_state[key].shape and torch.equal(tensor, b_state[key].to(tensor.device, tensor.dtype))
            for key, tensor in a_state.items()
        )
    )
