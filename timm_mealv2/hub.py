"""Trained models as folders that plain timm loads: `timm.create_model('local-dir:FOLDER', pretrained=True)`."""

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_input_data_config, resolve_model_data_config
from timm.models import (
    clean_state_dict,
    parse_model_name,
    resolve_model_input_args,
    save_for_hf,
    split_model_name_tag,
)
from timm.utils import load_checkpoint_metadata
from torch import nn

from timm_mealv2.cli import OneLineParser, run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.mealv2_students import VANILLA_ARCHITECTURE

WEIGHTS_FILE, CONFIG_FILE = 'model.safetensors', 'config.json'

# What an architecture's config says about the architecture; the rest of it is about weights that are not these.
_ARCHITECTURE_KEYS = ('architecture', 'first_conv', 'classifier', 'fixed_input_size', 'min_input_size')


def export_model(checkpoint: str | os.PathLike[str], out: str | os.PathLike[str], *, use_ema: bool = True) -> Path:
    """Export the model of a training checkpoint as a folder that plain timm loads, without this package.

    `model.safetensors` has the weights; `config.json` timm's own architecture (also for the `mealv2_*` students), its
    arguments, the data configuration of the training and the class names. The folder is loaded back and compared
    before it gets its name: the weights are equal to the bit, and so is the data configuration.

    Args:
        checkpoint: A `.pth.tar` of a run folder, or one of timm's train.py.
        out: The folder to make. An earlier export there is replaced; an error leaves it as it was.
        use_ema: Take the averaged weights where the checkpoint has them.

    Returns:
        The folder.

    Raises:
        UserError: If the checkpoint cannot be read or does not tell its model, or `out` is something else.
    """
    saved = _read_checkpoint(Path(checkpoint))
    model, data_config = _rebuild(saved, use_ema)
    names = saved.get('class_names') or ()  # the folders' names, which tell no class where there are no labels
    model_config = {'label_names': names} if len(names) == model.num_classes else {}
    with _replacing_folder(Path(out)) as folder:
        save_for_hf(model, folder, model_config=model_config, safe_serialization=True, data_config=data_config)
        # safetensors makes its file readable by the owner alone, whatever the umask.
        (folder / WEIGHTS_FILE).chmod((folder / CONFIG_FILE).stat().st_mode)
        _check_equal(model, data_config, timm.create_model(f'local-dir:{folder}', pretrained=True))
    return Path(out)


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f'no checkpoint at {path}: expected a .pth.tar file of a run folder.')
    try:
        saved = load_checkpoint_metadata(os.fspath(path))
    except Exception as error:  # torch raises half a dozen kinds for a torn or foreign file
        raise UserError(f'{path} is no whole training checkpoint: {str(error).splitlines()[0]}') from error
    if not isinstance(saved, dict) or 'state_dict' not in saved or 'args' not in saved:
        raise UserError(f'{path} does not tell its model: expected a training checkpoint with state_dict and args.')
    return saved


def _rebuild(saved: Mapping[str, Any], use_ema: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The checkpoint's model, of timm's own architecture and without other weights' config, and its data config."""
    args = saved['args']
    options = dict(vars(args) if isinstance(args, argparse.Namespace) else args)
    name = options['model']
    if parse_model_name(name)[0] is None:
        architecture = split_model_name_tag(name)[0]
        name = VANILLA_ARCHITECTURE.get(architecture, architecture)
    # A model of fixed size is built for the size it was trained with.
    pixels = saved.get('data_config') or options
    size = {key: pixels.get(key) for key in ('input_size', 'img_size', 'in_chans')}
    arguments = {
        'num_classes': options.get('num_classes'),
        'global_pool': options.get('gp'),
        'bn_eps': options.get('bn_eps'),
        **(options.get('model_kwargs') or {}),
    }
    state = (saved.get('state_dict_ema') if use_ema else None) or saved['state_dict']
    try:
        model = timm.create_model(**resolve_model_input_args(name, size, **arguments))
        model.load_state_dict(clean_state_dict(state))
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f'the weights do not fit {name} with {arguments}: {error}') from error
    data_config = saved.get('data_config') or resolve_input_data_config(model, args=options)
    cfg = model.pretrained_cfg
    model.pretrained_cfg = {**{key: cfg[key] for key in _ARCHITECTURE_KEYS if key in cfg}, **data_config}
    return model, data_config


def _check_equal(model: nn.Module, data_config: Mapping[str, Any], loaded: nn.Module) -> None:
    weights, loaded_weights = model.state_dict(), loaded.state_dict()
    if weights.keys() != loaded_weights.keys():
        raise RuntimeError(f'the export has other weights: {sorted(weights.keys() ^ loaded_weights.keys())}')
    if differing := [name for name, tensor in weights.items() if not torch.equal(tensor, loaded_weights[name])]:
        raise RuntimeError(f'these weights differ after loading the export: {differing}')
    expected, received = (_tuples(config) for config in (data_config, resolve_model_data_config(loaded)))
    if expected != received:
        raise RuntimeError(f'the data configuration was {expected} and is {received} after loading the export')


def _tuples(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


@contextmanager
def _replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`; give it that name when the block ends without an error.

    Raises:
        UserError: If there is something at `path` that is no earlier export.
    """
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or _is_export(path))):
        raise UserError(f'{path} is there and is no earlier export: name another folder, or remove it.')
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{path.name}-', dir=path.parent) as temporary:
        folder = Path(temporary, 'new')
        folder.mkdir()
        yield folder
        if path.exists():  # a folder with files in it cannot be replaced in one step
            path.rename(Path(temporary, 'former'))
        folder.rename(path)


def _is_export(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()


def build_parser() -> argparse.ArgumentParser:
    """Return a fresh parser of the command line."""
    parser = OneLineParser(prog='mealv2-hub', description='Trained models as folders that plain timm loads.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    export = commands.add_parser('export', help='make a folder from a training checkpoint')
    export.add_argument('checkpoint', help='last.pth.tar, model_best.pth.tar or another checkpoint of a run folder')
    export.add_argument('--out', required=True, metavar='DIR', help='folder to make; an earlier export is replaced')
    export.add_argument(
        '--no-ema',
        action='store_true',
        help='the weights themselves, not their average (--model-ema) where there is one',
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`, that of the process if None."""
    args = build_parser().parse_args(argv)
    folder = export_model(args.checkpoint, args.out, use_ema=not args.no_ema)
    print(f"{folder}: load it with timm.create_model('local-dir:{folder}', pretrained=True)")


def cli() -> None:
    """Run the command `mealv2-hub`."""
    run_cli(main)


if __name__ == '__main__':
    cli()
