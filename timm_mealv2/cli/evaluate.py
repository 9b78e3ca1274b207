"""The program `mealv2-eval`: accuracy of timm models, and their agreement with teachers."""

import argparse
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.data import RealLabelsImagenet
from torch import Tensor
from torch.utils.data import IterableDataset
from tqdm import tqdm

from timm_mealv2.arguments import build_ensemble, choose_device, open_split
from timm_mealv2.command_line import (
    AMP,
    DATA,
    DEVICE,
    PIXELS,
    TEACHERS,
    UNLABELED,
    OneLineParser,
    add_options,
    file_text,
    run_cli,
)
from timm_mealv2.data.class_names import class_names_of, has_labels, index_map, relabeled, unlabeled
from timm_mealv2.data.dataset import image_names
from timm_mealv2.data.loader import eval_loader
from timm_mealv2.data.normalize import resolve_pixels
from timm_mealv2.data.unreadable import BadImages
from timm_mealv2.errors import UserError
from timm_mealv2.evaluation import Metrics, evaluate, member_names, metrics_as_json
from timm_mealv2.files import replacing
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import TeacherSpec, create_ensemble, for_classes
from timm_mealv2.predictions import Predictions, readable_names, write_page, write_predictions

ENSEMBLE = 'ensemble'
"""What the ensemble of `--teachers` is called in the table and the JSON."""

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
"""Metric -> heading and format of its column."""


