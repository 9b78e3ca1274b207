"""The losses of MEAL V2: similarity to the teachers' mean probability, and the discriminator with its loss.

Half types are raised to float32 before any softmax, sum over classes or binary cross-entropy; float64 stays float64.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST_PROBABILITY = 2.0**-24
"""The smallest number above zero that float16 holds, and hence a record of the soft-label store."""

LABEL_RESTS = ('uniform', 'renormalize', 'drop')
"""What becomes of the probability that a stored label's K classes leave over; see `sparse_similarity_loss`."""


def at_least_float32(x: Tensor) -> Tensor:
    """Raise half types to float32; leave float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def similarity_loss(logits: Tensor, target_log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Soft cross-entropy of the student with a dense target, and that target's entropy.

    With p = exp(target_log_probs) and q = softmax(logits) the loss is the mean over the batch of -sum_c p_c log q_c
    = KL(p || q) + H(p), at temperature 1. Loss minus entropy is the KL divergence.

    Args:
        logits: Student logits [B, C]; receive the gradient.
        target_log_probs: Log of the target probabilities [B, C], -inf for zero; receive none.

    Returns:
        The loss and the mean entropy H(p) in nats: two scalars, at least float32.
    """
    p = at_least_float32(target_log_probs.detach()).exp()
    log_q = F.log_softmax(at_least_float32(logits), dim=1)
    return -_times(p, log_q).sum(dim=1).mean(), torch.special.entr(p).sum(dim=1).mean()


def sparse_similarity_loss(
    logits: Tensor, indices: Tensor, probabilities: Tensor, rest: str = 'uniform'
) -> tuple[Tensor, Tensor]:
    """`similarity_loss` for a target of which K probabilities per row are stored, without its dense form.

    What the K leave over, r = max(0, 1 - sum_k p_k), is with `rest`
    - 'uniform': spread evenly over the other C - K classes (the marginal smoothing of FKD, arXiv 2112.01528):
      -sum_k p_k log q_k - r / (C - K) * (sum_c log q_c - sum_k log q_k); at K = C nothing is spread;
    - 'renormalize': shared out to the K in proportion, -sum_k p_k / sum_j p_j log q_k;
    - 'drop': left out, -sum_k p_k log q_k; such a target does not sum to 1.

    Args:
        logits: Student logits [B, C]; receive the gradient.
        indices: Class indices [B, K], int64, different ones in a row.
        probabilities: Their probabilities [B, K]; receive no gradient.
        rest: One of `LABEL_RESTS`.

    Returns:
        The loss and the mean entropy of that very target in nats: two scalars, at least float32.
    """
    log_q = F.log_softmax(at_least_float32(logits), dim=1)
    p = probabilities.detach().to(log_q.dtype)
    if rest == 'renormalize':
        p = p / p.sum(dim=1, keepdim=True)
    log_q_k = log_q.gather(1, indices)
    loss = -_times(p, log_q_k).sum(dim=1)
    entropy = torch.special.entr(p).sum(dim=1)
    if rest == 'uniform':
        others = logits.shape[1] - indices.shape[1]
        share = _share(p, others)
        loss = loss - _times(share, log_q.sum(dim=1) - log_q_k.sum(dim=1))
        entropy = entropy + others * torch.special.entr(share)
    return loss.mean(), entropy.mean()


def dense_log_target(indices: Tensor, probabilities: Tensor, num_classes: int) -> Tensor:
    """Log of the dense target [B, C] that `sparse_similarity_loss` describes ('uniform'), as discriminator rows.

    Probabilities are floored at `SMALLEST_PROBABILITY`, so that the rows are finite. At least float32.

    Args:
        indices: Class indices [B, K], int64, different ones in a row.
        probabilities: Their probabilities [B, K].
        num_classes: C.
    """
    p = at_least_float32(probabilities.detach())
    share = _share(p, num_classes - indices.shape[1])
    dense = share[:, None].repeat(1, num_classes).scatter(1, indices, p)
    return dense.clamp(min=SMALLEST_PROBABILITY).log()


