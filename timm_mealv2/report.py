"""A run folder drawn: curves of `summary.csv` as PNG, and one HTML file with curves, results and settings in it."""

import base64
import csv
import html
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing

StrPath = str | os.PathLike[str]

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
    """

    title: str
    unit: str
    columns: Mapping[str, str]
    scale: float = 1.0


PANELS = {
    'top1': Panel('Top-1 accuracy', 'validation images, %', {'eval_top1': 'top-1', 'eval_top1_ema': 'top-1, average'}),
    'top5': Panel('Top-5 accuracy', 'validation images, %', {'eval_top5': 'top-5', 'eval_top5_ema': 'top-5, average'}),
    'eval_agreement': Panel('Agreement with the teachers', 'validation images, %', {'eval_agreement': 'same top-1'}),
    'loss': Panel(
        'Loss',
        'nats',
        {'train_loss': 'training', 'train_similarity_loss': 'training, similarity alone', 'eval_loss': 'validation'},
    ),
    'kl': Panel('KL divergence from the teachers', 'nats', {'train_kl': 'training', 'eval_kl': 'validation'}),
    'agreement': Panel(
        'Agreement with the teachers', 'training crops, %', {'train_teacher_agreement': 'same top-1'}, 100
    ),
    'discriminator_loss': Panel('Discriminator loss', 'nats', {'train_discriminator_loss': 'training'}),
    'discriminator_accuracy': Panel(
        'Discriminator accuracy', 'rows told right, %', {'train_discriminator_accuracy': 'training'}, 100
    ),
    'lr': Panel('Learning rate', 'learning rate', {'lr': 'learning rate'}),
    'speed': Panel('Speed', 'training images/s', {'images_per_second': 'images/s'}),
}
"""Name -> panel, in the order in which they are drawn; a panel without any data is left out."""


@dataclass(frozen=True)
class Run:
    """What a run folder tells.

    Attributes:
        epochs: Epoch numbers, from 0.
        columns: Column -> one value per epoch, None where there is none (an epoch without evaluation).
        settings: The program's arguments (args.yaml); empty if the file is not there.
    """

    epochs: list[int]
    columns: dict[str, list[float | None]]
    settings: dict[str, Any] = field(default_factory=dict)

    def values(self, column: str) -> list[tuple[int, float]]:
        """Return (epoch, value) of a column where it has one."""
        values = self.columns.get(column, [])
        return [(epoch, value) for epoch, value in zip(self.epochs, values, strict=False) if value is not None]


def read_run(folder: StrPath) -> Run:
    """Read `summary.csv` and `args.yaml` of a run folder.

    Raises:
        UserError: If there is no summary, it is empty, or holds something else than numbers.
    """
    path = Path(folder) / 'summary.csv'
    if not path.is_file():
        raise UserError(f'no summary.csv in {folder}: expected a run folder (OUTPUT/EXPERIMENT) with a finished epoch.')
    try:
        with path.open(newline='') as file:
            rows = list(csv.DictReader(file))
        epochs = [int(float(row.pop('epoch'))) for row in rows]
        columns = {
            name: [float(row[name]) if row.get(name) else None for row in rows] for name in (rows[0] if rows else ())
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{path} is no summary of a run: expected a column epoch and numbers ({error}).') from error
    if not rows:
        raise UserError(f'{path} has no epoch yet: wait for the first to end.')
    settings_path = Path(folder) / 'args.yaml'
    try:
        settings = yaml.safe_load(settings_path.read_text()) if settings_path.is_file() else {}
    except yaml.YAMLError as error:
        raise UserError(f'{settings_path} is not YAML: {error}') from error
    return Run(epochs, columns, settings or {})


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
        top1_lines: Label -> top-1 in percent, drawn as a horizontal line: what the teachers reach.
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
            for number, (label, value) in enumerate((top1_lines or {}).items()):
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
    text = PAGE.format(title=title, picture=picture, results=_results_html(runs), settings=_settings_html(runs))
    with replacing(out) as path:
        path.write_text(text, encoding='utf-8')
    return out


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }}
img {{ max-width: 100%; height: auto }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }}
td.number, th.number {{ text-align: right }}
tr.differs td {{ font-weight: 600 }}
</style>
</head>
<body>
<h1>{title}</h1>
<h2>Curves</h2>
<img alt="Curves of {title}; the last values are in the table below." src="data:image/png;base64,{picture}">
<h2>Results</h2>
{results}
<h2>Settings</h2>
{settings}
</body>
</html>
"""


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
    rows = [
        (name, ['-' if column[i] is None else f'{column[i]:.6g}' for column in columns]) for i, name in enumerate(names)
    ]
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


def _settings_html(runs: Mapping[str, Run]) -> str:
    """A table of the settings, those that differ between the runs in bold."""
    names = sorted({name for run in runs.values() for name in run.settings})
    if not names:
        return '<p>There is no args.yaml.</p>'
    rows = [(name, [str(run.settings.get(name, '-')) for run in runs.values()]) for name in names]
    return _table('setting', list(runs), rows, numbers=False)


def _table(corner: str, heads: Sequence[str], rows: Sequence[tuple[str, list[str]]], *, numbers: bool) -> str:
    kind = ' class="number"' if numbers else ''
    lines = [f'<tr><th>{corner}</th>' + ''.join(f'<th{kind}>{html.escape(head)}</th>' for head in heads) + '</tr>']
    for name, cells in rows:
        row_kind = ' class="differs"' if not numbers and len(set(cells)) > 1 else ''
        cells_html = ''.join(f'<td{kind}>{html.escape(cell)}</td>' for cell in cells)
        lines.append(f'<tr{row_kind}><td>{html.escape(name)}</td>{cells_html}</tr>')
    return '<div class="wide"><table>\n' + '\n'.join(lines) + '\n</table></div>'