def build_parser() -> argparse.ArgumentParser:
    """Return a fresh parser of the program's command line."""
    parser = OneLineParser(
        prog='mealv2-eval', description='Accuracy of timm models, and their agreement with teachers.'
    )
    parser.add_argument('models', nargs='+', metavar='MODEL', help='as --teachers; a model.onnx too')
    group = parser.add_argument_group('teachers', 'Report agreement and KL divergence with the ensemble of these.')
    add_options(group, TEACHERS)

    group = parser.add_argument_group('data')
    add_options(group, DATA)
    add = group.add_argument
    add('--split', metavar='NAME', help='default: validation, or the whole folder where there is none')
    add('--imagenet-v2', action='store_true', help='the folder names 0..999 are the class indices; no --class-map')
    add_options(group, [UNLABELED])
    text = "ImageNet-ReaL too; timm's own labels if no FILE"
    add('--real-labels', nargs='?', const='', type=file_text, metavar='FILE', help=text)
    add('--img-size', type=PIXELS, metavar='PIXELS', help="image size; the model's own if not given")
    add('--use-test-size', action='store_true', help="the test size and crop of the model's config, where it has them")

    group = parser.add_argument_group('running')
    add_options(group, (*DEVICE, *AMP))
    # torch warns of more workers than there are cores.
    parser.set_defaults(device=None, workers=min(4, os.cpu_count() or 1))

    add = parser.add_argument_group('results').add_argument
    add('--calibration', action='store_true', help='negative log-likelihood and expected calibration error too')
    add(
        '--report',
        type=Path,
        metavar='DIR',
        help='write evaluation.html there: confusion, calibration, images that differ',
    )
    add('--predictions', type=Path, metavar='FILE', help='write the most likely classes of each image there, as CSV')
    add('--json', type=Path, metavar='FILE', help='write the results there as well')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program on `argv` (the command line if None): print a table, write JSON, predictions and a page.

    Raises:
        UserError: If a model cannot be had, the data cannot be read, or the options do not go together.
    """
    args = build_parser().parse_args(argv)
    _check_args(args)
    device = choose_device(args.device)
    specs = [TeacherSpec.parse(name) for name in args.models]
    args.teachers = TeacherSpec.parse_all(args.teachers or ())
    for spec in (*specs, *args.teachers):
        spec.check()
    data = _open_data(args)
    # An ensemble of one is the model, made from whatever names a teacher, with pixels of the size that it must have.
    sizes = None if args.img_size is None else [args.img_size]
    dtype = getattr(torch, args.amp_dtype) if args.amp else None
    options: dict[str, Any] = {'img_sizes': sizes, 'autocast_dtype': dtype, 'device': device}
    models = {str(spec): create_ensemble(spec, **options) for spec in specs}
    models, data, classes = _with_the_same_classes(models, data, args.imagenet_v2)
    if args.teachers:
        models[ENSEMBLE] = build_ensemble(args, class_names=classes, device=device)
    configs = {
        name: resolve_pixels({'img_size': args.img_size}, model.pretrained_cfg, model.in_chans, args.use_test_size)
        for name, model in models.items()
    }
    rows: dict[str, tuple[dict[str, Any], Predictions | None]] = {}
    bad = BadImages()
    for config in configs.values():
        # Models of the same pixels are evaluated together, each time with the ensemble to compare them with.
        if group := [name for name in models if configs[name] == config and name not in rows]:
            together = {name: models[name] for name in models if name in group or name == ENSEMBLE}
            evaluated = _evaluate(config, together, data, args, device, bad)
            rows |= {name: evaluated[name] for name in group}

    results = {name: rows[name][0] for name in models}
    print(_table(results))
    if bad.found:
        print(f'Images that cannot be read and are left out: {len(bad.found)}')
    for line in bad.tell_ignored():
        print(line)
    if args.json is not None:
        for name, model in models.items():
            parameters = sum(parameter.numel() for parameter in model.parameters())
            results[name] |= {'parameters': parameters, 'unreadable': len(bad.found), 'data_config': configs[name]}
        with replacing(args.json) as path:
            path.write_text(metrics_as_json(results))
    predictions = {name: top for name in models if (top := rows[name][1]) is not None}
    if predictions:
        every = image_names(data)
        images = [index for index in range(len(every)) if f'validation #{index}' not in bad.found]
        files = [every[index] for index in images]
        if args.predictions is not None:
            write_predictions(args.predictions, predictions, files)
        if args.report is not None:
            write_page(args.report / 'evaluation.html', predictions, data, images, files)


def _check_args(args: argparse.Namespace) -> None:
    """Refuse options that do nothing, and files that cannot be written in the end."""
    for name in ('teacher_weights', 'teacher_classes', 'teacher_dtype', 'teacher_img_size'):
        if getattr(args, name) and not args.teachers:
            raise UserError(f'--{name.replace("_", "-")} needs --teachers: name them.')
    for name in ('json', 'predictions'):
        path = getattr(args, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise UserError(f'--{name} {path}: name a file in a folder that is there.')
    if args.report is not None:
        args.report.mkdir(exist_ok=True)


def _open_data(args: argparse.Namespace) -> Any:
    # timm numbers the folders that are there in their order; those of ImageNet-V2 say their number.
    numbered = {'class_map': {str(index): index for index in range(1000)}} if args.imagenet_v2 else {}
    data: Any = open_split(args, '--split', or_all=args.split is None, batch_size=args.batch_size, **numbered)
    if (args.report or args.predictions) and isinstance(data, IterableDataset):
        raise UserError('--report and --predictions need a data set with numbered images, and this one is a stream.')
    return unlabeled(data) if args.unlabeled else data


def _with_the_same_classes(
    models: Mapping[str, Any], data: Any, numbered: bool
) -> tuple[dict[str, Any], Any, list[str] | None]:
    """Map the classes of models and data by name to those of the model that knows the fewest; return these, too.

    Where no model knows any, these are the data's; data that is `numbered` has the numbers of the model's classes.
    """
    folders = None if numbered else class_names_of(data)
    classes = min(filter(None, map(class_names_of, models.values())), key=len, default=folders)
    mapped: dict[str, Any] = {name: for_classes(model, classes, name) for name, model in models.items()}
    for model in mapped.values():  # those without names are taken to be in the data's order
        model.pretrained_cfg['label_names'] = classes
    if has_labels(data) and not numbered:
        data = relabeled(data, index_map(classes, folders, ' and '.join(models)))
    return mapped, data, classes


def _evaluate(
    config: dict[str, Any],
    models: Mapping[str, EnsembleTeacher],
    data: Any,
    args: argparse.Namespace,
    device: torch.device,
    bad: BadImages,
) -> dict[str, tuple[Metrics, Predictions | None]]:
    """Evaluate models on the data, cut and normalized as `config` says; with predictions if they are asked for."""
    options = {'num_workers': args.workers, 'pin_memory': device.type == 'cuda'}
    options |= {'img_mode': args.input_img_mode, 'decode': args.decode}
    loader = eval_loader(data, config, batch_size=args.batch_size, device=device, bad=bad, **options)
    # A model that is a teacher too is run once, as a member of the ensemble.
    ensemble, members = models.get(ENSEMBLE), {}
    changed = args.img_size or args.teacher_img_size or args.teacher_classes or args.teacher_dtype
    if ensemble is not None and not changed:
        members = dict(zip(ensemble.names, member_names(ENSEMBLE, ensemble), strict=True))
    rows = {name: members.get(name, name) for name in models}
    real_labels = {row: _real_labels(args.real_labels, data) for row in rows.values() if args.real_labels is not None}
    top: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)

    def keep(row: str, output: Tensor, target: Tensor) -> None:
        if row in real_labels:
            real_labels[row].add_result(output)
        if args.report is not None or args.predictions is not None:
            probabilities, classes = output.softmax(dim=1).topk(min(5, output.shape[1]))
            top[row].append((target.cpu(), classes.cpu(), probabilities.cpu()))

    results = evaluate(
        {name: model for name, model in models.items() if rows[name] == name},
        tqdm(loader, desc='evaluating', leave=False, disable=None),
        device=device,
        reference=ENSEMBLE if ensemble is not None else None,
        members=bool(members),
        data_config=config,
        calibration=args.calibration,
        on_output=keep,
    )
    if real_labels and bad.found:
        raise UserError('--real-labels needs every image of the validation set, but some cannot be read: see above.')
    for row, labels in real_labels.items():
        results[row].update({f'real_top{k}': accuracy for k, accuracy in labels.get_accuracy().items()})
    predictions: dict[str, Predictions] = {}
    for name, row in rows.items():
        if row in top:
            targets, classes, probabilities = map(torch.cat, zip(*top[row], strict=True))
            predictions[name] = Predictions(readable_names(models[name]), targets, classes, probabilities)
    of_ensemble = predictions.pop(ENSEMBLE, None)
    evaluated: dict[str, tuple[Metrics, Predictions | None]] = {
        name: (results[row], replace(predictions[name], ensemble=of_ensemble) if name in predictions else None)
        for name, row in rows.items()
    }
    if of_ensemble is not None:
        evaluated[ENSEMBLE] = results[ENSEMBLE], of_ensemble
    return evaluated


def _real_labels(path: str, data: Any) -> RealLabelsImagenet:
    filenames = data.filenames(basename=True)
    try:
        real_labels = RealLabelsImagenet(filenames, real_json=path or None)
    except AssertionError:
        real_labels = None
    if real_labels is None or set(filenames) != set(real_labels.real_labels):
        raise UserError(
            f'--real-labels expects as many images as labels, named ILSVRC2012_val_00000001.JPEG and so on, got '
            f'{len(filenames)} images, the first {filenames[0]}: take the whole validation set of ImageNet.'
        )
    return real_labels


def _table(results: Mapping[str, Metrics]) -> str:
    columns = [metric for metric in TABLE if any(metric in metrics for metrics in results.values())]
    rows = [['model', *(TABLE[metric][0] for metric in columns)]]
    for name, metrics in results.items():
        rows.append([name, *(TABLE[key][1].format(metrics[key]) if key in metrics else '-' for key in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # Names to the left, figures to the right.
    return '\n'.join('  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def cli() -> None:
    """Run the command `mealv2-eval`."""
    run_cli(main)


if __name__ == '__main__':
    cli()
