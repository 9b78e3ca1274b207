r"""The quick start: a small student learns from two trained teachers what 2,000 labeled images could not teach it.

    python examples/fashion_mnist/quickstart.py

It trains the student with cross-entropy ("start"), then goes on from there in three ways of as many steps: with
cross-entropy ("control"), with timm's logit distillation from the better teacher ("logit"; temperature 4, half of the
loss on the labels) and with MEAL V2 from the ensemble of the teachers. The weights of the last epoch are
evaluated, never the best ones on the validation images. In `output/quickstart` it leaves `results.json` (top-1 in
percent), `results_detail.json`, `curves.png`, the run folders, and `student/`, which plain timm loads.

Longer (50 epochs for the start, 30 for each arm), with several seeds and all 10,000 test images, as in
docs/quickstart.md:

    python examples/fashion_mnist/make_sample.py --full
    python examples/fashion_mnist/quickstart.py --long --seeds 0 1 2 --out output/quickstart_seeds \
        --val-data output/fashion_mnist_full/validation.tar

The same without labels:

    python examples/fashion_mnist/make_sample.py --unlabeled 6000
    python examples/fashion_mnist/quickstart.py --long --unlabeled output/fashion_mnist_unlabeled
"""

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from timm.data import ImageDataset, create_dataset, create_loader, resolve_model_data_config
from torch import nn

from timm_mealv2.cli.hub import export_model
from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.evaluation import evaluate
from timm_mealv2.files import replacing
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.models.factory import create_ensemble
from timm_mealv2.report import COLORS
from timm_mealv2.runs import read_run
from timm_mealv2.training import run as training

HERE = Path(__file__).resolve().parent
DATA = HERE / 'data'
TEACHERS = {name: f'local-dir:{HERE / "teachers" / name}' for name in ('teacher_a', 'teacher_b')}

STUDENT = 'resnet10t'
START_EPOCHS, STUDENT_EPOCHS = 30, 12
LONG = 50, 30
LABELED = 2000

# The recipe has the model, the pixels, the augmentation and the settings of MEAL V2.
COMMON = shlex.split(
    '--recipe quickstart --train-split train.tar --val-split validation.tar --val-interval 3 --checkpoint-hist 1 '
    '--channels-last --workers 1'
)
START = shlex.split('--lr 0.1 --warmup-epochs 5 --weight-decay 5e-4')
CONTROL = shlex.split('--weight-decay 5e-4')
LOGIT = shlex.split('--kd-distill-type logit --kd-temperature 4 --task-loss-weight 0.5 --weight-decay 5e-4')
LOGIT += ['--teachers', TEACHERS['teacher_b']]
MEALV2 = ['--teachers', *TEACHERS.values()]

# Run by a Python process of its own, which knows nothing of this package.
LOAD_WITH_PLAIN_TIMM = """
import sys
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config

model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval()
config = resolve_model_data_config(model)
data = create_dataset('', root=sys.argv[2], split='validation', input_img_mode='L')
loader = create_loader(data, batch_size=250, num_workers=0, device=torch.device('cpu'), **config)
with torch.inference_mode():
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in loader)
assert 'timm_mealv2' not in sys.modules
print(100 * right / len(data))
"""


def train(name: str, out: Path, data: Path, options: Sequence[str], *, seed: int, epochs: int) -> Path:
    """Train one arm as `train_distill.py` does; return its last checkpoint. An earlier run of that name goes."""
    folder = out / name
    if (folder / 'args.yaml').is_file():
        shutil.rmtree(folder)
    argv = ['--data-dir', str(data), *COMMON, *options, '--seed', str(seed), '--epochs', str(epochs)]
    argv += ['--output', str(out), '--experiment', name]
    print(f'\n== {name}: OMP_NUM_THREADS=1 python train_distill.py {shlex.join(argv)}', flush=True)
    began = time.perf_counter()
    training.main(argv)
    print(f'== {name}: {time.perf_counter() - began:.0f} s', flush=True)
    return folder / 'last.pth.tar'


def run_arms(out: Path, *, seed: int, unlabeled: Path | None, start_epochs: int, epochs: int) -> dict[str, Path]:
    """Train the start and what goes on from it; return arm -> last checkpoint."""
    checkpoints = {'start': train('start', out, DATA, START, seed=seed, epochs=start_epochs)}
    from_start = ['--initial-checkpoint', str(checkpoints['start'])]
    checkpoints['control'] = train('control', out, DATA, CONTROL + from_start, seed=seed, epochs=epochs)
    checkpoints['logit'] = train('logit', out, DATA, LOGIT + from_start, seed=seed, epochs=epochs)
    checkpoints['mealv2'] = train('mealv2', out, DATA, MEALV2 + from_start, seed=seed, epochs=epochs)
    if unlabeled is not None:
        images = len(create_dataset('', root=str(unlabeled), split='train.tar'))
        same_steps = max(1, round(epochs * LABELED / images))
        options = [*MEALV2, *from_start, '--unlabeled', '--val-interval', '1']
        checkpoints['mealv2_unlabeled'] = train(
            'mealv2_unlabeled', out, unlabeled, options, seed=seed, epochs=same_steps
        )
    return checkpoints


