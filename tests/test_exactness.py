"""`MealV2Task` against the formulas of MEAL V2 written out in NumPy, forward and backward, in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from timm_mealv2 import Discriminator, DiscriminatorLoss, MealV2Task

PIXELS = 3 * 4 * 4
HIDDEN = 32
BATCH = 8


class Classifier(nn.Module):
    """Two linear layers on flat pixels: a student or teacher whose gradient can be written down."""

    def __init__(self, num_classes: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.num_classes = num_classes
        self.in_chans = 3
        self.pretrained_cfg = {'mean': (0.5, 0.5, 0.5), 'std': (0.25, 0.25, 0.25), 'input_size': (3, 4, 4)}
        self.fc1 = nn.Linear(PIXELS, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, num_classes)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x.flatten(1)).relu())


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy().copy() for name, parameter in module.named_parameters()}


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def layers_forward(weights: dict[str, np.ndarray], x: np.ndarray, count: int, final_relu: bool) -> list[np.ndarray]:
    """Outputs of every layer, the input first; ReLU between the layers and, if asked for, after the last."""
    outputs = [x]
    for number in range(1, count + 1):
        x = x @ weights[f'fc{number}.weight'].T + weights[f'fc{number}.bias']
        if number < count or final_relu:
            x = np.maximum(x, 0)
        outputs.append(x)
    return outputs


def layers_backward(
    weights: dict[str, np.ndarray], outputs: list[np.ndarray], gradient: np.ndarray, final_relu: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Gradients of the weights, and of the input."""
    gradients = {}
    count = len(outputs) - 1
    for number in range(count, 0, -1):
        if number < count or final_relu:
            gradient = gradient * (outputs[number] > 0)
        gradients[f'fc{number}.weight'] = gradient.T @ outputs[number - 1]
        gradients[f'fc{number}.bias'] = gradient.sum(axis=0)
        gradient = gradient @ weights[f'fc{number}.weight']
    return gradients, gradient


class Reference:
    """The official training step, and the paper's adversarial one, in NumPy."""

    def __init__(
        self,
        student: dict[str, np.ndarray],
        discriminator: dict[str, np.ndarray],
        teachers: list[dict[str, np.ndarray]],
        adversarial: bool,
    ) -> None:
        self.weights = {'student': student, 'discriminator': discriminator}
        self.velocity = {part: {name: np.zeros_like(w) for name, w in ws.items()} for part, ws in self.weights.items()}
        self.teachers = teachers
        self.final_relu = not adversarial
        self.sign = -1 if adversarial else 1

    def gradients(self, x: np.ndarray) -> tuple[dict[str, float], dict[str, dict[str, np.ndarray]]]:
        z = [layers_forward(teacher, x, 2, False)[-1] for teacher in self.teachers]
        p = sum(softmax(logits) for logits in z) / len(z)
        student = layers_forward(self.weights['student'], x, 2, False)
        s = student[-1]
        similarity = -(p * (s - np.log(np.exp(s).sum(axis=1, keepdims=True)))).sum(axis=1).mean()
        ds = (softmax(s) - p) / len(s)

        rows = np.concatenate([s, sum(z) / len(z)])
        labels = np.repeat([[1.0, 0.0], [0.0, 1.0]], len(s), axis=0)
        judged = layers_forward(self.weights['discriminator'], rows, 3, self.final_relu)
        d = judged[-1]
        loss = -(labels * np.log(sigmoid(d)) + (1 - labels) * np.log(1 - sigmoid(d))).mean()
        d_discriminator, d_rows = layers_backward(
            self.weights['discriminator'], judged, (sigmoid(d) - labels) / d.size, self.final_relu
        )
        ds = ds + self.sign * d_rows[: len(s)]
        d_student, _ = layers_backward(self.weights['student'], student, ds, False)
        losses = {'loss': similarity + loss, 'similarity_loss': similarity, 'discriminator_loss': loss}
        losses['kl'] = similarity + (p * np.log(p)).sum(axis=1).mean()
        return losses, {'student': d_student, 'discriminator': d_discriminator}

    def update(self, gradients: dict[str, dict[str, np.ndarray]], lr: float, momentum: float) -> None:
        for part, weights in self.weights.items():
            for name in weights:
                self.velocity[part][name] = momentum * self.velocity[part][name] + gradients[part][name]
                weights[name] = weights[name] - lr * self.velocity[part][name]


