"""What the command line programs share: one-line errors, types of options with their ranges, groups of options."""

import argparse
import difflib
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import Any, NoReturn

import timm
import torch
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.models import get_arch_pretrained_cfgs, split_model_name_tag
from timm.optim import list_optimizers

from timm_mealv2.errors import TrainingFailedError, UserError, is_full_disk
from timm_mealv2.version import __version__


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage (that of `mealv2-train` fills a screen).

    An option that does not exist is an error that names the nearest one. `--help` shows each default that is not
    empty, `--version` what a report of a fault needs. Subparsers are of the same class. Exit code 2, as in argparse.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{'formatter_class': HelpFormatter, 'allow_abbrev': False, **kwargs})
        versions = f'timm_mealv2 {__version__}, timm {timm.__version__}, torch {torch.__version__}'
        self.add_argument('--version', action='version', version=versions, help='show the versions and stop')

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse as argparse does, and refuse what is left over here, where the options of a subcommand are known."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].partition('=')[0], self._option_string_actions, 1)
            hint = f'; the nearest option is {near[0]}' if near else ''
            self.error(f'unrecognized arguments: {" ".join(unknown)}{hint}')
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Print `message` on one line of stderr and exit with code 2."""
        self.exit(2, f'error: {_one_line(message)} ({self.prog} --help lists the options)\n')


class HelpFormatter(argparse.HelpFormatter):
    """Help with a wide first column, and the default behind each option that has one.

    The usage has what must be given; the options, which would fill the screen, follow below it.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Any, prefix: str | None = None
    ) -> None:
        needed = [action for action in actions if action.required or not action.option_strings]
        super().add_usage(usage, needed, [], prefix)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ''
        empty = action.default is None or action.default is False or action.default in ('', [], {}, argparse.SUPPRESS)
        return text if empty or 'default' in text else f'{text} (default: %(default)s)'


def run_cli(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Run `main(argv)` as a program; returns when it succeeds.

    A `UserError`, and a full disk, becomes one line on stderr and exit code 2; anything else keeps its traceback.
    Ctrl-C exits with 130, and a reader that closed the pipe (`| head`) with 141, as shells report the two signals.
    """
    logging.getLogger('huggingface_hub').propagate = False  # it has a handler of its own
    try:
        main(argv)
        sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's shutdown
    except UserError as error:
        print(f'error: {_one_line(str(error))}', file=sys.stderr)
        raise SystemExit(2) from None
    except TrainingFailedError as error:
        print(f'error: {error}', file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # What is still buffered would raise once more when the interpreter flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:
        if not is_full_disk(error):
            raise
        sys.unraisablehook = lambda _: None  # torch's writer may fail once more where it is taken down
        print(f'error: {_one_line(str(error).splitlines()[-1])} ({_WHOLE})', file=sys.stderr)
        raise SystemExit(2) from None


_WHOLE = 'what was written before is whole; the same command goes on, a training with --resume auto'


def _one_line(message: str) -> str:
    return ' '.join(message.split())


# Types of options


def number(kind: type, text: str, allowed: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Return the type of a finite int or float that has to be `allowed`; `text` says what is."""

    def convert(word: str) -> Any:
        value = kind(word)
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f'must be a finite number, got {word}')
        if not allowed(value):
            raise argparse.ArgumentTypeError(f'must be {text}, got {word}')
        return value

    convert.__name__ = kind.__name__  # argparse names it: invalid int value
    return convert


COUNT = number(int, '1 or more', lambda value: value >= 1)
COUNT_OR_0 = number(int, '0 or more', lambda value: value >= 0)
PIXELS = number(int, '1 to 65535', lambda value: 1 <= value < 2**16)
POSITIVE = number(float, 'above 0', lambda value: value > 0)
NOT_NEGATIVE = number(float, '0 or more', lambda value: value >= 0)
PROBABILITY = number(float, '0 to 1', lambda value: 0 <= value <= 1)
BELOW_1 = number(float, '0 or more and below 1', lambda value: 0 <= value < 1)
SEED = number(int, '0 to 4294967295', lambda value: 0 <= value < 2**32)


def _checked(check: Callable[[str], str | None]) -> Callable[[str], str]:
    """Make an argparse type of a function that says what is wrong with a text, None if nothing is."""

    def convert(text: str) -> str:
        if problem := check(text):
            raise argparse.ArgumentTypeError(f'{text!r}: {problem}')
        return text

    convert.__name__ = 'str'
    return convert


