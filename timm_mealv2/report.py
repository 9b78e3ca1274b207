"""A run folder drawn: curves of `summary.csv` as PNG, and one HTML file with curves, results and settings in it."""

import json
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from timm_mealv2.errors import UserError
from timm_mealv2.figures import Table, duration, figure, short
from timm_mealv2.files import replacing
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.pages import picture, render
from timm_mealv2.runs import INITIAL, TIMES, Run, model_cost, short_names

# Okabe and Ito's colors, which color-blind readers can tell apart; yellow is too pale for a line on white.
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
LINE_STYLES = ('-', '--', ':', '-.')


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Attributes:
        title: Heading.
        unit: Label of the y axis.
        columns: Column of summary.csv -> its name in the legend.
        log: Draw it on a logarithmic scale where the values are positive and span more than a factor of 20.
    """

    title: str
    unit: str
    columns: Mapping[str, str]
    log: bool = False


PANELS = {
    'top1': Panel('Top-1 accuracy', 'validation images, %', {'eval_top1': 'top-1', 'eval_top1_ema': 'top-1, average'}),
    'top5': Panel('Top-5 accuracy', 'validation images, %', {'eval_top5': 'top-5', 'eval_top5_ema': 'top-5, average'}),
    'eval_agreement': Panel('Agreement with the teachers', 'validation images, %', {'eval_agreement': 'same top-1'}),
    'loss': Panel(
        'Loss',
        'nats',
        {'train_loss': 'training', 'train_similarity_loss': 'training, similarity alone', 'eval_loss': 'validation'},
        log=True,
    ),
    'kl': Panel('KL divergence from the teachers', 'nats', {'train_kl': 'training', 'eval_kl': 'validation'}, log=True),
    'agreement': Panel('Agreement with the teachers', 'training crops, %', {'train_teacher_agreement': 'same top-1'}),
    'discriminator_loss': Panel('Discriminator loss', 'nats', {'train_discriminator_loss': 'training'}),
    'discriminator_accuracy': Panel(
        'Discriminator accuracy', 'rows told right, %', {'train_discriminator_accuracy': 'training'}
    ),
    'lr': Panel('Learning rate', 'learning rate', {'lr': 'learning rate'}, log=True),
    'grad_norm': Panel('Gradient norm', 'before clipping', {'train_grad_norm': 'training'}, log=True),
    'time': Panel('Time of a batch', 'seconds', TIMES),
    'speed': Panel('Speed', 'training images/s', {'images_per_second': 'images/s'}),
}
"""Name -> panel, in the order in which they are drawn; a panel without any data is left out."""

_TITLES = {
    column: f'{panel.title}{f", {words}" if len(panel.columns) > 1 else ""} ({panel.unit})'
    for panel in PANELS.values()
    for column, words in panel.columns.items()
} | {'lr': 'Learning rate'}
"""Column -> its name for a reader; other columns go by their own."""


def draw_runs(
    runs: Mapping[str, Run],
    out_png: str | os.PathLike[str],
    *,
    panels: Sequence[str] = tuple(PANELS),
    first_epochs: Mapping[str, int] | None = None,
    top1_lines: Mapping[str, float] | None = None,
    top1_from: float | None = None,
    title: str = '',
) -> Path:
    """Draw the curves of one run or, one color each, of several.

    Args:
        runs: Label -> run.
        out_png: The file to write.
        panels: Names of `PANELS`; those without any data are left out.
        first_epochs: Label -> epochs trained before the run's first, for a run that goes on from another's weights.
        top1_lines: Label -> top-1 in percent, drawn as a horizontal line: what the teachers reach. Those of the runs'
            preflight.json if None.
        top1_from: The lowest top-1 in percent that is shown; all if None.
        title: Heading of the picture.

    Returns:
        The file.
    """
    drawn = [name for name in panels if _has_data(runs, name)]
    if not drawn:
        raise UserError(f'nothing to draw: summary.csv has none of the columns of {", ".join(panels)}.')
    across = min(len(drawn), 3)
    down = -(-len(drawn) // across)
    # A figure of one's own leaves pyplot's state, and with it the user's plots, alone.
    figure = Figure(figsize=(5 * across, 3.7 * down + 0.2), layout='constrained')
    if title:
        figure.suptitle(title, fontsize=14)
    for index, name in enumerate(drawn):
        axes = figure.add_subplot(down, across, index + 1)
        _draw_panel(axes, PANELS[name], runs, first_epochs or {}, top1_lines, top1_from)
    with replacing(out_png) as path:
        figure.savefig(path, format='png', dpi=120)
    return Path(out_png)


def _has_data(runs: Mapping[str, Run], panel: str) -> bool:
    return any(run.values(column) for run in runs.values() for column in PANELS[panel].columns)


def _draw_panel(
    axes: Axes,
    panel: Panel,
    runs: Mapping[str, Run],
    first_epochs: Mapping[str, int],
    top1_lines: Mapping[str, float] | None,
    top1_from: float | None,
) -> None:
    columns = [column for column in panel.columns if any(run.values(column) for run in runs.values())]
    values = []
    for run_number, (label, run) in enumerate(runs.items()):
        for column_number, column in enumerate(columns):
            points = run.values(column)
            values += [value for _, value in points if math.isfinite(value)]
            initial = run.before(INITIAL, column.removeprefix('eval_')) if column.startswith('eval_') else None
            if points and initial is not None:
                points = [(-1, initial), *points]
            words = ([label] if len(runs) > 1 else []) + ([panel.columns[column]] if len(columns) > 1 else [])
            axes.plot(
                [first_epochs.get(label, 0) + epoch + 1 for epoch, _ in points],
                [value for _, value in points],
                color=COLORS[(run_number if len(runs) > 1 else column_number) % len(COLORS)],
                linestyle=LINE_STYLES[column_number % len(LINE_STYLES)],
                marker='.' if len(points) < 20 else None,
                linewidth=1.6,
                label=': '.join(words) or panel.columns[column],
            )
    if panel is PANELS['top1']:
        for number, (label, top1) in enumerate((_teachers(runs) if top1_lines is None else top1_lines).items()):
            style = LINE_STYLES[1 + number % 3]
            axes.axhline(top1, color='#666666', linestyle=style, linewidth=1.2, label=f'{label} ({top1:.2f})')
        axes.set_ylim(bottom=top1_from)
    if len(axes.get_lines()) > 1 or len(runs) > 1:
        axes.legend(fontsize=8, framealpha=0.9, edgecolor='none')
    if panel.log and values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale('log')
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel('epochs trained')
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(color='#dddddd', linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)


def _teachers(runs: Mapping[str, Run]) -> dict[str, float]:
    """Top-1 of the ensemble and the teachers before the first step, by their short names."""
    measured = {name: run.before(name, 'top1') for run in runs.values() for name in run.preflight if name != INITIAL}
    shown = short_names(measured)
    return {shown[name]: top1 for name, top1 in measured.items() if top1 is not None}


def write_report(
    runs: Mapping[str, Run], out_html: str | os.PathLike[str], defaults: Mapping[str, Any] = MappingProxyType({})
) -> Path:
    """Write one HTML file about a run, or about several side by side; it needs no other file and no network.

    Args:
        runs: Label -> run.
        out_html: The file to write.
        defaults: Values of settings that are not worth showing.

    Returns:
        The file.
    """
    names = sorted({name for run in runs.values() for name in run.settings})
    settings = {name: [run.settings.get(name) for run in runs.values()] for name in names}
    differing = {name for name, values in settings.items() if any(value != values[0] for value in values)}
    plain = {name for name in names if name in defaults and settings[name][0] in (defaults[name], [], '')}
    plots = {}
    for panel in filter(lambda name: _has_data(runs, name), PANELS):
        plots[panel] = Figure(figsize=(5, 3.7), layout='constrained')
        _draw_panel(plots[panel].subplots(), PANELS[panel], runs, {}, None, None)
    page = render(
        'report.html',
        title=', '.join(runs),
        runs=list(runs),
        has_predictions=Path(out_html).with_name('evaluation.html').is_file(),  # of mealv2-eval --report
        headline=_headline(runs),
        over_seeds=_over_seeds(runs),
        differing=[(name, list(map(_readable, settings[name]))) for name in names if name in differing],
        same=[(name, [_readable(settings[name][0])]) for name in names if name not in differing | plain],
        plots=[(PANELS[name].title, picture(plot, dpi=120)) for name, plot in plots.items()],
        results=_results(runs),
    )
    with replacing(out_html) as path:
        path.write_text(page, encoding='utf-8')
    return Path(out_html)


def _readable(value: Any) -> str:
    """A setting as a reader types it."""
    if isinstance(value, bool):
        return 'on' if value else 'off'
    if isinstance(value, dict):
        value = [f'{key}={item}' for key, item in value.items()]
    if isinstance(value, list | tuple):
        value = ', '.join(map(_readable, value))
    return '-' if value in (None, '') else str(value)


def _headline(runs: Mapping[str, Run]) -> list[tuple[str, list[str]]]:
    """What a reader asks first: the student and its cost, and its accuracy beside what it began with and learned from.

    Without labels it is the agreement with the teachers in place of the accuracy.
    """
    rows: dict[str, list[str]] = {}
    shown = short_names(name for run in runs.values() for name in run.preflight)
    for number, run in enumerate(runs.values()):
        parameters, gmacs, images = _checkpoint_figures(run.folder)
        metric, title = ('top1', 'top-1, %') if run.values('eval_top1') else ('agreement', 'same top-1 as teachers, %')
        evaluated = dict(run.values(f'eval_{metric}'))
        cells = {
            'student': str(run.settings.get('model', '-')),
            'parameters, millions': '-' if parameters is None else short(parameters / 1e6),
            'GMACs an image': '-' if gmacs is None else short(gmacs),
            'epochs trained': str(run.epochs[-1] + 1),
        }
        for word, epoch in (('best', run.best_epoch), ('last', max(evaluated, default=None))):
            if epoch is not None:
                cells[f'{title}: {word} epoch'] = f'{figure(metric, evaluated.get(epoch))} (epoch {epoch + 1})'
        cells |= {f'{title}: {shown[name]}': figure(metric, run.before(name, metric)) for name in run.preflight}
        if 'ensemble' in run.preflight:
            cells['images evaluated on'] = figure('samples', run.before('ensemble', 'samples'))
        speeds = [speed for _, speed in run.values('images_per_second')]
        if speeds:
            cells['training images/s, mean'] = figure('images_per_second', statistics.mean(speeds))
        if images is not None and all(speeds):
            cells['training, without evaluation'] = duration(sum(images / speed for speed in speeds))
        seconds = {name: sum(value for _, value in run.values(column)) for column, name in TIMES.items()}
        if total := sum(seconds.values()):
            cells |= {f'share of that time, %: {name}': f'{100 * s / total:.2f}' for name, s in seconds.items()}
        for name, cell in cells.items():
            rows.setdefault(name, ['-'] * len(runs))[number] = cell
    return list(rows.items())


def _checkpoint_figures(folder: Path) -> tuple[float | None, float | None, int | None]:
    """Parameters and GMACs of the student, and images of an epoch; None where the last checkpoint does not tell."""
    try:
        checkpoint = TrainingCheckpoint.read(folder / 'last.pth.tar')
        model = checkpoint.build()
    except UserError:
        return None, None, None
    args, batches = checkpoint.args, checkpoint.contents.get('batches')
    known = batches is not None and 'world_size' in args and not args.get('train_img_sizes')
    return *model_cost(model), batches * args['batch_size'] * args['world_size'] if known else None


def _over_seeds(runs: Mapping[str, Run]) -> list[tuple[str, list[str]]]:
    """Mean and spread of the last evaluation, over runs that differ in nothing but their seed and their folder."""
    groups = defaultdict(list)
    for label, run in runs.items():
        same = {key: value for key, value in run.settings.items() if key not in ('seed', 'output', 'experiment')}
        groups[json.dumps(same, sort_keys=True, default=str)].append(label)
    rows = []
    for labels in groups.values():
        for column in ('eval_top1', 'eval_agreement', 'eval_kl'):
            last = [value for label in labels for _, value in runs[label].values(column)[-1:]]
            if len(last) > 1:
                mean, spread = (figure(column, of(last)) for of in (statistics.mean, statistics.stdev))
                rows.append((f'{", ".join(labels)}: {_TITLES[column]}', [str(len(last)), f'{mean} ± {spread}']))
    return rows


def _results(runs: Mapping[str, Run]) -> Table:
    """Headings and rows of a table of the best and the last epoch of each run."""
    names = dict.fromkeys(name for run in runs.values() for row in run.rows for name in row if name != 'epoch')
    shown = {}
    for label, run in runs.items():
        for word, epoch in (('best', run.best_epoch), ('last', run.epochs[-1])):
            if epoch is not None:
                head = f'{word} epoch ({epoch + 1})'
                shown[f'{label}, {head}' if len(runs) > 1 else head] = run.rows[run.epochs.index(epoch)]
    return list(shown), [(_TITLES.get(n, n), [figure(n, row.get(n)) for row in shown.values()]) for n in names]
