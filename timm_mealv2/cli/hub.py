"""The program `mealv2-hub`: trained models to the Hugging Face Hub and back."""

import argparse
import logging
import sys
from collections.abc import Sequence

import timm

from timm_mealv2.command_line import PIXELS, OneLineParser, Option, add_options, flag, run_cli
from timm_mealv2.hub.card import CardOptions
from timm_mealv2.hub.export import convert_released, export_ensemble, export_model, read_config
from timm_mealv2.hub.hub_api import pull_model, push_model
from timm_mealv2.models.checkpoint import is_ensemble

_logger = logging.getLogger(__name__)

# The names that the options are kept under are those of the functions' parameters.
_FOLDER = (
    Option('--out', None, 'folder to make; an earlier export is replaced', required=True, metavar='DIR'),
    Option('--repo-id', None, 'USER/NAME that it will have on the Hub, for the card', metavar='REPO'),
    Option('--card', None, 'Jinja template of the card, in place of the own one', dest='template', metavar='FILE'),
)
_LICENSE = Option('--license', None, "its license by the Hub's name, such as apache-2.0 (default: none)", metavar='ID')
_EXPORT = (
    Option('checkpoint', None, 'run folder (its best checkpoint) or checkpoint', metavar='RUN'),
    *_FOLDER,
    _LICENSE,
    flag('--no-ema', 'the weights themselves, not their average (--model-ema) where there is one'),
    Option('--dataset-id', None, "the Hub's name of the data set, for the card"),
    Option('--test-size', PIXELS, "image size for tests, written into the config (default: the model's)"),
    flag('--onnx', 'write model.onnx too, compared with the model on the validation images'),
    flag('--int8', 'write model_int8.onnx too (static quantization, calibrated on training images); implies --onnx'),
    Option('--data-dir', None, "data set for --onnx and --int8 (default: the run's)"),
)
_ENSEMBLE = (
    Option('--teachers', None, 'as mealv2-train takes them', nargs='+', required=True, metavar='TEACHER'),
    Option('--teacher-weights', float, 'one per teacher', nargs='+', dest='weights'),
    Option('--teacher-img-size', int, 'for all or for each', nargs='+', dest='img_sizes'),
    Option('--num-classes', int, 'the class count that all must have'),
    *_FOLDER,
    _LICENSE,
)
_CONVERT = (
    Option('file', None, 'the released file, as in MEALV2_ResNet50_224.pth'),
    Option('--student', None, ', '.join(timm.list_pretrained('mealv*')), required=True, metavar='NAME.TAG'),
    *_FOLDER,
)
_PUSH = (
    Option('source', None, 'exported folder, run folder or checkpoint', metavar='MODEL'),
    Option('repo_id', None, 'USER/NAME; made if it is not there', metavar='REPO'),
    Option('--message', None, 'message of the commit'),
    flag('--private', 'make it private'),
)
_PULL = (
    Option('repo_id', None, 'USER/NAME', metavar='REPO'),
    Option('--revision', None, 'branch, tag or commit; the main branch if not given', metavar='NAME'),
    Option('--out', None, 'folder to make; NAME in the current one if not given', metavar='DIR'),
)


def build_parser() -> argparse.ArgumentParser:
    """Return a fresh parser of the command line."""
    parser = OneLineParser(prog='mealv2-hub', description='Trained models as folders that plain timm loads.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    parsers = {}
    for name, options, text in (
        ('export', _EXPORT, 'make a folder from a run folder or a checkpoint'),
        ('export-ensemble', _ENSEMBLE, 'make a small folder that names the teachers of an ensemble'),
        ('convert', _CONVERT, 'make a folder from a file that the authors of MEAL V2 released'),
        ('push', _PUSH, 'push a folder, or the export of a checkpoint, to the Hugging Face Hub'),
        ('pull', _PULL, 'get a folder from the Hugging Face Hub, verified'),
    ):
        parsers[name] = commands.add_parser(name, help=text)
        add_options(parsers[name], options)
    push = parsers['push']
    permission = 'the owners of weights without a license (those of `convert`) allowed it'
    push.add_argument('--i-have-permission', action='store_true', dest='has_permission', help=permission)
    target = push.add_mutually_exclusive_group()
    target.add_argument('--revision', metavar='NAME', help='branch; the main one if not given')
    target.add_argument('--create-pr', action='store_true', help='open a pull request to the main branch')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`, that of the process if None."""
    options = vars(build_parser().parse_args(argv))
    logging.basicConfig(format='%(message)s', stream=sys.stderr)
    logging.getLogger('timm_mealv2').setLevel(logging.INFO)
    command = options.pop('command')
    if command == 'push':
        print(push_model(**options))
        return
    if command == 'pull':
        folder = pull_model(**options)
    else:
        about = ('repo_id', 'template', 'license', 'dataset_id')
        card = CardOptions(**{name: options.pop(name) for name in about if name in options})
        if command == 'export':
            if not card.license:
                _logger.info('The card names no license, and others may then not use the model: --license names one.')
            folder = export_model(use_ema=not options.pop('no_ema'), card=card, **options)
        elif command == 'export-ensemble':
            folder = export_ensemble(card=card, **options)
        else:
            folder = convert_released(card=card, **options)
    first = 'import timm_mealv2 and ' if is_ensemble(read_config(folder)['architecture']) else ''
    print(f"{folder}: {first}load it with timm.create_model('local-dir:{folder}', pretrained=True)")


def cli() -> None:
    """Run the command `mealv2-hub`."""
    run_cli(main)


if __name__ == '__main__':
    cli()
