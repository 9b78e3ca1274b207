"""`--dry-run`: the real loop is measured, and nothing is written."""

import re

import pytest
from quick_training import Train

from timm_mealv2.training import dry_run


def test_a_dry_run_measures_the_whole_loop(
    train: Train, teachers: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, 'SECONDS', 1)
    options = ('--teachers', *teachers, '--dry-run', '--grad-accum-steps', 2, '--workers', 1)
    folder = train('dry', *options)
    assert not folder.exists()
    text = capsys.readouterr().out
    seconds, batches = map(float, re.search(r'over (\d+) s \((\d+) batches\)', text).groups())  # type: ignore[union-attr]
    assert seconds <= 5
    assert batches > 5  # more than an epoch
    parts = dict(re.findall(r'(data wait|teachers|student|update) ([\d.e-]+) s', text))
    assert set(parts) == {'data wait', 'teachers', 'student', 'update'}
    assert float(parts['teachers']) > 0
    batch = float(re.search(r'([\d.]+) s a batch', text)[1])  # type: ignore[index]
    assert sum(map(float, parts.values())) == pytest.approx(batch, rel=0.02)
    assert re.search(r'peak memory: [\d.]+ GiB', text)
    assert re.search(r'whole run: [\d.]+ s without evaluation, [\d.]+ s with 2 evaluations; nothing was written', text)
