"""Trained models as folders that plain timm loads: `timm.create_model('local-dir:FOLDER', pretrained=True)`.

Such a folder is made from a training checkpoint, from an ensemble's teachers or from a file that the authors released.
It appears at `out` when it has been loaded back and compared; an earlier export there is replaced, and an error leaves
that as it was. `card` is what only the user can say about the model.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, resolve_model_data_config
from timm.models import get_pretrained_cfg, save_for_hf
from torch import nn

from timm_mealv2.errors import UserError, blamed_on
from timm_mealv2.hub.card import METRICS, CardOptions, weights_row, write_card, write_trained_card
from timm_mealv2.hub.demo import Classifier
from timm_mealv2.hub.folder import (
    APP_FILE,
    CONFIG_FILE,
    ENSEMBLE,
    EXAMPLES_FOLDER,
    REQUIREMENTS_FILE,
    WEIGHTS_FILE,
    is_export,
    read_config,
    replacing_export,
)
from timm_mealv2.hub.hub_api import push_folder
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.models.factory import TeacherSpec, create_ensemble
from timm_mealv2.models.mealv2_students import VANILLA_ARCHITECTURE

_logger = logging.getLogger(__name__)

# What an architecture's config says about the architecture; its other entries are about weights that are not these.
_ARCHITECTURE_KEYS = ('architecture', 'first_conv', 'classifier', 'fixed_input_size', 'min_input_size')

NO_LICENSE = 'unknown'
"""License in the config.json of weights that were given none; timm keeps it there when it loads and saves them."""

PAPER_ACCURACY: dict[str, tuple[float, float]] = {
    'mealv1_resnet50.in1k': (78.21, 94.01),
    'mealv2_resnet50.in1k': (80.67, 95.09),
    'mealv2_resnet50.in1k_380': (81.72, 95.81),
    'mealv2_resnet50.cutmix_in1k': (80.98, 95.35),
    'mealv2_mobilenetv3_small_075.in1k': (67.60, 87.23),
    'mealv2_mobilenetv3_small_100.in1k': (69.65, 88.71),
    'mealv2_mobilenetv3_large_100.in1k': (76.92, 93.32),
    'mealv2_efficientnet_b0.in1k': (78.29, 93.95),
}
"""Top-1 and top-5 in percent that the authors state for each file that they released; not measured by us."""


def export_model(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    use_ema: bool = True,
    card: CardOptions | None = None,
    demo: bool = False,
    examples: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Export the model of a training checkpoint as a folder that plain timm loads, without this package.

    `model.safetensors` has the weights; `config.json` timm's own architecture (also for the `mealv2_*` students), its
    arguments, the data configuration of the training and the class names; `README.md` is the model card, with
    `curves.png` where the run folder has a summary. Loaded back, weights and data configuration are equal to the bit.

    Args:
        checkpoint: A `.pth.tar` of a run folder, or one of timm's train.py.
        out: The folder to make, which is returned.
        use_ema: Take the averaged weights where the checkpoint has them.
        demo: Add a Gradio app, which runs as a Space.
        examples: Images for the card and the app.

    Raises:
        UserError: If the checkpoint cannot be read or does not tell its model, or `out` is something else.
    """
    out = Path(out)
    trained = TrainingCheckpoint.read(checkpoint)
    has_average = bool(trained.contents.get('state_dict_ema'))
    averaged = use_ema and has_average
    model: Any = trained.build(ema=averaged)
    data_config = resolve_model_data_config(model)
    _describe(model, data_config)
    names = trained.class_names  # the folders' names, which tell no class where there are no labels
    with replacing_export(out) as folder:
        _save(model, folder, _labels(names) if len(names) == model.num_classes else {}, data_config)
        if demo:
            app = resources.files('timm_mealv2') / 'hub' / 'demo.py'
            (folder / APP_FILE).write_bytes(app.read_bytes())
            (folder / REQUIREMENTS_FILE).write_text(f'gradio\ntimm>={timm.__version__}\n')
        predictions = _add_examples(folder, examples)
        name, options = out.resolve().name, card or CardOptions()
        with blamed_on(checkpoint):
            write_trained_card(folder, name, trained, options, averaged=averaged, predictions=predictions, app=demo)
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
    config = {'architecture': ENSEMBLE, 'num_classes': ensemble.num_classes, 'model_args': arguments}
    config['pretrained_cfg'] = data_config
    with replacing_export(out) as folder:
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))
        _check_equal(ensemble, data_config, timm.create_model(f'local-dir:{folder}', pretrained=True))
        rows = [weights_row(name, weight) for name, weight in zip(ensemble.names, ensemble.weights, strict=True)]
        write_card(folder, out.resolve().name, card or CardOptions(), tags=['ensemble'], kind='ensemble', teachers=rows)
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
    if tagged not in PAPER_ACCURACY:
        raise UserError(f'no weights were released for {student}: name one of {", ".join(PAPER_ACCURACY)}.')
    cfg = get_pretrained_cfg(tagged)
    model = timm.create_model(tagged, pretrained=True, pretrained_cfg_overlay={'file': str(file)})
    data_config = resolve_model_data_config(model)
    about = {key: getattr(cfg, key) for key in ('origin_url', 'paper_name', 'paper_ids')}
    _describe(model, data_config, license=NO_LICENSE, **about)
    with file.open('rb') as opened:
        digest = hashlib.file_digest(opened, 'sha256').hexdigest()
    options = card or CardOptions()
    with replacing_export(out) as folder:
        _save(model, folder, _labels(ImageNetInfo().label_names()), data_config)
        write_card(
            folder,
            out.resolve().name,
            options,
            tags=['knowledge-distillation'],
            header={'datasets': [options.dataset_id]} if options.dataset_id else None,
            kind='released',
            student=tagged,
            sha256=digest,
            claims=[
                {'metric': METRICS[key], 'value': value}
                for key, value in zip(('top1', 'top5'), PAPER_ACCURACY[tagged], strict=True)
            ],
        )
    return out


