"""The export: plain timm loads the folder and gets the same weights, pixels and classes; or there is no folder."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.utils import ModelEmaV3

from timm_mealv2 import hub
from timm_mealv2.errors import UserError

GREY = {
    'input_size': (1, 48, 40),
    'interpolation': 'bilinear',
    'mean': (0.286,),
    'std': (0.353,),
    'crop_pct': 1.0,
    'crop_mode': 'squash',
}


def save(path: Path, model_name: str, model: torch.nn.Module, args: dict[str, Any], **entries: Any) -> Path:
    """Write a checkpoint as timm's saver does, with what our training adds in `entries`."""
    namespace = argparse.Namespace(**{'model': model_name, 'gp': None, 'bn_eps': None, 'model_kwargs': {}, **args})
    content = {'epoch': 1, 'arch': model_name, 'version': 2, 'args': namespace, 'state_dict': model.state_dict()}
    torch.save({**content, **entries}, path)
    return path


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Give every weight and buffer of floats values that no initialisation gives."""
    torch.manual_seed(3)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model.eval()


@pytest.fixture
def grey(tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    """A small ResNet on grey pictures with its checkpoint."""
    kwargs = {'channels': (8, 8, 16, 16), 'stem_width': 8, 'output_stride': 8}
    model = randomised(timm.create_model('resnet10t', num_classes=3, in_chans=1, **kwargs))
    args = {'num_classes': 3, 'in_chans': None, 'model_kwargs': kwargs, 'input_size': [1, 48, 40]}
    names = {'data_config': GREY, 'class_names': ['bag', 'coat', 'shirt']}
    return model, save(tmp_path / 'last.pth.tar', 'resnet10t', model, args, **names)


def test_plain_timm_in_a_fresh_process_gets_the_same_outputs_pixels_and_names(
    grey: tuple[torch.nn.Module, Path], tmp_path: Path
) -> None:
    model, checkpoint = grey
    folder = hub.export_model(checkpoint, tmp_path / 'deep/out')
    images = torch.randn(2, 1, 48, 40)
    torch.save(images, tmp_path / 'images.pt')
    code = """
