"""A run folder drawn: curves of `summary.csv` as PNG, and one HTML file with curves, results and settings in it."""

import base64
import html
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from timm_mealv2.errors import UserError, blamed_on
from timm_mealv2.files import replacing
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.runs import INITIAL, TIMES, Run, StrPath, model_cost, read_run, short_names

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
    runs: Mapping[str, StrPath],
    out_png: StrPath,
    *,
    panels: Sequence[str] | None = None,
    first_epochs: Mapping[str, int] | None = None,
    top1_lines: Mapping[str, float] | None = None,
    top1_from: float | None = None,
    title: str = '',
) -> Path:
    """Draw the curves of one run or, one color each, of several.

    Args:
        runs: Label -> run folder.
        out_png: The file to write.
        panels: Names of `PANELS`; all that have data if None.
        first_epochs: Label -> epochs trained before the run's first, for a run that goes on from another's weights.
        top1_lines: Label -> top-1 in percent, drawn as a horizontal line: what the teachers reach. Those of the runs'
            preflight.json if None.
        top1_from: The lowest top-1 in percent that is shown; all if None.
        title: Heading of the picture.

    Returns:
        The file.
    """
    loaded = {label: read_run(folder) for label, folder in runs.items()}
    drawn = [
        PANELS[name]
        for name in panels or PANELS
        if any(run.values(column) for run in loaded.values() for column in PANELS[name].columns)
    ]
    if not drawn:
        raise UserError(f'nothing to draw: summary.csv has none of the columns of {", ".join(panels or PANELS)}.')
    if top1_lines is None:
        measured = {name: run.before(name, 'top1') for run in loaded.values() for name in run.preflight}
        shown = short_names(measured)
        top1_lines = {shown[name]: top1 for name, top1 in measured.items() if top1 is not None and name != INITIAL}
    across = min(len(drawn), 3)
    down = -(-len(drawn) // across)
    # A figure and canvas of one's own leave pyplot's state, and with it the user's plots, alone.
    figure = Figure(figsize=(5 * across, 3.7 * down + 0.2), layout='constrained')
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=14)
    grid = figure.add_gridspec(down, across)
    for index, panel in enumerate(drawn):
        axes = figure.add_subplot(grid[divmod(index, across)])
        _draw_panel(axes, panel, loaded, first_epochs or {})
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
            if not points:
                continue
            initial = run.before(INITIAL, column.removeprefix('eval_')) if column.startswith('eval_') else None
            points = points if initial is None else [(-1, initial), *points]
            words = [label] if len(runs) > 1 else []
            words += [panel.columns[column]] if len(columns) > 1 or not words else []
            axes.plot(
                [first_epochs.get(label, 0) + epoch + 1 for epoch, _ in points],
                [value * panel.scale for _, value in points],
                color=COLORS[(run_number if len(runs) > 1 else column_number) % len(COLORS)],
                linestyle=LINE_STYLES[column_number % len(LINE_STYLES)],
                marker='.' if len(points) < 20 else None,
                linewidth=1.6,
                label=': '.join(words),
            )
    shown: list[float] = [value for line in axes.get_lines() for value in np.asarray(line.get_ydata()).tolist()]
    values = [value for value in shown if math.isfinite(value)]
    if panel.log and values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale('log')
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel('epochs trained')
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(color='#dddddd', linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)


