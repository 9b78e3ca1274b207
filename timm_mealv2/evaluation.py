"""How good models are: accuracy, calibration, and agreement with a reference such as the ensemble of the teachers.

`evaluate` is the function, `mealv2-eval` (`python -m timm_mealv2.evaluation`) the program.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.data import ImageDataset, RealLabelsImagenet, create_dataset, create_loader, resolve_model_data_config
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from timm_mealv2.cli.parser import OneLineParser, run_cli
from timm_mealv2.data.dataset import dataset_root
from timm_mealv2.data.normalize import channel_stats, renormalize
from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing
from timm_mealv2.losses import at_least_float32
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import create_ensemble, read_classes

CALIBRATION_BINS = 15

ENSEMBLE = 'ensemble'
"""What the program calls the ensemble of `--teachers` in its table and JSON."""

TABLE = {
    'samples': ('images', '{:.0f}'),
    'top1': ('top-1', '{:.2f}'),
    'top5': ('top-5', '{:.2f}'),
    'real_top1': ('ReaL-1', '{:.2f}'),
    'real_top5': ('ReaL-5', '{:.2f}'),
    'loss': ('loss', '{:.4f}'),
    'nll': ('NLL', '{:.4f}'),
    'ece': ('ECE', '{:.2f}'),
    'agreement': ('agreement', '{:.2f}'),
    'kl': ('KL', '{:.4f}'),
}
"""Metric -> heading and format of its column in the program's table."""

Metrics = dict[str, float]


@torch.inference_mode()
def evaluate(
    models: Mapping[str, nn.Module],
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    reference: str | None = None,
    data_config: Mapping[str, Any] | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    distributed: bool = False,
    criterion: nn.Module | None = None,
    channels_last: bool = False,
    calibration: bool = False,
    progress: bool = False,
    on_output: Callable[[str, Tensor], None] | None = None,
) -> dict[str, Metrics]:
    """Evaluate models in one pass over a loader, all on the same pixels.

    Every model is in eval mode meanwhile and in its own mode afterwards. What a distributed sampler added to even out
    the processes counts for nothing. Accuracy leaves out images whose label is -1 (unknown).

    Args:
        models: Name -> model on `device`, [B, C, H, W] -> logits (or log-probabilities) [B, classes].
        loader: Gives (images, class indices [B]).
        device: Where the batches go and the sums are kept.
        reference: Name of the model, say the ensemble, that the others are compared with.
        data_config: What the loader's pixels are normalised with ('mean', 'std'). A model whose `pretrained_cfg` says
            otherwise then gets them renormalized; without `data_config` every model gets them as they are.
        autocast: Makes the context of each batch's forward passes.
        distributed: Sum over the processes of the default group; each must have as many batches as the others.
        criterion: Loss to report on (logits float32, class indices); cross-entropy if None.
        channels_last: Give the models channels-last pixels.
        calibration: Add 'nll' and 'ece'.
        progress: Show a bar, if stderr is a terminal.
        on_output: Called with name and output [B, classes] of each model for each batch, without padding.

    Returns:
        Name -> metrics, means over the images. With labels: 'loss', 'top1' and 'top5' (percent); with `calibration`
        'nll' (negative log-likelihood, nats) and 'ece' (expected calibration error, percent, over 15 equal bins of the
        largest probability). For all but the reference, labels or not: 'agreement' (percent of images with the same
        top-1) and 'kl' (KL(p_reference || p_model), nats). Always 'samples', the number of images.

    Raises:
        UserError: If there is no such reference, no image, a class count other than the reference's, or a label
            beyond a model's classes.
    """
    if reference is not None and reference not in models:
        raise UserError(f'the reference must be one of the models {sorted(models)}, got {reference!r}.')
    meters = {name: _Meter(device, criterion, calibration) for name in models}
    remaining = evaluation_sample_limit(loader)
    with _eval_mode(models.values()):
        for x, target in tqdm(loader, desc='evaluating', leave=False, disable=None if progress else True):
            x, target = x.to(device, non_blocking=True), target.to(device, non_blocking=True)
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            with autocast():
                outputs = {name: model(_pixels_for(model, x, data_config)) for name, model in models.items()}
            if remaining is not None:  # the padding is at the end; the models run on it as other processes wait
                target = target[:remaining]
                outputs = {name: output[:remaining] for name, output in outputs.items()}
                remaining -= len(target)
            if not len(target):
                continue
            lowest, highest = torch.stack(target.aminmax()).tolist()
            known = target >= 0 if lowest < 0 else None
            for name, output in outputs.items():
                output = at_least_float32(output)
                if highest >= output.shape[1]:
                    raise UserError(
                        f'label {highest} is beyond the {output.shape[1]} classes of {name}: take a model for these '
                        'classes, or map the labels with a class map.'
                    )
                meters[name].add_labelled(*((output, target) if known is None else (output[known], target[known])))
                if reference is not None and name != reference:
                    meters[name].add_compared(output, at_least_float32(outputs[reference]), name, reference)
                meters[name].samples += len(output)
                if on_output is not None:
                    on_output(name, output)
    return {name: meter.compute(distributed) for name, meter in meters.items()}


