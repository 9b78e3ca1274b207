"""The losses against plain NumPy, over class counts, ensemble sizes and dtypes."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from timm_mealv2 import Discriminator, DiscriminatorLoss
from timm_mealv2.losses import (
    SMALLEST_PROBABILITY,
    GradientReversal,
    dense_log_target,
    similarity_loss,
    sparse_similarity_loss,
)


def np_softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def np_cross_entropy(logits: np.ndarray, p: np.ndarray) -> float:
    return float(-(p * np.log(np_softmax(logits))).sum(axis=1).mean())


def np_entropy(p: np.ndarray) -> float:
    return float(-np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(axis=1).mean())


def np_dense(indices: np.ndarray, p: np.ndarray, num_classes: int) -> np.ndarray:
    dense = np.zeros((len(p), num_classes))
    for row in range(len(p)):
        others = [c for c in range(num_classes) if c not in indices[row]]
        if others:
            dense[row, others] = max(0.0, 1 - p[row].sum()) / len(others)
        dense[row, indices[row]] = p[row]
    return dense


def stored(num_classes: int, k: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    """The top K of a random target, rounded to float16 as the store does it."""
    p = torch.randn(rows, num_classes).mul(2).softmax(dim=1)
    top = p.topk(k, dim=1)
    return top.indices, top.values.half().float()


@pytest.mark.parametrize('num_classes', [2, 10, 1000, 21841])
@pytest.mark.parametrize('teachers', [1, 2, 3])
def test_similarity_is_soft_cross_entropy_with_the_mean_probability(num_classes: int, teachers: int) -> None:
    torch.manual_seed(0)
    z = torch.randn(teachers, 4, num_classes, dtype=torch.float64)
    s = torch.randn(4, num_classes, dtype=torch.float64, requires_grad=True)
    p = np.mean([np_softmax(logits) for logits in z.numpy()], axis=0)
    loss, entropy = similarity_loss(s, torch.from_numpy(p).log())
    loss.backward()
    assert loss.item() == pytest.approx(np_cross_entropy(s.detach().numpy(), p), rel=1e-12)
    assert entropy.item() == pytest.approx(np_entropy(p), rel=1e-12)
    np.testing.assert_allclose(s.grad.numpy(), (np_softmax(s.detach().numpy()) - p) / 4, rtol=0, atol=1e-15)


def test_loss_minus_entropy_is_the_divergence_and_zero_at_the_target() -> None:
    log_p = torch.randn(5, 7, dtype=torch.float64).log_softmax(dim=1)
    loss, entropy = similarity_loss(log_p + 3, log_p)
    assert (loss - entropy).item() == pytest.approx(0, abs=1e-14)
    s = torch.randn(5, 7, dtype=torch.float64)
    loss, entropy = similarity_loss(s, log_p)
    divergence = nn.functional.kl_div(s.log_softmax(dim=1), log_p, reduction='batchmean', log_target=True)
    assert (loss - entropy).item() == pytest.approx(divergence.item(), rel=1e-12)


def test_classes_of_probability_zero_count_nothing() -> None:
    loss, entropy = similarity_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, -float('inf')]]))
    assert loss.item() == pytest.approx(np.log(1 + np.e))
    assert entropy.item() == 0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_types_are_raised_and_float64_stays(dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    s = torch.randn(3, 10).to(dtype).requires_grad_()
    indices, p = stored(10, 3, rows=3)
    discriminator_loss = DiscriminatorLoss(Discriminator(10).to(expected))
    for losses in (
        similarity_loss(s, torch.randn(3, 10, dtype=expected).log_softmax(dim=1)),
        sparse_similarity_loss(s, indices, p.to(expected)),
        discriminator_loss.measure(s, torch.randn(3, 10).to(dtype)),
    ):
        assert [x.dtype for x in losses] == [expected, expected]
        s.grad = None
        losses[0].backward()
        assert s.grad.dtype == dtype
        assert s.grad.abs().sum() > 0


def test_only_the_student_receives_gradient() -> None:
    s, t = torch.randn(3, 10, requires_grad=True), torch.randn(3, 10, requires_grad=True)
    similarity_loss(s, t.log_softmax(dim=1))[0].backward()
    DiscriminatorLoss(Discriminator(10))(s, t).backward()
    assert t.grad is None


@pytest.mark.parametrize(('num_classes', 'k'), [(2, 1), (2, 2), (10, 1), (10, 9), (10, 10), (1000, 10), (21841, 5)])
def test_sparse_similarity_equals_that_with_the_dense_target(num_classes: int, k: int) -> None:
    torch.manual_seed(1)
    indices, p = stored(num_classes, k)
    p = p.double()
    s = torch.randn(6, num_classes, dtype=torch.float64, requires_grad=True)
    dense = np_dense(indices.numpy(), p.numpy(), num_classes)
    loss, entropy = sparse_similarity_loss(s, indices, p)
    loss.backward()
    assert loss.item() == pytest.approx(np_cross_entropy(s.detach().numpy(), dense), rel=1e-11)
    assert entropy.item() == pytest.approx(np_entropy(dense), rel=1e-11)
    q = np_softmax(s.detach().numpy())
    gradient = (q * dense.sum(axis=1, keepdims=True) - dense) / 6
    np.testing.assert_allclose(s.grad.numpy(), gradient, rtol=0, atol=1e-14)
    expected = np.log(np.maximum(dense, SMALLEST_PROBABILITY))
    np.testing.assert_allclose(dense_log_target(indices, p, num_classes).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize('rest', ['renormalize', 'drop'])
def test_the_rest_of_a_stored_label_is_shared_out_or_dropped(rest: str) -> None:
    torch.manual_seed(4)
    indices, p = stored(20, 4)
    dense = torch.zeros(6, 20, dtype=torch.float64).scatter(1, indices, p.double()).numpy()
    if rest == 'renormalize':
        dense /= dense.sum(axis=1, keepdims=True)
    s = torch.randn(6, 20, dtype=torch.float64)
    loss, entropy = sparse_similarity_loss(s, indices, p.double(), rest)
    assert loss.item() == pytest.approx(np_cross_entropy(s.numpy(), dense), rel=1e-11)
    assert entropy.item() == pytest.approx(np_entropy(dense), rel=1e-11)


def test_probabilities_that_sum_above_one_leave_nothing_over() -> None:
    indices, p = torch.tensor([[0, 1]]), torch.tensor([[0.7, 0.4]])
    s = torch.randn(1, 4)
    loss, entropy = sparse_similarity_loss(s, indices, p)
    torch.testing.assert_close(loss, -(p * s.log_softmax(dim=1)[:, :2]).sum())
    torch.testing.assert_close(entropy, -(p * p.log()).sum())
    rows = dense_log_target(indices, p, 4).exp()
    torch.testing.assert_close(rows, torch.tensor([[0.7, 0.4, SMALLEST_PROBABILITY, SMALLEST_PROBABILITY]]))


@pytest.mark.parametrize('num_classes', [2, 10, 200, 1000])
@pytest.mark.parametrize('final_relu', [False, True])
def test_discriminator_loss_is_binary_cross_entropy_over_both_columns(num_classes: int, final_relu: bool) -> None:
    torch.manual_seed(2)
    discriminator = Discriminator(num_classes, final_relu=final_relu).double()
    s, t = torch.randn(2, 5, num_classes, dtype=torch.float64)
    x = np.concatenate([discriminator(rows).detach().numpy() for rows in (s, t)])
    labels = np.array([[1, 0]] * 5 + [[0, 1]] * 5)
    q = 1 / (1 + np.exp(-x))
    expected = -(labels * np.log(q) + (1 - labels) * np.log(1 - q)).mean()
    loss, accuracy = DiscriminatorLoss(discriminator).measure(s, t)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert DiscriminatorLoss(discriminator)(s, t).item() == loss.item()
    right = [row[0] >= row[1] for row in x[:5]] + [row[1] > row[0] for row in x[5:]]
    assert accuracy.item() == pytest.approx(np.mean(right))
    assert not accuracy.requires_grad


def test_a_dead_official_discriminator_stays_at_ln_2_and_half_right() -> None:
    discriminator = Discriminator(10, final_relu=True)
    nn.init.zeros_(discriminator.fc3.weight)
    nn.init.constant_(discriminator.fc3.bias, -1.0)
    loss, accuracy = DiscriminatorLoss(discriminator).measure(torch.randn(4, 10), torch.randn(4, 10))
    assert loss.item() == pytest.approx(np.log(2))
    assert accuracy.item() == 0.5


def test_autocast_does_not_touch_the_discriminator() -> None:
    discriminator_loss = DiscriminatorLoss(Discriminator(100))
    s, t = torch.randn(2, 8, 100)
    expected = discriminator_loss(s, t)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(discriminator_loss(s, t), expected)


def test_rows_of_different_shapes_are_a_programming_error() -> None:
    with pytest.raises(AssertionError):
        DiscriminatorLoss(Discriminator(4))(torch.randn(3, 4), torch.randn(2, 4))


def test_a_class_of_probability_zero_adds_nothing_even_where_the_student_excludes_it() -> None:
    s = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True)
    p = torch.tensor([[0.25, 0.75, 0.0]])
    expected = -(p[:, :2] * s[:, :2].log_softmax(dim=1)).sum()
    for loss, _ in (similarity_loss(s, p.log()), sparse_similarity_loss(s, torch.tensor([[0, 1]]), p[:, :2])):
        torch.testing.assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(loss, s)
        assert gradient.isfinite().all()


def test_an_excluded_class_leaves_the_discriminators_loss_finite() -> None:
    s, t = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
    discriminator_loss = DiscriminatorLoss(Discriminator(10))
    loss = discriminator_loss(s, t.index_fill(1, torch.tensor(3), -torch.inf))
    loss.backward()
    assert loss.isfinite()
    assert s.grad.isfinite().all()
    floor = t.index_fill(1, torch.tensor(3), -torch.inf).logsumexp(dim=1) + np.log(2.0**-24)
    torch.testing.assert_close(loss, discriminator_loss(s, t.index_copy(1, torch.tensor([3]), floor[:, None])))


# The discriminator


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
def test_the_discriminators_layers_shrink_by_the_reduction_and_never_below_two(
    num_classes: int, sizes: list[int]
) -> None:
    discriminator = Discriminator(num_classes)
    assert layer_sizes(discriminator) == sizes
    assert discriminator(torch.randn(3, num_classes)).shape == (3, 2)


def test_its_parameter_count_at_1000_classes_is_the_published_one() -> None:
    assert sum(parameter.numel() for parameter in Discriminator(1000).parameters()) == 127_047


def test_the_discriminators_reduction_is_adjustable() -> None:
    assert layer_sizes(Discriminator(100, reduction=4)) == [100, 25, 6, 2]


def test_its_initial_distribution_is_that_of_1x1_convolutions() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(200)
    torch.manual_seed(0)
    for layer in (discriminator.fc1, discriminator.fc2, discriminator.fc3):
        convolution = nn.Conv2d(layer.in_features, layer.out_features, 1)
        assert torch.equal(layer.weight, convolution.weight[:, :, 0, 0])
        assert torch.equal(layer.bias, convolution.bias)


@pytest.mark.parametrize('final_relu', [False, True])
def test_its_output_is_three_linear_layers_with_relu_between(final_relu: bool) -> None:
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


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_reversal_is_the_identity_with_the_exact_negative_gradient(dtype: torch.dtype) -> None:
    x = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    weight = torch.randn(5, 3, dtype=dtype)
    y = GradientReversal()(x)
    (y * weight).sum().backward()
    assert torch.equal(y, x)
    assert y.dtype == dtype
    assert torch.equal(x.grad, -weight)
