"""The program `mealv2-hub`: trained models to the Hugging Face Hub and back."""

import argparse
import logging
import sys
from collections.abc import Sequence

from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.hub.card import CardOptions
from timm_mealv2.hub.export import (
    ENSEMBLE,
    PAPER_ACCURACY,
    convert_released,
    export_ensemble,
    export_model,
    read_config,
)
from timm_mealv2.hub.hub_api import pull_model, push_model

_logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Return a fresh parser of the command line."""
    parser = OneLineParser(prog='mealv2-hub', description='Trained models as folders that plain timm loads.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    export = commands.add_parser('export', help='make a folder from a training checkpoint')
    export.add_argument('checkpoint', help='last.pth.tar, model_best.pth.tar or another checkpoint of a run folder')
    _add_folder_options(export)
    no_ema = 'the weights themselves, not their average (--model-ema) where there is one'
    export.add_argument('--no-ema', action='store_true', help=no_ema)
    export.add_argument('--dataset-id', metavar='ID', help="the Hub's name of the data set, for the card")
    export.add_argument('--examples', nargs='+', default=[], metavar='IMAGE', help='images for the card')

    ensemble = commands.add_parser('export-ensemble', help='make a small folder that names the teachers of an ensemble')
    ensemble.add_argument('--teachers', nargs='+', required=True, metavar='TEACHER', help='as mealv2-train takes them')
    ensemble.add_argument('--teacher-weights', nargs='+', type=float, metavar='WEIGHT', help='one per teacher')
    ensemble.add_argument('--teacher-img-size', nargs='+', type=int, metavar='PIXELS', help='for all or for each')
    ensemble.add_argument('--num-classes', type=int, metavar='N', help='the class count that all must have')
    _add_folder_options(ensemble)

    convert = commands.add_parser('convert', help='make a folder from a file that the authors of MEAL V2 released')
    convert.add_argument('file', help='the released file, as in MEALV2_ResNet50_224.pth')
    convert.add_argument('--student', required=True, metavar='NAME.TAG', help=', '.join(PAPER_ACCURACY))
    _add_folder_options(convert, has_license=False)

    push = commands.add_parser('push', help='push a folder, or the export of a checkpoint, to the Hugging Face Hub')
    push.add_argument('source', metavar='DIR|CHECKPOINT', help='exported folder or training checkpoint')
    push.add_argument('repo', metavar='REPO', help='USER/NAME; made if it is not there')
    push.add_argument('--private', action='store_true', help='make it private')
    push.add_argument('--message', help='message of the commit')
    target = push.add_mutually_exclusive_group()
    target.add_argument('--revision', help='branch; the main one if not given')
    target.add_argument('--create-pr', action='store_true', help='open a pull request to the main branch')
    permission = 'the owners of weights without a license (those of `convert`) allowed it'
    push.add_argument('--i-have-permission', action='store_true', help=permission)

    pull = commands.add_parser('pull', help='get a folder from the Hugging Face Hub, verified')
    pull.add_argument('repo', metavar='REPO', help='USER/NAME')
    pull.add_argument('--revision', help='branch, tag or commit; the main branch if not given')
    pull.add_argument('--out', metavar='DIR', help='folder to make; NAME in the current one if not given')
    return parser


def _add_folder_options(parser: argparse.ArgumentParser, has_license: bool = True) -> None:
    parser.add_argument('--out', required=True, metavar='DIR', help='folder to make; an earlier export is replaced')
    parser.add_argument('--repo-id', metavar='REPO', help='USER/NAME that it will have on the Hub, for the card')
    parser.add_argument('--card', metavar='FILE', help='Jinja template of the card, in place of the own one')
    if has_license:
        text = "its license by the Hub's name, as in apache-2.0; left out if not given"
        parser.add_argument('--license', metavar='ID', help=text)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`, that of the process if None."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(format='%(message)s', stream=sys.stderr)
    logging.getLogger('timm_mealv2').setLevel(logging.INFO)
    if args.command == 'push':
        options = {name: getattr(args, name) for name in ('private', 'revision', 'message', 'create_pr')}
        print(push_model(args.source, args.repo, has_permission=args.i_have_permission, **options))
        return
    if args.command == 'pull':
        folder = pull_model(args.repo, args.out, revision=args.revision)
    else:
        given = {name: getattr(args, name, None) for name in ('repo_id', 'license', 'dataset_id')}
        card = CardOptions(template=args.card, **given)
        if args.command == 'export':
            if not card.license:
                _logger.info(
                    'The card names no license, and others may then not use the model: --license ID names one.'
                )
            options = {'use_ema': not args.no_ema, 'examples': args.examples}
            folder = export_model(args.checkpoint, args.out, card=card, **options)
        elif args.command == 'export-ensemble':
            options = {'weights': args.teacher_weights, 'img_sizes': args.teacher_img_size}
            folder = export_ensemble(args.teachers, args.out, num_classes=args.num_classes, card=card, **options)
        else:
            folder = convert_released(args.file, args.student, args.out, card=card)
            _logger.warning('The authors gave this file no license: to push the folder needs their permission.')
    first = 'import timm_mealv2 and ' if read_config(folder)['architecture'] == ENSEMBLE else ''
    print(f"{folder}: {first}load it with timm.create_model('local-dir:{folder}', pretrained=True)")


def cli() -> None:
    """Run the command `mealv2-hub`."""
    run_cli(main)


if __name__ == '__main__':
    cli()
