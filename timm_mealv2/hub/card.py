"""Model cards (README.md): what a run folder, a checkpoint and timm know about a model, and no other figure."""

import argparse
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from timm.models import get_pretrained_cfg

from timm_mealv2.errors import UserError
from timm_mealv2.hub.folder import CARD_FILE, CURVES_FILE
from timm_mealv2.soft_labels.store import StoreMeta

if TYPE_CHECKING:
    from timm_mealv2.report import Run

_logger = logging.getLogger(__name__)

_PAPER = """@misc{shen2020mealv2,
  title = {{MEAL V2}: Boosting Vanilla {ResNet-50} to 80\\%+ Top-1 Accuracy on {ImageNet} without Tricks},
  author = {Shen, Zhiqiang and Savvides, Marios},
  year = {2020},
  eprint = {2009.08453},
  archivePrefix = {arXiv}
}"""
_TIMM = """@misc{rw2019timm,
  title = {{PyTorch} Image Models},
  author = {Wightman, Ross},
  year = {2019},
  publisher = {GitHub},
  doi = {10.5281/zenodo.4414861},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}}
}"""

_METRICS = {
    'top1': 'top-1 accuracy, %',
    'top5': 'top-5 accuracy, %',
    'loss': 'loss, nats',
    'agreement': 'same top-1 as the teachers, %',
    'kl': 'KL divergence from the teachers, nats',
}
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
        license: Its licence by the Hub's identifier (apache-2.0, cc-by-nc-4.0, ...); left out if None.
        dataset_id: The Hub's name of the data set; left out if None.
        template: A Jinja template in place of `timm_mealv2/hub/card.md`, which lists the variables.
    """

    repo_id: str | None = None
    license: str | None = None
    dataset_id: str | None = None
    template: str | os.PathLike[str] | None = None


def write_trained_card(
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    saved: Mapping[str, Any],
    run_folder: Path,
    *,
    averaged: bool,
    examples: Mapping[str, Mapping[str, float]] | None = None,
    app: bool = False,
    options: CardOptions,
) -> None:
    """Write the card and, where the run folder has a summary, the picture of its curves into an exported folder.

    Accuracy is that of `summary.csv` for the checkpoint's epoch, and is left out where it was measured on other
    weights: in the middle of an epoch, in an epoch without evaluation, on the average while the weights themselves are
    exported (or the reverse), or in another run (the metric differs from the checkpoint's).

    Args:
        folder: The exported folder.
        name: Name of the model where `options` names no repository.
        config: Its config.json.
        saved: The training checkpoint, without need of its tensors.
        run_folder: The folder beside the checkpoint, with `summary.csv` and `args.yaml` if it is a run's.
        averaged: The average (EMA) was exported.
        examples: File name in `folder` -> the probabilities that the exported model gives for that image.
        app: The folder has an app.py that a Space can run.
        options: What the user says.

    Raises:
        UserError: If `options.template` is no template of a card.
    """
    args = _as_dict(saved.get('args'))
    run = _draw_run(run_folder, name, folder / CURVES_FILE)
    measured = _measured(saved, args, run, averaged) if run else {}
    if config['num_classes'] <= 5:
        measured.pop('top5', None)  # always 100
    teachers = _teachers(args)
    dataset_id = options.dataset_id or _hub_dataset(args)
    dataset = dataset_id or _dataset_name(args)
    distilled = bool(teachers or args.get('soft_labels'))
    eval_results = _eval_results(measured, dataset_id, dataset, args)
    data = _header(
        options,
        ['knowledge-distillation'] if distilled else [],
        model_name=_name(name, options) if eval_results else None,
        datasets=[dataset_id] if dataset_id else None,
        base_model=_base_model(args),
        metrics=['accuracy'] if 'top1' in measured else None,
        eval_results=eval_results or None,
    )
    if app:  # what a Space reads in its README.md
        data['title'], data['sdk'], data['app_file'] = _name(name, options), 'gradio', 'app.py'
    settings = _settings(args, run.settings) if run else ''
    _write(
        folder,
        name,
        config,
        data,
        options,
        description=_description(config['architecture'], args, teachers, dataset),
        start=_start(args),
        teachers=teachers,
        results=[{'metric': _METRICS[key], 'value': measured[key]} for key in _METRICS if key in measured],
        results_of=_results_of(measured, args, saved, dataset, averaged),
        examples=_examples(examples or {}),
        curves=CURVES_FILE if run else '',
        recipe=args.get('recipe') or '',
        command=_command(args) if settings else '',
        settings=settings,
        citations=[_PAPER, _TIMM] if _is_mealv2(args) and distilled else [_TIMM],
    )


def write_ensemble_card(
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    teachers: Sequence[str],
    weights: Sequence[float],
    options: CardOptions,
) -> None:
    """Write the card of an ensemble: its teachers with their weights and licences.

    Raises:
        UserError: If `options.template` is no template of a card.
    """
    _write(
        folder,
        name,
        config,
        _header(options, ['ensemble']),
        options,
        description=f'An ensemble of {len(teachers)} teachers for knowledge distillation: it answers with the log of '
        'their mean probability. The folder only names them; their weights are where they have always been.',
        needs_package=True,
        teachers=[_teacher(teacher, weight) for teacher, weight in zip(teachers, weights, strict=True)],
        citations=[_PAPER, _TIMM],
    )


def write_released_card(
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    student: str,
    claims: Mapping[str, float],
    sha256: str,
    options: CardOptions,
) -> None:
    """Write the card of a converted released file: what its authors state is told as their claim.

    Args:
        folder: The converted folder.
        name: Name of the model where `options` names no repository.
        config: Its config.json.
        student: timm name and tag of the student.
        claims: 'top1' and 'top5' as the paper has them, in percent.
        sha256: Digest of the file that was converted.
        options: What the user says.

    Raises:
        UserError: If `options.template` is no template of a card.
    """
    datasets = [options.dataset_id] if options.dataset_id else None
    source = config['pretrained_cfg']['origin_url']
    _write(
        folder,
        name,
        config,
        _header(options, ['knowledge-distillation'], datasets=datasets),
        options,
        description=f'`{config["architecture"]}` with the weights that the authors of MEAL (arXiv 2009.08453) released '
        f'as `{student}`, converted for timm; no weight was changed.',
        origin=f'The SHA-256 of the file was `{sha256}`; [the release]({source}) tells no digest to compare it with. '
        '**The authors gave it no licence**: to pass it on needs their permission.',
        claims=[{'metric': _METRICS[key], 'value': value} for key, value in claims.items()],
        citations=[_PAPER, _TIMM],
    )


# What the checkpoint and its run tell


def _as_dict(args: Any) -> dict[str, Any]:
    return dict(vars(args) if isinstance(args, argparse.Namespace) else args or {})


def _draw_run(run_folder: Path, name: str, picture: Path) -> 'Run | None':
    """Draw the curves of a run folder, and return what it tells; None, with a warning, if that cannot be read."""
    from timm_mealv2.report import draw_runs, read_run  # loads matplotlib, which no other command needs

    try:
        run = read_run(run_folder)
        draw_runs({name: run_folder}, picture)
    except UserError as error:
        _logger.warning(f'{CARD_FILE} has no accuracy: {error}')
        return None
    return run


def _measured(saved: Mapping[str, Any], args: Mapping[str, Any], run: 'Run', averaged: bool) -> dict[str, float]:
    """The metrics that summary.csv has of exactly the exported weights; none, with a warning, if it has none."""
    epoch, metric = saved.get('epoch'), saved.get('metric')
    average_measured = bool(saved.get('state_dict_ema')) and not args.get('model_ema_force_cpu')
    values: dict[str, float] = {}
    if epoch in run.epochs:
        row = run.epochs.index(epoch)
        for name, column in run.columns.items():
            value = column[row]
            if name.startswith('eval_') and value is not None:
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


def _is_mealv2(args: Mapping[str, Any]) -> bool:
    return args.get('kd_distill_type') == 'mealv2'


def _teachers(args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The teachers as rows of the card's table; their weights sum to 1."""
    names = list(args.get('teachers') or [])
    if args.get('soft_labels'):
        try:
            recorded = StoreMeta.read(Path(args['soft_labels'])).teachers
        except UserError:  # the store is not on this machine
            return []
        return [_teacher(teacher['name'], teacher['weight']) for teacher in recorded]
    if not names and args.get('kd_model_name'):  # of timm's train.py
        names = [args['kd_model_name']]
    weights = args.get('teacher_weights') or [1.0] * len(names)
    return [_teacher(name, weight / sum(weights)) for name, weight in zip(names, weights, strict=True)]


def _teacher(text: str, weight: float) -> dict[str, Any]:
    """A row of the card's table of teachers; timm knows the licence of its own pretrained weights alone."""
    cfg = _known_weights(text)
    hub_id = (cfg and cfg.hf_hub_id) or (text.partition(':')[2] if text.startswith(('hf-hub:', 'hf_hub:')) else None)
    url = f'https://huggingface.co/{hub_id.partition("@")[0]}' if hub_id else (cfg and cfg.origin_url) or ''
    # The tag that a name without one stands for today may be another one tomorrow.
    name = f'{cfg.architecture}.{cfg.tag}' if cfg and cfg.tag else _without_folders(text)
    return {'name': name, 'weight': weight, 'license': (cfg and cfg.license) or '', 'url': url}


def _known_weights(name: str) -> Any:
    """Return timm's pretrained config of a model name, None for what is no name of timm's or has no weights."""
    if '=' in name or ':' in name:
        return None
    try:
        cfg = get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError:  # a tag that this timm does not have
        return None
    return cfg if cfg and cfg.has_weights else None


def _start(args: Mapping[str, Any]) -> str:
    if own := args.get('initial_checkpoint') or args.get('pretrained_path'):
        return f'a checkpoint, `{_without_folders(own)}`'
    if not args.get('pretrained'):
        return ''
    row = _teacher(args['model'], 1.0)
    name = f'[`{row["name"]}`]({row["url"]})' if row['url'] else f'`{row["name"]}`'
    return f'the weights {name} (licence: {row["license"] or "not known"})'


def _base_model(args: Mapping[str, Any]) -> str | None:
    own = args.get('initial_checkpoint') or args.get('pretrained_path')
    cfg = _known_weights(args['model']) if args.get('pretrained') and not own else None
    return cfg.hf_hub_id if cfg else None


def _hub_dataset(args: Mapping[str, Any]) -> str | None:
    """The Hub's name of a data set that timm read from there (hfds/NAME, hfids/NAME)."""
    kind, _, name = (args.get('dataset') or '').partition('/')
    return name if kind in ('hfds', 'hfids') else None


def _dataset_name(args: Mapping[str, Any]) -> str:
    """What the data set is called on the user's machine, '' if that is not known."""
    if args.get('dataset'):
        return str(args['dataset']).rpartition('/')[2]
    path = args.get('data_dir') or args.get('data')
    return Path(path).resolve().name if path else ''


def _description(
    architecture: str, args: Mapping[str, Any], teachers: Sequence[Mapping[str, Any]], dataset: str
) -> str:
    count = f'{len(teachers)} teacher{"" if len(teachers) == 1 else "s"}'
    images = f' on {dataset}' if dataset else ''
    if not teachers and not args.get('soft_labels'):
        return f'`{architecture}`, trained{images} with the labels.'
    if not _is_mealv2(args):
        kind = args.get('kd_distill_type') or 'logit'
        return f'`{architecture}`, distilled{images} from {count} with the {kind} distillation of timm.'
    method = '[MEAL V2](https://arxiv.org/abs/2009.08453)'
    source = f'from {count}'
    if args.get('soft_labels'):
        source = f'from the stored answers of {count if teachers else "teachers"}'
    target = 'the mean probability of the teachers for the same pixels'
    if weight := args.get('hard_label_weight'):
        target = f'{target} and, with weight {weight:g}, the labels'
        return f'`{architecture}`, distilled{images} {source} with {method}: it learns {target}.'
    return f'`{architecture}`, distilled{images} {source} with {method}: its only target is {target}, no label.'


def _results_of(
    measured: Mapping[str, float], args: Mapping[str, Any], saved: Mapping[str, Any], dataset: str, averaged: bool
) -> str:
    if not measured:
        return ''
    weights = f'the moving average (decay {args.get("model_ema_decay")})' if averaged else 'the weights'
    images = 'the images that the run evaluated on'
    if 'top1' in measured and args.get('val_split'):
        images = f'split `{args["val_split"]}`' + (f' of {dataset}' if dataset else '')
    return f'Of {weights} after {saved["epoch"] + 1} epochs, as the training measured it on {images}.'


def _eval_results(
    measured: Mapping[str, float], dataset_id: str | None, dataset: str, args: Mapping[str, Any]
) -> list[EvalResult]:
    return [
        EvalResult(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type=dataset_id or 'imagefolder',
            dataset_name=dataset or 'imagefolder',
            dataset_split=args.get('val_split'),
            metric_type='accuracy',
            metric_name=_METRICS[key],
            metric_value=measured[key],
        )
        for key in ('top1', 'top5')
        if key in measured
    ]


def _settings(args: Mapping[str, Any], written: Mapping[str, Any]) -> str:
    """The options in the run folder's args.yaml, with the checkpoint's own values, as YAML; '' without that file."""
    if not written:
        return ''
    unused = _PRIVATE + (_UNUSED if _is_mealv2(args) else ())
    values = {key: args.get(key, value) for key, value in written.items() if not key.startswith(unused)}
    # Every option that can be off is so by default, but for --dist-bn.
    kept = {key: _plain(value) for key, value in values.items() if key == 'dist_bn' or not _is_off(value)}
    return yaml.safe_dump(kept, sort_keys=False).strip()


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ('', [], {})


def _command(args: Mapping[str, Any]) -> str:
    return 'mealv2-train -c args.yaml' if 'discriminator_mode' in args else 'python train.py -c args.yaml'


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


# The text


def _header(options: CardOptions, tags: Sequence[str], **more: Any) -> ModelCardData:
    """The YAML header; `tags` beside those of every card."""
    return ModelCardData(
        license=options.license,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', *tags],
        **more,
    )


def _name(name: str, options: CardOptions) -> str:
    return options.repo_id.rpartition('/')[2] if options.repo_id else name


def _examples(examples: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    rows = []
    for file, probabilities in examples.items():
        best = sorted(probabilities.items(), key=lambda item: -item[1])[:3]
        rows.append({'file': file, 'classes': [{'name': name, 'probability': value} for name, value in best]})
    return rows


def _write(
    folder: Path, name: str, config: Mapping[str, Any], data: ModelCardData, options: CardOptions, **variables: Any
) -> None:
    cfg = config['pretrained_cfg']
    everything: dict[str, Any] = {
        'name': _name(name, options),
        'source': f'hf-hub:{options.repo_id}' if options.repo_id else f'local-dir:{name}',
        'architecture': config['architecture'],
        'num_classes': config['num_classes'],
        'image_mode': 'L' if cfg['input_size'][0] == 1 else 'RGB',
        'pixels': {key: cfg[key] for key in _PREPROCESSING if cfg.get(key) is not None},
        'needs_package': False,
        'claims': [],
        'teachers': [],
        'results': [],
        'examples': [],
        'citations': [],
        **dict.fromkeys(('start', 'results_of', 'origin', 'curves', 'recipe', 'command', 'settings'), ''),
        **variables,
    }
    _render(data, everything, options.template).save(folder / CARD_FILE)


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
