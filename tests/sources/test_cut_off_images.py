"""A picture that is cut off: picture 7 of the training split and picture 2 of the validation split, of every source."""

from pathlib import Path

import pytest
from color_sources import write_parquet, write_shards
from colors import evaluate, train

from timm_mealv2 import UserError
from timm_mealv2.cli.soft_labels import main as soft_labels

UNREADABLE = {'train': 7, 'validation': 2}
TOP1 = 100 * 10 / 11  # one of the eleven that are left has a wrong label


def damaged(kind: str, root: Path) -> list[str]:
    if kind == 'wds':
        return ['--dataset', 'wds/', '--data-dir', str(write_shards(root, unreadable=UNREADABLE))]
    return ['--dataset', f'{kind}/{write_parquet(root, unreadable=UNREADABLE)}']


@pytest.mark.parametrize('kind', ['wds', 'hfds', 'hfids'])
def test_training_leaves_it_out_and_names_it(
    kind: str, knowing: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = damaged(kind, tmp_path / 'data')
    with caplog.at_level('INFO'):
        row = train(tmp_path / 'run', *source, '--initial-checkpoint', knowing)[0]
    assert float(row['train_loss']) < 1e-3
    assert float(row['eval_top1']) == pytest.approx(TOP1)
    left_out = [line for line in caplog.messages if 'cannot be read' in line]
    for name in ('train #7', 'validation #2') if kind == 'hfds' else ('train', 'validation'):
        assert sum(name in line.partition('read')[2] for line in left_out) == 1, left_out


@pytest.mark.parametrize('kind', ['wds', 'hfids'])
def test_evaluation_counts_it(kind: str, knowing: Path, tmp_path: Path) -> None:
    name = f'test_resnet={knowing}'
    row = evaluate(tmp_path / 'e.json', name, *damaged(kind, tmp_path / 'data'))[name]
    assert row['samples'] == 11
    assert row['top1'] == pytest.approx(TOP1)
    assert row['unreadable'] == 1


def test_too_many_end_the_training_on_a_stream_too(knowing: Path, tmp_path: Path) -> None:
    source = damaged('wds', tmp_path / 'data')
    with pytest.raises(UserError, match='--max-bad-images allows 0'):
        train(tmp_path / 'run', *source, '--initial-checkpoint', knowing, '--max-bad-images', 0)


def test_recording_names_it(
    knowing: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    words = ['record', '--teachers', f'test_resnet={knowing}', *damaged('hfds', tmp_path / 'data'), '--img-size', 32]
    words += ['--epochs', 1, '--out', tmp_path / 'store', '--no-aug', '--top-k', 4, '--workers', 0, '--device', 'cpu']
    with caplog.at_level('INFO'):
        soft_labels([str(word) for word in words])
    assert 'train #7' in caplog.text
    capsys.readouterr()
    soft_labels(['info', str(tmp_path / 'store')])
    assert '1 images without a record' in capsys.readouterr().out
