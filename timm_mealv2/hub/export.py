"""Trained models as folders that plain timm loads: `timm.create_model('local-dir:FOLDER', pretrained=True)`.

Such a folder is made from a training checkpoint, from an ensemble's teachers or from a file that the authors released.
It appears at `out` when it has been loaded back and compared; an earlier export there is replaced, and an error leaves
that as it was. `card` is what only the user can say about the model.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, resolve_model_data_config
from timm.models import get_pretrained_cfg, save_for_hf
from torch import nn

from timm_mealv2.data.class_names import class_names_of
from timm_mealv2.errors import UserError
from timm_mealv2.hub.card import (
    CARD_FILE,
    CURVES_FILE,
    CardOptions,
    weights_row,
    write_card,
    write_trained_card,
)
from timm_mealv2.hub.onnx_export import INT8_FILE, ONNX_FILE, add_onnx
from timm_mealv2.models.checkpoint import architecture_arguments, is_ensemble
from timm_mealv2.models.factory import TeacherSpec, create_ensemble
from timm_mealv2.models.mealv2_students import VANILLA_ARCHITECTURE

_logger = logging.getLogger(__name__)

WEIGHTS_FILE, CONFIG_FILE = 'model.safetensors', 'config.json'
FILES = [WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, CURVES_FILE, ONNX_FILE, INT8_FILE]
"""The files of an export."""

# What an architecture's config says about the architecture; its other entries are about weights that are not these.
_ARCHITECTURE_KEYS = ('architecture', 'first_conv', 'classifier', 'fixed_input_size', 'min_input_size')
_TEST_KEYS = ('test_input_size', 'test_crop_pct')

NO_LICENSE = 'unknown'
"""License in the config.json of weights that were given none; timm keeps it there when it loads and saves them."""


def export_model(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    use_ema: bool = True,
    card: CardOptions | None = None,
    onnx: bool = False,
    int8: bool = False,
    data_dir: str | None = None,
    test_size: int | None = None,
) -> Path:
    """Export the model of a training checkpoint as a folder that plain timm loads, without this package.

    `model.safetensors` has the weights; `config.json` timm's own architecture (also for the `mealv2_*` students), its
    arguments, the data configuration of the training and the class names; `README.md` is the model card, with
    `curves.png` where the run folder has a summary. Loaded back, weights and data configuration are equal to the bit.

    Args:
        checkpoint: A run folder (its best checkpoint), a `.pth.tar` of one, or one of timm's train.py.
        out: The folder to make, which is returned.
        use_ema: Take the averaged weights where the checkpoint has them.
        onnx: Write `model.onnx` as well, compared with the model on the validation images; see `add_onnx`.
        int8: Write `model_int8.onnx` too, which implies `onnx`.
        data_dir: The data set for that comparison; the run's if None.
        test_size: Image size for tests, which `use_test_size` takes; the model's own if None.

    Raises:
        UserError: If the checkpoint cannot be read or does not tell its model, `out` is something else, or model.onnx
            does not predict the same.
    """
    out = Path(out)
    trained = TeacherSpec.parse(os.fspath(checkpoint)).read_checkpoint()
    has_average = bool(trained.contents.get('state_dict_ema'))
    averaged = use_ema and has_average
    model: Any = trained.build(ema=averaged)
    data_config, names = resolve_model_data_config(model), class_names_of(model)
    tests = {key: model.pretrained_cfg[key] for key in _TEST_KEYS if key in model.pretrained_cfg}
    if test_size:
        tests['test_input_size'] = (data_config['input_size'][0], test_size, test_size)
    _describe(model, data_config)
    labels = _labels(names) if names else {}
    with replacing_export(out) as folder:
        config = _save(model, folder, labels, {**data_config, **tests})
        measured = None
        if onnx or int8:
            measured = add_onnx(folder, model, trained, labels.get('label_names'), int8=int8, data_dir=data_dir)
        write_trained_card(
            folder,
            card or CardOptions(),
            name=out.resolve().name,
            config=config,
            checkpoint=trained,
            model=model,
            averaged=averaged,
            onnx=measured,
        )
    kind = 'the weights, not their moving average' if has_average else 'the weights'
    _logger.info(f'{checkpoint}: exported {"the moving average of the weights (EMA)" if averaged else kind}.')
    return out


def export_ensemble(
    teachers: Sequence[str],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    num_classes: int | None = None,
    img_sizes: Sequence[int] | None = None,
    card: CardOptions | None = None,
) -> Path:
    """Make a small folder `out` that names the teachers of an ensemble; loading it needs this package imported.

    The teachers' weights stay where they are; paths are written whole. The other arguments are those of
    `create_ensemble`, but no text may name a Python function.

    Raises:
        UserError: If a teacher is unknown, cannot be loaded, or does not fit the others, or `out` is something else.
    """
    out = Path(out)
    specs = TeacherSpec.parse_all(teachers)
    if functions := [spec for spec in specs if spec.kind == 'python']:
        raise UserError(f'{functions[0]} cannot be named by a folder: code is run only where you name it yourself.')
    arguments: dict[str, Any] = {'teachers': [str(spec.under(Path.cwd())) for spec in specs]}
    arguments |= {key: list(value) for key, value in (('weights', weights), ('img_sizes', img_sizes)) if value}
    ensemble = create_ensemble(**arguments, num_classes=num_classes)
    data_config = resolve_model_data_config(ensemble)
    config = {
        'architecture': 'mealv2_ensemble',
        'num_classes': ensemble.num_classes,
        'model_args': arguments,
        'pretrained_cfg': data_config,
    }
    with replacing_export(out) as folder:
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))
        _check_equal(ensemble, data_config, timm.create_model(f'local-dir:{folder}', pretrained=True))
        rows = [weights_row(name, weight) for name, weight in zip(ensemble.names, ensemble.weights, strict=True)]
        options = card or CardOptions()
        write_card(
            folder, options, name=out.resolve().name, config=config, tags=['ensemble'], kind='ensemble', teachers=rows
        )
    return out


def convert_released(
    file: str | os.PathLike[str], student: str, out: str | os.PathLike[str], *, card: CardOptions | None = None
) -> Path:
    """Make an exported folder from a file of the authors' release page.

    The authors gave their files no license. config.json says so, and `push_model` then needs their permission.

    Args:
        file: The released file; it must fit the student exactly.
        student: The student's name with its tag, as in mealv2_resnet50.in1k.
        out: The folder to make, which is returned.

    Raises:
        UserError: If there is no such student, nothing was released for it, or the file is not there or does not fit.
    """
    file, out = Path(file), Path(out)
    tagged = student if '.' in student else f'{student}.in1k'  # the default tag of every student
    if tagged not in (released := timm.list_pretrained('mealv*')):
        raise UserError(f'no weights were released for {student}: name one of {", ".join(released)}.')
    cfg = get_pretrained_cfg(tagged)
    model = timm.create_model(tagged, pretrained=True, pretrained_cfg_overlay={'file': str(file)})
    data_config = resolve_model_data_config(model)
    about = {key: getattr(cfg, key) for key in ('origin_url', 'paper_name', 'paper_ids')}
    _describe(model, data_config, license=NO_LICENSE, **about)
    with file.open('rb') as opened:
        digest = hashlib.file_digest(opened, 'sha256').hexdigest()
    with replacing_export(out) as folder:
        config = _save(model, folder, _labels(ImageNetInfo().label_names()), data_config)
        write_card(
            folder,
            card or CardOptions(),
            name=out.resolve().name,
            config=config,
            tags=['knowledge-distillation'],
            kind='released',
            student=tagged,
            sha256=digest,
        )
    _logger.warning('The authors gave this file no license: to push the folder needs their permission.')
    return out


def read_config(folder: Path, source: str | None = None) -> dict[str, Any]:
    """Return what the `config.json` of an exported folder holds.

    Args:
        source: What an error calls the folder, if not by its path.

    Raises:
        UserError: If it is no exported folder, or says which weights to fetch: only arguments of an architecture may
            come from a file.
    """
    path = folder / CONFIG_FILE
    config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if not config or not ((folder / WEIGHTS_FILE).is_file() or is_ensemble(config['architecture'])):
        raise UserError(
            f'{source or folder} is no exported model, with a {CONFIG_FILE} and weights: `mealv2-hub export` makes one.'
        )
    model_args = config.get('model_args') or {}
    if refused := sorted(model_args.keys() - architecture_arguments(model_args).keys() - {'teachers'}):
        raise UserError(
            f'{source or folder} is refused: the model_args in {CONFIG_FILE} ({", ".join(refused)}) say where weights '
            'come from, which is not for a file to say.'
        )
    return config


@contextmanager
def replacing_export(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`; give it that name when the block ends without an error.

    Raises:
        UserError: If there is something at `path` that is neither empty nor an earlier export and nothing else.
    """
    if path.exists():
        names = {entry.name for entry in path.iterdir()} if path.is_dir() else {''}
        if names - set(FILES) or (names and CONFIG_FILE not in names):
            raise UserError(f'{path} holds something else than an earlier export: name another folder.')
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{path.name}-', dir=path.parent) as temporary:
        folder = Path(temporary, 'new')
        folder.mkdir()
        yield folder
        if path.exists():  # a folder with files in it cannot be replaced in one step
            path.rename(Path(temporary, 'former'))
        folder.rename(path)


