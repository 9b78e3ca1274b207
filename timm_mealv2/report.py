"""A run folder drawn: curves of `summary.csv` as PNG, and one HTML file with curves, results and settings in it."""

import base64
import json
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.pages import render
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
        scale: Factor from the column to the unit.
        log: Draw it on a logarithmic scale where the values are positive and span more than a factor of 20.
    """

    title: str
    unit: str
    columns: Mapping[str, str]
    scale: float = 1.0
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
    'agreement': Panel(
        'Agreement with the teachers', 'training crops, %', {'train_teacher_agreement': 'same top-1'}, 100
    ),
    'discriminator_loss': Panel('Discriminator loss', 'nats', {'train_discriminator_loss': 'training'}),
    'discriminator_accuracy': Panel(
        'Discriminator accuracy', 'rows told right, %', {'train_discriminator_accuracy': 'training'}, 100
    ),
    'lr': Panel('Learning rate', 'learning rate', {'lr': 'learning rate'}, log=True),
    'time': Panel('Time of a batch', 'seconds', TIMES),
    'speed': Panel('Speed', 'training images/s', {'images_per_second': 'images/s'}),
}
"""Name -> panel, in the order in which they are drawn; a panel without any data is left out."""


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
    drawn = [
        PANELS[name]
        for name in panels
        if any(run.values(column) for run in runs.values() for column in PANELS[name].columns)
    ]
    if not drawn:
        raise UserError(f'nothing to draw: summary.csv has none of the columns of {", ".join(panels)}.')
    if top1_lines is None:
        measured = {name: run.before(name, 'top1') for run in runs.values() for name in run.preflight}
        shown = short_names(measured)
        top1_lines = {shown[name]: top1 for name, top1 in measured.items() if top1 is not None and name != INITIAL}
    across = min(len(drawn), 3)
    down = -(-len(drawn) // across)
    # A figure and canvas of one's own leave pyplot's state, and with it the user's plots, alone.
    figure = Figure(figsize=(5 * across, 3.7 * down + 0.2), layout='constrained')
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=14)
    for index, panel in enumerate(drawn):
        axes = figure.add_subplot(down, across, index + 1)
        _draw_panel(axes, panel, runs, first_epochs or {})
        if panel is PANELS['top1']:
            for number, (label, value) in enumerate(top1_lines.items()):
                style = LINE_STYLES[1 + number % 3]
                axes.axhline(value, color='#666666', linestyle=style, linewidth=1.2, label=f'{label} ({value:.2f})')
            axes.set_ylim(bottom=top1_from)
        if len(axes.get_lines()) > 1 or len(runs) > 1:
            axes.legend(fontsize=8, framealpha=0.9, edgecolor='none')
    with replacing(out_png) as path:
        figure.savefig(path, format='png', dpi=120)
    return Path(out_png)


def _draw_panel(axes: Axes, panel: Panel, runs: Mapping[str, Run], first_epochs: Mapping[str, int]) -> None:
    columns = [column for column in panel.columns if any(run.values(column) for run in runs.values())]
    for run_number, (label, run) in enumerate(runs.items()):
        for column_number, column in enumerate(columns):
            points = run.values(column)
            initial = run.before(INITIAL, column.removeprefix('eval_')) if column.startswith('eval_') else None
            if not points:
                continue
            if initial is not None:
                points = [(-1, initial), *points]
            words = ([label] if len(runs) > 1 else []) + ([panel.columns[column]] if len(columns) > 1 else [])
            axes.plot(
                [first_epochs.get(label, 0) + epoch + 1 for epoch, _ in points],
                [value * panel.scale for _, value in points],
                color=COLORS[(run_number if len(runs) > 1 else column_number) % len(COLORS)],
                linestyle=LINE_STYLES[column_number % len(LINE_STYLES)],
                marker='.' if len(points) < 20 else None,
                linewidth=1.6,
                label=': '.join(words) or panel.columns[column],
            )
    values = [value for run in runs.values() for column in columns for _, value in run.values(column)]
    finite = list(filter(math.isfinite, values))
    if panel.log and finite and min(finite) > 0 and max(finite) > 20 * min(finite):
        axes.set_yscale('log')
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel('epochs trained')
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(color='#dddddd', linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)


def write_report(runs: Mapping[str, Run], out_html: str | os.PathLike[str], curves: Path) -> Path:
    """Write one HTML file about a run, or about several side by side; it needs no other file and no network.

    Args:
        runs: Label -> run.
        out_html: The file to write.
        curves: The picture that `draw_runs` made of them.

    Returns:
        The file.
    """
    settings = {
        name: [str(run.settings.get(name, '-')) for run in runs.values()]
        for run in runs.values()
        for name in run.settings
    }
    heads, results = _results(runs)
    page = render(
        'report.html',
        title=', '.join(runs),
        runs=list(runs),
        has_predictions=Path(out_html).with_name('evaluation.html').is_file(),  # of mealv2-eval --report
        headline=_headline(runs),
        over_seeds=_over_seeds(runs),
        differing=[(name, cells) for name, cells in sorted(settings.items()) if len(set(cells)) > 1],
        same=[(name, cells[:1]) for name, cells in sorted(settings.items()) if len(set(cells)) == 1],
        curves=base64.b64encode(curves.read_bytes()).decode(),
        result_heads=heads,
        results=results,
    )
    with replacing(out_html) as path:
        path.write_text(page, encoding='utf-8')
    return Path(out_html)


def _headline(runs: Mapping[str, Run]) -> list[tuple[str, list[str]]]:
    """What a reader asks first: the student and its cost, and its accuracy beside what it began with and learned from.

    Without labels it is the agreement with the teachers in place of the accuracy.
    """
    rows: dict[str, list[str]] = {}
    shown = short_names(name for run in runs.values() for name in run.preflight)
    for number, run in enumerate(runs.values()):
        parameters, gmacs, images = _checkpoint_figures(run.folder)
        metric, title = 'top1', 'top-1, %'
        if not run.values('eval_top1'):
            metric, title = 'agreement', 'same top-1 as the teachers, %'
        best = _best_epoch(run)
        cells = {
            'student': str(run.settings.get('model', '-')),
            'parameters, millions': _number(parameters, 1e6),
            'GMACs an image': _number(gmacs),
            'epochs trained': str(run.epochs[-1] + 1),
            f'{title}: best epoch': _number(_at(run, f'eval_{metric}', best)),
        }
        cells |= {f'{title}: {shown[name]}': _number(run.before(name, metric)) for name in run.preflight}
        if run.preflight:
            cells['images evaluated on'] = f'{run.before("ensemble", "samples") or 0:.0f}'
        speeds = [speed for _, speed in run.values('images_per_second')]
        if speeds:
            cells['training images/s, mean'] = _number(statistics.mean(speeds))
        if images is not None and all(speeds):
            cells['hours of training, without evaluation'] = _number(sum(images / speed for speed in speeds), 3600)
        seconds = {name: sum(value for _, value in run.values(column)) for column, name in TIMES.items()}
        if total := sum(seconds.values()):
            cells |= {f'share of that time, %: {name}': _number(value, total / 100) for name, value in seconds.items()}
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


def _number(value: float | None, scale: float = 1.0) -> str:
    return '-' if value is None else f'{value / scale:.4g}'


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
                spread = f'{statistics.mean(last):.4g} ± {statistics.stdev(last):.2g}'
                rows.append((f'{", ".join(labels)}: {_measure(column)[0]}', [str(len(last)), spread]))
    return rows


def _measure(column: str) -> tuple[str, float]:
    """Name and unit of a column for a reader, and the factor to that unit; other columns go by their own name."""
    for panel in PANELS.values():
        if column in panel.columns:
            words = f', {panel.columns[column]}' if len(panel.columns) > 1 else ''
            return f'{panel.title}{words} ({panel.unit})', panel.scale
    return column, 1.0


def _results(runs: Mapping[str, Run]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Headings and rows of a table of the last and the best epoch of each run."""
    names = dict.fromkeys(name for run in runs.values() for name in run.columns if run.values(name))
    heads, epochs = [], []
    for label, run in runs.items():
        for title, epoch in (('last', run.epochs[-1]), ('best', _best_epoch(run))):
            if epoch is not None:
                heads.append(f'{label}, {title} epoch ({epoch + 1})')
                epochs.append((run, epoch))
    rows = []
    for name in names:
        title, scale = _measure(name)
        values = [_at(run, name, epoch) for run, epoch in epochs]
        rows.append((title, ['-' if value is None else f'{value * scale:.6g}' for value in values]))
    return heads, rows


def _at(run: Run, column: str, epoch: int | None) -> float | None:
    return next((value for number, value in run.values(column) if number == epoch), None)


def _best_epoch(run: Run) -> int | None:
    """The epoch of the best evaluation by the run's metric (--eval-metric), None without evaluation."""
    metric = run.settings.get('eval_metric') or 'top1'
    values = run.values(f'eval_{metric}') or run.values('eval_agreement')
    sign = -1 if metric in ('loss', 'kl') else 1
    # NaN ranks last.
    ranks = {epoch: -math.inf if math.isnan(value) else sign * value for epoch, value in values}
    return max(ranks, key=ranks.__getitem__, default=None)
