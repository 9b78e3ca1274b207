"""The discriminator's sizes and form, and the reversal of its gradient."""

import pytest
import torch
from torch import nn

from timm_mealv2 import Discriminator
from timm_mealv2.discriminator import GradientReversal
from timm_mealv2.errors import UserError


def layer_sizes(discriminator: nn.Module) -> list[int]:
    layers = [module for module in discriminator.modules() if isinstance(module, nn.Linear)]
    return [layers[0].in_features, *(layer.out_features for layer in layers)]


@pytest.mark.parametrize(
    ('num_classes', 'sizes'),
    [
        (2, [2, 2, 2, 2]),
        (10, [10, 2, 2, 2]),
        (63, [63, 7, 2, 2]),
        (128, [128, 16, 2, 2]),
        (200, [200, 25, 3, 2]),
        (1000, [1000, 125, 15, 2]),
        (21841, [21841, 2730, 341, 2]),
    ],
)
def test_layers_shrink_by_the_reduction_and_never_below_two(num_classes: int, sizes: list[int]) -> None:
    discriminator = Discriminator(num_classes)
    assert layer_sizes(discriminator) == sizes
    assert discriminator(torch.randn(3, num_classes)).shape == (3, 2)


def test_parameter_count_at_1000_classes_is_the_published_one() -> None:
    assert sum(parameter.numel() for parameter in Discriminator(1000).parameters()) == 127_047


def test_reduction_is_adjustable() -> None:
    assert layer_sizes(Discriminator(100, reduction=4)) == [100, 25, 6, 2]


def test_initial_distribution_is_that_of_1x1_convolutions() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(200)
    torch.manual_seed(0)
    for layer in (discriminator.fc1, discriminator.fc2, discriminator.fc3):
        convolution = nn.Conv2d(layer.in_features, layer.out_features, 1)
        assert torch.equal(layer.weight, convolution.weight[:, :, 0, 0])
        assert torch.equal(layer.bias, convolution.bias)


@pytest.mark.parametrize('final_relu', [False, True])
def test_output_is_three_linear_layers_with_relu_between(final_relu: bool) -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(200, final_relu=final_relu).double()
    x = 30 * torch.randn(64, 200, dtype=torch.float64)
    expected = x
    for index, layer in enumerate((discriminator.fc1, discriminator.fc2, discriminator.fc3)):
        expected = expected @ layer.weight.T + layer.bias
        if index < 2 or final_relu:
            expected = expected * (expected > 0)
    torch.testing.assert_close(discriminator(x), expected, rtol=1e-12, atol=1e-14)
    assert bool((discriminator(x) >= 0).all()) == final_relu


@pytest.mark.parametrize('arguments', [{'num_classes': 1}, {'num_classes': 0}, {'num_classes': 10, 'reduction': 0}])
def test_impossible_sizes_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(UserError, match='Discriminator needs'):
        Discriminator(**arguments)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_reversal_is_the_identity_with_the_exact_negative_gradient(dtype: torch.dtype) -> None:
    x = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    weight = torch.randn(5, 3, dtype=dtype)
    y = GradientReversal()(x)
    (y * weight).sum().backward()
    assert torch.equal(y, x)
    assert y.dtype == dtype
    assert torch.equal(x.grad, -weight)
