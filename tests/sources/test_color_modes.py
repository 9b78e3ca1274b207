"""Gray pictures for models of colors, and colors for models of gray, of sources that are no folders of timm's."""

from pathlib import Path

import pytest
from color_sources import RIGHT, write_fashion_mnist, write_image_folder, write_parquet, write_shards
from colors import CLASSES, evaluate, save_model, train

from timm_mealv2.cli.soft_labels import main as soft_labels

TEN = ('--num-classes', 10)


def ten_classes(path: Path, **kwargs: bool) -> Path:
    """A model of the ten classes of Fashion-MNIST, of which four have pictures."""
    save_model(path, [*CLASSES, *['apple'] * 6], used=4, **kwargs)
    return path


def test_gray_pictures_of_torchvision_train_a_model_of_colors(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / 'data')
    model = ten_classes(tmp_path / 'model.pth', gray_pictures=True)
    source = ('--dataset', 'torch/fashion_mnist', '--data-dir', tmp_path / 'data')
    row = train(tmp_path / 'run', *source, *TEN, '--initial-checkpoint', model)[0]
    assert float(row['train_loss']) < 1
    assert float(row['eval_top1']) == pytest.approx(RIGHT['validation'])
    name = f'test_resnet={model}'
    assert evaluate(tmp_path / 'e.json', name, *source)[name]['top1'] == pytest.approx(RIGHT['validation'])


def test_colors_of_torchvision_train_a_model_of_gray(tmp_path: Path) -> None:
    write_image_folder(tmp_path / 'data')
    name = save_model(tmp_path / 'gray.pth', channels=1)
    source = ('--dataset', 'torch/image_folder', '--data-dir', tmp_path / 'data')
    row = train(tmp_path / 'run', *source, '--in-chans', 1, '--initial-checkpoint', tmp_path / 'gray.pth')[0]
    assert float(row['train_loss']) < 1
    assert float(row['eval_top1']) == pytest.approx(RIGHT['validation'])
    assert evaluate(tmp_path / 'e.json', name, *source)[name]['top1'] == pytest.approx(RIGHT['validation'])


def test_colors_of_torchvision_are_recorded_for_a_model_of_gray(tmp_path: Path) -> None:
    write_image_folder(tmp_path / 'data')
    name = save_model(tmp_path / 'gray.pth', channels=1)
    source = ['--dataset', 'torch/image_folder', '--data-dir', tmp_path / 'data', '--in-chans', 1]
    recording = ['record', '--teachers', name, *source, '--img-size', 32, '--no-aug', '--epochs', 1, '--top-k', 4]
    more = ['--out', tmp_path / 'store', '--workers', 0, '--device', 'cpu']
    soft_labels([str(word) for word in (*recording, *more)])
    start = ('--initial-checkpoint', tmp_path / 'gray.pth', '--soft-labels', tmp_path / 'store')
    assert float(train(tmp_path / 'run', *source, *start)[0]['train_kl']) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize('kind', ['wds', 'hfids'])
@pytest.mark.parametrize('gray', [True, False], ids=['gray model', 'gray pictures'])
def test_evaluation_of_a_stream(kind: str, gray: bool, tmp_path: Path) -> None:
    mode = 'RGB' if gray else 'L'
    name = save_model(tmp_path / 'model.pth', channels=1 if gray else 3, gray_pictures=not gray)
    if kind == 'wds':
        source = ['--dataset', 'wds/', '--data-dir', write_shards(tmp_path / 'data', mode)]
    else:
        source = ['--dataset', f'hfids/{write_parquet(tmp_path / "data", mode)}']
    row = evaluate(tmp_path / 'e.json', name, *source)[name]
    assert row['samples'] == 12
    assert row['top1'] == pytest.approx(RIGHT['validation'])