def _times(p: Tensor, log_q: Tensor) -> Tensor:
    """Return p log q, which is 0 where p is 0, also at q = 0."""
    return (p * log_q).masked_fill(p == 0, 0)


def _share(p: Tensor, others: int) -> Tensor:
    """Probability [B] of each of the `others` classes that share what the stored p [B, K] leave over."""
    return (1 - p.sum(dim=1)).clamp(min=0) / max(others, 1)


class Discriminator(nn.Module):
    """Tells whether a row of final outputs comes from the student or from the teachers (MEAL V2, arXiv 2009.08453).

    Three linear layers, `num_classes -> max(2, num_classes // reduction) -> max(2, num_classes // reduction**2) -> 2`,
    with ReLU between them. The official code writes them as 1x1 convolutions on a [B, C, 1, 1] map: the same function,
    parameter count (127,047 at 1000 classes) and initial distribution, as torch draws both layers alike. The floor of
    two units makes the form exist for any class count; from 128 classes up it never acts and the sizes are the official
    ones.

    Column 0 of the output is the logit of "student", column 1 that of "teacher".

    Args:
        num_classes: Width C of the rows to tell apart.
        reduction: Factor by which each hidden layer is narrower than the layer before.
        final_relu: ReLU on the output as well, the official form. It keeps the binary cross-entropy at or above
            ln(2)/2, because the column that should be negative cannot be, and a column that is negative for every row
            is dead: zero, and without gradient.
    """

    def __init__(self, num_classes: int, reduction: int = 8, final_relu: bool = False) -> None:
        super().__init__()
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


class DiscriminatorLoss(nn.Module):
    """Binary cross-entropy of a discriminator that tells student rows from teacher rows.

    The rows [student; teacher] go through the discriminator together; with labels [1, 0] for student rows and [0, 1]
    for teacher rows, the loss is the mean of the binary cross-entropy with logits over both columns and all 2B rows.
    Its gradient reaches the discriminator and the student, never the teachers. The student's gradient has the loss's
    own sign, which makes the student easier to tell apart (the official form); put a `GradientReversal` before it
    for an adversary.

    A logit of -inf, of a class that a model leaves out, enters as one of probability `SMALLEST_PROBABILITY`.

    Computed in the dtype of the discriminator's weights whatever autocast says, the cross-entropy in at least float32.

    Args:
        discriminator: Maps [rows, C] to [rows, 2], as `Discriminator` does.
    """

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def measure(self, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and, from the same forward pass, the discriminator's accuracy (0..1, without gradient).

        The accuracy is the fraction of the 2B rows whose larger output is the right one. Equal outputs count as
        "student", so a discriminator whose outputs are both dead has an accuracy of 0.5.

        Args:
            student_logits: Rows [B, C] of the student; receive the gradient.
            teacher_logits: Rows [B, C] of the teachers; receive none.
        """
        assert student_logits.shape == teacher_logits.shape, f'{student_logits.shape} != {teacher_logits.shape}'
        dtype = next(self.discriminator.parameters()).dtype
        rows = torch.cat([student_logits.to(dtype), teacher_logits.detach().to(dtype)])
        floor = rows.detach().logsumexp(dim=1, keepdim=True) + math.log(SMALLEST_PROBABILITY)
        rows = torch.where(rows == -math.inf, floor, rows)
        with torch.autocast(rows.device.type, enabled=False):
            output = at_least_float32(self.discriminator(rows))
        is_teacher = torch.arange(len(rows), device=rows.device) >= len(student_logits)
        labels = torch.stack([~is_teacher, is_teacher], dim=1).to(output.dtype)
        accuracy = (output.detach().argmax(dim=1) == is_teacher).to(output.dtype).mean()
        return F.binary_cross_entropy_with_logits(output, labels), accuracy

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return the loss, a scalar; arguments as for `measure`."""
        return self.measure(student_logits, teacher_logits)[0]
