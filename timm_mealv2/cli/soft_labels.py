"""The program `mealv2-softlabels`: record what teachers predict for a training's samples, inspect it, and check it."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from timm.utils.distributed import world_info_from_env
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_mealv2.arguments import build_ensemble, choose_device, open_split
from timm_mealv2.command_line import (
    AUGMENTATION,
    COUNT,
    DATA,
    DEVICE,
    INPUT,
    POSITIVE,
    SEED,
    TEACHERS,
    TRAIN_SPLIT,
    UNLABELED,
    OneLineParser,
    add_options,
    flag,
    model_text,
    run_cli,
)
from timm_mealv2.data.augmentation import Augmentation
from timm_mealv2.data.class_names import class_names_of, unlabeled
from timm_mealv2.data.normalize import resolve_pixels
from timm_mealv2.errors import UserError, one_line
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import TeacherSpec
from timm_mealv2.soft_labels.record import describe, measure_rate, record
from timm_mealv2.soft_labels.replay import StoredSamples
from timm_mealv2.soft_labels.store import SoftLabelStore, StoreMeta
from timm_mealv2.soft_labels.verify import changed_teachers, compare, create_teachers, draw_samples, read_all
from timm_mealv2.training.build_data import build_augmentation
from timm_mealv2.training.checks import check_image_settings
from timm_mealv2.training.settings import parse_with_files

_logger = logging.getLogger(__name__)


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

    def add_command(name: str, function: object, text: str, with_data: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=function, parser=command)
        if function is not _record:
            command.add_argument('store', type=Path, metavar='DIR', help='the store')
        if with_data:
            add_options(command.add_argument_group('data set'), (*DATA, TRAIN_SPLIT))
        return command

    text = 'Record the predictions for every sample, or go on where a recording stopped.'
    command = add_command('record', _record, text)
    add = command.add_argument_group('recording').add_argument
    add('--out', type=Path, required=True, metavar='DIR', help='folder of the store')
    add('--recipe', metavar='NAME', help='settings of a published training as defaults')
    add('-c', '--config', metavar='FILE', help='YAML file of settings as defaults, such as the args.yaml of a run')
    add('--epochs', type=COUNT, metavar='M', help='epochs to record, those that are there included')
    add('--top-k', type=COUNT, default=10, metavar='K', help='most probable classes to keep, or all of fewer')
    add('--seed', type=SEED, default=42, help="the training's seed: that of crops, augmentation and order")
    student = 'student, whose image size, mean and std count; else those of the first teacher'
    add('--model', type=model_text, metavar='NAME', help=student)
    dry_run = flag('--dry-run', 'measure the rate for half a minute, tell samples, bytes and hours, and write nothing')
    add_options(command, [dry_run])
    add_options(command, [UNLABELED])
    groups = {'teachers': TEACHERS, 'images': INPUT, 'augmentation': AUGMENTATION, 'device': DEVICE}
    for name, options in groups.items():
        add_options(command.add_argument_group(name), options)
    command.set_defaults(device=None)

    add_command('info', _info, 'Show what a store holds.', with_data=False)

    text = 'Read a store to its end, and let the teachers predict some samples again.'
    command = add_command('verify', _verify, text)
    command.add_argument('--teachers', nargs='+', metavar='TEACHER', help='what to load in place of the recorded names')
    command.add_argument('--samples', type=COUNT, default=256, metavar='N', help='samples to predict again')
    text = 'largest difference of a probability'
    command.add_argument('--tolerance', type=POSITIVE, default=0.01, metavar='P', help=text)
    add_options(command.add_argument_group('device'), DEVICE[:1])
    command.set_defaults(device=None)

    text = 'Draw the first samples of an image, each beside the classes that it was given.'
    command = add_command('show', _show, text)
    command.add_argument('image', metavar='IMAGE', help='its name in the data set, or its number')
    command.add_argument('--out', type=Path, required=True, metavar='FILE.png', help='the picture')
    command.add_argument('--samples', type=COUNT, default=8, metavar='N', help='samples to draw')
    return parser


def _record(args: argparse.Namespace) -> None:
    local_rank, rank, _ = world_info_from_env()  # torchrun and SLURM number the processes of a host
    if rank:
        logging.getLogger().setLevel(logging.WARNING)
    device = choose_device(args.device, local_rank)
    dataset, teachers, meta = _parts(args, device)
    if args.dry_run:
        rate = measure_rate(dataset, teachers, meta, workers=args.workers, device=device)
        print(_amount(meta, args.epochs))
        hours = meta.images * args.epochs / rate / 3600
        print(f'{rate:,.1f} samples/s on {device}: {hours:,.2f} hours with one process; several share the work')
        return
    store = record(
        args.out, dataset, teachers, meta, args.epochs, workers=args.workers, device=device, progress=not rank
    )
    _logger.info(f'{args.out}: {_amount(store.meta, store.meta.epochs)}')


def _info(args: argparse.Namespace) -> None:
    store = SoftLabelStore(args.store)
    meta = store.meta
    for number, teacher in enumerate(meta.teachers):
        size = 'x'.join(map(str, teacher['img_size'])) if teacher['img_size'] else 'as the samples'
        dtype = f', {teacher["autocast_dtype"]}' if teacher['autocast_dtype'] else ''
        print(
            f'{"" if number else "teachers":<10}{teacher["name"]}: weight {teacher["weight"]:.3g}, image size {size}'
            f'{dtype}, SHA-256 {teacher["sha256"][:12]}'
        )
    default = Augmentation(meta.augmentation.input_size)
    changed = [f'{name} {value}' for name, value in vars(meta.augmentation).items() if value != getattr(default, name)]
    print(f'samples   {"x".join(map(str, meta.augmentation.input_size))}, seed {meta.seed}')
    print(f'          {", ".join(changed) or "augmentation by default"}')
    print(f'records   {_amount(meta, meta.epochs)}')
    print(f'libraries {", ".join(f"{name} {version}" for name, version in meta.versions.items())}')
    files = [path for path in args.store.iterdir() if path.is_file()]
    print(f'on disk   {sum(path.stat().st_size for path in files):,} bytes in {len(files):,} files')
    if store.missing:
        print(f'epochs    {store.epochs} of {meta.epochs} are there; {store.incomplete()}')
    if store.epochs:
        records = store.read_epoch(0, np.arange(meta.images))
        unreadable = np.flatnonzero(records['crc'] == 0)
        mass = records['probabilities'][records['crc'] != 0].sum(axis=1, dtype=np.float64).mean()
        print(f'epoch 0   top {meta.top_k} of {meta.num_classes} classes keep {mass:.4f} of the probability')
        names = store.names() if len(unreadable) else []
        print(f'          {len(unreadable):,} images without a record', *(names[row] for row in unreadable[:10]))


def _verify(args: argparse.Namespace) -> None:
    store = SoftLabelStore(args.store)
    unreadable = read_all(store)
    total = store.meta.images * store.meta.epochs
    print(f'read                 {total:,} records, {unreadable:,} of them of images that could not be read')
    device = choose_device(args.device)
    samples = _samples(args, store)
    teachers = create_teachers(store.meta, [str(spec) for spec in TeacherSpec.parse_all(args.teachers or [])], device)
    found = compare(samples, teachers, count=args.samples, device=device)
    print(f'compared             {found["samples"]} samples; their pixels are the recorded ones')
    print(f'largest difference   {found["largest difference"]:.2e} of a probability')
    print(f'mean difference      {found["mean difference"]:.2e}')
    print(f'same top-1           {100 * found["same top-1"]:.2f}%')
    faults = [f'{name} had other weights (name it with --teachers)' for name in changed_teachers(store.meta, teachers)]
    if found['largest difference'] > args.tolerance:
        faults.append(f'a probability differs by {found["largest difference"]:.2e} (--tolerance {args.tolerance:g})')
    if faults:
        raise UserError(f'the predictions do not match: {"; ".join(faults)}.')


def _show(args: argparse.Namespace) -> None:
    store = SoftLabelStore(args.store)
    names = store.names()
    image = names.index(args.image) if args.image in names else int(args.image) if args.image.isdecimal() else -1
    if not 0 <= image < len(names):
        raise UserError(f'{args.store} has no image {args.image}, but {names[0]} for one (or its number, 0).')
    samples = _samples(args, store)
    classes = store.meta.class_names or class_names_of(samples.dataset)
    if classes is not None and len(classes) != store.meta.num_classes:
        classes = None
    draw_samples(samples, image, classes, args.samples).savefig(args.out)
    print(f'{args.out}: {names[image]}')


def _parts(args: argparse.Namespace, device: torch.device) -> tuple[Dataset, EnsembleTeacher, StoreMeta]:
    """The images, the teachers, and what is to be recorded, as the arguments say."""
    if 'mixup_mode' not in args.given:
        args.mixup_mode = 'pair'
    elif args.mixup_mode != 'pair' and (args.mixup or args.cutmix or args.cutmix_minmax):
        fault = 'a sample would depend on its batch; pair is what can be recorded'
        raise UserError(f'--mixup-mode {args.mixup_mode}: {fault}.')
    check_image_settings(args)
    args.teachers = TeacherSpec.parse_all(args.teachers)
    for spec in args.teachers:
        spec.check()
    dataset = open_split(args, '--train-split', or_all=args.train_split == 'train')
    folders = class_names_of(unlabeled(dataset) if args.unlabeled else dataset)
    if folders and len(folders) == 1:  # a place for all images, and no class
        folders = None
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else None)
    teachers = build_ensemble(args, num_classes=args.num_classes, in_chans=in_chans, class_names=folders, device=device)
    # A model of random weights tells the pixels that a student of this name expects.
    try:
        cfg = timm.create_model(args.model).pretrained_cfg if args.model else teachers.pretrained_cfg
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f'cannot create --model {args.model}: {one_line(error)}') from error
    pixels = {name: getattr(args, name) for name in ('input_size', 'img_size', 'mean', 'std')}
    config = resolve_pixels(pixels, cfg, teachers.in_chans)
    augmentation = build_augmentation(args, config)
    meta = describe(dataset, teachers, augmentation, seed=args.seed, top_k=args.top_k, batch_size=args.batch_size)
    return dataset, teachers, meta


def _samples(args: argparse.Namespace, store: SoftLabelStore) -> StoredSamples:
    return StoredSamples(store, open_split(args, '--train-split', or_all=args.train_split == 'train'))


def _amount(meta: StoreMeta, epochs: int) -> str:
    total, size = meta.images * epochs, meta.dtype.itemsize
    written = tqdm.format_sizeof(total * size, 'B')
    return f'{meta.images:,} images x {epochs} epochs = {total:,} records of {size} bytes, {written}'


if __name__ == '__main__':
    cli()
