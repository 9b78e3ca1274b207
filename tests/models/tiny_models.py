"""Small real models for the tests of this folder, and the files that hold them."""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import save_for_hf
from timm.utils import CheckpointSaver
from torch import Tensor, nn

HALF = (0.5, 0.5, 0.5)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tiny(seed: int = 0, name: str = 'resnet10t', **kwargs: Any) -> Any:
    """A small real model whose answers differ clearly from class to class."""
    torch.manual_seed(seed)
    if name == 'resnet10t':
        kwargs = {'channels': (8, 8, 16, 16), 'stem_width': 8, **kwargs}
    model = timm.create_model(name, **{'num_classes': 10, **kwargs})
    with torch.no_grad():
        model.get_classifier().weight.mul_(20)
    # Statistics unlike the initial ones: BatchNorm in the wrong mode, or its buffers lost, would show.
    model.train()
    with torch.no_grad():
        model(torch.randn(4, model.in_chans, 64, 64))
    return model.eval()


def images(count: int = 3, chans: int = 3, size: int = 64) -> Tensor:
    return torch.randn(count, chans, size, size, generator=torch.Generator().manual_seed(7))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Scripted(nn.Module):
    """Answers with given logits, so that NumPy can take the very same."""

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.num_classes = logits.shape[1]
        self.register_buffer('logits', torch.from_numpy(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_buffer('logits')[: len(x)].to(x.dtype)


def save_folder(folder: Path, model: nn.Module) -> str:
    # As hub tools write it: contiguous tensors in model.safetensors, the architecture and its arguments in config.json.
    save_for_hf(copy.deepcopy(model).to(memory_format=torch.contiguous_format), str(folder), safe_serialization=True)
    return f'local-dir:{folder}'


def save_training_checkpoint(folder: Path, model: nn.Module, ema: nn.Module | None = None, **args) -> Path:
    """A checkpoint as training writes it, by timm's own saver."""
    folder.mkdir()
    saver = CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        args=argparse.Namespace(model='resnet10t', **args),
        model_ema=ema,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
    )
    saver.save_checkpoint(0, 1.0)
    return folder / 'last.pth.tar'


def write_ensemble(folder: Path, **config) -> str:
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps({'architecture': 'mealv2_ensemble', **config}))
    return f'local-dir:{folder}'
