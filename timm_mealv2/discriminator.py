"""The network that tells student outputs from teacher outputs, and the reversal of its gradient."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mealv2.errors import UserError


class Discriminator(nn.Module):
    """Tells whether a row of final outputs comes from the student or from the teachers (MEAL V2, arXiv 2009.08453).

    Three linear layers, `num_classes -> max(2, num_classes // reduction) -> max(2, num_classes // reduction**2) -> 2`,
    with ReLU between them. The official code writes them as 1x1 convolutions on a [B, C, 1, 1] map: the same function,
    parameter count (127,047 at 1000 classes) and initial distribution, as torch draws both layers alike. The floor of
    two units makes the form exist for any class count; from 128 classes up it never acts and the sizes are the official
    ones.

    Column 0 of the output is the logit of "student", column 1 that of "teacher".

    Args:
        num_classes: Width C of the rows to tell apart, at least 2.
        reduction: Factor by which each hidden layer is narrower than the layer before.
        final_relu: ReLU on the output as well, the official form. It keeps the binary cross-entropy at or above
            ln(2)/2, because the column that should be negative cannot be, and a column that is negative for every row
            is dead: zero, and without gradient.

    Raises:
        UserError: If `num_classes` is below 2 or `reduction` below 1.
    """

    def __init__(self, num_classes: int, reduction: int = 8, final_relu: bool = False) -> None:
        super().__init__()
        if num_classes < 2:
            raise UserError(
                f'Discriminator needs num_classes >= 2, got {num_classes}: one output cannot be told apart.'
            )
        if reduction < 1:
            raise UserError(f'Discriminator needs reduction >= 1, got {reduction}: the official value is 8.')
        self.final_relu = final_relu
        width1, width2 = max(2, num_classes // reduction), max(2, num_classes // reduction**2)
        self.fc1 = nn.Linear(num_classes, width1)
        self.fc2 = nn.Linear(width1, width2)
        self.fc3 = nn.Linear(width2, 2)

    def forward(self, logits: Tensor) -> Tensor:
        """Map rows of outputs [B, C] to the two logits [B, 2]: student, teacher."""
        x = F.relu(self.fc1(logits))
        x = F.relu(self.fc2(x))
        x = self.fc3(x)
        return F.relu(x) if self.final_relu else x


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return -grad_output


class GradientReversal(nn.Module):
    """Identity whose gradient is the exact negative of the incoming one (gradient reversal, arXiv 1409.7495).

    Between student and discriminator it makes one backward pass train both against each other: the discriminator goes
    on minimising its loss, the student maximises it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, of any shape and dtype, unchanged."""
        reversed_x: Tensor = _ReverseGradient.apply(x)
        return reversed_x
