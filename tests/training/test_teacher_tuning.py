"""The teachers of a run are tuned once: what was chosen is in its folder, and a resumed run keeps to it."""

import json
from pathlib import Path

import pytest
from quick_training import Train, summary

from timm_mealv2.models import tuning
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.training.teacher_tuning import FILE


def test_a_resumed_run_keeps_the_forms_that_it_has_chosen(
    train: Train, teachers: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = ('--teachers', *teachers, '--teacher-tune', 'on', '--no-preflight')
    folder = train('run', *options, '--epochs', 1)
    choice = json.loads((folder / FILE).read_text())
    assert [row['teacher'] for row in choice['teachers']] == teachers
    assert choice['images'] == [4, 3, 16, 16]

    forms = ['folded', 'channels_last']
    for row, form in zip(choice['teachers'], forms, strict=True):
        row['chosen'] = form
    (folder / FILE).write_text(json.dumps(choice))
    tune, taken = EnsembleTeacher.tune, []
    run_as = EnsembleTeacher.run_as
    monkeypatch.setattr(EnsembleTeacher, 'tune', None)
    monkeypatch.setattr(EnsembleTeacher, 'run_as', lambda self, *args: (taken.append(args), run_as(self, *args)))
    with caplog.at_level('INFO'):
        train('run', *options, '--epochs', 2, '--resume', 'auto')
        train('other', *options, '--epochs', 3, '--resume', folder / 'last.pth.tar')
    assert taken == [(forms, [4, 3, 16, 16])] * 2
    assert 'The teachers run as before: folded, channels_last.' in caplog.text
    assert json.loads((folder.parent / 'other' / FILE).read_text()) == choice

    measured = []
    monkeypatch.setattr(EnsembleTeacher, 'tune', lambda self, *args: (measured.append(args), tune(self, *args))[1])
    (folder / FILE).write_text('{')  # damaged
    train('run', *options, '--epochs', 3, '--resume', 'auto')
    assert len(measured) == 1


def test_tuned_teachers_teach_the_same(
    train: Train, teachers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, '_LEAST', {})
    monkeypatch.setattr(tuning, '_fastest', lambda times: len(times) - 1)
    # At a rate of 0.05 noise of 3e-8 in the teachers' logits, as the forms' rounding is, changes the loss by 1e-3.
    options = ('--teachers', *teachers, '--drop', 0.2, '--lr', 1e-4)
    rows = [summary(train(how, *options, '--teacher-tune', how))[-1] for how in ('on', 'off')]
    choice = json.loads((tmp_path / 'on' / FILE).read_text())
    assert all(row['chosen'].endswith('+folded') for row in choice['teachers'])
    for column in ('train_loss', 'train_kl', 'eval_loss'):
        assert float(rows[0][column]) == pytest.approx(float(rows[1][column]), abs=1e-5), column


def test_off_tunes_nothing(train: Train, teachers: list[str]) -> None:
    assert not (train('off', '--teachers', *teachers, '--epochs', 1) / FILE).exists()
