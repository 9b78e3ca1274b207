"""The program `mealv2-softlabels`: record what teachers predict for a training's samples, inspect it, and check it."""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.utils.distributed import world_info_from_env
from torch.utils.data import Dataset

from timm_mealv2.arguments import build_ensemble, choose_device, open_split
from timm_mealv2.command_line import (
    AUGMENTATION,
    DATA,
    DEVICE,
    INPUT,
    TEACHERS,
    TRAIN_SPLIT,
    TUNING,
    OneLineParser,
    add_options,
    run_cli,
)
from timm_mealv2.data.augmentation import Augmentation
from timm_mealv2.data.dataset import class_names
from timm_mealv2.data.normalize import resolve_pixels
from timm_mealv2.errors import UserError, one_line
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import TeacherSpec
from timm_mealv2.option_types import COUNT, POSITIVE, PROBABILITY, SEED, model_text
from timm_mealv2.soft_labels.meta import StoreMeta, describe
from timm_mealv2.soft_labels.record import measure, record
from timm_mealv2.soft_labels.store import SoftLabelStore
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
    commands = build_parser()
    args = commands.parse_args(argv)
    if args.run in (_record, _estimate):
        args = parse_with_files(args.parser, argv[1:])
        if not args.teachers:
            raise UserError('--teachers: name the teachers, or a --recipe that does.')
        if not args.epochs:
            raise UserError('--epochs: say how many epochs to record.')
    logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stderr)
    args.run(args)


