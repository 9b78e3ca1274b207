"""Model cards (README.md): what a run folder, a checkpoint and timm know about a model, and no other figure.

The sentences are those of the template, card.md.
"""

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from timm.models import get_pretrained_cfg
from torch import nn

from timm_mealv2.errors import UserError, one_line
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.models.factory import TeacherSpec
from timm_mealv2.runs import Run, model_cost, read_run
from timm_mealv2.soft_labels.store import StoreMeta

_logger = logging.getLogger(__name__)

CARD_FILE, CURVES_FILE = 'README.md', 'curves.png'

METRICS = {
    'top1': 'top-1 accuracy, %',
    'top5': 'top-5 accuracy, %',
    'loss': 'loss, nats',
    'agreement': 'same top-1 as the teachers, %',
    'kl': 'KL divergence from the teachers, nats',
}
"""Metrics of a card in their order, and what they are called there."""

# Settings about the machine or an account there, not about the training, and of NaFlex, which is refused.
_NOT_SHOWN = ('output', 'experiment', 'resume', 'wandb_', 'naflex_')
# The folders of an absolute path: at the start, behind `NAME=` or `local-dir:`, or behind the kind in `hfds//PATH`.
_FOLDERS = re.compile(r'(^|[=:]|^\w+/)(?!//)(~[^/=]*)?/([^=]*/)?')


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


def write_card(
    folder: Path,
    options: CardOptions,
    *,
    name: str,
    config: Mapping[str, Any],
    tags: Sequence[str] = (),
    header: Mapping[str, Any] = MappingProxyType({}),
    **variables: Any,
) -> None:
    """Write the card of an exported folder.

    Args:
        options: What the user says.
        name: Name of the model where `options` names no repository.
        config: What the folder's config.json holds.
        tags: Tags beside those of every card.
        header: Further entries of the YAML header.
        **variables: Variables of the template.

    Raises:
        UserError: If `options.template` is no template of a card.
    """
    from huggingface_hub import ModelCard, ModelCardData  # these are loaded where a card is written
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    data = ModelCardData(
        license=options.license,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', *tags],
        **header,
    )
    template = Path(options.template) if options.template else files('timm_mealv2') / 'hub' / 'card.md'
    try:
        text = (
            ImmutableSandboxedEnvironment()
            .from_string(template.read_text(encoding='utf-8'))
            .render(
                card_data=data.to_yaml(),
                name=_model_name(options, name),
                source=f'hf-hub:{options.repo_id}' if options.repo_id else f'local-dir:{name}',
                config=config,
                **variables,
            )
        )
    except (OSError, TemplateError) as error:
        raise UserError(f'{options.template} is no template of a model card: {one_line(error)}') from error
    ModelCard(text).save(folder / CARD_FILE)


def write_trained_card(
    folder: Path,
    options: CardOptions,
    *,
    name: str,
    config: Mapping[str, Any],
    checkpoint: TrainingCheckpoint,
    model: nn.Module,
    averaged: bool,
    **variables: Any,
) -> None:
    """Write the card and, where the run folder has a summary, the picture of its curves into an exported folder.

    Accuracy is that of `summary.csv` for the checkpoint's epoch, and is left out where it was measured on other
    weights: in the middle of an epoch, in an epoch without evaluation, on the average while the weights themselves are
    exported (or the reverse), or in another run (the metric differs from the checkpoint's).

    Args:
        options, name, config: As of `write_card`.
        checkpoint: The training checkpoint; `summary.csv` and `args.yaml` lie beside it if its folder is a run's.
        model: Its model, as exported.
        averaged: The average (EMA) was exported.
        **variables: Further variables of the template: 'onnx'.
    """
    args = checkpoint.args
    run = _draw_run(checkpoint.path.resolve().parent, name, folder / CURVES_FILE)
    measured = _measured(checkpoint, run, averaged) if run else {}
    if config['num_classes'] <= 5:
        measured.pop('top5', None)  # always 100
    teachers = _teachers(args, run)
    method = args.get('kd_distill_type') or 'logit' if teachers or args.get('soft_labels') else ''
    hub_dataset, own_name = _dataset_names(args)
    dataset_id = options.dataset_id or hub_dataset
    split = args.get('val_split') if 'top1' in measured else ''
    own_weights = args.get('initial_checkpoint') or args.get('pretrained_path')
    start = weights_row(args['model']) if args.get('pretrained') and not own_weights else None
    accuracies = _hub_accuracies(measured, dataset_id or own_name, dataset_id or 'imagefolder', split)
    header: dict[str, Any] = {'base_model': start['hub_id'] or None if start else None}
    if dataset_id:
        header['datasets'] = [dataset_id]
    if accuracies:
        header |= {'model_name': _model_name(options, name), 'metrics': ['accuracy'], 'eval_results': accuracies}
    write_card(
        folder,
        options,
        name=name,
        config=config,
        tags=['knowledge-distillation'] if method else [],
        header=header,
        kind='trained',
        args=args,
        method=method,
        dataset=dataset_id or own_name,
        split=split,
        epochs=(checkpoint.contents.get('epoch') or 0) + 1,
        averaged=averaged,
        start=start,
        own_weights=_without_folders(own_weights or ''),
        teachers=teachers,
        results=[{'metric': METRICS[key], 'value': measured[key]} for key in METRICS if key in measured],
        curves=CURVES_FILE if run else '',
        settings=_settings(args, run.settings) if run else '',
        cost=model_cost(model),
        measured_on=int((run and run.before('ensemble', 'samples')) or 0),
        **variables,
    )


