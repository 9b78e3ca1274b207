"""ONNX files beside an exported model, measured against it on the run's own validation images."""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import Subset

from timm_mealv2.arguments import open_split
from timm_mealv2.command_line import DATA, TRAIN_SPLIT, UNLABELED, VAL_SPLIT, add_options
from timm_mealv2.data.class_names import class_names_of, index_map, relabeled, unlabeled
from timm_mealv2.data.loader import eval_loader
from timm_mealv2.errors import UserError
from timm_mealv2.evaluation import evaluate
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.models.onnx_model import OnnxModel, quantize_onnx, write_onnx

_logger = logging.getLogger(__name__)

ONNX_FILE, INT8_FILE = 'model.onnx', 'model_int8.onnx'

LARGEST_DIFFERENCE = 1e-4
"""Of a probability between model.onnx and the model, on any image; beyond it the export is refused."""

_CALIBRATION_IMAGES = 256
_ENOUGH_IMAGES = 200


def add_onnx(
    folder: Path,
    model: nn.Module,
    checkpoint: TrainingCheckpoint,
    label_names: list[str] | None,
    *,
    int8: bool = False,
    data_dir: str | None = None,
) -> dict[str, Any]:
    """Write `model.onnx` into an exported folder, with `int8` also `model_int8.onnx`, and run them.

    Every image of the validation split goes through the written files and the model, with the evaluation's own
    loader. The int8 form is calibrated on a seeded few hundred training images.

    Args:
        folder: The exported folder.
        model: The exported model.
        checkpoint: Says which data set the run had; only a folder or tar of images is opened on a file's word.
        label_names: Names of the classes, for the files' metadata.
        data_dir: The data set where it lies now; the run's if None.

    Returns:
        For the card: 'images' (their number), 'top1' of the model in percent, None without labels, and 'files': 'file',
        'megabytes', 'top1' and 'difference' (the largest of a probability) of each.

    Raises:
        UserError: If the data set is not there, or model.onnx predicts something else than the model.
    """
    args = _data_arguments(checkpoint, data_dir)
    config = resolve_model_data_config(model)
    options: dict[str, Any] = {'img_mode': args.input_img_mode, 'decode': args.decode, 'batch_size': 64}
    options |= {'num_workers': 0, 'device': torch.device('cpu')}
    validation = open_split(args, '--val-split', or_all=True)
    folders = class_names_of(validation)
    if args.unlabeled and len(folders or ()) != model.num_classes:
        validation = unlabeled(validation)
    else:
        validation = relabeled(validation, index_map(label_names, folders, str(checkpoint)))
    write_onnx(model, folder / ONNX_FILE, label_names)
    forms: dict[str, nn.Module] = {'': model, ONNX_FILE: OnnxModel(folder / ONNX_FILE)}
    if int8:
        training: Any = open_split(args, '--train-split', or_all=True)
        drawn: Any = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))[:_CALIBRATION_IMAGES]
        batches = (images for images, _ in eval_loader(Subset(training, drawn), config, **options))
        quantize_onnx(folder / ONNX_FILE, folder / INT8_FILE, batches)
        forms[INT8_FILE] = OnnxModel(folder / INT8_FILE)

    differences, exact = dict.fromkeys(forms, 0.0), torch.empty(0)

    def compare(name: str, output: Tensor, target: Tensor) -> None:
        nonlocal exact
        probabilities = output.softmax(dim=1)
        exact = exact if name else probabilities
        differences[name] = max(differences[name], float((probabilities - exact).abs().max()))

    results = evaluate(forms, eval_loader(validation, config, **options), on_output=compare)
    images, top1 = int(results['']['samples']), {name: row.get('top1') for name, row in results.items()}
    if not differences[ONNX_FILE] <= LARGEST_DIFFERENCE:
        raise UserError(
            f'{ONNX_FILE} predicts something else than the model: a probability differs by '
            f'{differences[ONNX_FILE]:.2e} (at most {LARGEST_DIFFERENCE:g}); leave --onnx out.'
        )
    if images < _ENOUGH_IMAGES:
        _logger.warning(f'{ONNX_FILE} was compared with the model on {images} images alone.')
    files = [
        {
            'file': name,
            'megabytes': (folder / name).stat().st_size / 1e6,
            'top1': top1[name],
            'difference': differences[name],
        }
        for name in forms
        if name
    ]
    return {'images': images, 'top1': top1[''], 'files': files}


def _data_arguments(checkpoint: TrainingCheckpoint, data_dir: str | None) -> argparse.Namespace:
    """The options of the run's data set. On a file's word a folder or tar is opened, and nothing fetched or run."""
    parser = argparse.ArgumentParser()
    add_options(parser, (*DATA, TRAIN_SPLIT, VAL_SPLIT, UNLABELED))
    args = argparse.Namespace(**{**vars(parser.parse_args([])), **checkpoint.args})
    if data_dir is None and args.dataset:
        raise UserError(f'--onnx compares on images: give a folder or tar of {args.dataset} with --data-dir.')
    args.data_dir = data_dir or args.data_dir or getattr(args, 'data', None)
    args.dataset, args.dataset_download, args.dataset_trust_remote_code = '', False, False
    return args
