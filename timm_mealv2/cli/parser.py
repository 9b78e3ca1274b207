"""What the command line programs share: one-line errors, options with their ranges, and groups of common options."""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from timm_mealv2.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage (that of `mealv2-train` fills a screen).

    An option that does not exist is an error that names the nearest one. `--help` shows each default that is not
    empty. Subparsers are of the same class. Exit code 2, as in argparse.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{'formatter_class': HelpFormatter, 'allow_abbrev': False, **kwargs})

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
        shown = action.option_strings and action.default not in (None, False, '', [], {}, argparse.SUPPRESS)
        return f'{text} (default: %(default)s)' if shown and 'default' not in text else text


def run_cli(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Run `main(argv)` as a program; returns when it succeeds.

    A `UserError` becomes one line on stderr and exit code 2; anything else that is not the user's mistake keeps its
    traceback. Ctrl-C exits with 130, and a reader that closed the pipe (`| head`) with 141, as shells report the two
    signals.
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


def _one_line(message: str) -> str:
    return ' '.join(message.split())


# Options


class Option:
    """One option: the arguments of argparse's `add_argument`. Its unit is the `metavar`, its range the `type`."""

    def __init__(self, *flags: str, **kwargs: Any) -> None:
        self.flags = flags
        self.kwargs = kwargs


def flag(*flags: str, help: str) -> Option:
    """An option without a value, False unless it is given."""
    return Option(*flags, action='store_true', help=help)


def add_options(parser: Any, options: Iterable[Option]) -> None:
    """Add `options` to a parser or a group of one."""
    for option in options:
        parser.add_argument(*option.flags, **option.kwargs)


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
POSITIVE = Range(float, above=0)
NOT_NEGATIVE = Range(float, 0)
PROBABILITY = Range(float, 0, 1)
SEED = Range(int, 0, 2**32 - 1)

INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'lanczos', 'box', 'hamming')
FLOAT_TYPES = ('float16', 'bfloat16', 'float32')

# Groups that several programs have. Names, types and defaults are those of timm's train.py where it has the option.

TEACHERS = (
    Option(
        '--teachers',
        type=str,
        nargs='+',
        metavar='TEACHER',
        help='NAME.TAG, NAME=CHECKPOINT, local-dir:FOLDER, hf-hub:USER/REPO or python:MODULE:FUNCTION',
    ),
    Option(
        '--teacher-classes',
        type=str,
        nargs='+',
        metavar='TEACHER=FILE',
        help="the student's classes among a teacher's: line k has the teacher's index of class k",
    ),
    Option(
        '--teacher-weights',
        type=NOT_NEGATIVE,
        nargs='+',
        metavar='WEIGHT',
        help='one for each teacher; equal if not given',
    ),
    Option(
        '--teacher-dtype',
        type=str,
        choices=FLOAT_TYPES,
        metavar='TYPE',
        help="autocast of the teachers (float16, bfloat16, float32); their weights' type if not given",
    ),
    Option(
        '--teacher-img-size',
        type=COUNT,
        nargs='+',
        metavar='PIXELS',
        help="image size for all teachers or for each; the student's if not given",
    ),
)

DATA = (
    Option('--data-dir', metavar='PATH', help='folder or tar of the data set'),
    Option('--dataset', default='', metavar='NAME', help='kind and name: torch/cifar10, hfds/NAME, ...; else a folder'),
    flag('--dataset-download', help='download the data set, where its kind allows that'),
    Option('--class-map', type=str, default='', metavar='FILE', help='class names in the order of their indices'),
    Option('--input-img-mode', type=str, metavar='MODE', help="Pillow's image mode; RGB, or L for one channel"),
    Option('--input-key', type=str, metavar='KEY', help='key of the images in a sample'),
    Option('--target-key', type=str, metavar='KEY', help='key of the labels in a sample'),
    flag('--dataset-trust-remote-code', help="run a Hugging Face data set's own code"),
)
TRAIN_SPLIT = Option('--train-split', default='train', metavar='NAME', help='training split')

