"""The forms a teacher may run in, all with the same predictions, and which is the fastest here.

The forms are measured, as none pays everywhere: channels_last makes a ResNet faster on a GPU and an EfficientNet at 380
pixels slower. A form is a module beside the teacher, which stays as it is; it shares the teacher's weights but for
those of the convolutions, which have another layout, or a batch norm in them.
"""

import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import BatchNormAct2d
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from timm_mealv2.errors import one_line
from timm_mealv2.models.teacher import copy_sharing_weights, is_channels_last

_logger = logging.getLogger(__name__)

PLAIN = 'plain'
"""The name of a teacher as it is."""

BOUND = 1e-5
"""How far a probability of a form may be from the teacher's own."""
HALF_BOUNDS = {torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""The same in half types: what rounding a logit of 16 to the type changes a probability of one half by."""

_LEAST = {'cpu': 20.0}  # milliseconds of a batch below which a teacher stays as it is: noise would choose
_GAIN = 0.97  # a form must take less than this share of the teacher's own time, so that noise does not choose
_ROUNDS, _LEAST_ROUNDS, _SECONDS = 10, 3, 3.0


class Form(NamedTuple):
    """A teacher in another form.

    Attributes:
        name: What was done, joined by '+': 'channels_last' or 'contiguous' (layout), 'folded' (batch norm into
            convolutions), 'inductor' (compiled).
        module: What runs in place of the teacher.
        channels_last: Layout of the images.
        shape: Shape of the images that it is for; None for any. A compiler makes code for one shape.
    """

    name: str
    module: nn.Module
    channels_last: bool
    shape: torch.Size | None


class Tuning(NamedTuple):
    """What was chosen for a teacher.

    Attributes:
        teacher: Its name.
        chosen: The form's name, `PLAIN` for none.
        before: Milliseconds of a batch as it is.
        after: Milliseconds of a batch in the form.
        difference: Largest difference of a probability.
    """

    teacher: str
    chosen: str
    before: float
    after: float
    difference: float


def make_form(teacher: nn.Module, name: str, x: Tensor, shape: torch.Size) -> Form:
    """Make a form of a teacher.

    Args:
        teacher: The teacher, which stays as it is.
        name: The form's name.
        x: Images as the teacher takes them.
        shape: Shape of the images that a compiled form is for, before they are resized for the teacher.

    Raises:
        ValueError: If the teacher has no such form; what torch raises, if it fails.
    """
    steps = name.split('+')
    if unknown := set(steps) - {'channels_last', 'contiguous', 'folded', 'inductor'}:
        raise ValueError(f'there is no form {unknown.pop()}')
    model = copy_sharing_weights(unwrap_model(teacher))
    if 'folded' in steps:
        _fold_batch_norm(model, x[:1])
    channels_last = is_channels_last(teacher)
    if 'channels_last' in steps or 'contiguous' in steps:
        if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
            raise ValueError('there is no convolution')
        channels_last = 'channels_last' in steps
        model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if 'inductor' not in steps:
        return Form(name, model, channels_last, None)
    options: dict[str, Any] = {'cpu': {'options': {'freezing': True}}, 'cuda': {'mode': 'reduce-overhead'}}
    compiled: Any = torch.compile(model, dynamic=False, **options.get(x.device.type, {}))
    return Form(name, compiled, channels_last, shape)


@torch.inference_mode()
def _find_pairs(model: nn.Module, x: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions whose output a batch norm takes; each of the two runs once for an input."""
    calls: Counter[nn.Module] = Counter()
    pairs: list[tuple[Any, Any]] = []

    def after_convolution(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[module] += 1
        output.made_by = module

    def before_norm(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls[module] += 1
        pairs.append((getattr(args[0], 'made_by', None), module))

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after_convolution))
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d):
            handles.append(module.register_forward_pre_hook(before_norm))
    model(x)
    for handle in handles:
        handle.remove()
    return [pair for pair in pairs if pair[0] is not None and calls[pair[0]] == calls[pair[1]] == 1]