def _pixels_for(model: nn.Module, x: Tensor, data_config: Mapping[str, Any] | None) -> Tensor:
    """`x` as the model was trained to take it, where both the loader's and the model's normalisation are known."""
    cfg = getattr(unwrap_model(model), 'pretrained_cfg', None)
    if data_config is None or not cfg:
        return x
    return renormalize(x, *channel_stats(data_config, x.shape[1]), *channel_stats(cfg, x.shape[1]))


@contextmanager
def _eval_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    """Put models in eval mode for a block; afterwards each of their modules is in its own mode again."""
    models = list(models)
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Meter:
    """The sums of one model, on the device: a batch is added without waiting for it."""

    def __init__(self, device: torch.device, criterion: nn.Module | None, calibration: bool) -> None:
        dtype = torch.float32 if device.type == 'mps' else torch.float64  # as timm's evaluator has it
        self.accuracy = ClassificationEvaluator(device, criterion=criterion)
        self.calibration = calibration
        self.samples = 0
        self.compared = torch.zeros(3, dtype=dtype, device=device)  # images, of equal top-1, sum of KL
        self.nll = torch.zeros(1, dtype=dtype, device=device)
        self.bins = torch.zeros(3, CALIBRATION_BINS, dtype=dtype, device=device)  # images, right ones, confidence

    def add_labelled(self, output: Tensor, target: Tensor) -> None:
        self.accuracy.update(output, target)
        if self.calibration:
            log_probs = F.log_softmax(output, dim=1)
            self.nll += F.nll_loss(log_probs, target, reduction='sum')
            confidence, top1 = log_probs.exp().max(dim=1)
            index = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
            rows = torch.stack([torch.ones_like(confidence), (top1 == target).to(confidence), confidence])
            self.bins.index_add_(1, index, rows.to(self.bins.dtype))

    def add_compared(self, output: Tensor, reference_output: Tensor, name: str, reference: str) -> None:
        if output.shape != reference_output.shape:
            raise UserError(
                f'{name} has {output.shape[1]} classes, {reference} {reference_output.shape[1]}: only models of the '
                'same classes can be compared.'
            )
        log_q, log_p = F.log_softmax(output, dim=1), F.log_softmax(reference_output, dim=1)
        p = log_p.exp()
        kl = torch.where(p > 0, p * (log_p - log_q), 0)  # log p is -inf where p is 0
        self.compared[0] += len(output)
        self.compared[1] += (output.argmax(dim=1) == reference_output.argmax(dim=1)).sum()
        self.compared[2] += kl.to(self.compared.dtype).sum()

    def compute(self, distributed: bool) -> Metrics:
        counts = torch.stack([self.accuracy.counts[0], self.accuracy.counts.new_tensor(self.samples)])
        if distributed:
            for sums in (counts, self.compared, self.nll, self.bins):
                dist.all_reduce(sums)
        labelled, samples = counts.tolist()
        accuracy = self.accuracy.compute(distributed=distributed)
        if not samples:
            raise UserError('there is no image to evaluate on: the loader is empty.')
        metrics: Metrics = {}
        if labelled:
            metrics.update(accuracy)
            if self.calibration:
                _, right, confidence = self.bins
                metrics['nll'] = self.nll.item() / labelled
                metrics['ece'] = 100 * (right - confidence).abs().sum().item() / labelled
        compared, agreeing, kl = self.compared.tolist()
        if compared:
            metrics['agreement'] = 100 * agreeing / compared
            metrics['kl'] = max(0.0, kl / compared)  # rounding can leave a little less
        metrics['samples'] = samples
        return metrics


