"""A model.onnx of `mealv2-hub export --onnx`: written, and run as a module like any other model."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing

PREPROCESSING = ('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std', 'num_classes')
"""Entries of a `pretrained_cfg` that a file's metadata has, as JSON; beside them `label_names` where known."""


class OnnxModel(nn.Module):
    """Runs a file in onnxruntime, on the CPU.

    Attributes:
        pretrained_cfg: What the file's metadata says: 'input_size', 'mean', 'std', 'label_names' and the like.
        num_classes: Number of classes C.

    Raises:
        UserError: If the file cannot be read, is none of `write_onnx`, or onnxruntime is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        runtime = _require('onnxruntime')
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = runtime.InferenceSession(os.fspath(path), options, providers=['CPUExecutionProvider'])
        except Exception as error:  # onnxruntime has exceptions of its own for each kind of damage
            raise UserError(f'{os.fspath(path)} is no readable ONNX file: {error}') from error
        entries = self.session.get_modelmeta().custom_metadata_map
        metadata = {key: json.loads(entries[key]) for key in (*PREPROCESSING, 'label_names') if key in entries}
        if 'num_classes' not in metadata:
            raise UserError(f'{os.fspath(path)} does not say what its images are: export it with mealv2-hub.')
        self.pretrained_cfg: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in metadata.items()}
        self.default_cfg = self.pretrained_cfg
        self.num_classes: int = metadata['num_classes']

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, C], float32, for images [B, chans, H, W] that are normalized with `pretrained_cfg`."""
        (name,) = (entry.name for entry in self.session.get_inputs())
        (logits,) = self.session.run(None, {name: images.float().numpy(force=True)})
        return torch.from_numpy(logits).to(images.device)


def write_onnx(model: nn.Module, path: Path, label_names: list[str] | None = None) -> None:
    """Write a model as ONNX: input [B, chans, H, W] float32, normalized, B free; output logits [B, C].

    Args:
        model: A timm model on the CPU, whose `pretrained_cfg` says what its images are.
        path: The file; one that is there is replaced.
        label_names: The names of the classes.

    Raises:
        UserError: If onnx or onnxscript is not installed.
    """
    _require('onnx')
    _require('onnxscript')
    images = torch.zeros(2, *get_model_input_config(model)['input_size'])
    program = torch.onnx.export(
        model.eval(),
        (images,),
        input_names=['images'],
        output_names=['logits'],
        dynamic_shapes=({0: torch.export.Dim('batch')},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    entries: dict[str, Any] = {**model.pretrained_cfg, 'num_classes': model.num_classes}  # type: ignore[dict-item]
    known = {key: entries[key] for key in PREPROCESSING if entries.get(key) is not None}
    if label_names:
        known['label_names'] = label_names
    program.model.metadata_props.update({key: json.dumps(value) for key, value in known.items()})
    with replacing(path) as temporary:
        program.save(temporary)


def quantize_onnx(path: Path, out: Path, batches: Iterable[Tensor]) -> None:
    """Write the int8 form of a file of `write_onnx`: static quantization, per channel, as QDQ pairs.

    Args:
        path: The file in float32.
        out: The file to write.
        batches: Normalized images [B, chans, H, W] that the ranges of the activations are calibrated on.
    """
    quantization = _require('onnxruntime.quantization')
    images = iter(batches)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(images, None)
            return None if batch is None else {'images': batch.float().numpy(force=True)}

    with replacing(out) as temporary:
        quantization.quantize_static(
            path,
            temporary,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
        )


def _require(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f'{name.partition(".")[0]} is not installed: pip install "timm_mealv2[onnx]".') from error