def _fold_batch_norm(model: nn.Module, x: Tensor) -> None:
    """Put each batch norm into the convolution before it."""
    pairs = _find_pairs(model, x)
    if not pairs:
        raise ValueError('there is no batch norm after a convolution')
    names = {module: name for name, module in model.named_modules()}
    for convolution, norm in pairs:
        model.set_submodule(names[convolution], fuse_conv_bn_eval(convolution, norm))
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        model.set_submodule(names[norm], rest.eval())


def fastest_form(
    name: str,
    teacher: nn.Module,
    x: Tensor,
    shape: torch.Size,
    dtype: torch.dtype,
    run: Callable[[Form | None], Tensor],
    compile: bool,
) -> tuple[Form | None, Tuning]:
    """Choose the form of a teacher that takes least time and predicts the same; None for the teacher as it is.

    Args:
        name: The teacher's name.
        teacher: The teacher.
        x: Images as it takes them.
        shape: Shape of the images before they are resized for it.
        dtype: What it computes in.
        run: Runs the images through a form, or through the teacher as it is; gives logits [B, C].
        compile: Compile the fastest form too.
    """
    reference = run(None).softmax(dim=1)
    candidates: list[tuple[Form | None, float]] = [(None, 0.0)]  # with the largest difference of a probability

    def add(steps: str) -> None:
        try:
            form = make_form(teacher, steps, x, shape)
            difference = (run(form).softmax(dim=1) - reference).abs().max().item()
        except Exception as error:  # whatever torch cannot do with a teacher
            _logger.debug(f'Teacher {name} cannot run as {steps}: {one_line(error)}')
            return
        if difference <= HALF_BOUNDS.get(dtype, BOUND):
            candidates.append((form, difference))

    def measure() -> tuple[list[list[float]], int]:
        times = _milliseconds([form for form, _ in candidates], run, x.device)
        worthwhile = min(times[0]) >= _LEAST.get(x.device.type, 0.0)
        return times, _fastest(times) if worthwhile else 0

    layout = 'contiguous' if is_channels_last(teacher) else 'channels_last'
    for steps in (layout, 'folded', f'{layout}+folded'):
        add(steps)
    times, best = measure()
    if compile:
        candidates[:] = [candidates[place] for place in sorted({0, best})]
        form = candidates[-1][0]
        add('inductor' if form is None else f'{form.name}+inductor')
        times, best = measure()
    form, difference = candidates[best]
    before, after = statistics.median(times[0]), statistics.median(times[best])
    return form, Tuning(name, PLAIN if form is None else form.name, before, after, difference)


def _milliseconds(
    forms: Sequence[Form | None], run: Callable[[Form | None], Tensor], device: torch.device
) -> list[list[float]]:
    """Milliseconds of each form in each round. They take turns, so that what else the machine does meets all."""
    times: list[list[float]] = [[] for _ in forms]
    began = time.perf_counter()
    for number in range(-1, _ROUNDS):  # the first round only warms up
        if number >= _LEAST_ROUNDS and time.perf_counter() - began > _SECONDS:
            break
        for form, own in zip(forms, times, strict=True):
            start = time.perf_counter()
            run(form)
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            if number >= 0:
                own.append(1e3 * (time.perf_counter() - start))
    return times


def _fastest(times: Sequence[Sequence[float]]) -> int:
    """The place of the fastest, 0 if none is faster than the first by enough; ratios are those within a round."""
    shares = [statistics.median(t / first for t, first in zip(own, times[0], strict=True)) for own in times]
    best = min(range(len(shares)), key=shares.__getitem__)
    return best if shares[best] < _GAIN else 0


def tuning_table(rows: Sequence[Tuning]) -> str:
    """Return what was chosen, a line for each teacher."""
    width = max(len('teacher'), *(len(row.teacher) for row in rows))
    form = max(len('runs as'), *(len(row.chosen) for row in rows))
    lines = [f'{"teacher":<{width}}  {"runs as":<{form}}  {"ms before":>9}  {"after":>9}  largest difference']
    for row in rows:
        times = f'{row.before:>9.1f}  {row.after:>9.1f}'
        lines.append(f'{row.teacher:<{width}}  {row.chosen:<{form}}  {times}  {row.difference:.1e}')
    return '\n'.join(lines)
