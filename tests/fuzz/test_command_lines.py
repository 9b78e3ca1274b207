"""Single options, pairs and triples of a program's options: each command line does its work, or is refused in one line.

Pairs are numbered, and a pair's number decides the values: the suite tries the first few, the slow tests all of them
once, and `--fuzz-minutes` those from a number that nobody has tried.
"""

import argparse
import contextlib
import itertools
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from outcomes import SMALL, is_accepted

from timm_mealv2.cli import evaluate, hub, soft_labels
from timm_mealv2.training import run
from timm_mealv2.training.options import build_parser

TEXTS = ('', 'x', 'ä', 'nan', '/proc/not/there', 'a=b', 'None')
NUMBERS = ('-1', '0', '1', '2', '3', '0.1', '0.5', '1e-30', '0_1', 'nan', 'inf', '', 'x')
HUGE = ('1e30', str(10**12))

# Options that are left out, or not given huge numbers, and why.
LEFT_OUT = {
    'pretrained': 'asks the Hub, as it should',
    'config': 'has a search of its own',
    'out': 'says where to write',
    **dict.fromkeys(('torchcompile', 'teacher_compile'), 'compiles for a quarter of a minute'),
}
NOT_HUGE = {
    'takes hours': 'epochs warmup_epochs cooldown_epochs lr_cycle_limit lr_cycle_mul dry_run_seconds samples recount '
    'train_batches_per_epoch aug_repeats epoch_repeats samples_per_decode workers seconds images',
    'takes all memory': 'batch_size validation_batch_size img_size input_size in_chans num_classes train_img_sizes '
    'teacher_img_size aug_splits kd_student_feature_dim kd_teacher_feature_dim',
}

Words = dict[str, list[Any]]


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))


PROGRAMS = {
    'train': (run.main, build_parser()),
    'evaluate': (evaluate.main, evaluate.build_parser()),
    **{name: (soft_labels.main, commands(soft_labels.build_parser())[name]) for name in ('record', 'verify', 'show')},
    'export': (hub.main, commands(hub.build_parser())['export']),
}


def options(program: str) -> list[argparse.Action]:
    actions = PROGRAMS[program][1]._actions
    return [
        action for action in actions if action.dest not in LEFT_OUT and (action.option_strings or program == 'train')
    ]


def all_pairs(program: str) -> list[tuple[argparse.Action, ...]]:
    pairs = list(itertools.combinations(options(program), 2))
    Random(0).shuffle(pairs)
    return pairs


PAIRS = {program: all_pairs(program) for program in PROGRAMS}
COUNTERS: dict[str, Iterator[int]] = {}
BLOCK = 1000


