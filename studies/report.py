r"""Make the tables and the pictures of docs/evidence.md from studies/results/*.csv.

python studies/report.py            # writes the tables between the markers, docs/evidence.png and evidence_curves.png
python studies/report.py --check    # fails if the tables in the document are not those of the CSV files
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from arms import RECORDED, SEEDS, STUDENTS, TUNING_SEED
from data_sets import COLOR
from later_arms import LENGTHS, MODELS_OF, STUDIES
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from run import ROOT, Row, read_rows

from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing

DOCUMENT = ROOT / 'docs/evidence.md'
PICTURE = ROOT / 'docs/evidence.png'
CURVES_PICTURE = ROOT / 'docs/evidence_curves.png'

REFERENCES = {
    'methods': (('control', 'mealv2_without'), ()),
    'discriminator': (('off',), ('mealv2', 'mealv2_adversarial')),
    'recipe': (('mealv2',), ()),
    'teachers': (('mealv2_without',), ('logit_t1',)),
    'start': (('mealv2',), ('control',)),
    'longer': (('control_long',), ()),
    'stored': (('mealv2_without',), ()),
    'few': ((), ()),
    'students': ((), ('control', 'mealv2_without')),
    'transfer': ((), ()),
    'photos': (('photos_control',), ()),
    'icons': (('icons_control', 'icons_without', 'icons_rate'), ()),
    'long': ((), ()),
    'longest': ((), ()),
    'ledger': (('live',), ()),
    'pool': (('pool_2000',), ()),
    'one_teacher': ((), ()),
}
"""Study -> the arms that its others are compared with, and arms of other studies that its table repeats."""

_NEW = [arm.name for arm in STUDIES['ledger'] if arm.name not in ('live', 'weak_weighted')]
LEDGER = {
    **{'mealv2': 'off', 'mealv2_adversarial': 'off', 'photos_official': 'photos_without'},
    **{'icons_official': 'icons_without', 'icons_logit': 'icons_without', 'icons_pool': 'icons_without'},
    **{'ensemble_t4': 'mealv2_without', 'logit_t4_labels': 'mealv2_without', 'photos_logit': 'photos_without'},
    **dict.fromkeys(('hard_0.1', 'hard_0.5', 'mean_logits', 'equal_3', 'equal_5'), 'mealv2_without'),
    **{'unequal_weighted': 'unequal', 'taught': 'mealv2', 'decay_5e-4': 'mealv2', 'step': 'mealv2'},
    **{'mixup': 'mealv2_without', 'mixup_long': 'mealv2_without_long', 'augmented': 'mealv2_without'},
    **dict.fromkeys(_NEW, 'live'),
    **{'weak_weighted': 'weak', 'pool_9500': 'pool_2000', 'pool_57000': 'pool_2000'},
    **{f'stored_mixed_{epochs}': f'stored_crops_{epochs}' for epochs in LENGTHS},
}
"""Arm with an add-on -> the arm without it: the rows of the ledger."""

CURVES = {
    'labels_crops': ('labels', '#888888', '-'),
    'labels_mixed': ('labels, RandAugment and CutMix', '#888888', '--'),
    'stored_crops': ("teachers' predictions", '#1f5fa8', '-'),
    'stored_mixed': ("teachers' predictions, RandAugment and CutMix", '#1f5fa8', '--'),
}
"""Arms of `long` and `longest` without their length -> the second picture's label, color and line."""

