"""The studies of docs/evidence.md: their statistics, resuming, and that the document shows their results."""

import csv
import dataclasses
import importlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from timm_mealv2.losses import similarity_loss
from timm_mealv2.training.settings import parse_args

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / 'examples/fashion_mnist'


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The programs in studies/, which import each other by their plain names."""
    monkeypatch.syspath_prepend(str(ROOT / 'studies'))
    names = ('arms', 'later_arms', 'ledger', 'run', 'report', 'data_sets', 'make_data')
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


class InThisProcess(Executor):
    """Runs a job when it is submitted, and counts."""

    jobs = 0

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        self.jobs += 1
        return future


def test_a_paired_gain_is_the_mean_difference_over_shared_seeds_with_students_interval(
    studies: dict[str, ModuleType],
) -> None:
    arm = {str(seed): {'top1': top1} for seed, top1 in enumerate(('82.0', '84.0', '86.0'))}
    control = {str(seed): {'top1': top1} for seed, top1 in enumerate(('81.0', '82.0', '83.0', '50.0'))}
    gain = studies['report'].paired_gain(arm, control)
    # Differences 1, 2, 3: deviation 1, error 1/sqrt(3), t(0.975, 2) = 4.303.
    assert gain.mean == pytest.approx(2)
    assert gain.error == pytest.approx(0.57735, abs=1e-5)
    assert gain.half_width == pytest.approx(2.4843, abs=1e-4)
    assert studies['report'].paired_gain(arm, {'0': {'top1': '81.0'}}) is None


def test_an_add_on_survives_above_zero_and_fails_below_a_gain_worth_naming(studies: dict[str, ModuleType]) -> None:
    report = studies['report']
    for mean, half_width, verdict in ((0.2, 0.1, 'survives'), (0.0, 0.2, 'does not'), (0.1, 0.2, 'cannot tell')):
        assert report.verdict(report.Interval(mean, half_width / 2, half_width)) == verdict
    rows = report.ledger_table(
        {
            'off': {str(seed): {'top1': '80.0'} for seed in range(3)},
            'mealv2': {str(seed): {'top1': f'8{seed + 2}.0'} for seed in range(3)},
        }
    )
    assert rows.splitlines()[2:] == ['| MEAL V2, official discriminator | none | 15 | 3 | +3.00 ± 2.48 | survives |']


def test_the_losses_of_the_ledger_are_those_of_the_papers(studies: dict[str, ModuleType]) -> None:
    losses = studies['ledger'].LOSSES
    logits, teacher = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_p = teacher.log_softmax(dim=1)
    plain, entropy = similarity_loss(logits, log_p)
    # A student that gives the teachers' probabilities has nothing to relate better.
    assert float(losses['dist_2'](log_p, log_p)[0]) == pytest.approx(float(entropy))
    p, q = log_p.exp().numpy(), logits.softmax(dim=1).numpy()
    related = sum(1 - np.corrcoef(a, b).diagonal(offset=len(a)).mean() for a, b in ((p, q), (p.T, q.T)))
    assert float(losses['dist_2'](logits, log_p)[0]) == pytest.approx(float(plain) + 2 * related)
    # Standardized logits know neither scale nor shift.
    same = losses['standardized'](3 * logits + 1, log_p)[0]
    assert float(same) == pytest.approx(float(losses['standardized'](logits, log_p)[0]))
    each = -(p * logits.log_softmax(dim=1).numpy()).sum(axis=1)
    uncertain = -(p * np.log(p)).sum(axis=1)
    for name, weights in (('certain', np.log(4) - uncertain), ('uncertain', uncertain)):
        assert float(losses[name](logits, log_p)[0]) == pytest.approx(np.average(each, weights=weights))


def test_every_arm_is_a_command_line_that_the_training_program_takes(
    studies: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    arms = [arm for group in studies['later_arms'].STUDIES.values() for arm in group]
    assert len({arm.name for arm in arms}) == len(arms)
    for arm in arms:
        # The model that it starts from and the predictions that it reads are made by the study.
        options = studies['run'].arm_job(arm, 0, 0.05).options.partition(' --initial-checkpoint')[0]
        made, stored, _ = options.partition('--soft-labels')
        options = f'{made} --teachers {studies["arms"].ONE}' if stored else options
        parse_args(shlex.split(f'{studies["arms"].COMMON} {options}'))


def test_a_study_goes_on_where_it_was(
    studies: dict[str, ModuleType], small_sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, arms = studies['run'], studies['arms']
    teacher = f'local-dir:{EXAMPLE / "teachers/teacher_b"}'
    fashion = dataclasses.replace(arms.FASHION, folder=str(small_sample), teacher=teacher)
    data = {'data': str(small_sample), 'measured': fashion}
    options, losses = f'--teachers {teacher} --checkpoint-hist 2', []
    monkeypatch.chdir(ROOT)
    for name, value in {
        'RESULTS': tmp_path / 'results',
        'MODELS': str(tmp_path / 'models'),
        'LEARNING_RATES': (0.05, 0.1),
        'STUDIES': {'smoke': (arms.Arm('first', 'First', options, start='', epochs=2, loss='counted', **data),)},
        'LOSSES': {'counted': lambda *logits: losses.append(similarity_loss(*logits)) or losses[-1]},
    }.items():
        monkeypatch.setattr(run, name, value)
    pool = InThisProcess()
    run.run_study(pool, 'smoke', seeds=(0,))
    assert pool.jobs == 3  # two learning rates, one seed
    assert losses  # the arm's own loss was taken
    rows = run.read_rows('smoke')
    tuning = {row['lr']: float(row['tuning_top1']) for row in rows if row['seed'] == '100'}
    assert rows[-1]['lr'] == max(tuning, key=lambda lr: tuning[lr])
    assert float(rows[-1]['kl']) > 0
    assert list((tmp_path / 'models').iterdir()) == []

    path = tmp_path / 'results/smoke.csv'
    complete = path.read_text()
    path.write_text(''.join(complete.splitlines(keepends=True)[:-1]))
    run.run_study(pool, 'smoke', seeds=(0,))
    assert pool.jobs == 4
    with path.open(newline='') as file:
        again = list(csv.DictReader(file))
    assert [{**row, 'seconds': ''} for row in again] == [{**row, 'seconds': ''} for row in rows]


def test_the_document_has_the_tables_of_the_csv_files(
    studies: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = studies['report']
    report.main(['--check'])
    changed = tmp_path / 'evidence.md'
    text = report.DOCUMENT.read_text()
    row = next(line for line in text.splitlines() if line.startswith('| control, cross-entropy'))
    changed.write_text(text.replace(row, row.replace('±', '+-')))
    monkeypatch.setattr(report, 'DOCUMENT', changed)
    with pytest.raises(report.UserError, match='differs from studies/results'):
        report.main(['--check'])


def test_squares_for_training_and_for_testing_are_all_of_a_photo_and_share_none(
    studies: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, column = np.indices((192, 256)) // 32
    Image.fromarray(np.stack([20 * row, 20 * column, 0 * row], axis=2).astype(np.uint8)).save(tmp_path / 'photo.png')
    monkeypatch.chdir(tmp_path)
    studies['make_data'].main(['photos', 'photo.png'])

    def places(split: str) -> set[tuple[int, ...]]:
        files = (tmp_path / 'output/studies/photos' / split / 'photo').iterdir()
        return {tuple(np.unique(np.asarray(Image.open(file)).reshape(-1, 3), axis=0).ravel()) for file in files}

    train, tuning, test = (places(split) for split in ('train_all', 'tuning', 'validation'))
    assert [len(split) for split in (train, tuning, test)] == [24, 6, 18]
    assert len(train | tuning | test) == 48
    assert len(places('train')) == 8
    assert places('train') < train


def test_icons_of_the_last_vendor_are_the_test_images_unless_another_has_the_same(
    studies: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data = studies['make_data']
    codes = [f'{0x1F400 + number:04X}' for number in range(make_data.FEWEST)]
    lines = [f'{code} ; fully-qualified' for code in codes]
    few = [f'{0x1F500 + number:04X} ; fully-qualified' for number in range(make_data.FEWEST - 1)]
    groups = ('# group: Animals', '# subgroup: cat & dog', *lines, '1F400 1F3FF ; fully-qualified')
    (tmp_path / 'emoji.txt').write_text('\n'.join((*groups, '# subgroup: few', *few, '# group: Flags', *lines)))
    for vendor in range(3):
        (tmp_path / str(vendor)).mkdir()
        for number, code in enumerate(codes):
            color = (0, 0, 0) if number == vendor == 0 or number == vendor == 2 else (100 + vendor, 10 * number, 0)
            Image.new('RGB', (4, 4), color).save(tmp_path / f'{vendor}/{code}.png')
    monkeypatch.setattr(make_data, 'EMOJI', tmp_path / 'emoji.txt')
    monkeypatch.chdir(tmp_path)
    make_data.main(['icons', '0', '1', '2'])

    def vendors(split: str) -> list[int]:
        assert [folder.name for folder in (tmp_path / 'output/studies/icons' / split).iterdir()] == ['cat-dog']
        files = sorted((tmp_path / 'output/studies/icons' / split / 'cat-dog').iterdir())
        return [Image.open(file).getpixel((16, 16))[0] % 100 for file in files]

    assert vendors('train_all') == [0, 1] * 8
    assert len(vendors('train')) == 8
    assert set(vendors('train')) == {0, 1}
    assert vendors('tuning') == [2] * 2
    assert vendors('validation') == [2] * 5


def test_the_named_teachers_are_files_that_the_studies_make(studies: dict[str, ModuleType]) -> None:
    pairs = {'two': 'teacher', 'photos': 'photos_teacher', 'icons': 'icons_teacher'}
    named = {name: [f'{model}-10', f'{model}-11'] for name, model in pairs.items()}
    for name, models in (named | {'one': ['teacher-11']}).items():
        folder = ROOT / f'studies/teachers/{name}'
        config = json.loads((folder / 'config.json').read_text())
        paths = [(folder / teacher.partition('=')[2]).resolve() for teacher in config['model_args']['teachers']]
        made = (ROOT / studies['arms'].MODELS).resolve()
        assert paths == [made / model / 'last.pth.tar' for model in models]
