"""The program `mealv2-predict`: the most likely classes of pictures, by any model."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_mealv2.arguments import choose_device
from timm_mealv2.command_line import COUNT, DECODE, DEVICE, OneLineParser, Option, add_options, run_cli
from timm_mealv2.data.decode import is_image_file
from timm_mealv2.data.loader import eval_loader
from timm_mealv2.data.normalize import resolve_pixels
from timm_mealv2.data.unreadable import BadImages
from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing
from timm_mealv2.models.factory import TeacherSpec, create_ensemble
from timm_mealv2.predictions import TopClasses, write_predictions

_PREDICT = (
    Option('--topk', COUNT, 'classes of each image', 5),
    Option('--csv', Path, 'write them there as CSV', metavar='FILE'),
    Option('--json', Path, 'write them there as JSON: path and predictions of each image', metavar='FILE'),
)


class _ImageFiles(Dataset):
    """Pictures by their paths, without labels."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return self.paths[index].open('rb'), -1

    def filename(self, index: int, **kwargs: Any) -> str:
        """Return the path of an image, for messages."""
        return str(self.paths[index])


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the pictures at paths: files, and the files in folders at any depth that Pillow has a reader for.

    Raises:
        UserError: If there is nothing at a path, or there are no pictures.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise UserError(f'{path}: there is no such picture or folder.')
        found += sorted(file for file in path.rglob('*') if is_image_file(str(file))) if path.is_dir() else [path]
    if not found:
        raise UserError(f'there are no pictures in {", ".join(map(str, paths))}.')
    return found


def build_parser() -> argparse.ArgumentParser:
    """Return a fresh parser of the program's command line."""
    parser = OneLineParser(prog='mealv2-predict', description='The most likely classes of pictures.')
    text = 'timm name with its tag, checkpoint, run folder, export, model.onnx, hf-hub:USER/REPO, ...'
    parser.add_argument('model', metavar='MODEL', help=text)
    parser.add_argument('images', nargs='+', type=Path, metavar='IMAGE', help='pictures, or folders of them')
    add_options(parser, (*_PREDICT, DECODE, *DEVICE))
    parser.set_defaults(device=None, workers=0)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program on `argv` (the command line if None): print a line for each picture, write CSV and JSON.

    Raises:
        UserError: If the model cannot be had, or there are no pictures.
    """
    args = build_parser().parse_args(argv)
    device = choose_device(args.device)
    spec = TeacherSpec.parse(args.model)
    spec.check()
    paths = find_images(args.images)
    model = create_ensemble(spec).to(device)
    bad = BadImages(limit=len(paths))
    config = resolve_pixels({}, model.pretrained_cfg, model.in_chans)
    options = {'decode': args.decode, 'device': device, 'num_workers': args.workers}
    loader = eval_loader(_ImageFiles(paths), config, batch_size=args.batch_size, bad=bad, **options)
    top = TopClasses(args.topk)
    with torch.inference_mode():
        for images, target in tqdm(loader, desc='predicting', leave=False, disable=None):
            top.add(args.model, model(images), target)
    found = top.predictions({args.model: model})
    readable = bad.readable(len(paths)) if found else []
    entries: list[dict[str, Any]] = [{'path': str(path), 'predictions': []} for path in paths]
    for predictions in found.values():
        for number, index in enumerate(readable):
            entries[index]['predictions'] = [{'name': name, 'probability': p} for _, name, p in predictions.top(number)]
    for entry in entries:
        shown = [f'{row["name"]} {100 * row["probability"]:.2f} %' for row in entry['predictions']]
        print(f'{entry["path"]}: {", ".join(shown) or "cannot be read"}')
    for line in bad.tell_ignored():
        print(line, file=sys.stderr)
    if args.csv is not None and found:
        write_predictions(args.csv, found, [str(paths[index]) for index in readable])
    if args.json is not None:
        with replacing(args.json) as path:
            path.write_text(json.dumps(entries, indent=2) + '\n', encoding='utf-8')


def cli() -> None:
    """Run the command `mealv2-predict`."""
    run_cli(main)


if __name__ == '__main__':
    cli()