def evaluate_all(checkpoints: dict[str, Path], data: ImageDataset) -> dict[str, dict[str, float]]:
    """Evaluate teachers, ensemble and arms on the same images in one pass; return name -> metrics and parameters."""
    teachers: dict[str, nn.Module] = {
        name: timm.create_model(source, pretrained=True) for name, source in TEACHERS.items()
    }
    ensemble = create_ensemble(list(TEACHERS.values()))
    arms = {name: TrainingCheckpoint.read(path, STUDENT).build() for name, path in checkpoints.items()}
    config = resolve_model_data_config(arms['start'])
    loader = create_loader(data, batch_size=250, num_workers=0, device=torch.device('cpu'), **config)
    models = {**teachers, 'ensemble': ensemble, **arms}
    results = evaluate(models, loader, device=torch.device('cpu'), reference='ensemble', data_config=config)
    for name, model in models.items():
        results[name]['parameters'] = sum(parameter.numel() for parameter in model.parameters())
    return results


def export_and_verify(checkpoint: Path, out: Path, validation: Path, expected_top1: float) -> None:
    """Export the student, and let a fresh process with plain timm measure it again."""
    folder = export_model(checkpoint, out / 'student')
    command = [sys.executable, '-c', LOAD_WITH_PLAIN_TIMM, str(folder), str(validation)]
    top1 = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if abs(top1 - expected_top1) > 1e-3:
        raise RuntimeError(f'the exported student has a top-1 of {top1}, the trained one {expected_top1}')
    print(f'\n{folder} loads with plain timm, top-1 {top1:.2f}')


def table(results: dict[str, dict[str, float]]) -> str:
    """Return the results as a Markdown table."""
    lines = ['| model | parameters | top-1, % | KL to the ensemble | same top-1 as the ensemble, % |']
    lines += ['|---|---:|---:|---:|---:|']
    for name, metrics in results.items():
        kl, agreement = (
            format(metrics[key], spec) if key in metrics else '-' for key, spec in (('kl', '.3f'), ('agreement', '.2f'))
        )
        lines.append(f'| {name} | {metrics["parameters"] / 1e6:.2f} M | {metrics["top1"]:.2f} | {kl} | {agreement} |')
    return '\n'.join(lines)


def table_of_seeds(seeds: Sequence[int], runs: Sequence[dict[str, dict[str, float]]]) -> str:
    """Return top-1 and KL over seeds as a Markdown table, and the gains over the control, paired by seed."""
    heads = ' | '.join(f'seed {seed}' for seed in seeds)
    lines = [f'| model | {heads} | mean | standard deviation | KL to the ensemble |', '|---' * (len(seeds) + 4) + '|']
    for name in runs[0]:
        top1 = [run[name]['top1'] for run in runs]
        kl = statistics.mean(run[name]['kl'] for run in runs) if 'kl' in runs[0][name] else None
        cells = [*(f'{value:.2f}' for value in top1), f'{statistics.mean(top1):.2f}', f'{statistics.stdev(top1):.2f}']
        lines.append(f'| {name} | {" | ".join(cells)} | {"-" if kl is None else f"{kl:.3f}"} |')
    for name in runs[0]:
        if name.startswith(('logit', 'mealv2')):
            gains = [run[name]['top1'] - run['control']['top1'] for run in runs]
            error = statistics.stdev(gains) / len(gains) ** 0.5
            each = ', '.join(f'{gain:+.2f}' for gain in gains)
            lines.append(
                f'\nGain of {name} over the control, paired by seed: {each}; '
                f'mean {statistics.mean(gains):+.2f}, standard error {error:.2f} points.'
            )
    return '\n'.join(lines)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + '\n')


