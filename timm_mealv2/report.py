"""A run folder drawn: curves of `summary.csv` as PNG, and one HTML file with curves, results and settings in it."""

import os
import statistics
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


PANELS = (
    Panel('Top-1 accuracy', 'validation images, %', {'eval_top1': 'top-1', 'eval_top1_ema': 'top-1, average'}),
    Panel(
        'Loss',
        'nats',
        {'train_loss': 'training', 'train_similarity_loss': 'training, similarity alone', 'eval_loss': 'validation'},
        log=True,
    ),
    Panel('KL divergence from the teachers', 'nats', {'train_kl': 'training', 'eval_kl': 'validation'}, log=True),
    Panel(
        'Agreement with the teachers',
        'same top-1, %',
        {'train_teacher_agreement': 'training crops', 'eval_agreement': 'validation images'},
    ),
    Panel('Discriminator', 'rows told right, %', {'train_discriminator_accuracy': 'training'}),
    Panel('Learning rate', 'learning rate', {'lr': 'learning rate'}, log=True),
    Panel('Gradient norm', 'before clipping', {'train_grad_norm': 'training'}, log=True),
    Panel('Time of a batch', 'seconds', TIMES),
)
"""In the order in which they are drawn; a panel without any data is left out."""


def draw_runs(runs: Mapping[str, Run], out_png: str | os.PathLike[str]) -> Path:
    """Draw the curves of one run or of several.

    Args:
        runs: Label -> run.
        out_png: The file to write.

    Returns:
        The file.
    """
    panels = _with_data(runs)
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    # A figure of one's own leaves pyplot's state, and with it the user's plots, alone.
    plot = Figure(figsize=(5 * across, 3.7 * down + 0.2), layout='constrained')
    for number, panel in enumerate(panels, 1):
        _draw_panel(plot.add_subplot(down, across, number), panel, runs)
    with replacing(out_png) as path:
        plot.savefig(path, format='png', dpi=120)
    return Path(out_png)


def _with_data(runs: Mapping[str, Run]) -> list[Panel]:
    there = {column for run in runs.values() for row in run.rows for column in row}
    return [panel for panel in PANELS if there & panel.columns.keys()]


def _draw_panel(axes: Axes, panel: Panel, runs: Mapping[str, Run]) -> None:
    axes.set_prop_cycle(color=COLORS)
    for label, run in runs.items():
        for column, name in panel.columns.items():
            points = run.values(column)
            initial = run.before(INITIAL, column.removeprefix('eval_')) if column.startswith('eval_') else None
            if points and initial is not None:
                points = [(-1, initial), *points]
            if points:
                epochs, values = zip(*points, strict=True)
                name = f'{label}: {name}' if len(runs) > 1 else name
                axes.plot([epoch + 1 for epoch in epochs], values, marker='.', label=name)
    if 'eval_top1' in panel.columns:
        measured = {name: run.before(name, 'top1') for run in runs.values() for name in run.preflight}
        shown = short_names(measured)
        for number, (name, top1) in enumerate(measured.items()):
            if name != INITIAL and top1 is not None:
                style, label = ('--', ':', '-.')[number % 3], f'{shown[name]} ({top1:.2f})'
                axes.axhline(top1, color='#666666', linestyle=style, label=label)
    if panel.log and axes.dataLim.y1 > 20 * axes.dataLim.y0 > 0:
        axes.set_yscale('log')
    axes.set(title=panel.title, xlabel='epochs trained', ylabel=panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color='#dddddd')
    axes.legend(fontsize=8)


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
    settings = _rows([{name: _readable(value) for name, value in run.settings.items()} for run in runs.values()])
    differing = [(name, cells) for name, cells in settings if len(set(cells)) > 1]
    same = [(name, cells[:1]) for name, cells in settings if len(set(cells)) == 1]
    plots = []
    for panel in _with_data(runs):
        plot = Figure(figsize=(5, 3.7), layout='constrained')
        _draw_panel(plot.subplots(), panel, runs)
        plots.append((panel.title, picture(plot, dpi=120)))
    page = render(
        'report.html',
        title=', '.join(runs),
        runs=list(runs),
        has_predictions=Path(out_html).with_name('evaluation.html').is_file(),  # of mealv2-eval --report
        headline=_rows([_headline(run) for run in runs.values()]),
        differing=differing,
        same=[(name, cells) for name, cells in same if name not in defaults or cells != [_readable(defaults[name])]],
        plots=plots,
        results=_results(runs),
    )
    with replacing(out_html) as path:
        path.write_text(page, encoding='utf-8')
    return Path(out_html)


def _rows(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Rows of a table from its columns, name -> cell."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, '-') for column in columns]) for name in names]


def _readable(value: Any) -> str:
    """A setting as a reader types it."""
    if isinstance(value, bool):
        return 'on' if value else 'off'
    if isinstance(value, dict):
        value = [f'{key}={item}' for key, item in value.items()]
    if isinstance(value, list | tuple):
        value = ', '.join(map(_readable, value))
    return '-' if value in (None, '') else str(value)


def _headline(run: Run) -> dict[str, str]:
    """What a reader asks first: the student and its cost, and its accuracy beside what it began with and learned from.

    Without labels it is the agreement with the teachers in place of the accuracy.
    """
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
    shown = short_names(run.preflight)
    cells |= {f'{title}: {shown[name]}': figure(metric, run.before(name, metric)) for name in run.preflight}
    if 'ensemble' in run.preflight:
        cells['images evaluated on'] = figure('samples', run.before('ensemble', 'samples'))
    speeds = [speed for _, speed in run.values('images_per_second')]
    if speeds:
        cells['training images/s, mean'] = figure('images_per_second', statistics.mean(speeds))
    if images is not None and all(speeds):
        cells['training, without evaluation'] = duration(sum(images / speed for speed in speeds))
    return cells


def _checkpoint_figures(folder: Path) -> tuple[float | None, float | None, int | None]:
    """Parameters and GMACs of the student, and images of an epoch; None where the last checkpoint does not tell."""
    try:
        checkpoint = TrainingCheckpoint.read(folder / 'last.pth.tar')
        model = checkpoint.build()
    except UserError:
        return None, None, None
    args, batches = checkpoint.args, checkpoint.contents.get('batches')
    known = batches is not None and 'world_size' in args
    return *model_cost(model), batches * args['batch_size'] * args['world_size'] if known else None


def _results(runs: Mapping[str, Run]) -> Table:
    """Headings and rows of a table of the best and the last epoch of each run."""
    columns = {}
    for label, run in runs.items():
        for word, epoch in (('best', run.best_epoch), ('last', run.epochs[-1])):
            if epoch is not None:
                head = f'{word} epoch ({epoch + 1})'
                row = run.rows[run.epochs.index(epoch)]
                cells = {name: figure(name, value) for name, value in row.items() if name != 'epoch'}
                columns[f'{label}, {head}' if len(runs) > 1 else head] = cells
    return list(columns), _rows(list(columns.values()))