WORTH_NAMING = 0.25
"""Points of top-1: an add-on whose interval ends below it does not survive."""

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t for 1 to 9 degrees of freedom."""


@dataclass(frozen=True)
class Interval:
    """A mean, its standard error, and half the width of its 95 % confidence interval."""

    mean: float
    error: float
    half_width: float


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of at least two values and how sure it is."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return Interval(statistics.mean(values), error, T_975[len(values) - 2] * error)


def paired_gain(rows: dict[str, Row], reference: dict[str, Row]) -> Interval | None:
    """Return the difference in top-1 over the seeds that both arms have; None below two seeds."""
    seeds = sorted(rows.keys() & reference.keys())
    if len(seeds) < 2:
        return None
    return interval([float(rows[seed]['top1']) - float(reference[seed]['top1']) for seed in seeds])


def read_arms(studies: Sequence[str] = ('models', *STUDIES)) -> dict[str, dict[str, Row]]:
    """Return arm -> seed -> row over the studies; the tuning runs are left out."""
    arms: dict[str, dict[str, Row]] = {}
    for study in studies:
        for row in read_rows(study):
            if row['seed'] != str(TUNING_SEED):
                arms.setdefault(row['arm'], {})[row['seed']] = row
    return arms


CHANCE = ('0.6931', '0.5')
"""Loss (ln 2) and accuracy of a discriminator whose outputs say nothing."""

ARMS = {arm.name: arm for arms in STUDIES.values() for arm in arms}
STUDY_OF = {arm.name: study for study, arms in STUDIES.items() for arm in arms}


def mean_of(rows: dict[str, Row], column: str, spec: str) -> str:
    """Return the formatted mean of a column, '-' where a row has no value."""
    values = [row[column] for row in rows.values()]
    return format(statistics.mean(map(float, values)), spec) if all(values) else '-'


def with_recording(name: str, rows: dict[str, Row]) -> dict[str, Row]:
    """Add the recording of the epochs that an arm reads to its processor time."""
    arm = ARMS[name]
    stores = read_arms([MODELS_OF[STUDY_OF[name]]]).get(arm.labels, {})
    share = min(arm.epochs, RECORDED) / RECORDED
    return {
        seed: {**row, 'seconds': str(float(row['seconds']) + share * float(stores[seed]['seconds']))} if stores else row
        for seed, row in rows.items()
    }


def study_table(study: str, arms: dict[str, dict[str, Row]]) -> str:
    """Return a study's results as a Markdown table: one arm a line."""
    references, repeated = REFERENCES[study]
    names = dict.fromkeys([*references, *repeated, *(arm.name for arm in STUDIES[study])])
    discriminator = study == 'discriminator'
    own = any(arm.control for arm in STUDIES[study])
    heads = ['arm', 'lr', 'seeds', 'top-1, %', *(f'minus {ARMS[name].label}' for name in references)]
    heads += ['minus its control'] if own else []
    heads += ['KL', 'agreement, %']
    heads += ['at chance', "discriminator's loss"] if discriminator else ['CPU s']
    lines = [f'| {" | ".join(heads)} |', '|---' + '|---:' * (len(heads) - 1) + '|']
    for name in names:
        rows = {seed: row for seed, row in arms.get(name, {}).items() if int(seed) in SEEDS}
        if len(rows) < 2:
            continue
        if study in ('long', 'longest'):
            rows = with_recording(name, rows)
        top1 = interval([float(row['top1']) for row in rows.values()])
        others = (*references, ARMS[name].control or ('control' if name in repeated else '')) if own else references
        gains = [None if name == other else paired_gain(rows, arms.get(other, {})) for other in others]
        cells = [
            ARMS[name].label,
            next(iter(rows.values()))['lr'],
            str(len(rows)),
            f'{top1.mean:.2f} ± {top1.error:.2f}',
        ]
        cells += [f'{gain.mean:+.2f} ± {gain.half_width:.2f}' if gain else '-' for gain in gains]
        cells += [mean_of(rows, 'kl', '.3f'), mean_of(rows, 'agreement', '.1f')]
        if discriminator:
            losses = [row['discriminator_loss'] for row in rows.values()]
            at_chance = sum(
                (row['discriminator_loss'], row['discriminator_accuracy']) == CHANCE for row in rows.values()
            )
            cells += [
                f'{at_chance} of {len(losses)}' if all(losses) else '-',
                mean_of(rows, 'discriminator_loss', '.3f'),
            ]
        else:
            cells += [mean_of(rows, 'seconds', '.0f')]
        lines.append(f'| {" | ".join(cells)} |')
    waiting = [ARMS[name].label for name in names if len(arms.get(name, {})) < 2]
    if waiting:
        lines += ['', f'Not run yet: {"; ".join(waiting)}.']
    return '\n'.join(lines)


VERDICTS = ('survives', 'cannot tell', 'does not')


def verdict(gain: Interval) -> str:
    """Return what an add-on's interval says: it begins above zero, ends below a gain worth naming, or neither."""
    if gain.mean - gain.half_width > 0:
        return 'survives'
    return 'does not' if gain.mean + gain.half_width < WORTH_NAMING else 'cannot tell'


def ledger_table(arms: dict[str, dict[str, Row]]) -> str:
    """Return the ledger: an add-on a line, with its gain and what that says, the best ones first."""
    rows = []
    for name, reference in LEDGER.items():
        gain = paired_gain(arms.get(name, {}), arms.get(reference, {}))
        if gain is not None:
            arm, other = ARMS[name], ARMS[reference]
            source = next((f'{name}: ' for name, data in COLOR.items() if arm.measured == data), '')
            seeds = len(arms[name].keys() & arms[reference].keys())
            points, says = f'{gain.mean:+.2f} ± {gain.half_width:.2f}', verdict(gain)
            cells = (f'{source}{arm.label}', other.label, str(arm.epochs), str(seeds), points, says)
            rows.append((VERDICTS.index(says), -gain.mean, f'| {" | ".join(cells)} |'))
    lines = ['| add-on | compared with | epochs | seeds | gain, points | |', '|---|---|---:|---:|---:|---|']
    return '\n'.join([*lines, *(line for _, _, line in sorted(rows))])