def one_of(*allowed: str) -> Callable[[str], str]:
    """Return the type of some texts; timm's options have a type but no `choices`, and keep that."""
    shown = ', '.join(filter(None, allowed))
    return _checked(lambda text: None if text in allowed else f'must be one of {shown}')


@_checked
def model_text(text: str) -> str | None:
    if ':' in text or os.sep in text:
        known = text.startswith(('hf-hub:', 'local-dir:'))
        kinds = 'must be a name of timm, hf-hub:USER/REPO or local-dir:FOLDER; weights are for --initial-checkpoint'
        return None if known else kinds
    architecture, tag = split_model_name_tag(text)
    if not timm.is_model(architecture):
        return f'timm has no such model, the nearest is {difflib.get_close_matches(text, timm.list_models(), 1, 0)[0]}'
    tags = get_arch_pretrained_cfgs(architecture)
    return f'timm has no such tag, but {", ".join(tags)}' if tag and text not in tags else None


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
    outside = text and (path.is_absolute() or '..' in path.parts or not path.parts)
    return 'must name a folder inside --output' if outside else None


# Options


class Option:
    """One option, a row of a table.

    Args:
        flags: Its names, with a space between them.
        type: Converts its text and checks the range; None leaves the text alone.
        help: What it is, in a few words.
        default: Its value where it is not given.
        **kwargs: Further arguments of argparse's `add_argument`; `metavar` is the last word of the name otherwise.
    """

    def __init__(
        self, flags: str, type: Callable[[str], Any] | None, help: str, default: Any = None, **kwargs: Any
    ) -> None:
        self.flags = flags.split()
        metavar = re.split('[-_ ]', flags)[-1].upper()
        self.kwargs = {'type': type, 'metavar': metavar, 'help': help, 'default': default, **kwargs}


def flag(flags: str, help: str) -> Option:
    """An option without a value, False unless it is given."""
    option = Option(flags, None, help)
    option.kwargs = {'action': 'store_true', 'help': help}
    return option


def add_options(parser: Any, options: Iterable[Option]) -> None:
    """Add `options` to a parser or a group of one."""
    for option in options:
        parser.add_argument(*option.flags, **option.kwargs)


INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'lanczos', 'box', 'hamming')
FLOAT_TYPES = ('float16', 'bfloat16', 'float32')

# Groups that several programs have. Names, types and defaults are those of timm's train.py where it has the option.

TEACHERS = (
    Option(
        '--teachers',
        str,
        'timm name, checkpoint, run folder, NAME=FILE, local-dir:DIR, hf-hub:ID, python:NAME',
        nargs='+',
        metavar='TEACHER',
    ),
    Option(
        '--teacher-classes',
        str,
        "class mapping: line k has the teacher's index of the student's class k",
        nargs='+',
        metavar='TEACHER=FILE',
    ),
    Option('--teacher-weights', NOT_NEGATIVE, 'one weight per teacher (default: equal)', nargs='+'),
    Option(
        '--teacher-dtype',
        str,
        'autocast dtype of the teachers (default: that of --amp)',
        choices=FLOAT_TYPES,
    ),
    Option(
        '--teacher-img-size',
        PIXELS,
        "image size for all teachers, or one per teacher (default: the student's)",
        nargs='+',
    ),
    Option(
        '--teacher-optimize',
        str,
        'on: teachers in channels_last, with folded batch norm; off: as they are',
        'on',
        choices=('on', 'off'),
    ),
)
PER_SAMPLE = Option(
    '--teachers-per-sample',
    COUNT,
    'teachers to draw for each sample, by their weights (default: all)',
    metavar='K',
)

