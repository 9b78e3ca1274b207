"""Model cards (README.md): what a run folder, a checkpoint and timm know about a model, and no other figure.

The sentences are those of the template, card.md.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from timm.models import get_pretrained_cfg

from timm_mealv2.errors import UserError
from timm_mealv2.hub.folder import CARD_FILE, CURVES_FILE, read_config
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.models.factory import TeacherSpec
from timm_mealv2.runs import Run, model_cost, read_run
from timm_mealv2.soft_labels.store import StoreMeta

_logger = logging.getLogger(__name__)

METRICS = {
    'top1': 'top-1 accuracy, %',
    'top5': 'top-5 accuracy, %',
    'loss': 'loss, nats',
    'agreement': 'same top-1 as the teachers, %',
    'kl': 'KL divergence from the teachers, nats',
}
"""Metrics of a card in their order, and what they are called there."""

# Variables of the template that are empty where they are not known.
_LISTS = ('teachers', 'results', 'examples', 'claims')
_OF_ONE_KIND = (
    *('method', 'stored', 'hard_label_weight', 'dataset', 'split', 'epochs', 'ema_decay', 'start', 'own_weights'),
    *('curves', 'recipe', 'program', 'settings', 'student', 'sha256', 'parameters', 'gmacs', 'measured_on'),
)
_PREPROCESSING = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
# Settings about the machine or an account there, not about the training.
_PRIVATE = ('output', 'experiment', 'resume', 'wandb_')
# Settings of timm's tasks, which say nothing under mealv2, and of NaFlex, which is refused.
_UNUSED = ('kd_temperature', 'kd_loss_type', 'kd_token_', 'naflex_')


@dataclass(frozen=True)
class CardOptions:
    """What only the user can say about a model.

    Attributes:
        repo_id: Its repository on the Hub (USER/NAME), for the name and the usage; the folder's name if None.
        license: Its license by the Hub's identifier (apache-2.0, cc-by-nc-4.0, ...); left out if None.
        dataset_id: The Hub's name of the data set; left out if None.
        template: A Jinja template in place of `timm_mealv2/hub/card.md`, which lists the variables.
    """

    repo_id: str | None = None
    license: str | None = None
    dataset_id: str | None = None
    template: str | os.PathLike[str] | None = None

    def model_name(self, folder: str) -> str:
        """Return the name of the model in the folder of that name."""
        return self.repo_id.rpartition('/')[2] if self.repo_id else folder


def write_card(
    folder: Path,
    name: str,
    options: CardOptions,
    *,
    tags: Sequence[str] = (),
    header: Mapping[str, Any] | None = None,
    **variables: Any,
) -> None:
    """Write the card of an exported folder, which has its config.json.

    Args:
        name: Name of the model where `options` names no repository.
        options: What the user says.
        tags: Tags beside those of every card.
        header: Further entries of the YAML header; None leaves one out.
        **variables: Variables of the template, for those that it does not have empty by itself.

    Raises:
        UserError: If `options.template` is no template of a card.
    """
    config = read_config(folder)
    cfg = config['pretrained_cfg']
    data = ModelCardData(
        license=options.license,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', *tags],
        **(header or {}),
    )
    everything: dict[str, Any] = {
        'name': options.model_name(name),
        'source': f'hf-hub:{options.repo_id}' if options.repo_id else f'local-dir:{name}',
        'architecture': config['architecture'],
        'num_classes': config['num_classes'],
        'image_mode': 'L' if cfg['input_size'][0] == 1 else 'RGB',
        'pixels': {key: cfg[key] for key in _PREPROCESSING if cfg.get(key) is not None},
        'origin_url': cfg.get('origin_url', ''),
        **{key: [] for key in _LISTS},
        **dict.fromkeys(_OF_ONE_KIND, ''),
        **variables,
    }
    _render(data, everything, options.template).save(folder / CARD_FILE)


def write_trained_card(
    folder: Path,
    name: str,
    checkpoint: TrainingCheckpoint,
    options: CardOptions,
    *,
    averaged: bool,
    predictions: Mapping[str, Mapping[str, float]] | None = None,
    app: bool = False,
) -> None:
    """Write the card and, where the run folder has a summary, the picture of its curves into an exported folder.

    Accuracy is that of `summary.csv` for the checkpoint's epoch, and is left out where it was measured on other
    weights: in the middle of an epoch, in an epoch without evaluation, on the average while the weights themselves are
    exported (or the reverse), or in another run (the metric differs from the checkpoint's).

    Args:
        name: Name of the model where `options` names no repository.
        checkpoint: The training checkpoint; `summary.csv` and `args.yaml` lie beside it if its folder is a run's.
        options: What the user says; errors are those of `write_card`.
        averaged: The average (EMA) was exported.
        predictions: Image's file name in `folder` -> the exported model's probability of each class.
        app: The folder has an app.py that a Space can run.
    """
    args = checkpoint.args
    run = _draw_run(checkpoint.path.resolve().parent, name, folder / CURVES_FILE)
    measured = _measured(checkpoint, run, averaged) if run else {}
    if read_config(folder)['num_classes'] <= 5:
        measured.pop('top5', None)  # always 100
    teachers = _teachers(args)
    for text, row in zip(args.get('teachers') or (), teachers, strict=False):
        row['top1'] = run.before(f'teacher {text}', 'top1') if run else None
    parameters, gmacs = model_cost(checkpoint.build(ema=averaged))
    stored = bool(args.get('soft_labels'))
    method = args.get('kd_distill_type') or 'logit' if teachers or stored else ''
    hub_dataset, own_name = _dataset_names(args)
    dataset_id = options.dataset_id or hub_dataset
    dataset = dataset_id or own_name
    own_weights = args.get('initial_checkpoint') or args.get('pretrained_path')
    start = weights_row(args['model']) if args.get('pretrained') and not own_weights else None
    header = _evaluation_header(measured, options.model_name(name), dataset_id, dataset, args.get('val_split'))
    header['base_model'] = start['hub_id'] if start and start['hub_id'] else None
    if app:  # what a Space reads in its README.md
        header |= {'title': options.model_name(name), 'sdk': 'gradio', 'app_file': 'app.py'}
    write_card(
        folder,
        name,
        options,
        tags=['knowledge-distillation'] if method else [],
        header=header,
        kind='trained',
        method=method,
        stored=stored,
        hard_label_weight=args.get('hard_label_weight') or 0,
        dataset=dataset,
        split=args.get('val_split') if 'top1' in measured else '',
        epochs=(checkpoint.contents.get('epoch') or 0) + 1,
        ema_decay=args.get('model_ema_decay') if averaged else '',
        start=start,
        own_weights=_without_folders(own_weights) if own_weights else '',
        teachers=teachers,
        results=[{'metric': METRICS[key], 'value': measured[key]} for key in METRICS if key in measured],
        examples=[
            {'file': file, 'classes': sorted(classes.items(), key=lambda item: -item[1])[:3]}
            for file, classes in (predictions or {}).items()
        ],
        curves=CURVES_FILE if run else '',
        recipe=args.get('recipe') or '',
        program='mealv2-train' if 'discriminator_mode' in args else 'python train.py',
        settings=_settings(args, run.settings) if run else '',
        parameters=parameters,
        gmacs=gmacs,
        measured_on=int((run and run.before('ensemble', 'samples')) or 0),
    )


def _evaluation_header(
    measured: Mapping[str, float], model_name: str, dataset_id: str | None, dataset: str, split: str | None
) -> dict[str, Any]:
    """What the Hub reads of accuracy and data set in a card's header."""
    results = [
        EvalResult(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type=dataset_id or 'imagefolder',
            dataset_name=dataset or 'imagefolder',
            dataset_split=split,
            metric_type='accuracy',
            metric_name=METRICS[key],
            metric_value=measured[key],
        )
        for key in ('top1', 'top5')
        if key in measured
    ]
    return {
        'model_name': model_name if results else None,
        'datasets': [dataset_id] if dataset_id else None,
        'metrics': ['accuracy'] if 'top1' in measured else None,
        'eval_results': results or None,
    }


def weights_row(text: str, weight: float = 1.0) -> dict[str, Any]:
    """Return what is known of weights, such as a teacher's: name, weight in the ensemble, license, url, hub_id.

    Only of its own pretrained weights does timm know the license.
    """
    spec = TeacherSpec.parse(text)
    cfg = None
    if spec.kind == 'timm':
        try:
            cfg = get_pretrained_cfg(text, allow_unregistered=True)
        except RuntimeError:  # a tag that this timm does not have
            cfg = None
    if cfg is None or not cfg.has_weights:
        hub_id = spec.name.partition('@')[0] if spec.kind == 'hf-hub' else None
        name, license, url = _without_folders(text), '', ''
    else:
        # The tag that a name without one stands for today may be another one tomorrow.
        name = f'{cfg.architecture}.{cfg.tag}' if cfg.tag else text
        hub_id, license, url = cfg.hf_hub_id, cfg.license or '', cfg.origin_url or ''
    url = f'https://huggingface.co/{hub_id}' if hub_id else url
    return {'name': name, 'weight': weight, 'license': license, 'url': url, 'hub_id': hub_id}


# What the checkpoint and its run tell


def _draw_run(run_folder: Path, name: str, picture: Path) -> Run | None:
    """Draw the curves of a run folder, and return what it tells; None, with a warning, if that cannot be read."""
    from timm_mealv2.report import draw_runs  # loads matplotlib, which no other command needs

    try:
        run = read_run(run_folder)
        draw_runs({name: run_folder}, picture)
    except UserError as error:
        _logger.warning(f'{CARD_FILE} has no accuracy: {error}')
        return None
    return run


def _measured(checkpoint: TrainingCheckpoint, run: Run, averaged: bool) -> dict[str, float]:
    """The metrics that summary.csv has of exactly the exported weights; none, with a warning, if it has none."""
    saved = checkpoint.contents
    epoch, metric = saved.get('epoch'), saved.get('metric')
    average_measured = bool(saved.get('state_dict_ema')) and not checkpoint.args.get('model_ema_force_cpu')
    values: dict[str, float] = {}
    if epoch in run.epochs:
        row = run.epochs.index(epoch)
        for name, column in run.columns.items():
            value = column[row]
            if name.startswith('eval_') and value is not None and not math.isnan(value):
                values[name.removeprefix('eval_')] = value
    if metric is None or not values:
        reason = 'these weights were not evaluated'
    elif averaged != average_measured:
        reason = f'the training evaluated {"their average" if average_measured else "the weights themselves"}'
    elif not any(math.isclose(metric, value, rel_tol=1e-6) for value in values.values()):
        reason = 'the summary.csv beside the checkpoint is not of its run'
    else:
        return values
    _logger.warning(f'{CARD_FILE} has no accuracy: {reason}')
    return {}


def _teachers(args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The teachers as rows of the card's table; their weights sum to 1."""
    if args.get('soft_labels'):
        try:
            recorded = StoreMeta.read(Path(args['soft_labels'])).teachers
        except UserError:  # the store is not on this machine
            return []
        return [weights_row(teacher['name'], teacher['weight']) for teacher in recorded]
    of_timm = args.get('kd_model_name')  # of timm's train.py
    names = list(args.get('teachers') or ([of_timm] if of_timm else []))
    weights = args.get('teacher_weights') or [1.0] * len(names)
    return [weights_row(name, weight / sum(weights)) for name, weight in zip(names, weights, strict=True)]


def _dataset_names(args: Mapping[str, Any]) -> tuple[str | None, str]:
    """The Hub's name of a data set that timm read from there, and what it is called on this machine; '' if unknown."""
    if args.get('dataset'):
        kind, _, name = args['dataset'].partition('/')
        return name if kind in ('hfds', 'hfids') else None, args['dataset'].rpartition('/')[2]
    path = args.get('data_dir') or args.get('data')
    return None, Path(path).resolve().name if path else ''


def _settings(args: Mapping[str, Any], written: Mapping[str, Any]) -> str:
    """The options in the run folder's args.yaml, with the checkpoint's own values, as YAML; '' without that file."""
    unused = _PRIVATE + (_UNUSED if args.get('kd_distill_type') == 'mealv2' else ())
    values = {key: args.get(key, value) for key, value in written.items() if not key.startswith(unused)}
    # Every option that can be off is so by default, but for --dist-bn.
    kept = {
        key: _plain(value)
        for key, value in values.items()
        if key == 'dist_bn' or not (value is None or value is False or value in ('', [], {}))
    }
    return yaml.safe_dump(kept, sort_keys=False).strip() if kept else ''


def _plain(value: Any) -> Any:
    """A setting as YAML can hold it, without the folders of this machine."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _without_folders(value) if isinstance(value, str) else value


def _without_folders(text: str) -> str:
    """`text` with an absolute path shortened to its last part: the rest tells of the user's machine alone."""
    head = ''
    for separator in ('local-dir:', '='):
        before, found, after = text.partition(separator)
        if found:
            head, text = before + found, after
            break
    shown = os.path.basename(text.rstrip('/')) if os.path.isabs(text) or text.startswith('~') else text
    return head + shown


def _render(data: ModelCardData, variables: Mapping[str, Any], template: str | os.PathLike[str] | None) -> ModelCard:
    """Fill the template, as `ModelCard.from_template` does, but in Jinja's sandbox and with misspelt names an error."""
    source = Path(template) if template else files('timm_mealv2') / 'hub' / 'card.md'
    try:
        text = source.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read the template {source}: {error}') from error
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        content = environment.from_string(text).render(card_data=data.to_yaml(), **{**data.to_dict(), **variables})
        if not REGEX_YAML_BLOCK.match(content):
            raise ValueError('a card begins with the lines ---, {{ card_data }} and ---')
        return ModelCard(content)
    except (TemplateError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f'{source} is no template of a model card: {error}') from error
