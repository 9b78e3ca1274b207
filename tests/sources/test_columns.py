"""Hugging Face sets with columns of other names than `image` and `label`, and with labels that are words."""

from pathlib import Path

import pytest
from color_sources import RIGHT, write_parquet
from colors import CLASSES, evaluate, save_model, train

from timm_mealv2 import UserError
from timm_mealv2.cli.soft_labels import main as soft_labels

COLUMNS = ('--input-key', 'img', '--target-key', 'fine_label')


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
@pytest.mark.parametrize(
    ('image', 'label', 'option'), [('img', 'label', '--input-key'), ('image', 'x', '--target-key')]
)
def test_a_column_that_is_not_there(
    kind: str, image: str, label: str, option: str, knowing: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = ['--dataset', f'{kind}/{write_parquet(tmp_path / "data", image=image, label=label)}']
    name = f'test_resnet={knowing}'
    recording = ['record', '--teachers', name, *source, '--epochs', '1', '--out', str(tmp_path / 'store')]
    programs = [
        lambda: train(tmp_path / 'run', *source, '--initial-checkpoint', knowing),
        lambda: evaluate(tmp_path / 'e.json', name, *source),
        *([lambda: soft_labels([*recording, '--device', 'cpu'])] if kind == 'hfds' else []),
    ]
    for program in programs:
        caplog.clear()
        with pytest.raises(UserError) as caught:
            program()
        assert option in str(caught.value)
        assert image in str(caught.value)  # the columns that there are
        assert label in str(caught.value)
        assert not any('cannot be read' in line for line in caplog.messages)


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_columns_that_are_named(kind: str, knowing: Path, tmp_path: Path) -> None:
    source = ('--dataset', f'{kind}/{write_parquet(tmp_path / "data", image="img", label="fine_label")}', *COLUMNS)
    row = train(tmp_path / 'run', *source, '--initial-checkpoint', knowing)[0]
    assert float(row['eval_top1']) == pytest.approx(RIGHT['validation'])


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_classes_that_a_set_names_are_those_of_the_model(kind: str, parquet: Path, tmp_path: Path) -> None:
    name = save_model(tmp_path / 'm.pth', CLASSES[::-1], names=CLASSES[::-1])
    row = evaluate(tmp_path / 'e.json', name, '--dataset', f'{kind}/{parquet}')[name]
    assert row['top1'] == pytest.approx(RIGHT['validation'])


def test_labels_that_are_words_are_numbered_in_their_order(knowing: Path, tmp_path: Path) -> None:
    # The validation split alone would number three words, and sea and sun otherwise.
    root = write_parquet(tmp_path / 'data', text_labels=True, not_in_validation='leaf')
    source = ['--dataset', f'hfds/{root}']
    row = train(tmp_path / 'run', *source, '--initial-checkpoint', knowing)[0]
    assert float(row['train_loss']) < 1e-3
    assert float(row['eval_top1']) == pytest.approx(100 * 8 / 9)
    trained = f'test_resnet={tmp_path / "run" / "last.pth.tar"}'
    predictions = tmp_path / 'predictions.csv'
    row = evaluate(tmp_path / 'e.json', trained, *source, '--predictions', predictions)[trained]
    assert (row['samples'], row['top1']) == (9, pytest.approx(100 * 8 / 9))
    assert all(f',{name},' in predictions.read_text() for name in ('apple', 'sea', 'sun'))


def test_words_of_a_stream_need_a_class_map(knowing: Path, tmp_path: Path) -> None:
    source = ['--dataset', f'hfids/{write_parquet(tmp_path / "data", text_labels=True)}']
    name = f'test_resnet={knowing}'
    with pytest.raises(UserError, match='--class-map'):
        evaluate(tmp_path / 'e.json', name, *source)
    (tmp_path / 'map.txt').write_text('\n'.join(CLASSES))
    top1 = evaluate(tmp_path / 'e.json', name, *source, '--class-map', tmp_path / 'map.txt')[name]['top1']
    assert top1 == pytest.approx(RIGHT['validation'])
