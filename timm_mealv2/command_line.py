"""What the command line programs share: one-line errors, options with their ranges, and groups of common options."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import timm
import torch

from timm_mealv2.errors import UserError, refusal
from timm_mealv2.option_types import (
    COUNT,
    COUNT_OR_0,
    NOT_NEGATIVE,
    PIXELS,
    POSITIVE,
    PROBABILITY,
    OneOf,
    device_text,
    policy_text,
)
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
    """Help with a wide first column, and the default behind each option that has one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ''
        empty = action.default is None or action.default is False or action.default in ('', [], {}, argparse.SUPPRESS)
        return text if empty or 'default' in text else f'{text} (default: %(default)s)'


def run_cli(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Run `main(argv)` as a program; returns when it succeeds.

    A `UserError`, and what the machine refuses, becomes one line on stderr and exit code 2; anything else that is not
    the user's mistake keeps its traceback. Ctrl-C exits with 130, and a reader that closed the pipe (`| head`) with
    141, as shells report the two signals.
    """
    try:
        main(argv)
        sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's shutdown
    except UserError as error:
        print(f'error: {_one_line(str(error))}', file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # What is still buffered would raise once more when the interpreter flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:
        if (refused := refusal(error)) is None:
            raise
        sys.unraisablehook = lambda _: None  # torch's loader may fail once more where it is taken down
        print(f'error: {_one_line(refused)} ({_WHOLE})', file=sys.stderr)
        raise SystemExit(2) from None


_WHOLE = 'what was written before is whole; the same command goes on, a training with --resume auto'


def _one_line(message: str) -> str:
    return ' '.join(message.split())


# Options


class Option:
    """One option, a row of a table.

    Args:
        flags: Its names, with a space between them.
        type: Converts its text and checks the range; None leaves the text alone.
        metavar: Its unit.
        help: What it is, in a few words.
        default: Its value where it is not given.
        **kwargs: Further arguments of argparse's `add_argument`.
    """

    def __init__(
        self, flags: str, type: Callable[[str], Any] | None, metavar: str, help: str, default: Any = None, **kwargs: Any
    ) -> None:
        self.flags = flags.split()
        self.kwargs = {'type': type, 'metavar': metavar, 'help': help, 'default': default, **kwargs}


def flag(flags: str, help: str) -> Option:
    """An option without a value, False unless it is given."""
    option = Option(flags, None, '', help)
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
        'TEACHER',
        'NAME.TAG, NAME=CHECKPOINT, local-dir:FOLDER, hf-hub:USER/REPO or python:MODULE:FUNCTION',
        nargs='+',
    ),
    Option(
        '--teacher-classes',
        str,
        'TEACHER=FILE',
        "the student's classes among a teacher's: line k has the teacher's index of class k",
        nargs='+',
    ),
    Option('--teacher-weights', NOT_NEGATIVE, 'WEIGHT', 'one for each teacher; equal if not given', nargs='+'),
    Option(
        '--teacher-dtype',
        str,
        'TYPE',
        "autocast of the teachers (float16, bfloat16, float32); their weights' type if not given",
        choices=FLOAT_TYPES,
    ),
    Option(
        '--teacher-img-size',
        PIXELS,
        'PIXELS',
        "image size for all teachers or for each; the student's if not given",
        nargs='+',
    ),
)
TUNING = (
    Option(
        '--teacher-tune',
        str,
        'HOW',
        'on: each in its fastest form; off: as it is, the same digits in each run',
        'on',
        choices=('on', 'off'),
    ),
    flag('--teacher-compile', 'a compiled form of each teacher may be chosen too'),
)

DATA = (
    Option('--data-dir', None, 'PATH', 'folder or tar of the data set'),
    Option('--dataset', None, 'NAME', 'kind and name: torch/cifar10, hfds/NAME, ...; else a folder', ''),
    flag('--dataset-download', help='download the data set, where its kind allows that'),
    Option('--class-map', str, 'FILE', 'class names in the order of their indices', ''),
    Option(
        '--input-img-mode',
        OneOf('L', 'LA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'LAB'),
        'MODE',
        "Pillow's image mode; RGB, or L for one channel",
    ),
    Option('--input-key', str, 'KEY', 'key of the images in a sample'),
    Option('--target-key', str, 'KEY', 'key of the labels in a sample'),
    flag('--dataset-trust-remote-code', help="run a Hugging Face data set's own code"),
)
TRAIN_SPLIT = Option('--train-split', None, 'NAME', 'training split', 'train')

DEVICE = (
    Option('--device', device_text, 'NAME', 'device; the CPU where unset and without CUDA', 'cuda'),
    Option('-b --batch-size', COUNT, 'IMAGES', 'images of a batch, per process', 128),
    Option('-j --workers', COUNT_OR_0, 'N', 'processes that load images', 4),
)

# What the student is given: with AUGMENTATION, every setting that decides a training sample's pixels.
INPUT = (
    Option('--num-classes', COUNT, 'N', "number of classes; the model's own if not given"),
    Option('--img-size', PIXELS, 'PIXELS', "image size, square; the model's own if not given"),
    Option('--in-chans', COUNT, 'N', "image channels; the model's own if not given"),
    Option('--input-size', PIXELS, 'N', 'channels, height and width in pixels', nargs=3),
    Option('--mean', PROBABILITY, 'MEAN', 'mean of the pixels (0..1) per channel', nargs='+'),
    Option('--std', POSITIVE, 'STD', 'standard deviation of the pixels (0..1)', nargs='+'),
)

AUGMENTATION = (
    flag('--no-aug', help='no augmentation: the crops of the evaluation'),
    Option(
        '--train-crop-mode',
        OneOf('rrc', 'rkrc', 'rkrr'),
        'MODE',
        'rrc (random resized crop), rkrc or rkrr (aspect ratio kept)',
    ),
    Option('--scale', POSITIVE, 'SHARE', 'area of the random crop', [0.08, 1.0], nargs='+'),
    Option('--ratio', POSITIVE, 'RATIO', 'its aspect ratio', [3 / 4, 4 / 3], nargs='+'),
    Option('--hflip', PROBABILITY, 'P', 'probability of a horizontal flip', 0.5),
    Option('--vflip', PROBABILITY, 'P', 'probability of a vertical flip', 0.0),
    Option('--color-jitter', NOT_NEGATIVE, 'STRENGTH', 'color jitter; 0 for none', 0.4),
    Option('--color-jitter-prob', PROBABILITY, 'P', 'probability of the jitter; 1 if not given'),
    Option('--grayscale-prob', PROBABILITY, 'P', 'probability of grayscale; 0 if not given'),
    Option('--gaussian-blur-prob', PROBABILITY, 'P', 'probability of a blur; 0 if not given'),
    Option('--aa', policy_text, 'POLICY', "timm's AutoAugment policy, such as rand-m9-mstd0.5"),
    Option(
        '--train-interpolation',
        OneOf('random', *INTERPOLATIONS, ''),
        'NAME',
        "interpolation of the crops; '' for that of the evaluation",
        'random',
    ),
    Option('--reprob', PROBABILITY, 'P', 'probability of random erasing', 0.0),
    Option(
        '--remode', OneOf('const', 'rand', 'pixel'), 'FILL', 'fill of the erased regions: const, rand or pixel', 'pixel'
    ),
    Option('--recount', COUNT, 'N', 'number of erased regions', 1),
    Option('--mixup', NOT_NEGATIVE, 'ALPHA', 'Mixup; 0 for none', 0.0),
    Option('--cutmix', NOT_NEGATIVE, 'ALPHA', 'CutMix; 0 for none', 0.0),
    Option(
        '--cutmix-minmax',
        PROBABILITY,
        'RATIO',
        "smallest and largest side of CutMix's box, in place of its alpha",
        nargs='+',
    ),
    Option('--mixup-prob', PROBABILITY, 'P', 'probability of mixing', 1.0),
    Option('--mixup-switch-prob', PROBABILITY, 'P', 'probability of CutMix where both are on', 0.5),
    Option(
        '--mixup-mode',
        OneOf('batch', 'pair', 'elem'),
        'MODE',
        'one draw for a batch, a pair of images or an image',
        'batch',
    ),
    Option('--mixup-off-epoch', COUNT_OR_0, 'EPOCH', 'first epoch without mixing; 0 to mix in all', 0),
)