@pytest.fixture(scope='session')
def named(
    few_images: Path, teacher: str, store: Path, run_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Words:
    """What there is to be named by an option that takes a text."""
    checkpoint = run_folder / 'last.pth.tar'
    names, numbers = (tmp_path_factory.mktemp('classes') / name for name in ('names.txt', 'numbers.txt'))
    names.write_text('warm\nplain\ncold\n')
    numbers.write_text('0\n2\n1\n')
    return {
        'aa': ['rand-m9-mstd0.5', 'augmix-m5-w2', '3a', 'original'],
        'class_map': [names],
        'data': [few_images],
        'data_dir': [few_images],
        'dataset': ['folder', 'torch/x'],
        'device': ['cpu', 'cpu:0', 'cuda', 'cuda:7', 'xpu'],
        'device_modules': ['json'],
        'examples': sorted((few_images / 'train').rglob('*.png'))[:2],
        'experiment': ['run', 'a/b'],
        'gp': ['fast', 'avg', 'max', 'avgmax', 'catavgmax', 'token'],
        'initial_checkpoint': [checkpoint],
        'input_img_mode': ['RGB', 'L', 'CMYK', 'RGBA', 'I;16'],
        'kd_model_name': [teacher],
        'model': ['test_resnet', 'test_vit', 'test_convnext', 'test_efficientnet', 'local-dir:/proc'],
        'model_kwargs': ['in_chans=3', 'stem_width=8', 'block_args={}', 'num_classes=2'],
        'opt': ['sgd', 'adamw', 'adan', 'lamb', 'lookahead_sgd', 'muon', 'lbfgs', 'madgrad'],
        'opt_kwargs': ['nesterov=True', 'lr=1', 'eps=1e-3'],
        'output': ['output', '.'],
        'pretrained_path': [checkpoint],
        'resume': [checkpoint, 'auto'],
        'soft_labels': [store],
        'split': ['train', 'validation'],
        'teacher_classes': [f'{teacher}={numbers}'],
        'teachers': [teacher, 'python:json:loads'],
        'train_split': ['train', 'validation'],
        'val_split': ['train', 'validation'],
    }


def values(action: argparse.Action, named: Words) -> list[str]:
    """Words that an option may be given: those that its type takes, and others."""
    kind: Any = action.type
    if action.choices or hasattr(kind, 'allowed'):
        return [*(action.choices or kind.allowed), 'x']
    if kind in (int, float) or hasattr(kind, 'low'):
        return [*NUMBERS, *([] if action.dest in ' '.join(NOT_HUGE.values()).split() else HUGE)]
    return [*TEXTS, *map(str, named.get(action.dest, []))]


def fits(action: argparse.Action, word: str) -> bool:
    try:
        return not callable(action.type) or action.type(word) is not None
    except (ValueError, argparse.ArgumentTypeError):
        return False


def words(action: argparse.Action, named: Words, random: Random) -> list[str]:
    """An option and its words: in nine of ten command lines such as its type takes."""
    if action.nargs == 0:
        return [action.option_strings[-1]]
    possible = values(action, named)
    if random.randrange(10):
        possible = [word for word in possible if fits(action, word)] or possible
    if action.dest in named and random.randrange(4):
        possible = [str(value) for value in named[action.dest]]
    count = action.nargs if isinstance(action.nargs, int) else random.randint(1, 3) if action.nargs in ('+', '*') else 1
    return joined(action, random.choices(possible, k=count))


def joined(action: argparse.Action, chosen: list[str]) -> list[str]:
    option = action.option_strings[-1:]
    return [*option, *chosen] if len(chosen) > 1 or not option else [f'{option[0]}={chosen[0]}']


def begin(program: str, named: Words, random: Random) -> list[Any]:
    """A command line that does something of a tenth of a second, before the options change it."""
    on_cpu, data = ['--workers', 0, '--device', 'cpu'], ['--data-dir', *named['data_dir']]
    teacher = named['teachers'][0]
    if program == 'train':
        argv = [*SMALL, *data, '--dry-run-seconds', 0.1]
        return [*argv, *random.choice([[], ['--teachers', teacher], ['--soft-labels', *named['soft_labels']]])]
    if program == 'evaluate':
        return [teacher, *data, *on_cpu]
    if program == 'record':
        own = ['--out', 'store'] if program == 'record' else ['--seconds', 0.1]
        return [program, *own, '--epochs', 1, '--teachers', teacher, *data, '--img-size', 16, *on_cpu]
    if program == 'export':
        return [program, *named['initial_checkpoint'], '--out', 'export']
    more = ['--device', 'cpu', '--samples', 4] if program == 'verify' else ['0', '--out', 'shown.png']
    return [program, *named['soft_labels'], *more, *data]


def pair_line(program: str, number: int, named: Words) -> list[Any]:
    """The command line with the pair of a number, in one of three cases with a third option."""
    random = Random(f'{program} {number}')
    pair = PAIRS[program][number % len(PAIRS[program])]
    chosen = pair if random.randrange(3) else (*pair, random.choice(options(program)))
    return [*begin(program, named, random), *(word for option in chosen for word in words(option, named, random))]


def attempt(program: str, argv: list[Any], tmp_path: Path) -> None:
    """Run a program in an empty folder."""
    print(argv)  # shown where the test fails
    with tempfile.TemporaryDirectory(dir=tmp_path) as here, contextlib.chdir(here):
        is_accepted(PROGRAMS[program][0], argv)


@pytest.mark.parametrize('program', PROGRAMS)
def test_any_pair_of_options_works_or_is_refused_in_one_line(
    request: pytest.FixtureRequest, named: Words, tmp_path: Path, program: str
) -> None:
    first = Random().randrange(10**6, 10**9) if request.config.getoption('--fuzz-minutes') else 0
    numbers = COUNTERS.setdefault(program, itertools.count(first))
    for number in itertools.islice(numbers, 50 if program == 'train' else 5):
        attempt(program, pair_line(program, number, named), tmp_path)


def attempt_all(program: str, lines: Iterable[list[Any]], tmp_path: Path) -> None:
    """Run all command lines, and show in the end which of them failed."""
    faults = []
    for argv in lines:
        try:
            attempt(program, argv, tmp_path)
        except (Exception, pytest.fail.Exception):
            faults.append(f'{argv}\n{traceback.format_exc(limit=-4)}')
    assert not faults, '\n'.join([f'{len(faults)} faults', *faults])


@pytest.mark.slow
@pytest.mark.parametrize('program', PROGRAMS)
def test_each_value_works_or_is_refused_in_one_line(named: Words, tmp_path: Path, program: str) -> None:
    random = Random(0)
    single = [
        joined(option, [word] * (option.nargs if isinstance(option.nargs, int) else 1))
        for option in options(program)
        for word in ([] if option.nargs == 0 else values(option, named))
    ]
    attempt_all(program, ([*begin(program, named, random), *words] for words in single), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('program', 'first'), [(program, first) for program in PROGRAMS for first in range(0, len(PAIRS[program]), BLOCK)]
)
def test_every_pair_of_options_works_or_is_refused_in_one_line(
    named: Words, tmp_path: Path, program: str, first: int
) -> None:
    numbers = range(first, min(first + BLOCK, len(PAIRS[program])))
    attempt_all(program, (pair_line(program, number, named) for number in numbers), tmp_path)