def _hub_accuracies(measured: Mapping[str, float], name: str, kind: str, split: str | None) -> list[Any]:
    """Top-1 and top-5 on a data set, as the Hub reads them."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type=kind,
            dataset_name=name or 'imagefolder',
            dataset_split=split,
            metric_type='accuracy',
            metric_name=METRICS[key],
            metric_value=measured[key],
        )
        for key in ('top1', 'top5')
        if key in measured
    ]


def weights_row(text: str, weight: float = 1.0) -> dict[str, Any]:
    """Return what is known of weights, such as a teacher's: name, weight in the ensemble, license, url, hub_id.

    Only of its own pretrained weights does timm know the license.
    """
    spec = TeacherSpec.parse(text)
    cfg = get_pretrained_cfg(text, allow_unregistered=True) if spec.kind == 'timm' else None
    if cfg is None or not cfg.has_weights:
        hub_id = spec.name.partition('@')[0] if spec.kind == 'hf-hub' else None
        name, license, url = _without_folders(text), '', ''
    else:
        # The tag that a name without one stands for today may be another one tomorrow.
        name = f'{cfg.architecture}.{cfg.tag}' if cfg.tag else text
        hub_id, license, url = cfg.hf_hub_id, cfg.license or '', cfg.origin_url or ''
    url = f'https://huggingface.co/{hub_id}' if hub_id else url
    return {'name': name, 'weight': weight, 'license': license, 'url': url, 'hub_id': hub_id}


def _model_name(options: CardOptions, folder: str) -> str:
    return options.repo_id.rpartition('/')[2] if options.repo_id else folder


def _draw_run(run_folder: Path, name: str, picture: Path) -> Run | None:
    """Draw the curves of a run folder, and return what it tells; None, with a warning, if that cannot be read."""
    from timm_mealv2.report import draw_runs  # loads matplotlib, which no other command needs

    try:
        run = read_run(run_folder)
        draw_runs({name: run}, picture)
    except UserError as error:
        _logger.warning(f'{CARD_FILE} has no accuracy: {error}')
        return None
    return run


def _measured(checkpoint: TrainingCheckpoint, run: Run, averaged: bool) -> dict[str, float]:
    """The metrics that summary.csv has of exactly the exported weights; none, with a warning, if it has none."""
    saved = checkpoint.contents
    metric = saved.get('metric')
    average_measured = bool(saved.get('state_dict_ema')) and not checkpoint.args.get('model_ema_force_cpu')
    row = next((row for row in run.rows if row['epoch'] == saved.get('epoch')), {})
    values = {n.removeprefix('eval_'): v for n, v in row.items() if n.startswith('eval_') and not math.isnan(v)}
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


def _teachers(args: Mapping[str, Any], run: Run | None) -> list[dict[str, Any]]:
    """The teachers as rows of the card's table; their weights sum to 1."""
    if args.get('soft_labels'):
        try:
            recorded = StoreMeta.read(Path(args['soft_labels'])).teachers
        except UserError:  # the store is not on this machine
            return []
        known = [(teacher['name'], teacher['weight'], teacher['autocast_dtype']) for teacher in recorded]
    else:
        names = args.get('teachers') or list(filter(None, [args.get('kd_model_name')]))  # the one of timm's train.py
        weights = args.get('teacher_weights') or [1.0] * len(names)
        known = [(name, weight, args.get('teacher_dtype')) for name, weight in zip(names, weights, strict=True)]
    total = sum(weight for _, weight, _ in known)
    return [
        {**weights_row(name, weight / total), 'dtype': dtype, 'top1': run and run.before(f'teacher {name}', 'top1')}
        for name, weight, dtype in known
    ]


def _dataset_names(args: Mapping[str, Any]) -> tuple[str | None, str]:
    """The Hub's name of a data set that timm read from there, and what it is called on this machine; '' if unknown."""
    if args.get('dataset'):
        kind, _, name = args['dataset'].partition('/')
        from_hub = kind.lower() in ('hfds', 'hfids') and re.fullmatch(r'[\w.-]+/[\w.-]+', name)
        return name if from_hub and not Path(name).exists() else None, Path(name or kind).name
    path = args.get('data_dir') or args.get('data')
    return None, Path(path).resolve().name if path else ''


def _settings(args: Mapping[str, Any], written: Mapping[str, Any]) -> str:
    """The options in the run folder's args.yaml, with the checkpoint's own values, as YAML; '' without that file."""
    # Settings of timm's tasks say nothing under mealv2.
    hidden = _NOT_SHOWN + (
        ('kd_temperature', 'kd_loss_type', 'kd_token_') if args.get('kd_distill_type') == 'mealv2' else ()
    )
    values = {key: args.get(key, value) for key, value in written.items() if not key.startswith(hidden)}
    # Every option that can be off is so by default, but for --dist-bn.
    kept = {
        key: _without_folders(value)
        for key, value in values.items()
        if key == 'dist_bn' or not (value is None or value is False or value in ('', [], {}))
    }
    return yaml.safe_dump(kept, sort_keys=False).strip() if kept else ''


def _without_folders(value: Any) -> Any:
    """A setting without the folders in its absolute paths, which tell of the user's machine alone."""
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    return _FOLDERS.sub(r'\1', value.rstrip('/')) if isinstance(value, str) else value
