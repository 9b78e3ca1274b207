"""argparse types: numbers within a range, and texts that have to name something (a model, a device, a file)."""

import argparse
import difflib
import math
import os
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import timm
import torch
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.models import get_arch_pretrained_cfgs, split_model_name_tag
from timm.optim import list_optimizers


class Range:
    """An argparse type: a finite int or float within bounds.

    Args:
        kind: int or float.
        low: Smallest number that is possible.
        high: Largest number that is possible.
        above: Open lower bound, in place of `low`.
        below: Open upper bound, in place of `high`.
    """

    def __init__(
        self,
        kind: type,
        low: float = -math.inf,
        high: float = math.inf,
        *,
        above: float | None = None,
        below: float | None = None,
    ) -> None:
        self.__name__ = kind.__name__  # argparse names it: invalid int value
        self.kind = kind
        self.low = low if above is None else math.nextafter(above, math.inf)
        self.high = high if below is None else math.nextafter(below, -math.inf)
        lower = f'{low} or more' if above is None else f'above {above}'
        upper = f'at most {high}' if below is None else f'below {below}'
        self.text = lower if self.high == math.inf else f'{lower} and {upper}'

    def __call__(self, text: str) -> Any:
        """Convert `text`.

        Raises:
            ValueError: If it is no number of the kind.
            argparse.ArgumentTypeError: If it is not finite or out of bounds.
        """
        value = self.kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f'must be a finite number, got {text}')
        if isinstance(value, int) and value.bit_length() > 40:  # numpy, torch and Pillow fail in ways of their own
            raise argparse.ArgumentTypeError(f'is too large a number, got {text}')
        if not self.low <= value <= self.high:
            raise argparse.ArgumentTypeError(f'must be {self.text}, got {text}')
        return value


class OneOf:
    """An argparse type: one of some texts. timm's options have a type but no `choices`, and keep that."""

    def __init__(self, *allowed: str) -> None:
        self.__name__ = 'str'
        self.allowed = allowed

    def __call__(self, text: str) -> str:
        """Return `text` if it is allowed.

        Raises:
            argparse.ArgumentTypeError: If it is not.
        """
        if text not in self.allowed:
            shown = ', '.join(filter(None, self.allowed))
            raise argparse.ArgumentTypeError(f'must be one of {shown}, got {text!r}')
        return text


COUNT = Range(int, 1)
COUNT_OR_0 = Range(int, 0)
PIXELS = Range(int, 1, 2**16 - 1)
POSITIVE = Range(float, above=0)
NOT_NEGATIVE = Range(float, 0)
PROBABILITY = Range(float, 0, 1)
SEED = Range(int, 0, 2**32 - 1)


def _checked(check: Callable[[str], str | None]) -> Callable[[str], str]:
    """Make an argparse type of a function that says what is wrong with a text, None if nothing is."""

    def convert(text: str) -> str:
        if problem := check(text):
            raise argparse.ArgumentTypeError(f'{text!r}: {problem}')
        return text

    convert.__name__ = 'str'
    return convert


@_checked
def model_text(text: str) -> str | None:
    if ':' in text:
        known = text.startswith(('hf-hub:', 'local-dir:'))
        return None if known else 'must be a name of timm, hf-hub:USER/REPO or local-dir:FOLDER'
    architecture, tag = split_model_name_tag(text)
    if not timm.is_model(architecture):
        return f'timm has no such model, the nearest is {difflib.get_close_matches(text, timm.list_models(), 1, 0)[0]}'
    tags = get_arch_pretrained_cfgs(architecture)
    return f'timm has no such tag, but {", ".join(tags)}' if tag and text not in tags else None


@_checked
def device_text(text: str) -> str | None:
    try:
        return 'computes nothing; choose cpu or cuda' if torch.device(text).type == 'meta' else None
    except RuntimeError:
        return 'must be a device of torch, such as cpu, cuda or cuda:1'


@_checked
def optimizer_text(text: str) -> str | None:
    known = text.lower() in list_optimizers()
    return None if known else 'timm has no such optimizer; timm.optim.list_optimizers() lists them'


@_checked
def policy_text(text: str) -> str | None:
    makers = {'rand': rand_augment_transform, 'augmix': augment_and_mix_transform}
    try:
        makers.get(text.split('-')[0], auto_augment_transform)(text, {})
    except (AssertionError, KeyError, ValueError, IndexError):
        return 'must be such as rand-m9-mstd0.5, augmix-m5-w2, 3a, v0, v0r, original or originalr'
    return None


@_checked
def file_text(text: str) -> str | None:
    return 'there is no such file' if text and not os.path.isfile(text) else None


@_checked
def experiment_text(text: str) -> str | None:
    path = PurePath(text)
    if text and (path.is_absolute() or '..' in path.parts or not path.parts):
        return 'must name a folder inside --output'
    if any(len(os.fsencode(part)) > 255 or '\0' in part for part in path.parts):
        return 'cannot be the name of a folder'
    return None
