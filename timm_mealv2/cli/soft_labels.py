"""The program `mealv2-softlabels`: record, inspect, check, estimate and join stores of soft labels."""

import argparse
import logging
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from timm.utils.distributed import is_distributed_env, world_info_from_env
from torch.utils.data import Dataset

from timm_mealv2.cli.parser import OneLineParser, run_cli
from timm_mealv2.data.dataset import image_names, open_dataset
from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import TeacherSpec, create_ensemble, read_classes
from timm_mealv2.soft_labels.crops import Recipe, decode
from timm_mealv2.soft_labels.merge import merge
from timm_mealv2.soft_labels.record import measure, record
from timm_mealv2.soft_labels.store import SoftLabelStore, StoreMeta, record_dtype
from timm_mealv2.soft_labels.verify import changed_teachers, compare, create_teachers

_logger = logging.getLogger(__name__)

_FLOAT_TYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16, 'float32': torch.float32}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand as the arguments say; without them, those of the command line.

    Raises:
        UserError: What the user can mend.
    """
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stderr)
    args.run(args)


def cli() -> None:
    """Run `main` as the command `mealv2-softlabels`."""
    run_cli(main)


def build_parser() -> argparse.ArgumentParser:
    """Return a fresh parser. What the training program has too has its names, types and defaults."""
    parser = OneLineParser(
        prog='mealv2-softlabels',
        description='Record the answers of an ensemble of teachers once, to train on them as often as wanted.',
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    def add(name: str, function: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.set_defaults(run=function)
        return command

    command = add('record', _record, 'Record the answers for random crops of every image, or go on where one stopped.')
    command.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder of the store')
    _add_recording(command)

    command = add('info', _info, 'Show what a store holds.')
    command.add_argument('store', type=Path, metavar='DIR', help='the store')

    command = add('verify', _verify, 'Ask the teachers again about some crops, and compare.')
    command.add_argument('store', type=Path, metavar='DIR', help='the store')
    command.add_argument('--samples', type=int, default=256, metavar='N', help='crops to compare')
    command.add_argument('--tolerance', type=float, default=0.01, help='largest difference of a probability to accept')
    command.add_argument(
        '--teachers', nargs='+', metavar='TEACHER', help='what to load in place of the recorded names, in their order'
    )
    command.add_argument('--seed', type=int, default=42, help='seed of the choice of crops')
    _add_data(command)
    _add_device(command)

    command = add('estimate', _estimate, 'Measure some images; tell the bytes and hours that recording will take.')
    command.add_argument('--images', type=int, metavar='N', help='images to count with; those of the data set if unset')
    command.add_argument('--seconds', type=float, default=20, help='how long to measure, after about as long a start')
    _add_recording(command)

    command = add('merge', _merge, 'Join stores of the same teachers and images, recorded with different seeds.')
    command.add_argument('stores', type=Path, nargs='+', metavar='DIR', help='the stores')
    command.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder of the new store')
    return parser


def _add_recording(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('teachers')
    group.add_argument(
        '--teachers',
        nargs='+',
        required=True,
        metavar='TEACHER',
        help='timm names with their tags, hf-hub:USER/REPO, local-dir:FOLDER, ARCHITECTURE=CHECKPOINT or '
        'python:MODULE:FUNCTION',
    )
    group.add_argument(
        '--teacher-classes',
        nargs='+',
        metavar='TEACHER=FILE',
        help="the student's classes among a teacher's: in line k its index of class k (split at the last '=')",
    )
    group.add_argument(
        '--teacher-weights', type=float, nargs='+', metavar='WEIGHT', help='one per teacher; equal if not given'
    )
    group.add_argument(
        '--teacher-dtype',
        choices=tuple(_FLOAT_TYPES),
        help="autocast of the teachers; without it they run in their weights' dtype",
    )
    group.add_argument(
        '--teacher-img-size', type=int, nargs='+', metavar='PIXELS', help='image size for the teachers, all or each'
    )
    group.add_argument('--num-classes', type=int, help="number of classes; the teachers' own if not given")
    group = parser.add_argument_group('crops')
    group.add_argument('--crops', type=int, default=10, metavar='M', help='crops of an image')
    group.add_argument(
        '--top-k', type=int, metavar='K', help='most probable classes to keep for a crop; 10, or all where fewer are'
    )
    group.add_argument(
        '--img-size', type=int, help="image size for the student, square; the first teacher's if not given"
    )
    group.add_argument(
        '--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='SHARE', help='area of the random crop'
    )
    group.add_argument(
        '--ratio', type=float, nargs='+', default=[3 / 4, 4 / 3], metavar='RATIO', help='its aspect ratio'
    )
    group.add_argument('--hflip', type=float, default=0.5, help='probability of a horizontal flip')
    group.add_argument('--train-interpolation', default='bilinear', help='interpolation of the crops')
    group.add_argument('--seed', type=int, default=42, help='seed of the crops')
    _add_data(parser).add_argument('--in-chans', type=int, help="image channels; the teachers' own if not given")
    _add_device(parser)
    parser.add_argument('-j', '--workers', type=int, default=4, help='worker processes that load images')


def _add_data(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group('data set')
    group.add_argument('--data-dir', help='folder or tar of the data set')
    group.add_argument('--dataset', default='', help='kind and name: torch/cifar10, hfds/NAME, ...; a folder if empty')
    group.add_argument('--train-split', default='train', help='name of the split')
    group.add_argument('--dataset-download', action='store_true', help='download the data set, where its kind can be')
    group.add_argument('--class-map', default='', help='file with the class names in the order of their indices')
    group.add_argument('--input-img-mode', help="Pillow's image mode; by default RGB, or L for one channel")
    group.add_argument('--input-key', help='key of the images in a sample')
    group.add_argument('--target-key', help='key of the labels in a sample')
    return group


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--device', help='device; CUDA where there is one, else the CPU')
    parser.add_argument('-b', '--batch-size', type=int, default=128, help='crops a batch')


def _record(args: argparse.Namespace) -> None:
    distributed = is_distributed_env()
    local_rank, rank, world_size = world_info_from_env() if distributed else (0, 0, 1)
    if rank:
        logging.getLogger().setLevel(logging.WARNING)
    device = _device(args, local_rank)
    if distributed:
        # A process may wait long for the last shard of another.
        dist.init_process_group('gloo', rank=rank, world_size=world_size, timeout=timedelta(days=7))
    try:
        teachers, dataset, recipe = _parts(args, device)
        meta = record(
            dataset,
            teachers,
            args.out,
            recipe,
            top_k=args.top_k,
            batch_size=args.batch_size,
            workers=args.workers,
            device=device,
            rank=rank,
            world_size=world_size,
            progress=True,
        )
    finally:
        if distributed:
            dist.destroy_process_group()
    _logger.info(f'{args.out}: {_amount(meta.images, meta.crops, meta)}, mean kept probability {meta.kept_mass:.4f}.')


def _estimate(args: argparse.Namespace) -> None:
    device = _device(args, 0)
    teachers, dataset, recipe = _parts(args, device)
    rate = measure(
        dataset,
        teachers,
        recipe,
        top_k=args.top_k,
        batch_size=args.batch_size,
        workers=args.workers,
        device=device,
        seconds=args.seconds,
    )
    images = len(dataset) if args.images is None else args.images  # type: ignore[arg-type]
    size = record_dtype(teachers.num_classes, args.top_k).itemsize
    records = images * args.crops
    print(f'measured  {rate:,.1f} crops/s in one process on {device}')
    print(f'records   {images:,} images x {args.crops} crops = {records:,}, {size} bytes each')
    print(f'bytes     {records * size:,} ({_bytes(records * size)}; names and sizes of the images come on top)')
    print(f'hours     {records / rate / 3600:,.2f} with one process; several share the work')


def _info(args: argparse.Namespace) -> None:
    store = SoftLabelStore(args.store)
    meta = store.meta
    height, width = meta.image_size
    dtype = f', {meta.teacher_dtype}' if meta.teacher_dtype else ''
    for number, teacher in enumerate(meta.teachers):
        size = 'x'.join(map(str, teacher['img_size'])) if teacher['img_size'] else 'as the crops'
        print(
            f'{"" if number else "teachers":<10}{teacher["name"]}: weight {teacher["weight"]:.3g}, image size {size}'
            f'{dtype}, SHA-256 {teacher["sha256"][:12]}'
        )
    print(f'labels    top {meta.top_k} of {meta.num_classes} classes, mean kept probability mass {meta.kept_mass:.4f}')
    print(
        f'crops     {meta.crops} an image, {height}x{width} {meta.img_mode}, {meta.interpolation}, scale '
        f'{_range(meta.scale)}, ratio {_range(meta.ratio)}, hflip {meta.hflip:g}, seed {_list(meta.seeds)}'
    )
    print(f'images    {meta.images:,}, {meta.unreadable:,} of them unreadable')
    unreadable = [name for name, size in zip(store.names, store.sizes, strict=True) if not size.all()]
    for name in unreadable[:10]:
        print(f'          {name}')
    if len(unreadable) > 10:
        print('          ...')
    print(f'records   {_amount(meta.images, meta.crops, meta)}')
    files = [path for path in args.store.iterdir() if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    print(f'on disk   {total:,} bytes in {len(files)} files ({_bytes(total)}); all checksums are right')
    print(f'decoder   Pillow {meta.pillow}, libjpeg {meta.libjpeg or "none"}')
    print(f'format    version {meta.format_version}')


def _verify(args: argparse.Namespace) -> None:
    if args.samples < 1 or args.batch_size < 1:
        raise UserError('--samples and --batch-size must be 1 or more.')
    store = SoftLabelStore(args.store)
    device = _device(args, 0)
    dataset = _open(args, args.input_img_mode or store.meta.img_mode)
    indices = {name: index for index, name in enumerate(image_names(dataset))}
    store.check_decoder(lambda name: decode(dataset, indices[name], store.meta.img_mode))
    teachers = create_teachers(
        store.meta, [str(spec) for spec in TeacherSpec.parse_all(args.teachers)] if args.teachers else None, device
    )
    changed = changed_teachers(store.meta, teachers)
    result = compare(
        store,
        dataset,
        teachers,
        samples=args.samples,
        batch_size=args.batch_size,
        device=device,
        seed=args.seed,
    )
    print(f'compared             {result.samples} crops')
    print(f'largest difference   {result.max_difference:.2e} of a probability')
    print(f'mean difference      {result.mean_difference:.2e}')
    print(f'same top-1           {100 * result.agreement:.2f}%')
    if changed:
        raise UserError(
            f'not the recorded teachers: {", ".join(changed)} had other weights; name them with --teachers.'
        )
    if not result.max_difference <= args.tolerance:
        raise UserError(
            f'the labels do not match: a probability differs by {result.max_difference:.2e}, more than --tolerance '
            f'{args.tolerance:g}.'
        )


def _merge(args: argparse.Namespace) -> None:
    meta = merge(args.stores, args.out)
    _logger.info(f'{args.out}: {_amount(meta.images, meta.crops, meta)}.')


def _parts(args: argparse.Namespace, device: torch.device) -> tuple[EnsembleTeacher, Dataset, Recipe]:
    """The teachers, the images and the crops to cut, as the arguments say."""
    teachers = create_ensemble(
        args.teachers,
        num_classes=args.num_classes,
        in_chans=args.in_chans,
        weights=args.teacher_weights,
        img_sizes=args.teacher_img_size,
        classes=read_classes(args.teacher_classes or ()),
        autocast_dtype=_FLOAT_TYPES[args.teacher_dtype] if args.teacher_dtype else None,
        device=device,
    )
    if args.top_k is None:
        args.top_k = min(10, teachers.num_classes)
    size = teachers.pretrained_cfg['input_size'][1:]
    recipe = Recipe(
        crops=args.crops,
        image_size=(args.img_size, args.img_size) if args.img_size is not None else (size[0], size[1]),
        img_mode=args.input_img_mode or ('L' if teachers.in_chans == 1 else 'RGB'),
        interpolation=args.train_interpolation,
        scale=tuple(args.scale),
        ratio=tuple(args.ratio),
        hflip=args.hflip,
        seed=args.seed,
    )
    return teachers, _open(args, recipe.img_mode), recipe


def _open(args: argparse.Namespace, img_mode: str) -> Dataset:
    return open_dataset(
        args.dataset,
        args.data_dir,
        args.train_split,
        class_map=args.class_map,
        download=args.dataset_download,
        input_img_mode=img_mode,
        input_key=args.input_key,
        target_key=args.target_key,
    )


def _device(args: argparse.Namespace, local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    name = args.device or ('cuda' if available else 'cpu')
    if name.startswith('cuda') and not available:
        raise UserError(f'--device {name}: this torch sees no CUDA device; use --device cpu.')
    try:
        return torch.device(f'cuda:{local_rank}' if name == 'cuda' else name)
    except RuntimeError as error:
        raise UserError(f'--device {name}: {error}') from error


def _amount(images: int, crops: int, meta: StoreMeta) -> str:
    size = record_dtype(meta.num_classes, meta.top_k).itemsize
    total = images * crops
    return f'{images:,} images x {crops} crops = {total:,} records of {size} bytes, {_bytes(total * size)}'


def _bytes(count: int) -> str:
    for unit, scale in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if count >= scale:
            return f'{count / scale:.1f} {unit}'
    return f'{count} bytes'


def _range(values: Sequence[float]) -> str:
    return '..'.join(f'{value:.4g}' for value in values)


def _list(values: Sequence[int]) -> str:
    return ', '.join(map(str, values))
