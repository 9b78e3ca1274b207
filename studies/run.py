r"""Run a study of docs/evidence.md; what its CSV file has already is not run again.

    apt install dataset-fashion-mnist
    python examples/fashion_mnist/make_sample.py --full
    python studies/run.py methods            # or another of studies/arms.py
    python studies/report.py                 # the tables and pictures of docs/evidence.md

A row of `studies/results/STUDY.csv` is one training: its settings, the metrics of its last weights on all 10,000 test
images, and its seconds of processor time. First come the models that the study starts from, then the learning rates of
the arms that tune theirs (judged on 5,000 training images that no student trains on), then the seeds.
"""

import argparse
import csv
import functools
import logging
import multiprocessing
import os
import shlex
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import timm
import torch
import yaml
from arms import (
    COMMON,
    LEARNING_RATES,
    MODEL_DATA,
    MODEL_OPTIONS,
    MODEL_STARTS,
    MODELS,
    SEEDS,
    STORES,
    TUNING_SEED,
    Arm,
)
from data_sets import FASHION, DataSet
from later_arms import MODELS_OF, STUDIES
from ledger import LOSSES
from timm.data import create_dataset, create_transform
from torch import Tensor, nn

from timm_mealv2.cli import soft_labels
from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.losses import similarity_loss
from timm_mealv2.training import run as training

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'studies/results'
COLUMNS = (
    *('arm', 'seed', 'lr', 'top1', 'kl', 'agreement', 'tuning_top1'),
    *('discriminator_loss', 'discriminator_accuracy', 'seconds', 'settings'),
)
Row = dict[str, str]


@dataclass(frozen=True)
class Job:
    """One training, and what it is measured on; the learning rate is '' if it is among the options."""

    arm: str
    seed: int
    lr: str
    options: str
    keep: bool = False
    measured: DataSet = FASHION
    loss: str = ''


