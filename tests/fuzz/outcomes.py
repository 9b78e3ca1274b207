"""How files are altered, and how a program may end. A module of its own, as `conftest` cannot be imported."""

import argparse
import contextlib
import io
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from timm_mealv2.command_line import run_cli

SMALL = (
    '--model test_resnet --num-classes 3 --img-size 16 --batch-size 3 --workers 0 --epochs 1 --warmup-epochs 0 '
    '--lr 0.01 --device cpu'
).split()
"""A training of a tenth of a second."""

WORDS = (
    *('', 'x', 'test_resnet', '/', '../x', '1e999', 'hf-hub:a/b', 'local-dir:/', 'hf_hub:a/b', 'https://x.org/y.pth'),
    *('python:evil:model', 'evil', '!!python/object/apply:os.system [touch x]', 'resnet18.a1_in1k'),
)
"""`evil` is a module that the tests put where Python finds it."""
KEYS = ('teachers', 'url', 'file', 'hf_hub_id', 'source', 'pretrained', 'checkpoint_path', 'device_modules', 'output')


def ends(program: Callable[..., Any], argv: list[Any]) -> int:
    """Run a program here; return its exit code, 1 for a traceback."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            run_cli(program, [str(word) for word in argv])
    except SystemExit as exit:
        return int(exit.code or 0)
    except Exception:
        return 1
    return 0


def altered(random: Random, value: Any) -> Any:
    """Return a copy of nested dicts and lists with up to six entries replaced, added or left out."""
    value = _copy(value)
    for _ in range(random.randint(1, 6)):
        place = value
        while place:
            key = random.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], (dict, list)) and random.randrange(4):
                place = place[key]
                continue
            how = random.randrange(6)
            if how == 0:
                del place[key]
            elif how == 1 and isinstance(place, dict):
                place[random.choice(KEYS)] = random.choice(WORDS)
            elif isinstance(place[key], Tensor) and how > 2:
                place[key] = random.choice((place[key][None], place[key].double(), place[key].reshape(-1)[:1]))
            else:
                place[key] = random.choice((None, True, 0, -1, 2**63, 0.5, torch.nan, [], {}, *WORDS))
            break
    return value


def _copy(value: Any) -> Any:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, (list, tuple)) else value


def flipped(content: bytes, bit: int) -> bytes:
    """Return a file's content with one bit flipped."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
