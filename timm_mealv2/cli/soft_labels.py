"""The program `mealv2-softlabels`: record what teachers predict for a training's samples, inspect it, and check it."""

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import resolve_model_input_args
from timm.utils.distributed import world_info_from_env
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_mealv2.arguments import build_ensemble, choose_device, open_split
from timm_mealv2.command_line import (
    AMP,
    AUGMENTATION,
    COUNT,
    DATA,
    DEVICE,
    INPUT,
    PER_SAMPLE,
    POSITIVE,
    SEED,
    TEACHERS,
    TRAIN_SPLIT,
    UNLABELED,
    VAL_SPLIT,
    OneLineParser,
    Option,
    add_options,
    flag,
    model_text,
    run_cli,
)
from timm_mealv2.data.augmentation import Augmentation
from timm_mealv2.data.class_names import class_names_of, unlabeled
from timm_mealv2.data.loader import eval_loader
from timm_mealv2.data.normalize import resolve_pixels
from timm_mealv2.errors import UserError
from timm_mealv2.evaluation import evaluate
from timm_mealv2.figures import as_text, metric_table
from timm_mealv2.models.checkpoint import making
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import TeacherSpec
from timm_mealv2.soft_labels.describe import describe
from timm_mealv2.soft_labels.record import measure_rate, record
from timm_mealv2.soft_labels.replay import StoredSamples
from timm_mealv2.soft_labels.store import SoftLabelStore, StoreMeta, shown
from timm_mealv2.soft_labels.verify import compare, create_teachers, read_all
from timm_mealv2.training.build_data import build_augmentation
from timm_mealv2.training.checks import check_image_settings
from timm_mealv2.training.settings import parse_with_files

_logger = logging.getLogger(__name__)

_RECORD = (
    Option('--out', Path, 'folder of the store', required=True, metavar='DIR'),
    Option('--recipe', None, 'settings of a published training as defaults', metavar='NAME'),
    Option('-c --config', None, 'YAML file of settings as defaults, such as the args.yaml of a run', metavar='FILE'),
    Option('--epochs', COUNT, 'epochs to record, those that are there included', metavar='M'),
    Option('--top-k', COUNT, 'most probable classes to keep, or all of fewer', 10),
    Option('--seed', SEED, "the training's seed: that of crops, augmentation and order", 42),
    Option('--model', model_text, 'student, whose image size, mean and std count; else those of the first teacher'),
    flag('--dry-run', 'measure the rate for half a minute, tell samples, bytes and hours, and write nothing'),
    VAL_SPLIT,
    UNLABELED,
)
_VERIFY = (
    Option('--teachers', None, 'what to load in place of the recorded names', nargs='+', metavar='TEACHER'),
    Option('--samples', COUNT, 'samples to predict again', 256, metavar='N'),
    Option('--tolerance', POSITIVE, 'largest difference of a probability', 0.01, metavar='P'),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand as the arguments say; without them, those of the command line.

    Raises:
        UserError: What the user can mend.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(argv)
    if args.run is _record:
        args = parse_with_files(args.parser, argv[1:])
        if not (args.teachers and args.epochs):
            raise UserError('name --teachers, or a --recipe that does, and say with --epochs how many to record.')
    logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stderr)
    args.run(args)


def cli() -> None:
    """Run `main` as the command `mealv2-softlabels`."""
    run_cli(main)


def build_parser() -> argparse.ArgumentParser:
    """Return a fresh parser. What the training program has too has its names, types and defaults."""
    parser = OneLineParser(
        prog='mealv2-softlabels',
        description='Record what teachers predict for the samples of a training, to train on it as often as wanted.',
    )
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    def add_command(name: str, function: object, text: str, **kwargs: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, **kwargs)
        command.set_defaults(run=function, parser=command)
        if function is not _record:
            command.add_argument('store', type=Path, metavar='DIR', help='the store')
        if function is not _show:
            add_options(command.add_argument_group('data set'), (*DATA, TRAIN_SPLIT))
        return command

    text = 'Record the predictions for every sample, or go on where a recording stopped.'
    command = add_command('record', _record, text)
    groups = {
        'recording': _RECORD,
        'teachers': (*TEACHERS, PER_SAMPLE),
        'images': INPUT,
        'augmentation': AUGMENTATION,
        'device': (*DEVICE, *AMP),
    }
    for name, options in groups.items():
        add_options(command.add_argument_group(name), options)
    command.set_defaults(mixup_mode='pair', device=None)
    text = 'Read a store to its end, and let the teachers predict some samples again.'
    command = add_command('verify', _verify, text)
    add_options(command, (*_VERIFY, DEVICE[0]))
    command.set_defaults(device=None)
    add_command('show', _show, 'Show what a store holds.', aliases=['info'])
    return parser