@functools.cache
def images(source: DataSet, split: str) -> tuple[Tensor, Tensor]:
    """Return images [N, C, H, W] and labels [N] of the split 'test' or 'tuning'."""
    config = {
        'input_size': (source.channels, source.size, source.size),
        'mean': (source.mean,) * source.channels,
        'std': (source.std,) * source.channels,
        'interpolation': 'bilinear',
        'crop_pct': 1.0,
    }
    name = source.test if split == 'test' else source.tuning
    mode = 'L' if source.channels == 1 else 'RGB'
    data = create_dataset('', source.folder, name, input_img_mode=mode, transform=create_transform(**config))
    indices: Sequence[int] = range(len(data))
    if name == 'train.tar':
        # Images come sorted by class. The last twelfth of each is neither in the sample nor among its unlabeled images.
        count = len(data) // 10
        indices = [count * label + index for label in range(10) for index in range(count * 11 // 12, count)]
    pixels, labels = zip(*(data[index] for index in indices), strict=True)
    return torch.stack(pixels), torch.tensor(labels)


@torch.inference_mode()
def log_probabilities(model: nn.Module, source: DataSet, split: str) -> Tensor:
    """Return the log-probabilities [N, C] of a model on the images of a split."""
    return torch.cat([model.eval()(batch) for batch in images(source, split)[0].split(250)]).log_softmax(dim=1)


@functools.cache
def ensemble_log_probabilities(source: DataSet) -> Tensor:
    """Return those of the teachers' ensemble on the test images."""
    return log_probabilities(timm.create_model(source.teacher, pretrained=True), source, 'test')


def measure(model: nn.Module, source: DataSet, *, compare: bool) -> Row:
    """Return top-1 (percent) for reporting and for tuning; with `compare` KL (nats) and agreement with the ensemble."""
    log_q = log_probabilities(model, source, 'test')
    top1 = [
        f'{100 * prediction.argmax(dim=1).eq(images(source, split)[1]).double().mean():.2f}'
        for split, prediction in (('test', log_q), ('tuning', log_probabilities(model, source, 'tuning')))
    ]
    row = dict(zip(('top1', 'tuning_top1'), top1, strict=True))
    if compare and source.teacher:
        log_p = ensemble_log_probabilities(source)
        row['kl'] = f'{(log_p.exp() * (log_p - log_q)).sum(dim=1).mean():.4f}'
        row['agreement'] = f'{100 * log_p.argmax(dim=1).eq(log_q.argmax(dim=1)).double().mean():.2f}'
    return row


@torch.no_grad()
def average(model: nn.Module, checkpoints: Sequence[Path], data: str) -> None:
    """Give a model the mean weights of checkpoints, and the statistics that its images then have in batch norm."""
    states = [torch.load(path, weights_only=True, map_location='cpu')['state_dict'] for path in checkpoints]
    model.load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over batches
    model.train()
    for batch in images(replace(FASHION, folder=data, test='train.tar'), 'test')[0].split(250):
        model(batch)


def train(job: Job) -> Row:
    """Train as `train_distill.py` does, and return the row of its last weights. A kept model's folder is whole."""
    logging.basicConfig(level=logging.WARNING)  # the training program then leaves the logging as it is
    torch.set_num_threads(1)
    final = Path(MODELS) / f'{job.arm}-{job.seed}'
    folder = final.with_name(f'{final.name}-{job.lr}.part')
    shutil.rmtree(folder, ignore_errors=True)
    argv = [*shlex.split(f'{COMMON} {job.options}'), '--seed', str(job.seed)]
    began = time.process_time()
    with patch('timm_mealv2.task.similarity_loss', LOSSES.get(job.loss, similarity_loss)):
        training.main([*argv, '--output', str(folder.parent), '--experiment', folder.name])
    seconds = time.process_time() - began
    settings = yaml.safe_load((folder / 'args.yaml').read_text())
    model = timm.create_model(
        settings['model'],
        num_classes=job.measured.classes,
        in_chans=job.measured.channels,
        checkpoint_path=folder / 'last.pth.tar',
        **settings['model_kwargs'],
    )
    if '--checkpoint-hist' in job.options:
        average(model, sorted(folder.glob('checkpoint-*.pth.tar')), settings['data_dir'])
    with (folder / 'summary.csv').open(newline='') as file:
        last = list(csv.DictReader(file))[-1]
    if job.keep:
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
    else:
        shutil.rmtree(folder)
    accuracy = last.get('train_discriminator_accuracy')  # percent; the studies' files have 0..1
    return {
        **{'arm': job.arm, 'seed': str(job.seed), 'lr': job.lr, 'settings': job.options},
        **measure(model, job.measured, compare=not job.keep),
        'discriminator_loss': last.get('train_discriminator_loss', '')[:6],
        'discriminator_accuracy': f'{float(accuracy) / 100:.4g}' if accuracy else '',
        'seconds': f'{seconds:.0f}',
    }


def record(job: Job) -> Row:
    """Record predictions as `mealv2-softlabels` does, and return a row of what that took."""
    torch.set_num_threads(1)
    final = Path(MODELS) / f'{job.arm}-{job.seed}'
    folder = final.with_name(f'{final.name}.part')
    shutil.rmtree(folder, ignore_errors=True)
    began = time.process_time()
    soft_labels.main(['record', *shlex.split(job.options), '--seed', str(job.seed), '--out', str(folder)])
    seconds = time.process_time() - began
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    return {'arm': job.arm, 'seed': str(job.seed), 'lr': '', 'settings': job.options, 'seconds': f'{seconds:.0f}'}


def read_rows(study: str) -> list[Row]:
    """Return the rows of a study, none if it has not been run."""
    path = RESULTS / f'{study}.csv'
    if not path.is_file():
        return []
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def add_row(study: str, row: Row) -> None:
    """Append a row to a study's CSV file."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f'{study}.csv'
    new = not path.is_file()
    with path.open('a', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        if new:
            writer.writeheader()
        writer.writerow(row)
    words = (f'{column} {row[column]}' for column in ('arm', 'seed', 'lr', 'top1', 'seconds') if row.get(column))
    print(f'{study}: {", ".join(words)}', flush=True)


def keys(study: str) -> set[tuple[str, ...]]:
    """Return arm, seed and learning rate of each row of a study."""
    return {(row['arm'], row['seed'], row['lr']) for row in read_rows(study)}


def missing(study: str, jobs: Iterable[Job]) -> list[Job]:
    """Return the jobs that have no row yet, or what they keep is not there."""
    done = keys(study)
    return [
        job
        for job in dict.fromkeys(jobs)
        if (job.arm, str(job.seed), job.lr) not in done
        or (job.keep and not (Path(MODELS) / f'{job.arm}-{job.seed}').is_dir())
    ]


def model_jobs(arms: Sequence[Arm], seeds: Sequence[int]) -> list[Job]:
    """Return the trainings of the models that the arms start from or learn from, and the recordings."""
    needed = [model for arm in arms for model in arm.models]
    needed += [(arm.start, seed) for arm in arms if arm.start for seed in (TUNING_SEED, *seeds[: arm.seeds])]
    needed += [(arm.labels, seed) for arm in arms if arm.labels for seed in seeds[: arm.seeds]]
    needed += [(MODEL_STARTS[name], seed) for name, seed in needed if name in MODEL_STARTS]
    jobs = []
    for name, seed in dict.fromkeys(needed):
        options = (MODEL_OPTIONS | STORES)[name]
        if name in MODEL_STARTS:
            options += f' --initial-checkpoint {MODELS}/{MODEL_STARTS[name]}-{seed}/last.pth.tar'
        jobs.append(Job(name, seed, '', options, keep=True, measured=MODEL_DATA.get(name, FASHION)))
    return jobs


def arm_job(arm: Arm, seed: int, lr: float | str) -> Job:
    """Return an arm's training."""
    options = f'--data-dir {arm.data} {arm.options} --lr {lr} --epochs {arm.epochs}'
    if arm.labels:
        options += f' --soft-labels {MODELS}/{arm.labels}-{seed}'
    if arm.start:
        options += f' --initial-checkpoint {MODELS}/{arm.start}-{seed}/last.pth.tar'
    return Job(arm.name, seed, str(lr), options, measured=arm.measured, loss=arm.loss)


def tuned_lr(arm: Arm) -> str:
    """Return an arm's learning rate: its own or another's, of the best top-1 on the tuning images."""
    name = arm.lr or arm.name
    rows = [row for study in STUDIES for row in read_rows(study)]
    of_arm = [row for row in rows if row['arm'] == name and row['seed'] == str(TUNING_SEED)]
    tuning = [row for row in of_arm if row['lr'] in map(str, LEARNING_RATES)]
    if len(tuning) < len(LEARNING_RATES):
        raise UserError(f'{arm.name} takes the learning rate of {name}, which is not tuned yet: run its study first.')
    return max(tuning, key=lambda row: (float(row['tuning_top1']), -float(row['lr'])))['lr']


def run_jobs(pool: Executor, study: str, jobs: Iterable[Job]) -> None:
    """Run the missing jobs side by side; each adds its row as it ends, also where another fails."""
    futures = [pool.submit(record if job.arm in STORES else train, job) for job in missing(study, jobs)]
    for future in as_completed(futures):
        if future.exception():
            continue
        row = future.result()
        if (row['arm'], row['seed'], row['lr']) not in keys(study):  # a model is made again where its file is gone
            add_row(study, row)
    for future in futures:
        future.result()  # raises


def run_study(pool: Executor, study: str, seeds: Sequence[int] = SEEDS) -> None:
    """Run what is missing of a study: the models it needs, learning rates, seeds."""
    arms = STUDIES[study]
    models = MODELS_OF.get(study, 'models')
    jobs = model_jobs(arms, seeds)
    later = [job for job in jobs if '--teachers' in job.options or '--initial-checkpoint' in job.options]
    run_jobs(pool, models, [job for job in jobs if job not in later])
    run_jobs(pool, models, later)
    for source in {arm.measured for arm in arms if arm.measured.teacher}:
        if not any(row['settings'] == source.teacher for row in read_rows(models)):
            ensemble = timm.create_model(source.teacher, pretrained=True)
            name = 'ensemble' if source == FASHION else f'{Path(source.folder).name}_ensemble'
            add_row(models, {'arm': name, 'settings': source.teacher, **measure(ensemble, source, compare=False)})
    run_jobs(pool, study, [arm_job(arm, TUNING_SEED, lr) for arm in arms if arm.lr is None for lr in LEARNING_RATES])
    # Seed by seed, so that a study that is ended early has whole ones.
    jobs = [arm_job(arm, seed, tuned_lr(arm)) for seed in seeds for arm in arms if seed in seeds[: arm.seeds]]
    run_jobs(pool, study, jobs)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the studies that are named."""
    parser: argparse.ArgumentParser = OneLineParser(
        description='Run studies; what is in studies/results already is not run again.'
    )
    parser.add_argument('studies', nargs='+', choices=STUDIES, metavar='STUDY', help=', '.join(STUDIES))
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='trainings side by side (default: the cores)')
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    arms = [arm for study in args.studies for arm in STUDIES[study]]
    folders = {MODEL_DATA.get(name, FASHION).folder for arm in arms for name, _ in arm.models}
    for folder in sorted(folders | {arm.data for arm in arms}):
        if not Path(folder).is_dir():
            raise UserError(f'there is no {folder}: docs/evidence.md says what makes it')
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context('spawn')) as pool:
        for study in args.studies:
            run_study(pool, study)


if __name__ == '__main__':
    run_cli(main)
