"""ONNX files of an export: what they predict, what they say of themselves, and what the card says of them."""

import json
import shutil
from pathlib import Path

import onnx
import pytest
import timm
import torch
from images import CLASSES, write_images

from timm_mealv2.cli.hub import main as hub
from timm_mealv2.data.class_names import class_names_of
from timm_mealv2.errors import UserError
from timm_mealv2.hub import onnx_export
from timm_mealv2.models.onnx_model import OnnxModel
from timm_mealv2.training.run import main as train


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with 210 validation images."""
    root = tmp_path_factory.mktemp('onnx')
    write_images(root / 'data' / 'train', 10, seed=0)
    write_images(root / 'data' / 'validation', 70, seed=1)
    train(
        f'--data-dir {root}/data --model test_resnet --num-classes 3 --img-size 32 --batch-size 6 --epochs 1 --lr 0.05 '
        f'--warmup-epochs 0 --workers 0 --device cpu --output {root} --experiment run'.split()
    )
    return root / 'run'


@pytest.fixture(scope='module')
def folder(run: Path) -> Path:
    """The export of the run, with both files."""
    hub(['export', str(run / 'last.pth.tar'), '--out', str(run.parent / 'export'), '--int8'])
    return run.parent / 'export'


def test_the_files_predict_what_the_model_predicts(folder: Path) -> None:
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    exact, quantized = (OnnxModel(folder / name) for name in ('model.onnx', 'model_int8.onnx'))
    config = json.loads((folder / 'config.json').read_text())
    assert class_names_of(exact) == class_names_of(quantized) == config['label_names']
    assert exact.pretrained_cfg['mean'] == tuple(config['pretrained_cfg']['mean'])
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        with torch.inference_mode():
            torch.testing.assert_close(exact(images), model(images), atol=1e-4, rtol=0)
            assert 0 < (quantized(images) - model(images)).abs().max() < 1
    assert (folder / 'model_int8.onnx').stat().st_size < 0.5 * (folder / 'model.onnx').stat().st_size
    card = (folder / 'README.md').read_text()
    rows = [line for line in card.splitlines() if line.startswith(('| model.', '| model_int8'))]
    assert 'On the 210 validation images' in card
    assert len(rows) == 3
    assert rows[0].split('|')[3] == rows[1].split('|')[3]  # top-1


def test_the_card_counts_classes_by_their_names(run: Path, tmp_path: Path) -> None:
    """On a folder that lacks the first class, which the run had; the model always says the second."""
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)
    checkpoint['state_dict']['fc.weight'].zero_()
    checkpoint['state_dict']['fc.bias'].copy_(torch.tensor([0.0, 1.0, 0.0]))
    torch.save(checkpoint, tmp_path / 'always.pth.tar')
    shutil.copytree(run.parent / 'data', tmp_path / 'data')
    for name in (CLASSES[0], CLASSES[2]):
        shutil.rmtree(tmp_path / 'data' / 'validation' / name)
    options = ['--out', str(tmp_path / 'out'), '--onnx', '--data-dir', str(tmp_path / 'data')]
    hub(['export', str(tmp_path / 'always.pth.tar'), *options])
    card = (tmp_path / 'out' / 'README.md').read_text()
    (row,) = [line for line in card.splitlines() if line.startswith('| model.onnx')]
    assert '100.00' in row


def test_a_file_that_predicts_something_else_is_refused(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: torch.nn.Module, path: Path, names: list[str] | None) -> None:
        file = onnx.load(folder / 'model.onnx')
        (weight,) = (tensor for tensor in file.graph.initializer if tensor.dims == [3])  # the classifier's bias
        values = onnx.numpy_helper.to_array(weight).copy()
        values[0] += 0.01
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(file, path)

    monkeypatch.setattr(onnx_export, 'write_onnx', spoil)
    with pytest.raises(UserError, match='predicts something else than the model'):
        hub(['export', str(run / 'last.pth.tar'), '--out', str(tmp_path / 'out'), '--onnx'])
    assert not (tmp_path / 'out').exists()


def test_a_data_set_that_is_gone_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match='--data-dir'):
        hub(['export', str(run / 'last.pth.tar'), '--out', str(tmp_path / 'out'), '--onnx', '--data-dir', '/absent'])
