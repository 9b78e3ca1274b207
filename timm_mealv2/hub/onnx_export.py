"""ONNX files beside an exported model, measured against it on the run's own validation images."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from timm_mealv2.data.class_names import class_names_of, index_map, relabeled, unlabeled
from timm_mealv2.data.dataset import image_mode, open_dataset, read_image
from timm_mealv2.data.loader import eval_loader
from timm_mealv2.errors import UserError
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
    config = resolve_model_data_config(model)
    args = checkpoint.args
    mode, decode = image_mode(args.get('input_img_mode'), config['input_size'][0]), args.get('decode', 'timm')
    validation = _open(checkpoint, args.get('val_split') or 'validation', data_dir)
    folders = class_names_of(validation)
    if args.get('unlabeled') and len(folders or ()) != model.num_classes:
        validation = unlabeled(validation)
    else:
        validation = relabeled(validation, index_map(label_names, folders, str(checkpoint)))
    write_onnx(model, folder / ONNX_FILE, label_names)
    forms: dict[str, nn.Module] = {'': model.eval(), ONNX_FILE: OnnxModel(folder / ONNX_FILE)}
    if int8:
        training = _open(checkpoint, args.get('train_split') or 'train', data_dir)
        quantize_onnx(folder / ONNX_FILE, folder / INT8_FILE, _calibration(training, config, mode, decode))
        forms[INT8_FILE] = OnnxModel(folder / INT8_FILE)

    images, labeled, right = 0, 0, dict.fromkeys(forms, 0)
    differences = dict.fromkeys(forms, 0.0)
    loader = eval_loader(
        validation, config, batch_size=64, device=torch.device('cpu'), num_workers=0, img_mode=mode, decode=decode
    )
    with torch.inference_mode():
        for x, target in loader:
            probabilities = {name: form(x).softmax(dim=1) for name, form in forms.items()}
            images += len(x)
            labeled += int((target >= 0).sum())
            for name, predicted in probabilities.items():
                right[name] += int((predicted.argmax(dim=1) == target).sum())
                differences[name] = max(differences[name], float((predicted - probabilities['']).abs().max()))
    if not differences[ONNX_FILE] <= LARGEST_DIFFERENCE:
        raise UserError(
            f'{ONNX_FILE} predicts something else than the model: a probability differs by '
            f'{differences[ONNX_FILE]:.2e} (at most {LARGEST_DIFFERENCE:g}); leave --onnx out.'
        )
    if images < _ENOUGH_IMAGES:
        _logger.warning(f'{ONNX_FILE} was compared with the model on {images} images alone.')
    top1 = {name: 100 * count / labeled if labeled else None for name, count in right.items()}
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


def _open(checkpoint: TrainingCheckpoint, split: str, data_dir: str | None) -> Any:
    args = checkpoint.args
    if data_dir is None and args.get('dataset'):
        raise UserError(f'--onnx compares on images: give a folder or tar of {args["dataset"]} with --data-dir.')
    root = data_dir or args.get('data_dir') or args.get('data')
    return open_dataset('', root, split, class_map=args.get('class_map') or '')


def _calibration(dataset: Any, config: dict[str, Any], mode: str, decode: str) -> Iterator[Tensor]:
    """Yield a few hundred training images, drawn with a fixed seed, cut and normalized as in the evaluation."""
    transform: Any = create_transform(**config, is_training=False)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:_CALIBRATION_IMAGES]
    for indices in order.split(32):
        yield torch.stack([transform(read_image(dataset, index, mode, decode)[0]) for index in indices.tolist()])
