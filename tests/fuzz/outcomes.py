"""How an example may end, and how examples are made. A module of its own, as `conftest` cannot be imported."""

import collections
import contextlib
import io
import reprlib
import signal
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from hypothesis import note
from torch import Tensor

from timm_mealv2.command_line import run_cli

SMALL = (
    '--model test_resnet --num-classes 3 --img-size 16 --batch-size 3 --workers 0 --epochs 1 --warmup-epochs 0 '
    '--lr 0.01 --device cpu'
).split()
"""A training of a tenth of a second."""

SECONDS = 60
"""How long one example may take, on a loaded machine: each is done in less than one."""


ENDS: collections.Counter[str] = collections.Counter()
"""How the examples of the present test have ended: 'accepted' or 'refused'."""


def is_accepted(program: Callable[..., Any], argv: list[Any]) -> bool:
    """Run a program here; return whether it succeeds, False if it ends with code 2 and one line.

    A traceback, another exit code, more lines and a run beyond `SECONDS` fail the test.
    """
    errors, code = io.StringIO(), 0
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            run_cli(program, [str(word) for word in argv])
    except SystemExit as exit:
        code = exit.code
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    told = [line for line in errors.getvalue().splitlines() if line.startswith('error: ')]
    assert code in (0, 2)
    assert len(told) == (1 if code else 0), errors.getvalue()
    ENDS['refused' if code else 'accepted'] += 1
    return code == 0


WORDS = ('', 'x', 'test_resnet', 'None', '-1', '1e999', '/', '../x', 'hf-hub:a/b', 'local-dir:/', 'ä\x00')
PLAIN = (None, True, False, 0, 1, -1, 7, 2**63, 10**30, 0.5, -0.0, float('nan'), float('inf'), *WORDS)


def any_value(random: Random, depth: int = 2) -> Any:
    """A value as JSON and YAML have it."""
    kind = random.randrange(6 if depth else 4)
    if kind < 4:
        return random.choice(PLAIN)
    inner = [any_value(random, depth - 1) for _ in range(random.randrange(4))]
    return inner if kind == 4 else {random.choice(WORDS): value for value in inner}


def altered(random: Random, value: Any) -> Any:
    """Return a copy of nested dicts and lists with one to three changes.

    An entry is left out, doubled under another name, exchanged with another one, or replaced; tensors get another
    shape, another type, or values that are not finite.
    """
    value = _copy(value)
    for _ in range(random.randint(1, 3)):
        place, path = value, []
        while place:
            key = random.choice(list(place) if isinstance(place, dict) else range(len(place)))
            path.append(key)
            if isinstance(place[key], (dict, list)) and random.randrange(5):
                place = place[key]
                continue
            how = random.choice(('replaced', 'replaced', 'dropped', 'doubled', 'exchanged'))
            if how == 'replaced':
                old = place[key]
                changed = isinstance(old, Tensor) and random.randrange(3)
                place[key] = random.choice(_CHANGES)(old) if changed else any_value(random)
            elif how == 'exchanged':
                other = random.choice(list(place) if isinstance(place, dict) else range(len(place)))
                place[key], place[other] = place[other], place[key]
            elif how == 'doubled' and isinstance(place, dict):
                place[random.choice(WORDS)] = place[key]
            else:
                del place[key]
            shown = '' if isinstance(place, list) or key not in place else reprlib.repr(place[key])
            note(f'{path} {how} {shown}')
            break
    return value


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, (list, tuple)) else value


_CHANGES: list[Callable[[Tensor], Tensor]] = [
    lambda tensor: tensor[None],
    lambda tensor: tensor.reshape(-1),
    lambda tensor: tensor.reshape(-1)[:1],
    lambda tensor: tensor.reshape(-1)[:0],
    lambda tensor: tensor.half(),
    lambda tensor: tensor.double(),
    lambda tensor: tensor.long(),
    lambda tensor: tensor.bool(),
    lambda tensor: tensor.to(torch.complex64),
    lambda tensor: tensor.to_sparse() if tensor.ndim else tensor,
    lambda tensor: tensor.to('meta'),
    lambda tensor: tensor * float('nan'),
]


def damaged(random: Random, content: bytes) -> bytes:
    """Return a file's content cut off, or with a flipped bit, or with other bytes at some place."""
    how = random.choice(('flipped', 'flipped', 'flipped', 'cut off', 'overwritten', 'doubled'))
    place = random.randrange(len(content))
    note(f'{how} at {place} of {len(content)}')
    if how == 'cut off':
        return content[:place]
    if how == 'overwritten':
        return content[:place] + random.randbytes(8) + content[place + 8 :]
    if how == 'doubled':
        return content[:place] + content[place // 2 :]
    changed = bytearray(content)
    changed[place] ^= 1 << random.randrange(8)
    return bytes(changed)