def cli() -> None:
    """Run `main` as the command `mealv2-softlabels`; a cluster's SIGTERM gives up the parts that are claimed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run_cli(main)


def build_parser() -> argparse.ArgumentParser:
    """Return a fresh parser. What the training program has too has its names, types and defaults."""
    parser = OneLineParser(
        prog='mealv2-softlabels',
        description='Record what teachers predict for the samples of a training, to train on it as often as wanted.',
    )
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    def add(name: str, function: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=function, parser=command)
        return command

    command = add('record', _record, 'Record the predictions for every sample, or go on where a recording stopped.')
    command.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder of the store')
    _add_recording(command)

    command = add('estimate', _estimate, 'Measure the rate of a recording; tell its hours and bytes.')
    command.add_argument('--images', type=COUNT, metavar='N', help="number of images; the data set's if not given")
    command.add_argument('--seconds', type=POSITIVE, default=20.0, metavar='S', help='how long to measure')
    _add_recording(command)

    command = add('info', _info, 'Show what a store holds.')
    command.add_argument('store', type=Path, metavar='DIR', help='the store')

    command = add('verify', _verify, 'Read a store to its end, and let the teachers predict some samples again.')
    command.add_argument('store', type=Path, metavar='DIR', help='the store')
    command.add_argument('--teachers', nargs='+', metavar='TEACHER', help='what to load in place of the recorded names')
    command.add_argument('--samples', type=COUNT, default=256, metavar='N', help='samples to predict again')
    text = 'largest difference of a probability'
    command.add_argument('--tolerance', type=POSITIVE, default=0.01, metavar='P', help=text)
    text = 'smallest cosine of the probabilities'
    command.add_argument('--min-cosine', type=PROBABILITY, default=0.999, metavar='C', help=text)
    command.add_argument('--seed', type=SEED, default=42, help='seed of the choice')
    _add_data(command)
    add_options(command.add_argument_group('device'), DEVICE[:1])
    command.set_defaults(device=None)

    command = add('show', _show, 'Draw the first samples of an image, each beside the classes that it was given.')
    command.add_argument('store', type=Path, metavar='DIR', help='the store')
    command.add_argument('image', metavar='IMAGE', help='its name in the data set, or its number')
    command.add_argument('--out', type=Path, required=True, metavar='FILE.png', help='the picture')
    command.add_argument('--samples', type=COUNT, default=8, metavar='N', help='samples to draw')
    _add_data(command)
    return parser


def _add_recording(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('recording').add_argument
    add('--recipe', metavar='NAME', help='settings of a published training as defaults')
    add('-c', '--config', metavar='FILE', help='YAML file of settings as defaults, such as the args.yaml of a run')
    add('--epochs', type=COUNT, metavar='M', help='epochs to record, those that are there included')
    add('--top-k', type=COUNT, metavar='K', help='most probable classes to keep; 10, or all where there are fewer')
    add('--seed', type=SEED, default=42, help="the training's seed: that of crops, augmentation and order")
    student = 'student, whose image size, mean and std count; else those of the first teacher'
    add('--model', type=model_text, metavar='NAME', help=student)
    add_options(parser.add_argument_group('teachers'), (*TEACHERS, *TUNING))
    _add_data(parser)
    add_options(parser.add_argument_group('images'), INPUT)
    add_options(parser.add_argument_group('augmentation'), AUGMENTATION)
    add_options(parser.add_argument_group('device'), DEVICE)
    parser.set_defaults(device=None)


def _add_data(parser: argparse.ArgumentParser) -> None:
    add_options(parser.add_argument_group('data set'), (*DATA, TRAIN_SPLIT))


def _record(args: argparse.Namespace) -> None:
    local_rank, rank, _ = world_info_from_env()  # torchrun and SLURM number the processes of a host
    if rank:
        logging.getLogger().setLevel(logging.WARNING)
    device = choose_device(args.device, local_rank)
    dataset, teachers, meta = _parts(args, device)
    options = _running(args, device)
    store = record(args.out, dataset, teachers, meta, args.epochs, progress=not rank, **options)
    _logger.info(f'{args.out}: {_amount(store.meta, store.meta.images, store.meta.epochs)}')


def _running(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """How the teachers run."""
    tune = args.teacher_tune == 'on'
    return {'workers': args.workers, 'device': device, 'tune': tune, 'compile': args.teacher_compile}


def _estimate(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    dataset, teachers, meta = _parts(args, device)
    rate = measure(dataset, teachers, meta, seconds=args.seconds, **_running(args, device))
    images = args.images or meta.images
    print(f'measured  {rate:,.1f} samples/s in one process on {device}')
    print(f'records   {_amount(meta, images, args.epochs)}')
    print(f'hours     {images * args.epochs / rate / 3600:,.2f} with one process; several share the work')


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
    print(f'images    {meta.images:,}')
    print(f'records   {_amount(meta, meta.images, meta.epochs)}')
    print(f'libraries {", ".join(f"{name} {version}" for name, version in meta.versions.items())}')
    files = [path for path in args.store.iterdir() if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    print(f'on disk   {total:,} bytes in {len(files):,} files ({_bytes(total)}), format {meta.format}')
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
    images = open_split(args, args.train_split, input_img_mode=store.meta.augmentation.input_img_mode)
    samples, rows = store.samples(images)
    here = np.arange(store.meta.images) if rows is None else rows
    texts = [str(spec) for spec in TeacherSpec.parse_all(args.teachers)] if args.teachers else None
    teachers = create_teachers(store.meta, texts, device)
    changed = changed_teachers(store.meta, teachers)
    result = compare(store, samples, teachers, here, count=args.samples, device=device, seed=args.seed)
    print(f'compared             {result.samples} samples; their pixels are the recorded ones')
    print(f'largest difference   {result.max_difference:.2e} of a probability')
    print(f'mean difference      {result.mean_difference:.2e}')
    print(f'same top-1           {100 * result.agreement:.2f}%')
    print(f'smallest cosine      {result.cosine:.6f}')
    if changed:
        names = ', '.join(changed)
        raise UserError(f'not the recorded teachers: {names} had other weights; name them with --teachers.')
    if not (result.max_difference <= args.tolerance and result.cosine >= args.min_cosine):
        raise UserError(
            f'the predictions do not match: a probability differs by {result.max_difference:.2e} (--tolerance '
            f'{args.tolerance:g}), a cosine is {result.cosine:.6f} (--min-cosine {args.min_cosine:g}).'
        )


def _show(args: argparse.Namespace) -> None:
    store = SoftLabelStore(args.store)
    if not store.epochs:
        raise UserError(store.incomplete())
    names = store.names()
    if args.image in names:
        row = names.index(args.image)
    elif args.image.isdecimal() and int(args.image) < len(names):
        row = int(args.image)
    else:
        raise UserError(f'{args.store} has no image {args.image}, but {names[0]} for one (or its number, 0).')
    images = open_split(args, args.train_split, input_img_mode=store.meta.augmentation.input_img_mode)
    samples, rows = store.samples(images)
    if rows is not None and row not in rows:
        raise UserError(f'{names[row]} is not in the data set.')
    classes = class_names(samples.dataset)
    if classes is not None and len(classes) != store.meta.num_classes:
        classes = None
    draw_samples(store, samples, row, classes, args.samples).save(args.out)
    print(f'{args.out}: {names[row]}')


def _parts(args: argparse.Namespace, device: torch.device) -> tuple[Dataset, EnsembleTeacher, StoreMeta]:
    """The images, the teachers, and what is to be recorded, as the arguments say."""
    if 'mixup_mode' not in args.given:
        args.mixup_mode = 'pair'
    elif args.mixup_mode != 'pair' and (args.mixup or args.cutmix or args.cutmix_minmax):
        fault = 'a sample would depend on its batch; pair is what can be recorded'
        raise UserError(f'--mixup-mode {args.mixup_mode}: {fault}.')
    check_image_settings(args)
    args.teachers = TeacherSpec.parse_all(args.teachers)
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else None)
    teachers = build_ensemble(args, num_classes=args.num_classes, in_chans=in_chans, device=device)
    # A model of random weights tells the pixels that a student of this name expects.
    try:
        cfg = timm.create_model(args.model).pretrained_cfg if args.model else teachers.pretrained_cfg
    except Exception as error:  # a config.json is the user's, whatever timm raises
        raise UserError(f'cannot create --model {args.model}: {one_line(error)}') from error
    pixels = {name: getattr(args, name) for name in ('input_size', 'img_size', 'mean', 'std')}
    config = resolve_pixels(pixels, cfg, teachers.in_chans)
    augmentation = build_augmentation(args, config)
    dataset = open_split(args, args.train_split, input_img_mode=augmentation.input_img_mode)
    top_k = args.top_k or min(10, teachers.num_classes)
    meta = describe(dataset, teachers, augmentation, seed=args.seed, top_k=top_k, batch_size=args.batch_size)
    return dataset, teachers, meta


def _amount(meta: StoreMeta, images: int, epochs: int) -> str:
    total = images * epochs
    size = meta.dtype.itemsize
    return f'{images:,} images x {epochs} epochs = {total:,} records of {size} bytes, {_bytes(total * size)}'


def _bytes(count: int) -> str:
    for unit, scale in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if count >= scale:
            return f'{count / scale:.1f} {unit}'
    return f'{count} bytes'


if __name__ == '__main__':
    cli()
