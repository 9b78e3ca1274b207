"""A fused model predicts the same, and nothing is folded where something else takes the convolution's output."""

import copy
import re

import pytest
import timm
import torch
from tiny_models import images, same_state, state_of, tiny
from torch import Tensor, nn

from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.fusion import BOUND, fuse_model

# What comes before a batch norm, or in its place, and how many batch norms are left.
MODELS = {
    'resnet': ({'name': 'resnet10t'}, 0),
    'efficientnet': ({'name': 'test_efficientnet'}, 0),
    'same padding': ({'name': 'test_efficientnet', 'pad_type': 'same'}, 0),
    'mobilenetv3': ({'name': 'mobilenetv3_small_050'}, 0),
    'convnext': ({'name': 'test_convnext'}, 0),
    'vit': ({'name': 'test_vit', 'img_size': 64}, 0),
    'norm before convolution': ({'name': 'resnetv2_18', 'norm_layer': 'batchnorm2d'}, None),
}


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize('name', MODELS)
def test_optimized_teachers_predict_the_same_and_stay_as_they_are(name: str) -> None:
    options, left = MODELS[name]
    model = tiny(**options)
    ensemble = EnsembleTeacher([model])
    expected, before = ensemble.predict(images())[0].exp(), state_of(ensemble)
    strides = [p.stride() for p in model.parameters()]
    ensemble.optimize_for_inference()
    (running,) = ensemble.running
    assert running is not model
    assert (ensemble.predict(images())[0].exp() - expected).abs().max() <= BOUND
    assert left is None or norms(running) == left
    convolutions = [m.weight for m in running.modules() if isinstance(m, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
    assert same_state(state_of(ensemble), before)
    assert [p.stride() for p in model.parameters()] == strides
    assert len(list(ensemble.parameters())) == len(list(model.parameters()))


class Small(nn.Module):
    """A convolution and a batch norm, and what `mode` does beside."""

    num_classes = 4

    def __init__(self, mode: str = '') -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mode = mode
        self.conv, self.norm, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        for norm in (self.norm, self.other):
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.running_mean)

    def forward(self, pixels: Tensor) -> Tensor:
        y = self.conv(pixels)
        x = self.norm(y)
        if self.mode == 'added':
            x = x + y
        elif self.mode == 'pooled':
            x = x * y.mean(dim=(2, 3), keepdim=True)
        elif self.mode == 'two norms':
            x = x - self.other(y)
        elif self.mode == 'two runs':
            x = x - self.other(self.conv(pixels.flip(1)))
        return x.mean(dim=(2, 3))


@pytest.mark.parametrize(('mode', 'left'), [('', 1), ('added', 2), ('pooled', 2), ('two norms', 2), ('two runs', 2)])
def test_nothing_is_folded_where_the_convolutions_output_is_used_twice(mode: str, left: int) -> None:
    model = Small(mode).eval()
    fused = fuse_model(model, (3, 16, 16))
    assert norms(fused) == left  # `other` is not run in the first
    torch.testing.assert_close(fused(images()), model(images()), rtol=1e-5, atol=1e-5)


class Shifted(Small):
    """Looks at the layout of its weights, as no model should, and answers otherwise, or not at all."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.conv.weight.is_contiguous():
            if self.mode == 'fails':
                raise RuntimeError('not in this layout')
            return super().forward(x) + torch.tensor([0.0, 0, 0, 1e-4])
        return super().forward(x)


@pytest.mark.parametrize(('mode', 'reason'), [('fails', 'not in this layout'), ('', r'would differ by 2\.\de-05')])
def test_a_teacher_that_fails_or_differs_runs_as_it_is(
    mode: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    ensemble = EnsembleTeacher([Shifted(mode), tiny(0, num_classes=4)])
    with caplog.at_level('INFO'):
        ensemble.optimize_for_inference()
    assert [running is teacher for running, teacher in zip(ensemble.running, ensemble.teachers, strict=True)] == [
        True,
        False,
    ]

    assert re.search(f'Teacher Shifted is not optimized, and runs as it is: .*{reason}', caplog.text)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_the_decision_is_made_in_float32_and_the_copy_has_the_teachers_dtype(dtype: torch.dtype) -> None:
    ensemble = EnsembleTeacher([tiny(0)]).to(dtype)
    expected = ensemble(images()).exp()
    ensemble.optimize_for_inference()
    assert {p.dtype for p in ensemble.running[0].parameters()} == {dtype}
    torch.testing.assert_close(ensemble(images()).exp(), expected, rtol=0, atol=0.02)


def test_copies_are_cast_with_the_ensemble_and_go_when_weights_are_loaded() -> None:
    ensemble, other = EnsembleTeacher([tiny(0)]), EnsembleTeacher([tiny(1)])
    ensemble.optimize_for_inference()
    copied = copy.deepcopy(ensemble)
    assert torch.equal(copied(images()), ensemble(images()))
    assert {p.dtype for p in copied.double().running[0].parameters()} == {torch.float64}
    ensemble.load_state_dict(other.state_dict())
    assert ensemble.running == list(ensemble.teachers)
    assert torch.equal(ensemble(images()), other(images()))


def test_the_copies_are_the_same_to_the_bit_whatever_has_been_drawn_before() -> None:
    states = []
    for drawn in (1, 7):
        ensemble = EnsembleTeacher([tiny(0), tiny(1, 'test_vit', img_size=64), tiny(2, 'test_efficientnet')])
        torch.rand(drawn)
        ensemble.optimize_for_inference()
        states.append([value for model in ensemble.running for value in model.state_dict().values()])
    assert all(map(torch.equal, *states))


@pytest.mark.slow  # compiles
def test_compiled_copies_predict_the_same_for_any_batch() -> None:
    ensemble = EnsembleTeacher([tiny(0), tiny(1)])
    expected = ensemble(images(5))
    ensemble.optimize_for_inference()
    ensemble.compile_each()
    for count in (3, 5, 2):
        torch.testing.assert_close(ensemble(images(5)[:count]), expected[:count], rtol=1e-3, atol=1e-3)


def test_a_published_architecture_is_folded_whole() -> None:
    with torch.device('cpu'):
        model = timm.create_model('seresnet18', num_classes=3).eval()
    assert norms(fuse_model(model, (3, 32, 32))) == 0
