"""How figures are written: one name, one unit and as many digits in logs, tables, pages and cards."""

from collections.abc import Mapping

METRICS = {
    'samples': 'images',
    'top1': 'top-1',
    'top5': 'top-5',
    'real_top1': 'ReaL-1',
    'real_top5': 'ReaL-5',
    'loss': 'loss',
    'nll': 'NLL',
    'ece': 'ECE',
    'agreement': 'agreement',
    'kl': 'KL',
}
"""Metric of an evaluation, in the order of a table's columns -> what it is called there."""

PERCENT = ('top1', 'top5', 'real_top1', 'real_top5', 'ece', 'agreement', 'teacher_agreement', 'discriminator_accuracy')
"""Metrics in percent; losses and KL divergences are in nats."""

Table = tuple[list[str], list[tuple[str, list[str]]]]
"""Headings of the columns, and rows of a name and its cells."""


def figure(metric: str, value: float | None) -> str:
    """Return the value of a metric, or of its column in `summary.csv`, in its unit; '-' where there is none."""
    metric = metric.removeprefix('train_').removeprefix('eval_').removesuffix('_ema')
    if value is None:
        return '-'
    if metric in ('samples', 'epoch'):
        return f'{value:.0f}'
    if metric in PERCENT:
        return f'{value:.2f}'
    if metric in ('nll', 'kl') or metric.endswith('loss'):
        return f'{value:.4f}'
    return f'{value:.0f}' if metric == 'images_per_second' and value >= 10 else short(value)


def short(value: float) -> str:
    """Return a number with three digits, or all those before the point."""
    return f'{value:.0f}' if abs(value) >= 100 else f'{value:.3g}'


def duration(seconds: float) -> str:
    """Return a time with two or three digits, in seconds, minutes or hours."""
    if seconds < 100:
        return f'{short(seconds)} s'
    return f'{short(seconds / 60)} minutes' if seconds < 6000 else f'{short(seconds / 3600)} hours'


def metric_table(results: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a table of evaluations, model -> metrics; a column that no model has is left out."""
    shown = [metric for metric in METRICS if any(metric in metrics for metrics in results.values())]
    rows = [(name, [figure(metric, metrics.get(metric)) for metric in shown]) for name, metrics in results.items()]
    return [METRICS[metric] for metric in shown], rows


def as_text(table: Table, corner: str = 'model') -> str:
    """Return a table for the console, names to the left and figures to the right."""
    heads, rows = table
    lines = [[corner, *heads], *([name, *cells] for name, cells in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return '\n'.join('  '.join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)