def write_report(run_folder: StrPath | Mapping[str, StrPath], out_html: StrPath | None = None) -> Path:
    """Write one HTML file about a run, or about several side by side; it needs no other file and no network.

    Args:
        run_folder: A run folder, or label -> run folder.
        out_html: The file to write; `report.html` in the (first) run folder if None.

    Returns:
        The file.
    """
    folders = run_folder if isinstance(run_folder, Mapping) else {Path(run_folder).resolve().name: run_folder}
    runs = {label: read_run(folder) for label, folder in folders.items()}
    out = Path(out_html) if out_html is not None else Path(next(iter(folders.values()))) / 'report.html'
    with tempfile.TemporaryDirectory() as temporary:
        picture = base64.b64encode(draw_runs(folders, Path(temporary, 'curves.png')).read_bytes()).decode()
    title = html.escape(', '.join(runs))
    differing, settings = _settings_html(runs)
    body = BODY.format(
        title=title,
        picture=picture,
        headline=_headline_html(runs, folders),
        results=_results_html(runs),
        differing=differing,
        settings=settings,
    )
    if (out.parent / 'evaluation.html').is_file():  # of mealv2-eval --report
        body = f'<p><a href="evaluation.html">Predictions, image by image</a></p>\n{body}'
    with replacing(out) as path:
        path.write_text(html_page(', '.join(runs), body), encoding='utf-8')
    return out


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }}
.wide > img {{ width: 100%; min-width: 50rem; height: auto }}
th, td {{ overflow-wrap: anywhere; min-width: 4.5rem }}
h1, h2 {{ overflow-wrap: anywhere }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }}
td.number, th.number {{ text-align: right }}
td.number {{ white-space: nowrap }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""

BODY = """{headline}
{differing}
<h2>Curves</h2>
<div class="wide">
<img alt="Curves of {title}; the last values are in the table below." src="data:image/png;base64,{picture}">
</div>
<h2>Results</h2>
{results}
<h2>Settings</h2>
{settings}"""


def html_page(title: str, body: str) -> str:
    """Return a page of the project's look; `body` is HTML, the title is not.

    Half a character, as in the name of a file that is not UTF-8, is shown by its number.
    """
    page = PAGE.format(title=html.escape(title), body=body)
    return page.encode(errors='backslashreplace').decode()


def html_table(corner: str, heads: Sequence[str], rows: Sequence[tuple[str, list[str]]], kind: str = '') -> str:
    """Return a table, in a box that scrolls where it is wider than the page.

    Args:
        corner: Heading of the first column.
        heads: Headings of the others.
        rows: The first cell of each row and the others, as HTML.
        kind: Attributes of the other cells.
    """
    lines = [f'<tr><th>{corner}</th>' + ''.join(f'<th{kind}>{html.escape(head)}</th>' for head in heads) + '</tr>']
    lines += [
        f'<tr><td>{name}</td>' + ''.join(f'<td{kind}>{cell}</td>' for cell in cells) + '</tr>' for name, cells in rows
    ]
    return '<div class="wide"><table>\n' + '\n'.join(lines) + '\n</table></div>'


def _headline_html(runs: Mapping[str, Run], folders: Mapping[str, StrPath]) -> str:
    """What a reader asks first: the student and its cost, and its accuracy beside what it began with and learned from.

    Without labels it is the agreement with the teachers in place of the accuracy.
    """
    rows: dict[str, list[str]] = {}
    shown = short_names(name for run in runs.values() for name in run.preflight)
    for number, (label, run) in enumerate(runs.items()):
        parameters, gmacs, images = _checkpoint_figures(Path(folders[label]))
        metric = 'top1' if any(run.values('eval_top1')) else 'agreement'
        title = {'top1': 'top-1, %', 'agreement': 'same top-1 as the teachers, %'}[metric]
        best, evaluated = _best_row(run), run.columns.get(f'eval_{metric}', [])
        cells = {
            'student': str(run.settings.get('model', '-')),
            'parameters, millions': _number(parameters, 1e6),
            'GMACs an image': _number(gmacs),
            'epochs trained': str(run.epochs[-1] + 1),
            f'{title}: best epoch': '-' if best is None else _number(evaluated[best] if evaluated else None),
        }
        cells |= {f'{title}: {shown[name]}': _number(run.before(name, metric)) for name in run.preflight}
        if run.preflight:
            cells['images evaluated on'] = f'{run.before("ensemble", "samples") or 0:.0f}'
        speeds = [speed for _, speed in run.values('images_per_second')]
        cells['training images/s, mean'] = _number(statistics.mean(speeds) if speeds else None)
        if images is not None and all(speeds):
            cells['hours of training, without evaluation'] = _number(sum(images / speed for speed in speeds), 3600)
        seconds = {name: sum(value for _, value in run.values(column)) for column, name in TIMES.items()}
        if any(seconds.values()):
            total = sum(seconds.values())
            cells |= {f'share of that time, %: {name}': _number(value, total / 100) for name, value in seconds.items()}
        for name, cell in cells.items():
            rows.setdefault(name, ['-'] * len(runs))[number] = cell
    return _table('', list(runs), list(rows.items()), numbers=True) + _seeds_html(runs)


def _checkpoint_figures(folder: Path) -> tuple[float | None, float | None, int | None]:
    """Parameters and GMACs of the student, and images of an epoch; None where the last checkpoint does not tell."""
    path = folder / 'last.pth.tar'
    try:
        with blamed_on(path):
            checkpoint = TrainingCheckpoint.read(path)
            args, batches = checkpoint.args, checkpoint.contents.get('batches')
            known = batches is not None and 'world_size' in args and not args.get('train_img_sizes')
            images = batches * args['batch_size'] * args['world_size'] if known else None
            return *model_cost(checkpoint.build()), images
    except UserError:
        return None, None, None


def _number(value: float | None, scale: float = 1.0) -> str:
    return '-' if value is None else f'{value / scale:.4g}'


def _seeds_html(runs: Mapping[str, Run]) -> str:
    """Mean and spread of the last evaluation, over runs that differ in nothing but their seed and their folder."""
    groups: dict[str, list[str]] = {}
    for label, run in runs.items():
        same = {key: value for key, value in run.settings.items() if key not in ('seed', 'output', 'experiment')}
        if 'seed' in run.settings:
            groups.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(label)
    rows = []
    for labels in groups.values():
        for column in ('eval_top1', 'eval_agreement', 'eval_kl'):
            last = [values[-1][1] for label in labels if (values := runs[label].values(column))]
            if len(last) == len(labels) > 1:
                spread = f'{statistics.mean(last):.4g} ± {statistics.stdev(last):.2g}'
                rows.append((f'{", ".join(labels)}: {_measure(column)[0]}', [str(len(last)), spread]))
    heads = ['seeds', 'mean ± standard deviation']
    return '<h2>Over seeds, last evaluation</h2>' + _table('runs', heads, rows, numbers=True) if rows else ''


def _measure(column: str) -> tuple[str, float]:
    """Name and unit of a column for a reader, and the factor to that unit; other columns go by their own name."""
    for panel in PANELS.values():
        if column in panel.columns:
            words = f', {panel.columns[column]}' if len(panel.columns) > 1 else ''
            return f'{panel.title}{words} ({panel.unit})', panel.scale
    return column, 1.0


def _results_html(runs: Mapping[str, Run]) -> str:
    """A table of the last and the best epoch of each run."""
    names = list(dict.fromkeys(name for run in runs.values() for name in run.columns if any(run.values(name))))
    heads, columns = [], []
    for label, run in runs.items():
        last, best = len(run.epochs) - 1, _best_row(run)
        for title, row in (('last', last), ('best', best)):
            if row is not None:
                heads.append(f'{label}, {title} epoch ({run.epochs[row] + 1})')
                columns.append([run.columns[name][row] if name in run.columns else None for name in names])
    rows = []
    for index, (title, scale) in enumerate(map(_measure, names)):
        values = [column[index] for column in columns]
        rows.append((title, ['-' if value is None else f'{value * scale:.6g}' for value in values]))
    return _table('measure', heads, rows, numbers=True)


def _best_row(run: Run) -> int | None:
    """The row of the best evaluation by the run's metric (--eval-metric), None without evaluation."""
    metric = run.settings.get('eval_metric') or 'top1'
    column = next((name for name in (f'eval_{metric}', 'eval_agreement') if run.values(name)), None)
    if column is None:
        return None
    sign = -1 if metric in ('loss', 'kl') else 1
    # NaN ranks last.
    ranks = {
        row: -math.inf if math.isnan(v) else sign * v for row, v in enumerate(run.columns[column]) if v is not None
    }
    return max(ranks, key=ranks.__getitem__)


def _settings_html(runs: Mapping[str, Run]) -> tuple[str, str]:
    """A table of the settings that differ between the runs, and one of those that all have."""
    names = sorted({name for run in runs.values() for name in run.settings})
    if not names:
        return '', '<p>There is no args.yaml.</p>'
    rows = [(name, [str(run.settings.get(name, '-')) for run in runs.values()]) for name in names]
    differing = [row for row in rows if len(set(row[1])) > 1]
    common = [(name, cells[:1]) for name, cells in rows if len(set(cells)) == 1]
    different = _table('setting', list(runs), differing, numbers=False)
    return '<h2>Settings that differ</h2>' + different if differing else '', _table(
        'setting', ['value'], common, numbers=False
    )


def _table(corner: str, heads: Sequence[str], rows: Sequence[tuple[str, list[str]]], *, numbers: bool) -> str:
    escaped = [(html.escape(name), list(map(html.escape, cells))) for name, cells in rows]
    return html_table(corner, heads, escaped, ' class="number"' if numbers else '')
