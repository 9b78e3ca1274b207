"""Add-ons of published distillation methods, as losses that take the place of MEAL V2's similarity loss.

Each has the signature of `timm_mealv2.losses.similarity_loss`: logits of the student [B, C] and the log of the
teachers' mean probability [B, C] give the loss and the target's entropy.
"""

import functools
import math
from collections.abc import Callable, Sequence

import timm
import torch
from data_sets import FASHION
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mealv2.losses import similarity_loss

TEMPERATURES = tuple(step / 20 for step in range(10, 41))
"""From 0.5 to 2, for calibration."""

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _correlation(x: Tensor, y: Tensor, dim: int) -> Tensor:
    x, y = x - x.mean(dim, keepdim=True), y - y.mean(dim, keepdim=True)
    return torch.cosine_similarity(x, y, dim=dim).mean()


def dist(weight: float, logits: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Add DIST's relation terms (arXiv 2205.10536): correlation of each image's and of each class's probabilities."""
    loss, entropy = similarity_loss(logits, log_p)
    q, p = logits.softmax(dim=1), log_p.exp()
    return loss + weight * (2 - _correlation(q, p, 1) - _correlation(q, p, 0)), entropy


def standardized(temperature: float, logits: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Standardize the logits of both sides image by image (arXiv 2403.01427); times the squared temperature."""
    z, t = (
        (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True) / temperature for x in (logits, log_p.detach())
    )
    loss, entropy = similarity_loss(z, t.log_softmax(dim=1))
    return temperature**2 * loss, entropy


def weighted(certain: bool, logits: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Weight images by how certain, or by how uncertain, the teachers are: the entropy's distance from one end."""
    entropy = torch.special.entr(log_p.exp()).sum(dim=1)
    weight = math.log(log_p.shape[1]) - entropy if certain else entropy
    loss = -(log_p.exp() * logits.log_softmax(dim=1)).sum(dim=1)
    return (loss * weight).sum() / weight.sum(), entropy.mean()


LOSSES: dict[str, Loss] = {
    'dist_0.5': functools.partial(dist, 0.5),
    'dist_2': functools.partial(dist, 2.0),
    'standardized': functools.partial(standardized, 2.0),
    'certain': functools.partial(weighted, True),
    'uncertain': functools.partial(weighted, False),
}


class Calibrated(nn.Module):
    """The mean probability of teachers, each at a temperature of its own."""

    def __init__(self, teachers: nn.ModuleList, temperatures: Sequence[float]) -> None:
        super().__init__()
        self.teachers = teachers
        self.temperatures = temperatures
        self.num_classes = 10
        self.in_chans = 1
        self.pretrained_cfg = teachers[0].pretrained_cfg

    def forward(self, images: Tensor) -> Tensor:
        """Return the log of the mean probability [B, C] for images [B, 1, H, W]."""
        logits = [teacher(images) / t for teacher, t in zip(self.teachers, self.temperatures, strict=True)]
        return torch.stack(logits).log_softmax(dim=2).logsumexp(dim=0) - math.log(len(logits))


def calibrated() -> Calibrated:
    """Find each teacher's temperature of the least loss on the tuning images.

    Made while a study runs, from the repository's root: `--teachers python:studies.ledger:calibrated`.
    """
    from run import images, log_probabilities  # run.py imports this file

    teachers = timm.create_model(FASHION.teacher, pretrained=True).teachers
    labels = images(FASHION, 'tuning')[1]
    temperatures = []
    for teacher in teachers:
        log_p = log_probabilities(teacher, FASHION, 'tuning')
        losses = {float(F.cross_entropy(log_p / t, labels)): t for t in TEMPERATURES}
        temperatures.append(losses[min(losses)])
    return Calibrated(teachers, temperatures)