def push_model(source: str | os.PathLike[str], repo_id: str, *, has_permission: bool = False, **options: Any) -> str:
    """Push an exported folder, or the export of a training checkpoint, to the Hugging Face Hub in one commit.

    Args:
        source: The folder or the checkpoint.
        repo_id: USER/NAME; the repository is made if it is not there.
        has_permission: The owners of weights without a license allowed it.
        **options: 'private', 'revision', 'message' and 'create_pr' of `push_folder`.

    Returns:
        URL of the commit or the pull request.

    Raises:
        UserError: If `source` is neither, its weights have no license, others cannot reach its teachers, or the Hub
            does not take it.
    """
    source = Path(source)
    if source.is_file():
        with tempfile.TemporaryDirectory() as temporary:
            folder = export_model(source, Path(temporary, 'export'), card=CardOptions(repo_id=repo_id))
            return push_folder(folder, repo_id, source=source, **options)
    if not is_export(source):
        raise UserError(f'{source} is neither a checkpoint nor an exported folder: make one with `mealv2-hub export`.')
    config = read_config(source)
    if config.get('pretrained_cfg', {}).get('license') == NO_LICENSE and not has_permission:
        raise UserError(
            f'the weights in {source} are of others, who gave them no license: get their permission, then push with '
            '--i-have-permission.'
        )
    for teacher in TeacherSpec.parse_all(config.get('model_args', {}).get('teachers', ())):
        if teacher.path is not None:
            remedy = 'push it, then export the ensemble with its hf-hub:USER/REPO'
            raise UserError(f'{teacher} is on this machine alone: {remedy}.')
    return push_folder(source, repo_id, **options)


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


def _save(model: nn.Module, folder: Path, model_config: dict[str, Any], data_config: Mapping[str, Any]) -> None:
    """Write weights and config.json, and check that plain timm loads the same again."""
    save_for_hf(model, folder, model_config=model_config, safe_serialization=True, data_config=data_config)
    # safetensors makes its file readable by the owner alone, whatever the umask.
    (folder / WEIGHTS_FILE).chmod((folder / CONFIG_FILE).stat().st_mode)
    _check_equal(model, data_config, timm.create_model(f'local-dir:{folder}', pretrained=True))


def _check_equal(model: nn.Module, data_config: Mapping[str, Any], loaded: nn.Module) -> None:
    weights, loaded_weights = model.state_dict(), loaded.state_dict()
    if weights.keys() != loaded_weights.keys():
        raise RuntimeError(f'the export has other weights: {sorted(weights.keys() ^ loaded_weights.keys())}')
    if differing := [name for name, tensor in weights.items() if not torch.equal(tensor, loaded_weights[name])]:
        raise RuntimeError(f'these weights differ after loading the export: {differing}')
    expected, received = (
        {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
        for config in (data_config, resolve_model_data_config(loaded))
    )
    if expected != received:
        raise RuntimeError(f'the data configuration was {expected} and is {received} after loading the export')


def _add_examples(folder: Path, images: Sequence[str | os.PathLike[str]]) -> dict[str, dict[str, float]]:
    """Copy images into the folder; return the probabilities that its model gives by their names there."""
    predictions: dict[str, dict[str, float]] = {}
    if not images:
        return predictions
    (folder / EXAMPLES_FOLDER).mkdir()
    classify = Classifier(folder)
    for number, path in enumerate(map(Path, images), 1):
        name = f'{EXAMPLES_FOLDER}/{number:02}{path.suffix.lower()}'
        try:
            shutil.copyfile(path, folder / name)
            with Image.open(path) as image:
                predictions[name] = classify(image)
        except OSError as error:
            raise UserError(f'{path} is no readable image: {error}') from error
    return predictions
