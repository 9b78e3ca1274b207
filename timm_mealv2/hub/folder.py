"""What an exported folder is: its files, and how one takes its place."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timm_mealv2.errors import UserError
from timm_mealv2.models.checkpoint import architecture_arguments

WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, CURVES_FILE = 'model.safetensors', 'config.json', 'README.md', 'curves.png'
APP_FILE, REQUIREMENTS_FILE, EXAMPLES_FOLDER = 'app.py', 'requirements.txt', 'examples'
FILES = {WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, CURVES_FILE, APP_FILE, REQUIREMENTS_FILE, EXAMPLES_FOLDER}

ENSEMBLE = 'mealv2_ensemble'  # its export names teachers and has no weights


def is_export(folder: Path) -> bool:
    """Whether plain timm can load `folder`, or timm with this package if it is an ensemble."""
    if not (folder / CONFIG_FILE).is_file():
        return False
    return (folder / WEIGHTS_FILE).is_file() or read_config(folder).get('architecture') == ENSEMBLE


def read_config(folder: Path) -> dict[str, Any]:
    """Return what the `config.json` of `folder` holds.

    Raises:
        UserError: If it cannot be read, is no object, or says which weights to fetch: only arguments of an architecture
            may come from a file.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f'{folder / CONFIG_FILE} cannot be read: {error}') from error
    if not isinstance(config, dict):
        raise UserError(f'{folder / CONFIG_FILE} must hold an object, got {type(config).__name__}.')
    model_args = config.get('model_args') or {}
    if refused := sorted(model_args.keys() - architecture_arguments(model_args).keys() - {'teachers'}):
        raise UserError(
            f'{folder / CONFIG_FILE} is refused: its model_args ({", ".join(refused)}) say where weights come from, '
            'which is not for a file to say.'
        )
    return config


@contextmanager
def replacing_export(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`; give it that name when the block ends without an error.

    Raises:
        UserError: If there is something at `path` that is no earlier export, or a file that is no part of one.
    """
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or is_export(path))):
        raise UserError(f'{path} is there and is no earlier export: name another folder, or remove it.')
    if path.exists() and (others := sorted({entry.name for entry in path.iterdir()} - FILES)):
        raise UserError(f'{path / others[0]} would be lost with the earlier export: move it, or name another folder.')
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{path.name}-', dir=path.parent) as temporary:
        folder = Path(temporary, 'new')
        folder.mkdir()
        yield folder
        if path.exists():  # a folder with files in it cannot be replaced in one step
            path.rename(Path(temporary, 'former'))
        folder.rename(path)