DEVICE = (
    Option('--device', type=str, default='cuda', metavar='NAME', help='device; the CPU where unset and without CUDA'),
    Option('-b', '--batch-size', type=COUNT, default=128, metavar='IMAGES', help='images of a batch, per process'),
    Option('-j', '--workers', type=COUNT_OR_0, default=4, metavar='N', help='processes that load images'),
)

# What the student is given: with AUGMENTATION, every setting that decides a training sample's pixels.
INPUT = (
    Option('--num-classes', type=COUNT, metavar='N', help="number of classes; the model's own if not given"),
    Option('--img-size', type=COUNT, metavar='PIXELS', help="image size, square; the model's own if not given"),
    Option('--in-chans', type=COUNT, metavar='N', help="image channels; the model's own if not given"),
    Option('--input-size', type=COUNT, nargs=3, metavar='N', help='channels, height and width in pixels'),
    Option('--mean', type=PROBABILITY, nargs='+', metavar='MEAN', help='mean of the pixels (0..1) per channel'),
    Option('--std', type=POSITIVE, nargs='+', metavar='STD', help='standard deviation of the pixels (0..1)'),
)

AUGMENTATION = (
    flag('--no-aug', help='no augmentation: the crops of the evaluation'),
    Option('--train-crop-mode', type=OneOf('rrc', 'rkrc', 'rkrr'), metavar='MODE', help='rrc, rkrc or rkrr'),
    Option('--scale', type=POSITIVE, nargs='+', default=[0.08, 1.0], metavar='SHARE', help='area of the random crop'),
    Option('--ratio', type=POSITIVE, nargs='+', default=[3 / 4, 4 / 3], metavar='RATIO', help='its aspect ratio'),
    Option('--hflip', type=PROBABILITY, default=0.5, metavar='P', help='probability of a horizontal flip'),
    Option('--vflip', type=PROBABILITY, default=0.0, metavar='P', help='probability of a vertical flip'),
    Option('--color-jitter', type=NOT_NEGATIVE, default=0.4, metavar='STRENGTH', help='color jitter; 0 for none'),
    Option('--color-jitter-prob', type=PROBABILITY, metavar='P', help='probability of the jitter; 1 if not given'),
    Option('--grayscale-prob', type=PROBABILITY, metavar='P', help='probability of grayscale; 0 if not given'),
    Option('--gaussian-blur-prob', type=PROBABILITY, metavar='P', help='probability of a blur; 0 if not given'),
    Option('--aa', type=str, metavar='POLICY', help="timm's AutoAugment policy, such as rand-m9-mstd0.5"),
    Option(
        '--train-interpolation',
        type=OneOf('random', *INTERPOLATIONS, ''),
        default='random',
        metavar='NAME',
        help="interpolation of the crops; '' for that of the evaluation",
    ),
    Option('--reprob', type=PROBABILITY, default=0.0, metavar='P', help='probability of random erasing'),
    Option(
        '--remode',
        type=OneOf('const', 'rand', 'pixel'),
        default='pixel',
        metavar='FILL',
        help='fill of the erased regions: const, rand or pixel',
    ),
    Option('--recount', type=COUNT, default=1, metavar='N', help='number of erased regions'),
    Option('--mixup', type=NOT_NEGATIVE, default=0.0, metavar='ALPHA', help='Mixup; 0 for none'),
    Option('--cutmix', type=NOT_NEGATIVE, default=0.0, metavar='ALPHA', help='CutMix; 0 for none'),
    Option(
        '--cutmix-minmax',
        type=PROBABILITY,
        nargs='+',
        metavar='RATIO',
        help="smallest and largest side of CutMix's box, in place of its alpha",
    ),
    Option('--mixup-prob', type=PROBABILITY, default=1.0, metavar='P', help='probability of mixing'),
    Option('--mixup-switch-prob', type=PROBABILITY, default=0.5, metavar='P', help='of CutMix where both are on'),
    Option(
        '--mixup-mode',
        type=OneOf('batch', 'pair', 'elem'),
        default='batch',
        metavar='MODE',
        help='one draw for a batch, a pair of images or an image',
    ),
    Option(
        '--mixup-off-epoch',
        type=COUNT_OR_0,
        default=0,
        metavar='EPOCH',
        help='first epoch without mixing; 0 to mix in all',
    ),
)
