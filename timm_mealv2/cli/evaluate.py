"""The program `mealv2-eval`: accuracy of timm models, and their agreement with teachers."""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.data import RealLabelsImagenet, resolve_model_data_config
from torch import Tensor
from torch.utils.data import IterableDataset
from tqdm import tqdm

from timm_mealv2.arguments import build_ensemble, choose_device, open_split
from timm_mealv2.command_line import DATA, DEVICE, FLOAT_TYPES, TEACHERS, OneLineParser, add_options, run_cli
from timm_mealv2.data.dataset import class_names, dataset_root, image_mode, image_names, unlabeled
from timm_mealv2.data.loader import eval_loader
from timm_mealv2.data.normalize import channel_stats
from timm_mealv2.data.unreadable import BadImages
from timm_mealv2.errors import UserError
from timm_mealv2.evaluation import Metrics, evaluate, member_names, metrics_as_json
from timm_mealv2.files import replacing
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import TeacherSpec, create_ensemble
from timm_mealv2.option_types import PIXELS
from timm_mealv2.predictions import Predictions, write_page, write_predictions

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
    names = 'hf-hub:USER/REPO, local-dir:FOLDER, ARCHITECTURE=CHECKPOINT or python:MODULE:FUNCTION'
    parser.add_argument('models', nargs='+', metavar='MODEL', help=f'timm name with its tag, {names}')
    group = parser.add_argument_group('teachers', 'Report agreement and KL divergence with the ensemble of these.')
    add_options(group, TEACHERS)

    group = parser.add_argument_group('data')
    add_options(group, DATA)
    add = group.add_argument
    add('--split', metavar='NAME', help='default: validation, or the whole folder where there is none')
    add('--imagenet-v2', action='store_true', help='the folder names 0..999 are the class indices')
    add('--unlabeled', action='store_true', help='there are no labels, or none to be looked at')
    add('--real-labels', nargs='?', const='', metavar='FILE', help="ImageNet-ReaL too; timm's own labels if no FILE")
    add('--img-size', type=PIXELS, metavar='PIXELS', help="image size; the model's own if not given")
    add('--use-test-size', action='store_true', help="the test size and crop of the model's config, where it has them")

    group = parser.add_argument_group('running')
    add_options(group, DEVICE)
    group.add_argument('--amp', action='store_true', help='mixed precision')
    group.add_argument('--amp-dtype', choices=FLOAT_TYPES[:2], default='float16', help='its type: float16 or bfloat16')
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
    """Run the program on `argv` (the command line if None): print a table, write JSON.

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
    options: dict[str, Any] = {'autocast_dtype': getattr(torch, args.amp_dtype) if args.amp else None, 'device': device}
    models = {str(spec): create_ensemble(spec, img_sizes=sizes, **options) for spec in specs}
    if args.teachers:
        models[ENSEMBLE] = build_ensemble(args, **options)

    configs: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        config = resolve_model_data_config(model, args={'img_size': args.img_size}, use_test_size=args.use_test_size)
        config['input_size'] = (model.in_chans, *config['input_size'][1:])
        config['mean'], config['std'] = channel_stats(config, model.in_chans)
        configs[name] = config
    results: dict[str, dict[str, Any]] = {}
    predictions: dict[str, Predictions] = {}
    bad = BadImages()
    for config in configs.values():
        # Models of the same pixels are evaluated together, each time with the ensemble to compare them with.
        if group := [name for name in models if configs[name] == config and name not in results]:
            together = {name: models[name] for name in models if name in group or name == ENSEMBLE}
            rows = _evaluate_with(config, together, data, args, device, bad, predictions)
            results |= {name: rows[name] for name in group}

    results = {name: results[name] for name in models}
    print(_table(results))
    if bad.found:
        print(f'Images that cannot be read and are left out: {len(bad.found)}')
    if args.json is not None:
        for name, model in models.items():
            parameters = sum(parameter.numel() for parameter in model.parameters())
            results[name] |= {'parameters': parameters, 'unreadable': len(bad.found), 'data_config': configs[name]}
        with replacing(args.json) as path:
            path.write_text(metrics_as_json(results))
    if args.report is not None or args.predictions is not None:
        predictions = {name: predictions[name] for name in models}
        images = [index for index in range(len(data)) if f'validation #{index}' not in bad.found]
        every = image_names(data)
        files, classes = [every[index] for index in images], class_names(data) or []
        if args.predictions is not None:
            write_predictions(args.predictions, predictions, files, classes)
        if args.report is not None:
            args.report.mkdir(exist_ok=True)
            write_page(args.report / 'evaluation.html', predictions, data, images, files, classes)


def _check_args(args: argparse.Namespace) -> None:
    """Refuse options that do not go together, and files that cannot be written."""
    for name in ('teacher_weights', 'teacher_classes', 'teacher_dtype', 'teacher_img_size'):
        if getattr(args, name) and not args.teachers:
            raise UserError(f'--{name.replace("_", "-")} needs --teachers: name them.')
    if args.unlabeled and not args.teachers and args.real_labels is None:
        raise UserError('--unlabeled leaves nothing to report without --teachers or --real-labels: give one.')
    if args.imagenet_v2 and (args.class_map or args.unlabeled):
        raise UserError('--imagenet-v2 says what the classes are: leave out --class-map and --unlabeled.')
    for name in ('json', 'predictions', 'report'):
        path = getattr(args, name)
        if path is not None and not path.parent.is_dir():
            raise UserError(f'--{name} {path}: there is no folder {path.parent}; make it first.')
        if path is not None and path.exists() and path.is_dir() != (name == 'report'):
            raise UserError(
                f'--{name} {path} is a {"file: name a folder" if path.is_file() else "folder: name a file"}.'
            )


def _open_data(args: argparse.Namespace) -> Any:
    # timm numbers the folders that are there in their order; those of ImageNet-V2 say their number.
    numbered = {'class_map': {str(index): index for index in range(1000)}} if args.imagenet_v2 else {}
    data: Any = open_split(args, args.split or 'validation', batch_size=args.batch_size, **numbered)
    if args.split and args.data_dir is not None and dataset_root(data) == Path(args.data_dir):
        # timm would take the whole data folder
        raise UserError(f'--split {args.split}: there is no such folder in {args.data_dir}.')
    if (args.report or args.predictions) and isinstance(data, IterableDataset):
        raise UserError('--report and --predictions need a data set with numbered images, and this one is a stream.')
    return unlabeled(data) if args.unlabeled else data


def _evaluate_with(
    config: dict[str, Any],
    models: Mapping[str, EnsembleTeacher],
    data: Any,
    args: argparse.Namespace,
    device: torch.device,
    bad: BadImages,
    predictions: dict[str, Predictions],
) -> dict[str, Metrics]:
    """Evaluate models on the data, cut and normalized as `config` says; add to `predictions` if they are wanted."""
    data.input_img_mode = image_mode(args.input_img_mode, config['input_size'][0])
    options = {'num_workers': args.workers, 'pin_memory': device.type == 'cuda'}
    loader = eval_loader(data, config, batch_size=args.batch_size, device=device, bad=bad, **options)
    # A model that is a teacher too is run once, as a member of the ensemble.
    ensemble, members = models.get(ENSEMBLE), {}
    changed = args.img_size or args.teacher_img_size or args.teacher_classes or args.teacher_dtype
    if ensemble is not None and not changed:
        members = dict(zip(ensemble.names, member_names(ENSEMBLE, ensemble), strict=True))
    rows = {name: members.get(name, name) for name in models}
    wanted = () if args.real_labels is None else rows.values()
    real_labels = {row: _real_labels(args.real_labels, data) for row in wanted}
    targets: list[Tensor] = []
    top: dict[str, list[Tensor]] = {}
    batches = tqdm(loader, desc='evaluating', leave=False, disable=None)

    def keep_targets() -> Iterator[tuple[Tensor, Tensor]]:
        for x, target in batches:
            targets.append(target.cpu())
            yield x, target

    def keep_output(name: str, output: Tensor) -> None:
        if name in real_labels:
            real_labels[name].add_result(output)
        if wants_predictions:
            probabilities, classes = output.softmax(dim=1).topk(min(5, output.shape[1]))
            top.setdefault(name, []).append(torch.stack([classes.double(), probabilities.double()]).cpu())

    wants_predictions = args.report is not None or args.predictions is not None
    results = evaluate(
        {name: model for name, model in models.items() if rows[name] == name},
        keep_targets() if wants_predictions else batches,
        device=device,
        reference=ENSEMBLE if ensemble is not None else None,
        members=bool(members),
        data_config=config,
        calibration=args.calibration,
        on_output=keep_output,
    )
    if real_labels and bad.found:
        raise UserError('--real-labels needs every image of the validation set, but some cannot be read: see above.')
    for row, labels in real_labels.items():
        results[row].update({f'real_top{k}': accuracy for k, accuracy in labels.get_accuracy().items()})
    if wants_predictions:
        tops = {row: torch.cat(parts, dim=1) for row, parts in top.items()}
        of_row = {row: Predictions(torch.cat(targets), classes.long(), probs) for row, (classes, probs) in tops.items()}
        for name, row in rows.items():
            predictions[name] = of_row[row]
            if ENSEMBLE in of_row and name != ENSEMBLE:
                predictions[name] = replace(of_row[row], ensemble=of_row[ENSEMBLE])
    return {name: results[row] for name, row in rows.items()}


def _real_labels(path: str, data: Any) -> RealLabelsImagenet:
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


def _table(results: Mapping[str, Metrics]) -> str:
    columns = [metric for metric in TABLE if any(metric in metrics for metrics in results.values())]
    rows = [['model', *(TABLE[metric][0] for metric in columns)]]
    for name, metrics in results.items():
        rows.append([name, *(TABLE[key][1].format(metrics[key]) if key in metrics else '-' for key in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join(
        '  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in rows  # names to the left
    )


def cli() -> None:
    """Run the command `mealv2-eval`."""
    run_cli(main)


if __name__ == '__main__':
    cli()