def _describe(model: Any, data_config: Mapping[str, Any], **about: Any) -> None:
    """Give a model a pretrained config of timm's own architecture, its pixels, and what `about` says of its weights."""
    cfg = model.pretrained_cfg
    kept = {key: cfg[key] for key in _ARCHITECTURE_KEYS if key in cfg}
    kept['architecture'] = VANILLA_ARCHITECTURE.get(kept['architecture'], kept['architecture'])
    model.pretrained_cfg = {**kept, **data_config, **about}


def _labels(names: Sequence[str]) -> dict[str, Any]:
    """Entries of config.json for class names; those of ImageNet-1k get timm's descriptions."""
    imagenet = ImageNetInfo()
    known = set(names) <= set(imagenet.label_names())
    descriptions = {'label_descriptions': {n: imagenet.label_name_to_description(n) for n in names}} if known else {}
    return {'label_names': list(names), **descriptions}


def _save(model: nn.Module, folder: Path, labels: dict[str, Any], data_config: Mapping[str, Any]) -> dict[str, Any]:
    """Write weights and config.json, check that plain timm loads the same again, and return the config."""
    save_for_hf(model, folder, model_config=labels, safe_serialization=True, data_config=data_config)
    # safetensors makes its file readable by the owner alone, whatever the umask.
    (folder / WEIGHTS_FILE).chmod((folder / CONFIG_FILE).stat().st_mode)
    _check_equal(model, data_config, timm.create_model(f'local-dir:{folder}', pretrained=True))
    config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
    return config


def _check_equal(model: nn.Module, data_config: Mapping[str, Any], loaded: nn.Module) -> None:
    weights, loaded_weights = model.state_dict(), loaded.state_dict()
    if weights.keys() != loaded_weights.keys() or not all(torch.equal(weights[k], loaded_weights[k]) for k in weights):
        raise RuntimeError('the weights are not the same after loading the export')
    received = json.dumps(resolve_model_data_config(loaded))
    expected = json.dumps({key: data_config[key] for key in resolve_model_data_config(loaded)})
    if expected != received:
        raise RuntimeError(f'the data configuration was {expected} and is {received} after loading the export')