import json, sys, timm, torch
from timm.data import resolve_model_data_config
model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval()
torch.save(model(torch.load(sys.argv[2], weights_only=True)).detach(), sys.argv[3])
assert 'timm_mealv2' not in sys.modules
cfg = model.pretrained_cfg
print(json.dumps([resolve_model_data_config(model), cfg['label_names'], cfg['num_classes'], cfg['architecture']]))
"""
    command = [sys.executable, '-c', code, str(folder), str(tmp_path / 'images.pt'), str(tmp_path / 'outputs.pt')]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    config, label_names, num_classes, architecture = json.loads(printed)
    assert torch.equal(torch.load(tmp_path / 'outputs.pt', weights_only=True), model(images))
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()} == GREY
    assert (label_names, num_classes, architecture) == (['bag', 'coat', 'shirt'], 3, 'resnet10t')
    assert {path.name for path in folder.iterdir()} == {'model.safetensors', 'config.json'}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # who may read one may read the other
    assert [path.name for path in folder.parent.iterdir()] == ['out']


def test_the_config_says_nothing_of_the_weights_that_others_trained(tmp_path: Path) -> None:
    model = randomised(timm.create_model('test_efficientnet.r160_in1k', num_classes=5))
    data_config = {**GREY, 'input_size': (3, 64, 64), 'mean': (0.1, 0.2, 0.3), 'std': (0.3, 0.2, 0.1)}
    args = {'num_classes': 5, 'in_chans': None}
    path = save(tmp_path / 'last.pth.tar', 'test_efficientnet.r160_in1k', model, args, data_config=data_config)
    config = json.loads((hub.export_model(path, tmp_path / 'out') / 'config.json').read_text())
    assert config['architecture'] == 'test_efficientnet'
    assert config['pretrained_cfg']['mean'] == [0.1, 0.2, 0.3]
    assert not {'tag', 'license', 'origin_url', 'paper_ids', 'hf_hub_id', 'url'} & config['pretrained_cfg'].keys()


def test_our_students_are_exported_as_timms_own_architecture(tmp_path: Path) -> None:
    model = randomised(timm.create_model('resnet18', num_classes=4))
    data_config = {**GREY, 'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.5,) * 3}
    path = save(tmp_path / 'a.pth.tar', 'mealv2_resnet18.in1k', model, {'num_classes': 4}, data_config=data_config)
    folder = hub.export_model(path, tmp_path / 'out')
    assert json.loads((folder / 'config.json').read_text())['architecture'] == 'resnet18'


def test_a_model_of_fixed_size_keeps_the_size_it_was_trained_with(tmp_path: Path) -> None:
    model = randomised(timm.create_model('test_vit', num_classes=2, img_size=64))
    data_config = {**GREY, 'input_size': (3, 64, 64), 'mean': (0.5,) * 3, 'std': (0.5,) * 3}
    args = {'num_classes': 2, 'model_kwargs': {'img_size': 64}}
    path = save(tmp_path / 'last.pth.tar', 'test_vit', model, args, data_config=data_config)
    loaded = timm.create_model(f'local-dir:{hub.export_model(path, tmp_path / "out")}', pretrained=True).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))


def test_the_average_is_exported_where_there_is_one_unless_the_weights_are_asked_for(tmp_path: Path) -> None:
    model = randomised(timm.create_model('test_resnet', num_classes=2))
    average = ModelEmaV3(model).module
    with torch.no_grad():
        average.fc.bias.fill_(7)
    entries = {'state_dict_ema': {f'module.{key}': value for key, value in average.state_dict().items()}}
    path = save(tmp_path / 'last.pth.tar', 'test_resnet', model, {'num_classes': 2}, **entries)
    hub.main(['export', str(path), '--out', str(tmp_path / 'ema')])
    hub.main(['export', str(path), '--out', str(tmp_path / 'raw'), '--no-ema'])
    biases = [timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True).fc.bias for name in ('ema', 'raw')]
    assert torch.equal(biases[0], average.fc.bias)
    assert torch.equal(biases[1], model.fc.bias)


def test_a_checkpoint_of_timms_own_program_tells_its_pixels_by_its_arguments(tmp_path: Path) -> None:
    model = randomised(timm.create_model('test_resnet', num_classes=2, in_chans=1))
    args = {'num_classes': 2, 'in_chans': 1, 'img_size': 96, 'mean': [0.25], 'crop_pct': 0.9, 'interpolation': ''}
    path = save(tmp_path / 'last.pth.tar', 'test_resnet', model, args)
    loaded = timm.create_model(f'local-dir:{hub.export_model(path, tmp_path / "out")}', pretrained=True)
    config = resolve_model_data_config(loaded)
    assert tuple(config['input_size']) == (1, 96, 96)
    assert tuple(config['mean']) == (0.25,)
    assert config['crop_pct'] == 0.9


def test_an_earlier_export_is_replaced_and_nothing_else_is(grey: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    _, checkpoint = grey
    out = tmp_path / 'out'
    out.mkdir()
    hub.export_model(checkpoint, out)  # an empty folder is taken
    (out / 'config.json').write_text('{}')
    hub.export_model(checkpoint, out)
    assert json.loads((out / 'config.json').read_text())['architecture'] == 'resnet10t'

    precious = tmp_path / 'precious'
    precious.mkdir()
    (precious / 'thesis.txt').write_text('five years')
    with pytest.raises(UserError, match='no earlier export'):
        hub.export_model(checkpoint, precious)
    assert [path.name for path in precious.iterdir()] == ['thesis.txt']


def test_a_checkpoint_that_does_not_fit_leaves_the_earlier_export_alone(
    grey: tuple[torch.nn.Module, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, checkpoint = grey
    out = hub.export_model(checkpoint, tmp_path / 'out')
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    state = {key: value for key, value in model.state_dict().items() if key != 'fc.bias'}
    wrong = torch.load(checkpoint, weights_only=False)
    torch.save({**wrong, 'state_dict': state}, tmp_path / 'wrong.pth.tar')
    (tmp_path / 'torn.pth.tar').write_bytes(checkpoint.read_bytes()[:2000])
    torch.save(model.state_dict(), tmp_path / 'bare.pth')
    for name, message in (
        ('wrong.pth.tar', 'fc.bias'),
        ('torn.pth.tar', 'no whole training checkpoint'),
        ('bare.pth', 'does not tell its model'),
        ('absent.pth.tar', 'no checkpoint at'),
    ):
        with pytest.raises(SystemExit) as exit_info:
            hub.run_cli(hub.main, ['export', str(tmp_path / name), '--out', str(out)])
        assert exit_info.value.code == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1
        assert message in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith('.out')]


def test_importing_the_package_does_not_import_the_export() -> None:
    code = "import sys, timm_mealv2; assert 'timm_mealv2.hub' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], check=True)
