"""The program `mealv2-eval`: accuracy of timm models, and their agreement with teachers."""

import argparse
import os
from collections.abc import Mapping, Sequence
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
    Option,
    add_options,
    file_text,
    flag,
    run_cli,
)
from timm_mealv2.data.class_names import class_names_of, has_labels, index_map, relabeled, unlabeled
from timm_mealv2.data.dataset import image_names
from timm_mealv2.data.loader import eval_loader
from timm_mealv2.data.normalize import resolve_pixels
from timm_mealv2.data.unreadable import BadImages
from timm_mealv2.errors import UserError
from timm_mealv2.evaluation import Metrics, evaluate, metrics_as_json
from timm_mealv2.evaluation_page import write_page
from timm_mealv2.figures import as_text, metric_table
from timm_mealv2.files import replacing
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import TeacherSpec, create_ensemble, for_classes
from timm_mealv2.predictions import Predictions, TopClasses, write_predictions

_DATA = (
    *DATA,
    Option('--split', None, 'default: validation, or the whole folder where there is none', metavar='NAME'),
    flag('--imagenet-v2', 'the folder names 0..999 are the class indices; no --class-map'),
    UNLABELED,
    Option(
        '--real-labels',
        file_text,
        "ImageNet-ReaL too; timm's own labels if no FILE",
        nargs='?',
        const='',
        metavar='FILE',
    ),
    Option('--img-size', PIXELS, "image size, or several to compare; the model's own if not given", nargs='+'),
    flag('--use-test-size', "the test size and crop of the model's config, where it has them"),
)
_RESULTS = (
    flag('--calibration', 'negative log-likelihood and expected calibration error too'),
    Option('--report', Path, 'write evaluation.html there: confusion, calibration, images that differ', metavar='DIR'),
    Option('--predictions', Path, 'write the most likely classes of each image there, as CSV', metavar='FILE'),
    Option('--json', Path, 'write the results there as well', metavar='FILE'),
)


def build_parser() -> argparse.ArgumentParser:
    """Return a fresh parser of the program's command line."""
    parser = OneLineParser(
        prog='mealv2-eval', description='Accuracy of timm models, and their agreement with teachers.'
    )
    parser.add_argument('models', nargs='+', metavar='MODEL', help='as --teachers; a model.onnx too')
    group = parser.add_argument_group('teachers', 'Report agreement and KL divergence with the ensemble of these.')
    add_options(group, TEACHERS)
    for name, options in (('data', _DATA), ('running', (*DEVICE, *AMP)), ('results', _RESULTS)):
        add_options(parser.add_argument_group(name), options)
    # torch warns of more workers than there are cores.
    parser.set_defaults(device=None, workers=min(4, os.cpu_count() or 1))
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
    dtype = getattr(torch, args.amp_dtype) if args.amp else None
    suffixes = {size: f'@{size}' if len(args.img_size or ()) > 1 else '' for size in args.img_size or [None]}
    models, sizes = {}, {}
    for size, suffix in suffixes.items():
        for spec in specs:
            # An ensemble of one is the model, made from whatever names a teacher.
            models[f'{spec}{suffix}'] = create_ensemble(spec, img_sizes=[size], autocast_dtype=dtype).to(device)
            sizes[f'{spec}{suffix}'] = size
    models, images, classes = _with_the_same_classes(models, data, args.imagenet_v2)
    ensemble = build_ensemble(args, device, class_names=classes) if args.teachers else None
    if ensemble is not None:
        models |= {f'ensemble{suffix}': ensemble for suffix in suffixes.values()}
        sizes |= {f'ensemble{suffix}': size for size, suffix in suffixes.items()}
    configs = {
        name: resolve_pixels({'img_size': sizes[name]}, model.pretrained_cfg, model.in_chans, args.use_test_size)
        for name, model in models.items()
    }
    results: dict[str, dict[str, Any]] = {name: {} for name in models}  # in the order of the command line
    predictions: dict[str, Predictions] = {}
    bad, left = BadImages(), list(models)
    while left:
        # Models of the same pixels are evaluated together, each time with the ensemble to compare them with.
        config = configs[left[0]]
        group = {name: models[name] for name in left if configs[name] == config}
        left = [name for name in left if name not in group]
        together, reference = group, None
        if ensemble is not None:
            reference = next((name for name, model in group.items() if model is ensemble), 'ensemble')
            together = {**group, reference: ensemble}
        rows, top = _evaluate(config, together, reference, images, args, device, bad)
        for name, model in group.items():
            parameters = sum(parameter.numel() for parameter in model.parameters())
            results[name] = {**rows[name], 'parameters': parameters, 'data_config': config}
            predictions |= {name: top[name]} if top else {}

    print(as_text(metric_table(results)))
    if bad.found:
        print(f'Images that cannot be read and are left out: {len(bad.found)}')
    for line in bad.tell_ignored():
        print(line)
    _write_files(args, results, predictions, data, bad)


def _write_files(
    args: argparse.Namespace,
    results: Mapping[str, Mapping[str, Any]],
    predictions: Mapping[str, Predictions],
    data: Any,
    bad: BadImages,
) -> None:
    if args.json is not None:
        with replacing(args.json) as path:
            path.write_text(metrics_as_json({n: {**row, 'unreadable': len(bad.found)} for n, row in results.items()}))
    if predictions:
        every = image_names(data)
        readable = bad.readable(len(every))
        files = [every[index] for index in readable]
        if args.predictions is not None:
            write_predictions(args.predictions, predictions, files)
        if args.report is not None:
            write_page(args.report / 'evaluation.html', results, predictions, data, readable, files)


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
    reference: str | None,
    data: Any,
    args: argparse.Namespace,
    device: torch.device,
    bad: BadImages,
) -> tuple[dict[str, Metrics], dict[str, Predictions]]:
    """Evaluate models on the data, cut and normalized as `config` says; with predictions if they are asked for."""
    options = {'num_workers': args.workers, 'pin_memory': device.type == 'cuda'}
    options |= {'img_mode': args.input_img_mode, 'decode': args.decode}
    loader = eval_loader(data, config, batch_size=args.batch_size, device=device, bad=bad, **options)
    real_labels = {name: _real_labels(args.real_labels, data) for name in models if args.real_labels is not None}
    top = TopClasses()

    def keep(name: str, output: Tensor, target: Tensor) -> None:
        if real_labels:
            real_labels[name].add_result(output)
        if args.report is not None or args.predictions is not None:
            top.add(name, output, target)

    results = evaluate(
        models,
        tqdm(loader, desc='evaluating', leave=False, disable=None),
        device=device,
        reference=reference,
        data_config=config,
        calibration=args.calibration,
        on_output=keep,
    )
    if real_labels and bad.found:
        raise UserError('--real-labels needs every image of the validation set, but some cannot be read: see above.')
    for name, labels in real_labels.items():
        results[name].update({f'real_top{k}': accuracy for k, accuracy in labels.get_accuracy().items()})
    return results, top.predictions(models, reference)


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


def cli() -> None:
    """Run the command `mealv2-eval`."""
    run_cli(main)


if __name__ == '__main__':
    cli()
