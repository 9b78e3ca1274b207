r"""Stored labels against live teachers: the quick start's student, over augmentation, K, recorded epochs and seeds.

    apt install dataset-fashion-mnist
    python examples/fashion_mnist/make_sample.py --full
    python examples/fashion_mnist/quickstart.py --long --seeds 0 1 2 --out output/quickstart_seeds \
        --val-data output/fashion_mnist_full/validation.tar
    python examples/fashion_mnist/soft_labels.py --seeds 0 1 2 --initial output/quickstart_seeds \
        --out output/soft_labels --val-data output/fashion_mnist_full/validation.tar

From each seed's initial weights the student is trained on the ensemble: live, and from stores of the K most probable
classes of 10, with crops alone, with RandAugment, and with CutMix as well. Live and stored take the same samples.
`--recorded 10 30 100 --epochs 100` trains, in place of that, 100 epochs on stores of so many epochs. No run has a
discriminator, which stored labels do without by default. The weights of the last epoch are evaluated. `table.md` in the
folder of the results has top-1 in percent.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from quickstart import DATA, LONG, MEALV2, TEACHERS, evaluate_all, train
from timm.data import create_dataset

from timm_mealv2.cli.soft_labels import main as soft_labels
from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing

AUGMENTATIONS = {
    'crops': [],
    '+ RandAugment': ['--aa', 'rand-m5'],
    '+ CutMix': ['--aa', 'rand-m5', '--cutmix', '1', '--mixup-mode', 'pair'],
}
TOP_K = (3, 5, 10)


def record(store: Path, augmentation: Sequence[str], seed: int, top_k: int, epochs: int) -> list[str]:
    """Record what the quick start's teachers predict; return the options of a training on it."""
    argv = ['record', '--recipe', 'quickstart', '--teachers', *TEACHERS.values(), *augmentation]
    argv += ['--data-dir', str(DATA), '--train-split', 'train.tar', '--seed', str(seed), '--workers', '0']
    soft_labels([*argv, '--epochs', str(epochs), '--top-k', str(top_k), '--out', str(store)])
    return ['--soft-labels', str(store)]


def make_arms(args: argparse.Namespace, seed: int) -> dict[str, list[str]]:
    """Arm -> options of its training; the stores are recorded."""
    arms: dict[str, list[str]] = {}
    stores = args.out / 'stores'
    for number, (name, augmentation) in enumerate(AUGMENTATIONS.items()):
        if args.recorded:
            for epochs in args.recorded:
                store = stores / f'{seed}-{number}-{epochs}-epochs'
                arms[f'{name}, {epochs} recorded'] = record(store, augmentation, seed, 10, epochs)
            continue
        arms[f'{name}, live'] = [*MEALV2, *augmentation, '--discriminator-weight', '0']
        for top_k in TOP_K:
            store = stores / f'{seed}-{number}-{top_k}'
            arms[f'{name}, K = {top_k}'] = record(store, augmentation, seed, top_k, args.epochs)
    return arms


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = OneLineParser(description='Compare stored labels with live teachers on the sample.')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], metavar='SEED')
    parser.add_argument(
        '--initial', type=Path, default=Path('output/quickstart_seeds'), help='folder of the quick start'
    )
    parser.add_argument('--out', type=Path, default=Path('output/soft_labels'), help='folder for the results')
    parser.add_argument('--val-data', type=Path, default=DATA / 'validation.tar', help='images to report on')
    parser.add_argument('--epochs', type=int, default=LONG[1])
    parser.add_argument('--recorded', type=int, nargs='+', metavar='M', help='numbers of recorded epochs to compare')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    args = build_parser().parse_args(argv)
    logging.getLogger('timm').setLevel(logging.WARNING)
    initial = {seed: args.initial / f'seed-{seed}' / 'start' / 'last.pth.tar' for seed in args.seeds}
    if missing := [path for path in initial.values() if not path.is_file()]:
        raise UserError(f'--initial: there is no {missing[0]}; quickstart.py --long --seeds makes it.')
    args.out.mkdir(parents=True, exist_ok=True)
    data = create_dataset('', root=str(args.val_data), split='validation', input_img_mode='L')
    rows: dict[str, list[float]] = {}
    for seed, start in initial.items():
        checkpoints = {'start': start}
        for number, (arm, options) in enumerate(make_arms(args, seed).items()):
            began = time.perf_counter()
            options = [*options, '--initial-checkpoint', str(start)]
            checkpoints[arm] = train(f'seed-{seed}-{number}', args.out, DATA, options, seed=seed, epochs=args.epochs)
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