def assert_agree(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    difference, scale = np.abs(actual - expected).max(), np.abs(expected).max()
    assert difference <= 1e-10 * scale, f'{what}: {difference} > 1e-10 * {scale}'


@pytest.mark.parametrize('mode', ['official', 'adversarial'])
@pytest.mark.parametrize('num_classes', [200, 1000])
def test_fifty_sgd_steps_are_the_written_out_arithmetic(num_classes: int, mode: str) -> None:
    student = Classifier(num_classes, seed=0)
    teachers = [Classifier(num_classes, seed=seed) for seed in (1, 2)]
    torch.manual_seed(3)
    task = MealV2Task(student, teachers, discriminator_mode=mode, verbose=False)
    parts = {'student': student, 'discriminator': task.discriminator}
    reference = Reference(
        arrays(student), arrays(task.discriminator), [arrays(teacher) for teacher in teachers], mode == 'adversarial'
    )
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01, momentum=0.9, weight_decay=0)
    generator = torch.Generator().manual_seed(4)
    learnt = False
    for step in range(50):
        x = 2 * torch.randn(BATCH, 3, 4, 4, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        result = task(x, torch.full((BATCH,), -1))
        result['loss'].backward()
        losses, gradients = reference.gradients(x.flatten(1).numpy())
        for name, value in losses.items():
            assert_agree(result[name].detach().numpy(), np.asarray(value), f'step {step} {name}')
        for part, module in parts.items():
            for name, parameter in module.named_parameters():
                assert_agree(parameter.grad.numpy(), gradients[part][name], f'step {step} gradient of {part} {name}')
        optimizer.step()
        reference.update(gradients, lr=0.01, momentum=0.9)
        for part, module in parts.items():
            for name, weight in arrays(module).items():
                assert_agree(weight, reference.weights[part][name], f'step {step} {part} {name}')
        learnt |= bool(np.abs(gradients['discriminator']['fc1.weight']).max() > 0)
    assert learnt, 'the discriminator was dead: nothing was compared'


@pytest.mark.parametrize(('mode', 'sign'), [('official', 1), ('adversarial', -1)])
def test_the_modes_give_the_student_the_gradient_and_its_exact_reverse(mode: str, sign: int) -> None:
    student = Classifier(200, seed=0)
    torch.manual_seed(5)
    task = MealV2Task(student, [Classifier(200, seed=1)], discriminator_mode=mode, verbose=False)
    x = torch.randn(BATCH, 3, 4, 4, dtype=torch.float64)
    rows = torch.randn(BATCH, 200, dtype=torch.float64)

    plain = DiscriminatorLoss(task.discriminator)(student(x), rows)
    parameters = [*student.parameters(), *task.discriminator.parameters()]
    expected = torch.autograd.grad(plain, parameters)
    _, loss, _ = task.get_trainable_module()(x, rows)
    actual = torch.autograd.grad(loss, parameters)

    assert torch.equal(loss, plain)
    of_student = len(list(student.parameters()))
    assert all(torch.equal(a, sign * b) for a, b in zip(actual[:of_student], expected[:of_student], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(actual[of_student:], expected[of_student:], strict=True))
    assert expected[0].abs().max() > 0


def dead_outputs(discriminator: nn.Module) -> int:
    """Outputs of a discriminator that no row moves: their bias gets no gradient."""
    s, t = torch.randn(2, 32, discriminator.fc1.in_features).mul(3)
    gradient = torch.autograd.grad(DiscriminatorLoss(discriminator)(s, t), discriminator.fc3.bias)[0]
    return int((gradient == 0).sum())


def test_only_the_official_discriminator_can_be_dead_from_the_start() -> None:
    dead = {True: 0, False: 0}
    for final_relu in dead:
        for seed in range(100):
            torch.manual_seed(seed)
            dead[final_relu] += dead_outputs(Discriminator(1000, final_relu=final_relu)) > 0
    assert dead[True] > 0
    assert dead[False] == 0


def test_a_dead_final_relu_stops_the_official_mode_and_not_the_adversarial_one() -> None:
    x = torch.randn(BATCH, 3, 4, 4, dtype=torch.float64)
    moved = {}
    for mode in ('official', 'adversarial'):
        task = MealV2Task(Classifier(200, seed=0), [Classifier(200, seed=1)], discriminator_mode=mode, verbose=False)
        nn.init.constant_(task.discriminator.fc3.bias, -10)  # below whatever the rows give
        task(x, torch.zeros(BATCH).long())['loss'].backward()
        moved[mode] = all(parameter.grad.abs().max() > 0 for parameter in task.discriminator.fc3.parameters())
    assert moved == {'official': False, 'adversarial': True}