def draw(out: Path, start_epochs: int, top1: dict[str, float], lowest: float | None) -> None:
    """Draw the curves of all arms; those that go on from the start begin where it ends."""
    figure = Figure(figsize=(15, 4), layout='constrained')
    figure.suptitle('Fashion-MNIST, 2,000 labeled images', fontsize=14)
    columns = {'eval_top1': 'top-1, %', 'train_kl': 'KL divergence from the teachers, nats'}
    columns |= {'train_teacher_agreement': 'same top-1 as the teachers, %'}
    for axes, (column, unit) in zip(figure.subplots(1, 3), columns.items(), strict=True):
        for arm, color in zip(('start', 'control', 'logit', 'mealv2'), COLORS, strict=False):
            points = read_run(out / arm).values(column)
            epochs = [epoch + 1 + (0 if arm == 'start' else start_epochs) for epoch, _ in points]
            if points:
                axes.plot(epochs, [value for _, value in points], color, marker='.', label=arm)
        if column == 'eval_top1':
            for name, style in zip((*TEACHERS, 'ensemble'), (':', '-.', '--'), strict=True):
                axes.axhline(top1[name], color='#666666', linestyle=style, label=f'{name} ({top1[name]:.2f})')
            axes.set_ylim(bottom=lowest)
        axes.set(xlabel='epochs trained', ylabel=unit)
        axes.legend(fontsize=8)
    figure.savefig(out / 'curves.png', dpi=120)


def run_once(args: argparse.Namespace, seed: int, out: Path, validation: ImageDataset) -> dict[str, dict[str, float]]:
    """Train, evaluate, draw and export for one seed; return name -> metrics."""
    out.mkdir(parents=True, exist_ok=True)
    start_epochs, epochs = (2, 2) if args.smoke else LONG if args.long else (START_EPOCHS, STUDENT_EPOCHS)
    checkpoints = run_arms(out, seed=seed, unlabeled=args.unlabeled, start_epochs=start_epochs, epochs=epochs)
    results = evaluate_all(checkpoints, validation)
    top1 = {name: metrics['top1'] for name, metrics in results.items()}
    arms = {name: top1[name] for name in ('ensemble', 'start', 'control', 'logit', 'mealv2')}
    write_json(out / 'results.json', {'teachers': {name: top1[name] for name in TEACHERS}, **arms})
    detail = {'seed': seed, 'data': str(args.val_data), 'images': len(validation), 'weights': 'last epoch'}
    write_json(out / 'results_detail.json', {**detail, 'models': results})
    draw(out, start_epochs, top1, None if args.smoke else 75)
    export_and_verify(checkpoints['mealv2'], out, args.val_data, top1['mealv2'])
    print(f'\nTop-1 on {len(validation):,} images, weights of the last epoch, seed {seed}:\n\n{table(results)}\n')
    print(f'Written: {out}/results.json, results_detail.json, curves.png, student/', flush=True)
    return results


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = OneLineParser(description='Distil a small student on 2,000 images of Fashion-MNIST from two teachers.')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], metavar='SEED', help='one run each (default: 0)')
    parser.add_argument(
        '--out', type=Path, default=Path('output/quickstart'), help='folder for the results (default: %(default)s)'
    )
    parser.add_argument(
        '--val-data',
        type=Path,
        default=DATA / 'validation.tar',
        metavar='PATH',
        help='tar or folder of the images to report on (default: the 2,000 shipped ones)',
    )
    parser.add_argument(
        '--unlabeled', type=Path, metavar='DIR', help='MEAL V2 on the images of DIR/train.tar too, without their labels'
    )
    parser.add_argument(
        '--long', action='store_true', help='50 epochs for the start and 30 for each arm, not 30 and 12'
    )
    parser.add_argument('--smoke', action='store_true', help='two epochs an arm, to see that everything runs')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment once per seed."""
    args = build_parser().parse_args(argv)
    if not args.val_data.exists():
        raise UserError(f'--val-data: there is no {args.val_data}; make_sample.py --full makes the 10,000 test images')
    if args.unlabeled and not (args.unlabeled / 'train.tar').is_file():
        raise UserError(f'--unlabeled: there is no {args.unlabeled}/train.tar; make_sample.py --unlabeled N makes it')
    torch.set_num_threads(1)  # the digits depend on it, and several wait for each other on cores that others use too
    validation = create_dataset('', root=str(args.val_data), split='validation', input_img_mode='L')
    began = time.perf_counter()
    if len(args.seeds) == 1:
        run_once(args, args.seeds[0], args.out, validation)
    else:
        runs = [run_once(args, seed, args.out / f'seed-{seed}', validation) for seed in args.seeds]
        text = table_of_seeds(args.seeds, runs)
        with replacing(args.out / 'table.md') as path:
            path.write_text(text + '\n')
        print(f'\n{text}\n\nWritten: {args.out}/table.md')
    print(f'{(time.perf_counter() - began) / 60:.1f} minutes')


if __name__ == '__main__':
    run_cli(main)
