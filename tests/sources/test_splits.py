"""Sources whose splits have one root: a stream of shards, and Hugging Face sets with a folder for their cache.

The accuracy on the validation split (91.67 %) is another than that on the training split (100 %).
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from color_sources import RIGHT, write_fashion_mnist, write_image_folder
from colors import STANDING, evaluate, preflight, summary, train
from forked import Forked

from timm_mealv2 import UserError
from timm_mealv2.cli.soft_labels import main as soft_labels

Source = Callable[[str], list[str]]

every_kind = pytest.mark.parametrize('kind', ['wds', 'hfds', 'hfids'])


@every_kind
def test_a_training_is_judged_on_the_validation_split(kind: str, source: Source, knowing: Path, tmp_path: Path) -> None:
    rows = train(tmp_path / 'run', *source(kind), '--initial-checkpoint', knowing)
    assert float(rows[0]['train_loss']) < 1e-3  # every label of the training split is the right one
    assert float(rows[0]['eval_top1']) == pytest.approx(RIGHT['validation'])


@every_kind
def test_an_unlabeled_training_is_judged_on_the_validation_split(
    kind: str, source: Source, knowing: Path, tmp_path: Path
) -> None:
    train(tmp_path / 'run', *source(kind), '--unlabeled', '--teachers', f'test_resnet={knowing}')
    assert preflight(tmp_path / 'run')['ensemble']['samples'] == 12


@every_kind
def test_evaluation_of_a_split_by_its_name(kind: str, source: Source, knowing: Path, tmp_path: Path) -> None:
    for split, count in (('train', 16), ('validation', 12)):
        model = f'test_resnet={knowing}'
        row = evaluate(tmp_path / 'results.json', model, *source(kind), '--split', split)[model]
        assert row['samples'] == count
        assert row['top1'] == pytest.approx(RIGHT[split])


@every_kind
def test_a_resumed_training_goes_on_with_the_next_epoch(
    kind: str, source: Source, knowing: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = [*source(kind), '--initial-checkpoint', knowing, '--resume', 'auto']
    train(tmp_path / 'run', *options)
    with caplog.at_level('INFO'):
        rows = train(tmp_path / 'run', *options, '--epochs', 2)
    assert 'epoch 2, batch 0, update 4' in caplog.text
    assert [float(row['eval_top1']) for row in rows] == pytest.approx([RIGHT['validation']] * 2)


def test_a_training_on_labels_recorded_from_a_hugging_face_set(source: Source, knowing: Path, tmp_path: Path) -> None:
    store, size = tmp_path / 'store', ['--img-size', '32', '--no-aug']
    words = ['record', '--teachers', f'test_resnet={knowing}', *source('hfds'), '--epochs', 1, '--out', store, *size]
    soft_labels([str(word) for word in (*words, '--top-k', 4, '--workers', 0, '--device', 'cpu')])
    rows = train(tmp_path / 'run', *source('hfds'), '--initial-checkpoint', knowing, '--soft-labels', store)
    assert float(rows[0]['train_kl']) == pytest.approx(0, abs=1e-3)  # student and teacher are one
    assert float(rows[0]['eval_top1']) == pytest.approx(RIGHT['validation'])
    with pytest.raises(UserError, match='--soft-labels'):
        train(tmp_path / 'stream', *source('hfids'), '--initial-checkpoint', knowing, '--soft-labels', store)


@pytest.mark.parametrize('kind', ['wds', 'hfids'])
def test_a_stream_cannot_be_recorded(kind: str, source: Source, knowing: Path, tmp_path: Path) -> None:
    words = ['record', '--teachers', f'test_resnet={knowing}', *source(kind), '--epochs', '1', '--device', 'cpu']
    with pytest.raises(UserError, match='stream'):
        soft_labels([*words, '--out', str(tmp_path / 'store')])
    assert not (tmp_path / 'store').exists()


def test_two_processes_share_the_shards_of_both_splits(
    source: Source, knowing: Path, tmp_path: Path, program: Forked
) -> None:
    options = ('--initial-checkpoint', knowing, '--batch-size', 2, '--validation-batch-size', 3)
    program.run(tmp_path, *STANDING, *source('wds'), *options, '--experiment', 'run', processes=2)
    row = summary(tmp_path / 'run')[0]
    assert float(row['train_loss']) < 1e-3
    assert float(row['eval_top1']) == pytest.approx(RIGHT['validation'])


def test_a_split_that_is_not_there_is_named(knowing: Path, tmp_path: Path) -> None:
    name = f'test_resnet={knowing}'
    folder = write_image_folder(tmp_path / 'folder')
    (folder / 'validation').rename(tmp_path / 'away')
    write_fashion_mnist(tmp_path / 'mnist')
    torchs = ['--dataset', 'torch/image_folder', '--data-dir', folder]
    mnist = ['--dataset', 'torch/fashion_mnist', '--data-dir', tmp_path / 'mnist']
    recording = ['record', '--teachers', name, '--epochs', 1, '--device', 'cpu', '--out', tmp_path / 'store']
    for option, source in (
        ('--val-split', torchs),  # torchvision would take both for classes of one set
        ('--val-split', ['--data-dir', folder]),
        ('--val-split', [*torchs, '--unlabeled', '--val-split', 'absent', '--teachers', name]),
        ('--train-split', [*mnist, '--train-split', 'trian']),  # timm would take the test images
    ):
        with pytest.raises(UserError, match=f'no split .*{option}'):
            train(tmp_path / 'run', *source, '--initial-checkpoint', knowing)
    for source in (torchs, mnist, ['--data-dir', folder]):
        with pytest.raises(UserError, match=r'no split .*--split'):
            evaluate(tmp_path / 'e.json', name, *source, '--split', 'absent')
        with pytest.raises(UserError, match=r'no split .*--train-split'):
            soft_labels([str(word) for word in (*recording, *source, '--train-split', 'absent')])


# What a stream does otherwise than numbered images


@pytest.mark.parametrize('kind', ['wds', 'hfids'])
def test_mixing_of_a_stream_ends_where_it_is_told(kind: str, source: Source, knowing: Path, tmp_path: Path) -> None:
    mixing = ('--mixup', 1, '--mixup-off-epoch', 1, '--epochs', 2)
    where = source(kind) if kind == 'wds' else source(kind)[:2]
    rows = train(tmp_path / 'run', *where, '--initial-checkpoint', knowing, *mixing)
    first, second = (float(row['train_loss']) for row in rows)
    assert first > 0.1
    assert second < 1e-3  # each image is one color again


def test_what_needs_numbered_images_is_refused_on_a_stream(source: Source, knowing: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match='--samples-per-decode'):
        train(tmp_path / 'run', *source('wds'), '--initial-checkpoint', knowing, '--samples-per-decode', 2)
    assert not (tmp_path / 'run').exists()


def test_a_stream_with_fewer_batches_than_it_says_ends_its_last_update(
    source: Source, knowing: Path, tmp_path: Path
) -> None:
    # Three workers share two shards: six batches are announced, and four come at first. All six are one update.
    more = ('--workers', 3, '--grad-accum-steps', 6, '--lr', 1, '--opt', 'momentum', '--smoothing', 0.1)
    rows = train(tmp_path / 'run', *source('wds'), '--initial-checkpoint', knowing, *more)
    trained = timm.create_model('test_resnet', num_classes=4, checkpoint_path=str(tmp_path / 'run' / 'last.pth.tar'))
    begun = timm.create_model('test_resnet', num_classes=4, checkpoint_path=str(knowing))
    assert float(rows[0]['train_loss']) > 0
    assert not torch.equal(trained.fc.weight, begun.fc.weight)


def test_a_stream_with_more_batches_than_it_says(
    source: Source, knowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Eight images are announced, 16 come, as of a set whose count is out of date.
    monkeypatch.setattr(timm.data.dataset.IterableImageDataset, '__len__', lambda _: 8)
    options = (*source('wds'), '--unlabeled', '--teachers', f'test_resnet={knowing}', '--discriminator-weight', 0)
    more = ('--grad-accum-steps', 2, '--lr', 0.05, '--opt', 'momentum', '--epochs', 4)
    rows = train(tmp_path / 'run', *options, *more, '--no-preflight')
    losses = [float(row['train_loss']) for row in rows]
    assert losses[-1] < losses[0]