def build_parser() -> argparse.ArgumentParser:
    """Return a fresh parser of the program's command line."""
    parser = OneLineParser(
        prog='mealv2-eval', description='Accuracy of timm models, and their agreement with teachers.'
    )
    add = parser.add_argument
    names = 'hf-hub:USER/REPO, local-dir:FOLDER, ARCHITECTURE=CHECKPOINT or python:MODULE:FUNCTION'
    add('models', nargs='+', metavar='MODEL', help=f'timm name with its tag, {names}')
    add('--teachers', nargs='+', metavar='MODEL', help='report agreement and KL with the ensemble of these')
    add('--teacher-weights', type=float, nargs='+', metavar='W', help='one per teacher')
    add(
        '--teacher-classes',
        nargs='+',
        default=(),
        metavar='TEACHER=FILE',
        help="the models' classes among a teacher's: in line k its index of class k (split at the last '=')",
    )

    group = parser.add_argument_group('data')
    add = group.add_argument
    add('--data-dir', metavar='PATH', help='image folder or tar')
    add('--dataset', default='', metavar='NAME', help="timm data set, such as 'hfds/NAME'; default: folder or tar")
    add('--split', metavar='NAME', help='default: validation, or the whole folder where there is none')
    add = group.add_mutually_exclusive_group().add_argument
    add('--class-map', default='', metavar='FILE', help='class names in the order of the classes, one a line (.txt)')
    add('--imagenet-v2', action='store_true', help='the folder names 0..999 are the class indices')
    add('--unlabeled', action='store_true', help='there are no labels, or none to be looked at')
    add = group.add_argument
    add('--real-labels', nargs='?', const='', metavar='FILE', help="ImageNet-ReaL too; timm's own labels if no FILE")
    add('--img-size', type=int, metavar='N', help="instead of the model's own")
    add('--use-test-size', action='store_true', help="the test size and crop of the model's config, where it has them")

    add = parser.add_argument_group('running').add_argument
    add('-b', '--batch-size', type=int, default=128, metavar='N', help='default: 128')
    workers = min(4, os.cpu_count() or 1)  # torch warns of more than there are cores
    add('-j', '--workers', type=int, default=workers, metavar='N', help='default: 4, or the number of cores if less')
    add('--device', help='default: cuda where there is one, else cpu')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', choices=('float16', 'bfloat16'), default='float16', help='default: float16')

    add = parser.add_argument_group('results').add_argument
    add('--calibration', action='store_true', help='negative log-likelihood and expected calibration error too')
    add('--json', type=Path, metavar='FILE', help='write the results there as well')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program on `argv` (the command line if None): print a table, write JSON.

    Raises:
        UserError: If a model cannot be had, the data cannot be read, or the options do not go together.
    """
    args = build_parser().parse_args(argv)
    device = _checked_device(args)
    dtype = getattr(torch, args.amp_dtype) if args.amp else None
    # An ensemble of one is the model, made from whatever names a teacher, with pixels of the size that it must have.
    sizes = None if args.img_size is None else [args.img_size]
    models = {
        name: create_ensemble([name], img_sizes=sizes, autocast_dtype=dtype, device=device) for name in args.models
    }
    if args.teachers:
        models[ENSEMBLE] = create_ensemble(
            args.teachers,
            weights=args.teacher_weights,
            classes=read_classes(args.teacher_classes),
            autocast_dtype=dtype,
            device=device,
        )

    configs = {name: _data_config(model, args) for name, model in models.items()}
    results: dict[str, dict[str, Any]] = {}
    for config in configs.values():
        if group := [name for name in models if configs[name] == config and name not in results]:
            together = {name: models[name] for name in models if name in group or name == ENSEMBLE}
            metrics = _evaluate_with(config, together, args, device)
            results.update({name: metrics[name] for name in group})

    results = {name: results[name] for name in models}
    print(_table(results))
    if args.json is not None:
        for name, model in models.items():
            results[name] |= {'parameters': _parameters(model), 'data_config': configs[name]}
        with replacing(args.json) as path:
            path.write_text(json.dumps(results, indent=2) + '\n')


def cli() -> None:
    """Run the command `mealv2-eval`."""
    run_cli(main)


def _checked_device(args: argparse.Namespace) -> torch.device:
    """Refuse options that do not go together; return the device."""
    for name in ('teacher_weights', 'teacher_classes'):
        if getattr(args, name) and not args.teachers:
            raise UserError(f'--{name.replace("_", "-")} needs --teachers: name them.')
    if args.unlabeled and not args.teachers and args.real_labels is None:
        raise UserError('--unlabeled leaves nothing to report without --teachers or --real-labels: give one.')
    if args.data_dir is None and '/' not in args.dataset:
        raise UserError('the data is missing: give --data-dir PATH, or --dataset as hfds/NAME.')
    if args.data_dir is not None and '/' not in args.dataset and not Path(args.data_dir).exists():
        raise UserError(f'--data-dir {args.data_dir} does not exist: expected an image folder or a tar.')
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f'--json {args.json}: there is no folder {args.json.parent}; make it first.')
    if args.json is not None and args.json.is_dir():
        raise UserError(f'--json {args.json} is a folder: name a file.')
    for name, least in (('batch_size', 1), ('img_size', 1), ('workers', 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f'--{name.replace("_", "-")} must be {least} or more, got {getattr(args, name)}.')
    try:
        device = torch.device(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {args.device} cannot be used: {str(error).splitlines()[0]}') from error
    return device


def _data_config(model: EnsembleTeacher, args: argparse.Namespace) -> dict[str, Any]:
    """How the pictures are to be cut and normalised for a model, by its config."""
    config = resolve_model_data_config(model, args={'img_size': args.img_size}, use_test_size=args.use_test_size)
    config['input_size'] = (model.in_chans, *config['input_size'][1:])
    config['mean'], config['std'] = channel_stats(config, model.in_chans)
    return config


def _evaluate_with(
    config: dict[str, Any], models: dict[str, EnsembleTeacher], args: argparse.Namespace, device: torch.device
) -> dict[str, Metrics]:
    """Evaluate models on the data, cut and normalised as `config` says."""
    data = _create_data(config, args)
    loader = create_loader(
        data,
        **config,
        batch_size=args.batch_size,
        num_workers=args.workers,
        device=device,
        pin_memory=device.type == 'cuda',
    )
    real_labels: dict[str, RealLabelsImagenet] = {}
    if args.real_labels is not None:
        real_labels = {name: _real_labels(args.real_labels, data) for name in models}

    def add_result(name: str, output: Tensor) -> None:
        if real_labels:
            real_labels[name].add_result(output)

    results = evaluate(
        models,
        loader,
        device=device,
        reference=ENSEMBLE if ENSEMBLE in models else None,
        data_config=config,
        calibration=args.calibration,
        progress=True,
        on_output=add_result,
    )
    for name, real in real_labels.items():
        results[name].update({f'real_top{k}': accuracy for k, accuracy in real.get_accuracy().items()})
    return results


def _create_data(config: dict[str, Any], args: argparse.Namespace) -> ImageDataset:
    # timm numbers the folders that are there in their order; those of ImageNet-V2 say their number.
    class_map = {str(index): index for index in range(1000)} if args.imagenet_v2 else args.class_map
    try:
        data = create_dataset(
            args.dataset,
            root=args.data_dir,
            split=args.split or 'validation',
            class_map=class_map,
            batch_size=args.batch_size,
            input_img_mode='L' if config['input_size'][0] == 1 else 'RGB',
        )
    except Exception as error:  # names, folders and class maps are all the user's, whatever timm's readers raise
        raise UserError(f'the data cannot be read: {error or type(error).__name__}') from error
    if args.split and args.data_dir is not None and dataset_root(data) == Path(args.data_dir):
        raise UserError(f'--split {args.split}: there is no such folder in {args.data_dir}.')  # timm takes all of it
    if args.unlabeled:
        data.target_transform = _unknown
    return data


def _unknown(label: Any) -> int:
    return -1


def _real_labels(path: str, data: ImageDataset) -> RealLabelsImagenet:
    filenames = data.filenames(basename=True)
    try:
        real_labels = RealLabelsImagenet(filenames, real_json=path or None)
    except (OSError, ValueError) as error:
        raise UserError(f'--real-labels expects a JSON list of lists of class indices, got {path}: {error}') from error
    except AssertionError:
        real_labels = None
    if real_labels is None or set(filenames) != set(real_labels.real_labels):
        raise UserError(
            f'--real-labels expects as many images as labels, named ILSVRC2012_val_00000001.JPEG and so on, got '
            f'{len(filenames)} images, the first {filenames[0]}: take the whole validation set of ImageNet.'
        )
    return real_labels


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _table(results: Mapping[str, Metrics]) -> str:
    columns = [metric for metric in TABLE if any(metric in metrics for metrics in results.values())]
    rows = [['model', *(TABLE[metric][0] for metric in columns)]]
    for name, metrics in results.items():
        rows.append(
            [name, *(TABLE[metric][1].format(metrics[metric]) if metric in metrics else '-' for metric in columns)]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join(
        '  '.join(
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


if __name__ == '__main__':
    cli()