def _record(args: argparse.Namespace) -> None:
    local_rank, rank, _ = world_info_from_env()  # torchrun and SLURM number the processes of a host
    if rank:
        logging.getLogger().setLevel(logging.WARNING)
    device = choose_device(args.device, local_rank)
    if args.mixup_mode != 'pair' and (args.mixup or args.cutmix or args.cutmix_minmax):
        fault = 'a sample would depend on its batch; pair is what can be recorded'
        raise UserError(f'--mixup-mode {args.mixup_mode}: {fault}.')
    check_image_settings(args)
    args.teachers = TeacherSpec.parse_all(args.teachers)
    for spec in args.teachers:
        spec.check()
    dataset = _open_images(args)
    folders = class_names_of(unlabeled(dataset) if args.unlabeled else dataset)
    if folders and len(folders) == 1:  # a place for all images, and no class
        folders = None
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else None)
    teachers = build_ensemble(args, device, num_classes=args.num_classes, in_chans=in_chans, class_names=folders)
    cfg = teachers.pretrained_cfg
    if args.model:
        with making(f'--model {args.model}'):
            cfg = resolve_model_input_args(args.model)['pretrained_cfg']
    pixels = {name: getattr(args, name) for name in ('input_size', 'img_size', 'mean', 'std')}
    config = resolve_pixels(pixels, cfg, teachers.in_chans)
    augmentation = build_augmentation(args, config)
    names = ('seed', 'top_k', 'batch_size', 'teachers_per_sample')
    meta = describe(dataset, teachers, augmentation, **{name: getattr(args, name) for name in names})
    work: dict[str, Any] = {'workers': args.workers, 'device': device}
    if args.dry_run:
        rate = measure_rate(dataset, teachers, meta, **work)
        print(_amount(meta, args.epochs))
        hours = meta.images * args.epochs / rate / 3600
        print(f'{rate:,.1f} samples/s on {device}: {hours:,.2f} hours with one process; several share the work')
        return
    measure = partial(_measure, args, teachers, folders or class_names_of(teachers), config, device)
    store = record(args.out, dataset, teachers, meta, args.epochs, progress=not rank, measure=measure, **work)
    _logger.info(f'{args.out}: {_amount(store.meta, store.meta.epochs)}')


def _measure(
    args: argparse.Namespace,
    teachers: EnsembleTeacher,
    names: list[str] | None,
    config: dict[str, Any],
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Evaluate ensemble and teachers on the validation split; {} where there is none, or with other classes."""
    try:
        validation = open_split(args, '--val-split')
    except UserError:
        return {}
    found = class_names_of(validation)
    if found is None or found != (names or found) or len(found) != teachers.num_classes:
        return {}
    options = {'batch_size': args.batch_size, 'num_workers': args.workers, 'device': device}
    loader = eval_loader(validation, config, img_mode=args.input_img_mode, decode=args.decode, **options)
    models = {'ensemble': teachers}
    figures = evaluate(models, loader, device=device, reference='ensemble', members=True, data_config=config)
    _logger.info(as_text(metric_table(figures)))
    return figures


def _verify(args: argparse.Namespace) -> None:
    store = SoftLabelStore(args.store)
    unreadable = read_all(store)
    total = store.meta.images * store.meta.epochs
    print(f'read                 {total:,} records, {unreadable:,} of them of images that could not be read')
    samples = StoredSamples(store, _open_images(args))
    names = [str(spec) for spec in TeacherSpec.parse_all(args.teachers or [])]
    teachers = create_teachers(store.meta, names).to(choose_device(args.device))
    compared, largest = compare(samples, teachers, args.samples)
    print(f'compared             {compared} samples; their pixels are the recorded ones')
    print(f'largest difference   {largest:.2e} of a probability')
    if largest > args.tolerance:
        raise UserError(f'the teachers predict something else: a probability differs by {largest:.2e} (--tolerance).')


def _show(args: argparse.Namespace) -> None:
    store = SoftLabelStore(args.store)
    meta = store.meta
    for teacher in meta.teachers:
        known = {**teacher, 'sha256': teacher['sha256'][:12], 'weight': f'{teacher["weight"]:.3g}'}
        print('teacher  ', shown({name: value for name, value in known.items() if value is not None}))
    if meta.teachers_per_sample:
        print(f'drawn     {meta.teachers_per_sample} of the teachers for each sample')
    if meta.figures:
        print(as_text(metric_table(meta.figures), 'measured'))
    default = vars(Augmentation(meta.augmentation.input_size)) | {'input_size': None}
    changed = {name: value for name, value in vars(meta.augmentation).items() if value != default[name]}
    print(f'samples   {shown(changed)}, seed {meta.seed}')
    print(f'records   {_amount(meta, meta.epochs)}')
    print(f'libraries {shown(meta.versions)}')
    if store.missing:
        print(f'epochs    {store.epochs} of {meta.epochs} are there; {store.incomplete()}')
    if store.epochs:
        records = store.read_epoch(0, np.arange(meta.images))
        unreadable = np.flatnonzero(records['crc'] == 0)
        mass = records['probabilities'][records['crc'] != 0].sum(axis=1, dtype=np.float64).mean()
        print(f'epoch 1   top {meta.top_k} of {meta.num_classes} classes keep {mass:.4f} of the probability')
        names = store.names() if len(unreadable) else []
        print(f'          {len(unreadable):,} images without a record', *(names[row] for row in unreadable[:10]))


def _open_images(args: argparse.Namespace) -> Dataset:
    return open_split(args, '--train-split', or_all=args.train_split == 'train')


def _amount(meta: StoreMeta, epochs: int) -> str:
    total, size = meta.images * epochs, meta.dtype.itemsize
    written = tqdm.format_sizeof(total * size, 'B')
    return f'{meta.images:,} images x {epochs} epochs = {total:,} records of {size} bytes, {written}'


if __name__ == '__main__':
    cli()
