"""What a training step asks of the device: how many operators, and never an answer."""

import collections
import re
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from timm_mealv2 import MealV2Task
from timm_mealv2.errors import UserError
from timm_mealv2.training import metric_logging
from timm_mealv2.training.loop import Schedule, Stepper
from timm_mealv2.training.metric_logging import Meters


class Counting(TorchDispatchMode):
    """Counts operators by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def make_stepper(device: str = 'cpu', clip_grad: float | None = None, **options: Any) -> Stepper:
    torch.manual_seed(0)
    student = timm.create_model('test_resnet', num_classes=3).to(device)
    teachers = [timm.create_model(name, num_classes=3) for name in ('test_resnet', 'test_efficientnet')]
    task = MealV2Task(student, teachers, verbose=False)
    stepper = Stepper(task, create_optimizer_v2(task.get_trainable_module(), lr=0.01, **options), clip_grad=clip_grad)
    stepper.train()
    return stepper


def step(stepper: Stepper, update: int, meters: Meters, bad: bool = False) -> Tensor:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(update))
    if bad:
        images[0] = torch.nan
    device = stepper.task.device
    result, made = stepper.step(images.to(device), (torch.arange(4) % 3).to(device), update=update)
    assert made is not None
    meters.update({name: value.detach() for name, value in result.items() if name != 'output'}, 4, made)
    return made


@pytest.mark.parametrize(
    ('options', 'waits'),
    [
        ({'opt': 'sgd', 'fused': True}, 0),
        ({'opt': 'adamw', 'fused': True, 'clip_grad': 1.0}, 0),
        ({'opt': 'sgd', 'foreach': True}, 1),
    ],
)
def test_a_step_waits_for_the_device_only_where_the_optimizer_cannot_skip(
    options: dict[str, Any], waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric_logging, '_WAITING', 1)  # the sums belong to each step
    stepper, meters = make_stepper(**options), Meters()
    step(stepper, 0, meters)  # waits
    with Counting() as mode:
        step(stepper, 1, meters)
    assert sum(mode.counts[name] for name in ('_local_scalar_dense', 'nonzero', 'is_nonzero')) == waits
    # The statistics of 9 layers of batch norm, 27 tensors, are not copied one by one.
    assert mode.counts['clone'] + mode.counts['copy_'] + mode.counts['_to_copy'] <= 4
    assert mode.counts['cat'] <= 3


@pytest.mark.parametrize('opt', ['sgd', 'adamw'])
@pytest.mark.parametrize('bad', [0, 1])
def test_a_fused_optimizer_skips_what_is_not_finite(opt: str, bad: int) -> None:
    """Also in its first update, whose momentum the fused kernel of SGD would leave without values."""
    skipping, never_met_it = make_stepper(opt=opt, fused=True), make_stepper(opt=opt, fused=True)
    meters, others = Meters(), Meters()
    for update in range(3):
        assert bool(step(skipping, update, meters, bad=update == bad)) == (update != bad)
        if update != bad:
            step(never_met_it, update, others)
    weights, expected = (s.task.get_trainable_module().state_dict().values() for s in (skipping, never_met_it))
    assert all(map(torch.equal, weights, expected))
    assert meters.means() == others.means()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('opt', ['sgd', 'adamw'])
def test_a_gpu_is_not_waited_for(opt: str) -> None:
    stepper, meters = make_stepper('cuda', opt=opt, fused=True), Meters()
    step(stepper, 0, meters)  # waits
    batch = torch.rand(4, 3, 32, 32, device='cuda'), torch.arange(4, device='cuda') % 3
    torch.cuda.set_sync_debug_mode('error')
    try:
        for update in range(1, 20):
            result, made = stepper.step(*batch, update=update)
            assert made is not None
            meters.update({'loss': result['loss'].detach()}, 4, made)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert meters.means()['loss'] > 0


@pytest.mark.parametrize(
    ('lr', 'options', 'text'),
    [(0.1, {'cycle_mul': 1e-30}, 'do not go together: math domain error'), (1e200, {}, 'has come to 1e+200')],
)
def test_a_schedule_without_a_rate_is_told(lr: float, options: dict[str, Any], text: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    schedule = Schedule(CosineLRScheduler(optimizer, 4, **options), 4, 2)
    with pytest.raises(UserError, match=re.escape(text)):
        schedule.after_epoch(0 if lr > 1 else 4, None)
