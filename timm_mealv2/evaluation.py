"""How good models are: accuracy, calibration, and agreement with a reference such as the ensemble of the teachers."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from timm.task import evaluation_sample_limit
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mealv2.data.normalize import channel_stats, renormalize
from timm_mealv2.errors import UserError
from timm_mealv2.losses import at_least_float32
from timm_mealv2.models.ensemble import EnsembleTeacher

CALIBRATION_BINS = 15

Metrics = dict[str, float]


@torch.inference_mode()
def evaluate(
    models: Mapping[str, nn.Module],
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | None = None,
    reference: str | None = None,
    members: bool = False,
    data_config: Mapping[str, Any] | None = None,
    distributed: bool = False,
    calibration: bool = False,
    on_output: Callable[[str, Tensor, Tensor], None] | None = None,
) -> dict[str, Metrics]:
    """Evaluate models in one pass over a loader, all on the same pixels.

    Every model is in eval mode meanwhile and in its own mode afterwards. What a distributed sampler added to even out
    the processes does not count. Accuracy leaves out images whose label is -1 (unknown). For mixed precision, call
    this under `torch.autocast`; for a bar, pass `tqdm(loader)`.

    Args:
        models: Name -> model on `device`, [B, C, H, W] -> logits (or log-probabilities) [B, classes].
        loader: Gives (images, class indices [B]).
        device: Where the batches go and the sums are kept; that of the first model if None.
        reference: Name of the model, say the ensemble, that the others are compared with.
        members: Evaluate the teachers of each `EnsembleTeacher` too, as 'teacher NAME'. Each teacher runs once: the
            ensemble's prediction is made of theirs.
        data_config: What the loader's pixels are normalized with ('mean', 'std'). A model whose `pretrained_cfg` says
            otherwise then gets them renormalized; without `data_config` every model gets them as they are.
        distributed: Sum over the processes of the default group.
        calibration: Add 'nll' and 'ece'.
        on_output: Called with each model's name, output [B, classes] and class indices [B] for each batch, unpadded.

    Returns:
        Name -> metrics, means over the images. With labels: 'loss' (cross-entropy, nats), 'top1' and 'top5' (percent);
        with `calibration` 'nll' (that loss by its other name) and 'ece' (expected calibration error, percent, over 15
        equal bins of the largest probability). For all but the reference, labels or not: 'agreement' (percent of
        images with the same top-1) and 'kl' (KL(p_reference || p_model), nats). Always 'samples', the number of images.
        A model that predicts NaN for an image has NaN in place of a figure.

    Raises:
        UserError: If there is no image, a class count other than the reference's, or a label beyond a model's classes.
    """
    parameters = (parameter for model in models.values() for parameter in model.parameters())
    device = device or next((parameter.device for parameter in parameters), torch.device('cpu'))
    names: list[str] = []
    for name, model in models.items():
        names += [name, *(_member_names(model) if members and isinstance(model, EnsembleTeacher) else ())]
    meters = {name: _Meter(device, calibration) for name in names}
    remaining = evaluation_sample_limit(getattr(loader, 'iterable', loader))  # of the loader in a bar of tqdm's
    with _eval_mode(models.values()):
        for x, target in loader:
            x, target = x.to(device, non_blocking=True), target.to(device, non_blocking=True)
            outputs: dict[str, Tensor] = {}
            for name, model in models.items():
                pixels = _pixels_for(model, x, data_config)
                if members and isinstance(model, EnsembleTeacher):
                    logits = model.teacher_logits(pixels).to(device, non_blocking=True)
                    outputs |= {name: _mean_log_prob(logits, model.weights)}
                    outputs |= dict(zip(_member_names(model), logits, strict=True))
                else:
                    outputs[name] = at_least_float32(model(pixels)).to(device, non_blocking=True)
            if remaining is not None:  # the padding is at the end; the models run on it as other processes wait
                target = target[:remaining]
                outputs = {name: output[:remaining] for name, output in outputs.items()}
                remaining -= len(target)
            if not len(target):
                continue
            for name, output in outputs.items():
                meters[name].add(output, target)
                if reference is not None and name != reference:
                    meters[name].compare(output, outputs[reference], name, reference)
                if on_output is not None:
                    on_output(name, output, target)
    return {name: meter.compute(name, distributed) for name, meter in meters.items()}


def metrics_as_json(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return `rows` as JSON; it knows no NaN and no infinity, which become null."""

    def finite(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({name: {key: finite(row[key]) for key in row} for name, row in rows.items()}, indent=2) + '\n'


def _member_names(ensemble: EnsembleTeacher) -> list[str]:
    """The names of the teachers' rows, with a number where two have one name."""
    repeated = {name for name in ensemble.names if ensemble.names.count(name) > 1}
    return [
        f'teacher {name} ({number})' if name in repeated else f'teacher {name}'
        for number, name in enumerate(ensemble.names, 1)
    ]


def _pixels_for(model: nn.Module, x: Tensor, data_config: Mapping[str, Any] | None) -> Tensor:
    """`x` as the model takes it: in its dtype, and in its normalization where the loader's is known too."""
    cfg = getattr(unwrap_model(model), 'pretrained_cfg', None)
    if data_config is not None and cfg:
        x = renormalize(x, *channel_stats(data_config, x.shape[1]), *channel_stats(cfg, x.shape[1]))
    if isinstance(model, EnsembleTeacher):  # whose teachers may have several
        return x
    return x.to(next((parameter.dtype for parameter in model.parameters()), x.dtype))


def _mean_log_prob(logits: Tensor, weights: tuple[float, ...]) -> Tensor:
    """The log of the mean probability [B, C] of teachers with logits [N, B, C]; one of weight 0 counts for nothing."""
    used = [number for number, weight in enumerate(weights) if weight]
    log_weights = logits.new_tensor([weights[number] for number in used]).log()[:, None, None]
    return torch.logsumexp(F.log_softmax(logits[used], dim=2) + log_weights, dim=0)


@contextmanager
def _eval_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    """Put models in eval mode for a block; afterwards each of their modules is in its own mode again."""
    modules = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modules:
            if module.training != training:  # a frozen teacher's mode cannot be set
                module.training = training


def calibration_bins(confidence: Tensor) -> Tensor:
    """Return which of `CALIBRATION_BINS` equal bins of (0, 1] each largest probability [N] falls in, counted from 0."""
    return (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1


class _Meter:
    """The sums of one model, on the device: a batch is added without waiting for it."""

    def __init__(self, device: torch.device, calibration: bool) -> None:
        dtype = torch.float32 if device.type == 'mps' else torch.float64
        self.calibration, self.classes = calibration, 0
        self.highest = torch.full((), -1, device=device)  # label
        # Images; those with a label, their loss, top-1 and top-5; those compared, their equal top-1 and KL divergence.
        self.sums = torch.zeros(8, dtype=dtype, device=device)
        self.bins = torch.zeros(2, CALIBRATION_BINS, dtype=dtype, device=device)  # right, confidence

    def add(self, output: Tensor, target: Tensor) -> None:
        self.classes = output.shape[1]
        self.highest = torch.maximum(self.highest, target.max())
        known = (target >= 0) & (target < self.classes)
        # As timm sums it up: the mean over a batch, which is NaN of no image, times the number of images.
        loss = F.cross_entropy(output.float(), target.where(known, -1), ignore_index=-1)
        right = (output.topk(min(5, self.classes)).indices == target[:, None]) & known[:, None]
        images = known.sum()
        values = (images, torch.where(images > 0, loss * images, 0), right[:, 0].sum(), right.any(dim=1).sum())
        self.sums[0] += len(output)
        self.sums[1:5] += torch.stack([value.to(self.sums) for value in values])
        if self.calibration:
            confidence, top1 = output.softmax(dim=1).max(dim=1)
            rows = torch.stack([(top1 == target).to(confidence), confidence]).where(known, 0)
            self.bins.index_add_(1, calibration_bins(confidence), rows.to(self.bins))

    def compare(self, output: Tensor, reference_output: Tensor, name: str, reference: str) -> None:
        if output.shape != reference_output.shape:
            raise UserError(
                f'{name} has {output.shape[1]} classes, {reference} {reference_output.shape[1]}: only models of the '
                'same classes can be compared.'
            )
        log_q, log_p = F.log_softmax(output, dim=1), F.log_softmax(reference_output, dim=1)
        p = log_p.exp()
        kl = torch.where(p == 0, 0, p * (log_p - log_q)).to(self.sums).sum()  # log p is -inf where p is 0
        same = (output.argmax(dim=1) == reference_output.argmax(dim=1)).sum()
        self.sums[5:] += torch.stack([torch.full_like(kl, len(output)), same, kl])

    def compute(self, name: str, distributed: bool) -> Metrics:
        if distributed:
            dist.all_reduce(self.sums)
            dist.all_reduce(self.bins)
            dist.all_reduce(self.highest, dist.ReduceOp.MAX)
        if (highest := int(self.highest)) >= self.classes > 0:
            raise UserError(
                f'label {highest} is beyond the {self.classes} classes of {name}: take a model for these classes, or '
                'map the labels with a class map.'
            )
        samples, images, loss, top1, top5, compared, same, kl = self.sums.tolist()
        if not samples:
            raise UserError('there is no image to evaluate on: the loader is empty.')
        metrics: Metrics = {}
        if images:
            metrics = {'loss': loss / images, 'top1': 100 * top1 / images, 'top5': 100 * top5 / images}
            if self.calibration:
                right, confidence = self.bins
                metrics |= {'nll': loss / images, 'ece': 100 * (right - confidence).abs().sum().item() / images}
            if math.isnan(loss):  # topk takes NaN for the largest
                metrics = dict.fromkeys(metrics, math.nan)
        if compared:
            metrics['agreement'] = math.nan if math.isnan(kl) else 100 * same / compared
            metrics['kl'] = kl / compared if math.isnan(kl) else max(kl / compared, 0.0)  # rounding can leave less
        metrics['samples'] = int(samples)
        return metrics