DECODE = Option(
    '--decode',
    str,
    'view: turned upright, transparency over white; timm: pixels as stored',
    'timm',
    choices=('timm', 'view'),
)
DATA = (
    Option('--data-dir', None, 'folder, tar or CSV file of the data set'),
    Option('--dataset', None, 'kind and name: torch/cifar10, hfds/NAME, ...; else a folder', ''),
    Option(
        '--val-share',
        BELOW_1,
        'share of each class of the training images to hold out for validation',
        0.0,
    ),
    flag('--dataset-download', help='download the data set, where its kind allows that'),
    Option('--class-map', str, 'class names in the order of their indices', '', metavar='FILE'),
    Option(
        '--input-img-mode',
        one_of('L', 'LA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'LAB'),
        "Pillow's image mode; RGB, or L for one channel",
    ),
    DECODE,
    Option('--input-key', str, 'key or column of the images'),
    Option('--target-key', str, 'key or column of the labels'),
    flag('--dataset-trust-remote-code', help="run a Hugging Face data set's own code"),
)
UNLABELED = flag('--unlabeled', 'ignore labels; any folder of images works')
TRAIN_SPLIT = Option('--train-split', None, 'training split', 'train')
VAL_SPLIT = Option('--val-split', None, 'validation split', 'validation')

DEVICE = (
    Option('--device', str, 'device; the CPU where unset and without CUDA', 'cuda'),
    Option('-b --batch-size', COUNT, 'batch size per process', 128),
    Option('-j --workers', COUNT_OR_0, 'worker processes that load images', 4),
)

AMP = (
    flag('--amp', help='mixed precision'),
    Option('--amp-dtype', one_of('float16', 'bfloat16'), 'type of mixed precision: float16 or bfloat16', 'float16'),
)

# What the student is given: with AUGMENTATION, every setting that decides a training sample's pixels.
INPUT = (
    Option('--num-classes', COUNT, 'number of classes (default: those of the data)'),
    Option('--img-size', PIXELS, "image size, square (default: the model's)"),
    Option('--in-chans', COUNT, "image channels (default: the model's)"),
    Option('--input-size', PIXELS, 'channels, height and width in pixels', nargs=3),
    Option('--mean', PROBABILITY, 'mean of the pixels (0..1) per channel', nargs='+'),
    Option('--std', POSITIVE, 'standard deviation of the pixels (0..1)', nargs='+'),
)

AUGMENTATION = (
    flag('--no-aug', help='no augmentation: evaluation crops'),
    Option(
        '--train-crop-mode',
        one_of('rrc', 'rkrc', 'rkrr'),
        'rrc (random resized crop), rkrc or rkrr (aspect ratio kept)',
    ),
    Option('--scale', POSITIVE, 'area range of the random crop', [0.08, 1.0], nargs='+'),
    Option('--ratio', POSITIVE, 'aspect ratio range of the random crop', [3 / 4, 4 / 3], nargs='+'),
    Option('--hflip', PROBABILITY, 'probability of horizontal flip', 0.5),
    Option('--vflip', PROBABILITY, 'probability of vertical flip', 0.0),
    Option('--color-jitter', NOT_NEGATIVE, 'color jitter; 0 for none', 0.4),
    Option('--color-jitter-prob', PROBABILITY, 'probability of color jitter (default: 1)'),
    Option('--grayscale-prob', PROBABILITY, 'probability of grayscale (default: 0)'),
    Option('--gaussian-blur-prob', PROBABILITY, 'probability of Gaussian blur (default: 0)'),
    Option('--aa', policy_text, "timm's AutoAugment policy, such as rand-m9-mstd0.5"),
    Option(
        '--train-interpolation',
        one_of('random', *INTERPOLATIONS, ''),
        "interpolation for training; '' for that of evaluation",
        'random',
    ),
    Option('--reprob', PROBABILITY, 'probability of random erasing', 0.0),
    Option('--remode', one_of('const', 'rand', 'pixel'), 'fill of the erased regions: const, rand or pixel', 'pixel'),
    Option('--recount', COUNT, 'number of erased regions', 1),
    Option('--mixup', NOT_NEGATIVE, 'Mixup; 0 for none', 0.0),
    Option('--cutmix', NOT_NEGATIVE, 'CutMix; 0 for none', 0.0),
    Option(
        '--cutmix-minmax', PROBABILITY, "smallest and largest side of CutMix's box, in place of its alpha", nargs='+'
    ),
    Option('--mixup-prob', PROBABILITY, 'probability of mixing', 1.0),
    Option('--mixup-switch-prob', PROBABILITY, 'probability of CutMix where both are on', 0.5),
    Option(
        '--mixup-mode', one_of('batch', 'pair', 'elem'), 'one draw for a batch, a pair of images or an image', 'batch'
    ),
    Option('--mixup-off-epoch', COUNT_OR_0, 'first epoch without mixing; 0 to mix in all', 0),
)
