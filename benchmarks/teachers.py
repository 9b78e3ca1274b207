r"""Time of teachers as they are, optimized for inference and compiled, and how far their predictions differ.

    python benchmarks/teachers.py --teachers resnet50 vit_tiny_patch16_224 --batch-size 8

All forms of a teacher take turns, round by round; a ratio is that of one round to the teacher as it is, contiguous and
eager. The weights are random but for the statistics of batch norm, which see a batch first.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from functools import partial

import timm
import torch
from measuring import in_turn, publish, ratios, spread
from torch import Tensor

from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.models.ensemble import EnsembleTeacher

TEACHERS = ('resnet50', 'resnet34', 'efficientnet_b0', 'mobilenetv3_large_100', 'vit_tiny_patch16_224')
PLAIN = 'as it is'


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this program."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--teachers', nargs='+', default=TEACHERS, help='timm architectures')
    add('--batch-size', type=int, default=8)
    add('--rounds', type=int, default=8, help='rounds that are measured')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--threads', type=int, help='CPU threads of torch; all cores if not given')
    add('--save', action='store_true', help='write benchmarks/results/teachers.json')
    return parser


def run(ensemble: EnsembleTeacher, x: Tensor, number: int = 0) -> float:
    """Return the milliseconds of a forward pass."""
    began = time.perf_counter()
    ensemble(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def measure(name: str, args: argparse.Namespace) -> list[list[str]]:
    """Return the rows of a teacher."""
    torch.manual_seed(0)
    teacher = timm.create_model(name).to(args.device)
    x = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    teacher.train()(x)
    ensembles = {name: EnsembleTeacher([copy.deepcopy(teacher)]) for name in (PLAIN, 'optimized', 'and compiled')}
    ensembles['optimized'].optimize_for_inference()
    ensembles['and compiled'].optimize_for_inference()
    ensembles['and compiled'].compile_each()
    plain = ensembles[PLAIN](x).exp()
    differences = {form: f'{(own(x).exp() - plain).abs().max().item():.0e}' for form, own in ensembles.items()}
    times = in_turn({form: partial(run, own, x) for form, own in ensembles.items()}, args.rounds)
    rows = zip(times, times.values(), strict=True)
    return [[name, form, spread(own, 1), spread(ratios(own, times[PLAIN])), differences[form]] for form, own in rows]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the teachers one after the other."""
    args = build_parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = [row for name in args.teachers for row in measure(name, args)]
    title = (
        f'Forward pass of teachers, {args.batch_size} images of 224 pixels, {torch.device(args.device).type}, '
        f'{torch.get_num_threads()} threads: median and quartiles of {args.rounds} rounds, and the largest difference '
        'of a probability.'
    )
    publish('teachers', title, ['teacher', 'form', 'ms', 'ratio', 'difference'], rows, args.save)


if __name__ == '__main__':
    run_cli(main)