def models_table(arms: dict[str, dict[str, Row]]) -> str:
    """Return the top-1 of what the arms start from and learn from."""
    names = {'start': 'start', 'taught_start': 'start, taught', 'teacher': 'teacher', 'ensemble': 'the two teachers'}
    names |= {f'start_{count}': f'start, {count} labels; 210 and 211 are its teachers' for count in (200, 600)}
    names |= {f'start_{name}': f'start, {label}' for name, (label, _) in STUDENTS.items()}
    names |= {'plain': 'start, then cross-entropy', 'distilled': 'start, then MEAL V2 without discriminator'}
    for name in COLOR:
        names |= {f'{name}_start': f'start, {name}', f'{name}_teacher': f'teacher, {name}'}
        names |= {f'{name}_ensemble': f'both, {name}'}
    lines = ['| model | seeds | top-1, % |', '|---|---|---:|']
    for name, label in names.items():
        rows = sorted(arms.get(name, {}).items(), key=lambda item: int(item[0] or 0))
        if rows:
            seeds = ', '.join(seed for seed, _ in rows) or '-'
            lines.append(f'| {label} | {seeds} | {", ".join(row["top1"] for _, row in rows)} |')
    return '\n'.join(lines)


def fill(document: str, arms: dict[str, dict[str, Row]]) -> str:
    """Return the document with each table in its place."""
    tables = {file: models_table(read_arms([file])) for file in {'models', *MODELS_OF.values()}}
    tables |= {'verdicts': ledger_table(arms)} | {study: study_table(study, arms) for study in STUDIES}
    for name, table in tables.items():
        head, begin, rest = document.partition(f'<!-- {name} -->\n')
        if begin:
            document = f'{head}{begin}{table}\n<!-- end -->{rest.partition("<!-- end -->")[2]}'
    return document


def draw(arms: dict[str, dict[str, Row]]) -> None:
    """Draw the gain over the control of each method, with its confidence interval."""
    gains = {
        arm.label: gain
        for arm in STUDIES['methods']
        if arm.name != 'control' and (gain := paired_gain(arms.get(arm.name, {}), arms['control'])) is not None
    }
    gains = dict(sorted(gains.items(), key=lambda item: item[1].mean))
    figure = Figure(figsize=(9, 0.45 * len(gains) + 1.3), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.errorbar(
        [gain.mean for gain in gains.values()],
        list(gains),
        xerr=[gain.half_width for gain in gains.values()],
        fmt='o',
        color='#1f5fa8',
        capsize=3,
    )
    axes.axvline(0, color='#666666', linewidth=1)
    axes.grid(axis='x', alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    axes.set_xlabel('points of top-1, mean of 5 seeds and its 95 % interval')
    figure.suptitle('Gain over going on with cross-entropy for as many steps')
    with replacing(PICTURE) as path:
        figure.savefig(path, dpi=120)


def draw_curves(arms: dict[str, dict[str, Row]]) -> None:
    """Draw top-1 over processor time, a line for each way of training, from 15 epochs to 450."""
    figure = Figure(figsize=(9, 4.5), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, name in (('the two teachers', 'ensemble'), ('the starts', 'start')):
        files = (read_arms([file]) for file in set(MODELS_OF.values()))
        top1 = [float(row['top1']) for models in files for row in models.get(name, {}).values()]
        axes.axhspan(min(top1), max(top1), color='#666666', alpha=0.15)
        axes.annotate(label, (0.01, max(top1)), xycoords=('axes fraction', 'data'), va='bottom')
    for way, (label, color, style) in CURVES.items():
        names = {f'{way}_{epochs}': epochs for epochs in LENGTHS}
        rows = {epochs: with_recording(name, arms[name]) for name, epochs in names.items() if name in arms}
        seconds, top1 = ([float(mean_of(arm, column, '')) for arm in rows.values()] for column in ('seconds', 'top1'))
        if rows:
            axes.plot(seconds, top1, style, color=color, label=label)
        for epochs, x, y in zip(rows, seconds, top1, strict=True):
            axes.plot([x] * len(rows[epochs]), [float(row['top1']) for row in rows[epochs].values()], '.', color=color)
            axes.annotate(str(epochs), (x, y), (0, -14), textcoords='offset points', color=color, ha='center')
    axes.set_xscale('log')
    axes.set_xticks([30, 100, 300, 1000], ['30', '100', '300', '1000'])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    axes.set_xlabel('processor seconds after the start, recording included (beside each point: its epochs)')
    axes.set_ylabel('top-1, %')
    axes.legend(loc='lower right', frameon=False)
    figure.suptitle('How near to its teachers the student comes, and what that costs (2 seeds)')
    with replacing(CURVES_PICTURE) as path:
        figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Write or check the document."""
    parser: argparse.ArgumentParser = OneLineParser(description='Make the tables and the picture of docs/evidence.md.')
    parser.add_argument('--check', action='store_true', help='write nothing; fail if a table differs')
    args = parser.parse_args(argv)
    arms = read_arms()
    document = DOCUMENT.read_text()
    filled = fill(document, arms)
    if args.check:
        if filled != document:
            raise UserError(f'{DOCUMENT.name} differs from studies/results: python studies/report.py writes it')
        return
    with replacing(DOCUMENT) as path:
        path.write_text(filled)
    if 'control' in arms:
        draw(arms)
    if 'stored_crops_15' in arms:
        draw_curves(arms)


if __name__ == '__main__':
    run_cli(main)
