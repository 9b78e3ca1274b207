r"""Stored labels against live teachers: the quick start's student, over K and seeds.

    apt install dataset-fashion-mnist
    python examples/fashion_mnist/make_sample.py --full
    python examples/fashion_mnist/quickstart.py --seeds 0 1 2 --out output/quickstart_seeds \
        --val-data output/fashion_mnist_full/validation.tar
    python examples/fashion_mnist/soft_labels.py --seeds 0 1 2 --starts output/quickstart_seeds \
        --out output/soft_labels --val-data output/fashion_mnist_full/validation.tar

From the start of each seed the student is trained on the ensemble, live and from stores of the K most probable classes
of 10, one crop of each image for every epoch. No run has a discriminator, which stored labels do without by default.
The weights of the last epoch are evaluated. `table.md` in the folder of the results has top-1 in percent.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from quickstart import DATA, MEALV2, STUDENT_EPOCHS, TEACHERS, evaluate_all, train
from timm.data import create_dataset

from timm_mealv2.cli.parser import OneLineParser, run_cli
from timm_mealv2.cli.soft_labels import main as soft_labels
from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing

TOP_K = (3, 5, 10)


def record(out: Path, top_k: int, crops: int) -> Path:
    """Record the answers of the quick start's teachers; a store that is there is kept."""
    store = out / f'store-{top_k}'
    soft_labels(
        ['record', '--teachers', *TEACHERS.values(), '--data-dir', str(DATA), '--train-split', 'train.tar']
        + ['--in-chans', '1', '--img-size', '32', '--scale', '0.6', '1.0', '--workers', '0']
        + ['--crops', str(crops), '--top-k', str(top_k), '--out', str(store)]
    )
    return store


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = OneLineParser(description='Compare stored labels with live teachers on the sample.')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], metavar='SEED')
    parser.add_argument(
        '--starts', type=Path, default=Path('output/quickstart_seeds'), help='folder of the quick start'
    )
    parser.add_argument('--out', type=Path, default=Path('output/soft_labels'), help='folder for the results')
    parser.add_argument('--val-data', type=Path, default=DATA / 'validation.tar', help='images to report on')
    parser.add_argument('--epochs', type=int, default=STUDENT_EPOCHS)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    args = build_parser().parse_args(argv)
    logging.getLogger('timm').setLevel(logging.WARNING)
    starts = {seed: args.starts / f'seed-{seed}' / 'start' / 'last.pth.tar' for seed in args.seeds}
    if missing := [path for path in starts.values() if not path.is_file()]:
        raise UserError(f'--starts: there is no {missing[0]}; quickstart.py --seeds makes it.')
    args.out.mkdir(parents=True, exist_ok=True)
    arms = {'live': [*MEALV2, '--discriminator-weight', '0']}
    arms |= {f'stored, K = {k}': ['--soft-labels', str(record(args.out, k, args.epochs))] for k in TOP_K}
    data = create_dataset('', root=str(args.val_data), split='validation', input_img_mode='L')
    rows: dict[str, list[float]] = {}
    for seed, start in starts.items():
        checkpoints = {'start': start}
        for number, (arm, options) in enumerate(arms.items()):
            began = time.perf_counter()
            name = f'seed-{seed}-{number}'
            options = [*options, '--initial-checkpoint', str(start)]
            checkpoints[arm] = train(name, args.out, DATA, options, seed=seed, epochs=args.epochs)
            print(f'{arm}: {time.perf_counter() - began:.0f} s', flush=True)
        for name, metrics in evaluate_all(checkpoints, data).items():
            rows.setdefault(name, []).append(metrics['top1'])
    heads = ' | '.join(f'seed {seed}' for seed in args.seeds)
    lines = [f'| model | {heads} | mean |', '|---' * (len(args.seeds) + 2) + '|']
    for name, values in rows.items():
        lines.append(f'| {name} | {" | ".join(f"{v:.2f}" for v in values)} | {sum(values) / len(values):.2f} |')
    text = '\n'.join(lines)
    with replacing(args.out / 'table.md') as path:
        path.write_text(text + '\n')
    print(f'\n{text}\n\nWritten: {args.out}/table.md')


if __name__ == '__main__':
    run_cli(main)
