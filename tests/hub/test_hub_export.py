"""The export: plain timm loads the folder and gets the same weights, pixels and classes; or there is no folder."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import HubServer, connected
from huggingface_hub import ModelCard
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from timm.utils import ModelEmaV3

from timm_mealv2.cli import hub
from timm_mealv2.errors import UserError
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.models.factory import create_ensemble

GRAY = {
    'input_size': (1, 48, 40),
    'interpolation': 'bilinear',
    'mean': (0.286,),
    'std': (0.353,),
    'crop_pct': 1.0,
    'crop_mode': 'squash',
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with connected(monkeypatch, tmp_path / 'hf_home') as server:
        yield server


def save(path: Path, model_name: str, model: torch.nn.Module, args: dict[str, Any], **entries: Any) -> Path:
    """Write a checkpoint as timm's saver does, with what our training adds in `entries`."""
    namespace = argparse.Namespace(**{'model': model_name, 'gp': None, 'bn_eps': None, 'model_kwargs': {}, **args})
    content = {'epoch': 1, 'arch': model_name, 'version': 2, 'args': namespace, 'state_dict': model.state_dict()}
    torch.save({**content, **entries}, path)
    return path


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Give every weight and buffer of floats values that no initialization gives."""
    torch.manual_seed(3)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model.eval()


@pytest.fixture
def gray(tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    """A small ResNet on gray pictures with its checkpoint."""
    kwargs = {'channels': (8, 8, 16, 16), 'stem_width': 8, 'output_stride': 8}
    model = randomized(timm.create_model('resnet10t', num_classes=3, in_chans=1, **kwargs))
    args = {'num_classes': 3, 'in_chans': None, 'model_kwargs': kwargs, 'input_size': [1, 48, 40]}
    names = {'data_config': GRAY, 'class_names': ['bag', 'coat', 'shirt']}
    return model, save(tmp_path / 'last.pth.tar', 'resnet10t', model, args, **names)


def test_plain_timm_in_a_fresh_process_gets_the_same_from_the_folder_and_from_the_hub(
    server: HubServer, gray: tuple[torch.nn.Module, Path], tmp_path: Path
) -> None:
    model, checkpoint = gray
    folder = hub.export_model(checkpoint, tmp_path / 'deep/out')
    hub.push_model(folder, 'me/gray')
    images = torch.randn(2, 1, 48, 40)
    torch.save(images, tmp_path / 'images.pt')
    code = """
import json, sys, timm, torch
from timm.data import resolve_model_data_config
images, outputs, *names = sys.argv[1:]
models = [timm.create_model(name, pretrained=True).eval() for name in names]
torch.save([model(torch.load(images, weights_only=True)).detach() for model in models], outputs)
assert 'timm_mealv2' not in sys.modules
cfg = models[0].pretrained_cfg
print(json.dumps([resolve_model_data_config(models[0]), cfg['label_names'], cfg['num_classes'], cfg['architecture']]))
"""
    command = [sys.executable, '-c', code, str(tmp_path / 'images.pt'), str(tmp_path / 'outputs.pt')]
    environment = {**os.environ, 'HF_HUB_OFFLINE': '0', 'HF_ENDPOINT': server.url, 'HF_HUB_DISABLE_XET': '1'}
    printed = subprocess.run(
        [*command, f'local-dir:{folder}', 'hf-hub:me/gray'],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    ).stdout
    config, label_names, num_classes, architecture = json.loads(printed)
    for output in torch.load(tmp_path / 'outputs.pt', weights_only=True):
        assert torch.equal(output, model(images))
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()} == GRAY
    assert (label_names, num_classes, architecture) == (['bag', 'coat', 'shirt'], 3, 'resnet10t')
    assert {path.name for path in folder.iterdir()} == {'model.safetensors', 'config.json', 'README.md'}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # who may read one may read the other
    assert [path.name for path in folder.parent.iterdir()] == ['out']


def test_a_checkpoint_is_read_and_its_model_built_once(
    gray: tuple[torch.nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for owner, name in ((torch, 'load'), (TrainingCheckpoint, 'build')):
        function = getattr(owner, name)

        def counted(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    hub.export_model(gray[1], tmp_path / 'out')
    assert calls == ['load', 'build']


def test_the_config_says_nothing_of_the_weights_that_others_trained(tmp_path: Path) -> None:
    model = randomized(timm.create_model('test_efficientnet.r160_in1k', num_classes=5))
    data_config = {**GRAY, 'input_size': (3, 64, 64), 'mean': (0.1, 0.2, 0.3), 'std': (0.3, 0.2, 0.1)}
    args = {'num_classes': 5, 'in_chans': None}
    path = save(tmp_path / 'last.pth.tar', 'test_efficientnet.r160_in1k', model, args, data_config=data_config)
    config = json.loads((hub.export_model(path, tmp_path / 'out') / 'config.json').read_text())
    assert config['architecture'] == 'test_efficientnet'
    assert config['pretrained_cfg']['mean'] == [0.1, 0.2, 0.3]
    assert not {'tag', 'license', 'origin_url', 'paper_ids', 'hf_hub_id', 'url'} & config['pretrained_cfg'].keys()


def test_the_size_for_tests_stays_where_the_training_kept_the_models_own(tmp_path: Path) -> None:
    model = randomized(timm.create_model('resnet10t', num_classes=2))
    sizes = []
    for size, options in ((176, {}), (64, {}), (64, {'test_size': 96})):
        pixels = {**GRAY, 'input_size': (3, size, size), 'mean': (0.5,) * 3, 'std': (0.5,) * 3}
        path = save(tmp_path / 'last.pth.tar', 'resnet10t', model, {'num_classes': 2}, data_config=pixels)
        loaded = timm.create_model(f'local-dir:{hub.export_model(path, tmp_path / "out", **options)}', pretrained=True)
        sizes.append(resolve_model_data_config(loaded, use_test_size=True)['input_size'])
    assert [tuple(size) for size in sizes] == [(3, 224, 224), (3, 64, 64), (3, 96, 96)]


def test_our_students_are_exported_as_timms_own_architecture(tmp_path: Path) -> None:
    model = randomized(timm.create_model('resnet18', num_classes=4))
    data_config = {**GRAY, 'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.5,) * 3}
    path = save(tmp_path / 'a.pth.tar', 'mealv2_resnet18.in1k', model, {'num_classes': 4}, data_config=data_config)
    folder = hub.export_model(path, tmp_path / 'out')
    assert json.loads((folder / 'config.json').read_text())['architecture'] == 'resnet18'


def test_a_model_of_fixed_size_keeps_the_size_it_was_trained_with(tmp_path: Path) -> None:
    model = randomized(timm.create_model('test_vit', num_classes=2, img_size=64))
    data_config = {**GRAY, 'input_size': (3, 64, 64), 'mean': (0.5,) * 3, 'std': (0.5,) * 3}
    args = {'num_classes': 2, 'model_kwargs': {'img_size': 64}}
    path = save(tmp_path / 'last.pth.tar', 'test_vit', model, args, data_config=data_config)
    loaded = timm.create_model(f'local-dir:{hub.export_model(path, tmp_path / "out")}', pretrained=True).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))


def test_the_average_is_exported_where_there_is_one_unless_the_weights_are_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = randomized(timm.create_model('test_resnet', num_classes=2))
    average = ModelEmaV3(model).module
    with torch.no_grad():
        average.fc.bias.fill_(7)
    entries = {'state_dict_ema': {f'module.{key}': value for key, value in average.state_dict().items()}}
    path = save(tmp_path / 'last.pth.tar', 'test_resnet', model, {'num_classes': 2}, **entries)
    hub.main(['export', str(path), '--out', str(tmp_path / 'ema')])
    assert 'exported the moving average' in caplog.text
    caplog.clear()
    hub.main(['export', str(path), '--out', str(tmp_path / 'raw'), '--no-ema'])
    assert 'exported the weights, not their moving average' in caplog.text
    biases = [timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True).fc.bias for name in ('ema', 'raw')]
    assert torch.equal(biases[0], average.fc.bias)
    assert torch.equal(biases[1], model.fc.bias)


def test_a_checkpoint_of_timms_own_program_tells_its_pixels_by_its_arguments(tmp_path: Path) -> None:
    model = randomized(timm.create_model('test_resnet', num_classes=2, in_chans=1))
    args = {'num_classes': 2, 'in_chans': 1, 'img_size': 96, 'mean': [0.25], 'crop_pct': 0.9, 'interpolation': ''}
    path = save(tmp_path / 'last.pth.tar', 'test_resnet', model, args)
    loaded = timm.create_model(f'local-dir:{hub.export_model(path, tmp_path / "out")}', pretrained=True)
    config = resolve_model_data_config(loaded)
    assert tuple(config['input_size']) == (1, 96, 96)
    assert tuple(config['mean']) == (0.25,)
    assert config['crop_pct'] == 0.9


def test_an_earlier_export_is_replaced_and_nothing_else_is(gray: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    _, checkpoint = gray
    out = tmp_path / 'out'
    out.mkdir()
    hub.export_model(checkpoint, out)  # an empty folder is taken
    (out / 'config.json').write_text('{}')
    hub.export_model(checkpoint, out)
    assert json.loads((out / 'config.json').read_text())['architecture'] == 'resnet10t'

    precious = tmp_path / 'precious'
    precious.mkdir()
    (precious / 'thesis.txt').write_text('five years')
    with pytest.raises(UserError, match='something else than an earlier export'):
        hub.export_model(checkpoint, precious)
    assert [path.name for path in precious.iterdir()] == ['thesis.txt']
    (out / 'notes.txt').write_text('mine')
    with pytest.raises(UserError, match='something else than an earlier export'):
        hub.export_model(checkpoint, out)
    assert (out / 'notes.txt').read_text() == 'mine'


def test_a_checkpoint_that_does_not_fit_leaves_the_earlier_export_alone(
    gray: tuple[torch.nn.Module, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, checkpoint = gray
    out = hub.export_model(checkpoint, tmp_path / 'out')
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    state = {key: value for key, value in model.state_dict().items() if key != 'fc.bias'}
    wrong = torch.load(checkpoint, weights_only=False)
    torch.save({**wrong, 'state_dict': state}, tmp_path / 'wrong.pth.tar')
    (tmp_path / 'corrupt.pth.tar').write_bytes(checkpoint.read_bytes()[:2000])
    torch.save(model.state_dict(), tmp_path / 'bare.pth')
    for name, message in (
        ('wrong.pth.tar', 'fc.bias'),
        ('corrupt.pth.tar', 'is not a readable checkpoint'),
        ('bare.pth', 'does not tell its model'),
        ('absent.pth.tar', 'there is no such file'),
    ):
        with pytest.raises(SystemExit) as exit_info:
            hub.run_cli(hub.main, ['export', str(tmp_path / name), '--out', str(out)])
        assert exit_info.value.code == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1
        assert message in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith('.out')]


def test_the_classes_of_imagenet_are_described(tmp_path: Path) -> None:
    model = randomized(timm.create_model('test_resnet', num_classes=3))
    names = ['n01440764', 'n02012849', 'n03126707']
    path = save(tmp_path / 'last.pth.tar', 'test_resnet', model, {'num_classes': 3}, class_names=names)
    config = json.loads((hub.export_model(path, tmp_path / 'out') / 'config.json').read_text())
    assert config['label_names'] == names
    assert config['label_descriptions']['n01440764'] == 'tench, Tinca tinca'


def test_what_a_file_says_of_places_reaches_neither_the_network_nor_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomized(timm.create_model('test_resnet', num_classes=2, stem_width=24))
    with HubServer() as server:
        attack = {
            'pretrained_cfg_overlay': {'url': f'{server.url}/weights.pth'},
            'pretrained': True,
            'checkpoint_path': str(tmp_path / 'other.pth'),
            'cache_dir': str(tmp_path / 'cache'),
        }
        args = {'num_classes': 2, 'model_kwargs': {'stem_width': 24, **attack}}
        path = save(tmp_path / 'last.pth.tar', 'test_resnet', model, args)
        folder = hub.export_model(path, tmp_path / 'out')
        assert server.requests == []
    assert not (tmp_path / 'cache').exists()
    config = json.loads((folder / 'config.json').read_text())
    assert config['model_args']['stem_width'] == 24
    assert not attack.keys() & {*config['model_args'], *config['pretrained_cfg']}

    # A folder that was changed, or that somebody else made, is not pushed either.
    config['model_args'].update(attack)
    (folder / 'config.json').write_text(json.dumps(config))
    monkeypatch.setenv('HF_TOKEN', 'hf_ofSomebody')
    with pytest.raises(UserError, match=r'cache_dir, checkpoint_path, pretrained, pretrained_cfg_overlay\) say where'):
        hub.push_model(folder, 'me/x')


def test_the_batch_norm_of_the_training_is_that_of_the_export(tmp_path: Path) -> None:
    model = randomized(timm.create_model('test_efficientnet', num_classes=2, bn_eps=0.1))
    path = save(tmp_path / 'last.pth.tar', 'test_efficientnet', model, {'num_classes': 2, 'bn_eps': 0.1})
    loaded = timm.create_model(f'local-dir:{hub.export_model(path, tmp_path / "out")}', pretrained=True).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))


# Ensembles


@pytest.fixture(scope='module')
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder, and in it two teachers as texts with paths from there."""
    folder = tmp_path_factory.mktemp('teachers')
    first, second = (randomized(timm.create_model(name, num_classes=4)) for name in ('test_resnet', 'test_vit'))
    second.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.4, 0.4))
    save_for_hf(second, folder / 'second', safe_serialization=True)
    torch.save(first.state_dict(), folder / 'first.pth')
    return folder, ['test_resnet=first.pth', 'local-dir:second']


def test_an_ensembles_folder_names_its_teachers_and_loads_from_everywhere(
    teachers: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(teachers[0])
    command = ['export-ensemble', '--teachers', *teachers[1], '--teacher-weights', '3', '1', '--num-classes', '4']
    hub.main([*command, '--out', str(tmp_path / 'ensemble'), '--repo-id', 'me/ensemble'])
    images = torch.randn(2, 3, 160, 160)
    expected = create_ensemble(teachers[1], weights=[3, 1])(images)
    monkeypatch.chdir(tmp_path)
    assert {path.name for path in (tmp_path / 'ensemble').iterdir()} == {'config.json', 'README.md'}
    config = json.loads((tmp_path / 'ensemble/config.json').read_text())
    assert (config['architecture'], config['num_classes']) == ('mealv2_ensemble', 4)
    loaded = timm.create_model('local-dir:ensemble', pretrained=True)
    assert torch.equal(loaded(images), expected)
    assert torch.equal(create_ensemble(['local-dir:ensemble'], num_classes=4)(images), expected)
    card = ModelCard.load(tmp_path / 'ensemble/README.md')
    assert '| `test_resnet=first.pth` | 0.75 | not known |' in card.text
    assert 'import timm_mealv2' in card.text
    assert 'model-index' not in card.data.to_dict()

    hub.export_ensemble([f'test_resnet={teachers[0] / "first.pth"}'], 'ensemble')  # an earlier one is replaced
    assert len(timm.create_model('local-dir:ensemble', pretrained=True).teachers) == 1
    monkeypatch.setenv('HF_TOKEN', 'hf_ofSomebody')
    with pytest.raises(UserError, match='on this machine alone'):
        hub.push_model('ensemble', 'me/ensemble')


def test_teachers_that_are_none_leave_no_folder(
    teachers: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(teachers[0])
    for arguments, message in (
        ({'teachers': teachers[1], 'num_classes': 5}, 'but 5 are asked for'),
        ({'teachers': teachers[1], 'weights': [1]}, 'one per teacher'),
        ({'teachers': ['local-dir:third']}, 'there is no config.json in it'),
        ({'teachers': ['python:os:getcwd']}, 'code is run only where you name it yourself'),
    ):
        with pytest.raises(UserError, match=message):
            hub.export_ensemble(out=tmp_path / 'out', **arguments)
    assert not (tmp_path / 'out').exists()


# To the Hub and back


def test_a_checkpoint_is_pushed_with_its_card_and_pulled_again(
    server: HubServer, gray: tuple[torch.nn.Module, Path], tmp_path: Path
) -> None:
    _, checkpoint = gray
    hub.main(['push', str(checkpoint), 'me/shirts', '--message', 'first'])
    hub.main(['pull', 'me/shirts', '--out', str(tmp_path / 'pulled')])
    hub.main(['push', str(tmp_path / 'pulled'), 'me/shirts'])
    titles = [commit.title for commit in server.repos['me/shirts'].log()]
    assert titles == ['first', 'initial commit']  # what is the same makes no second commit
    hub.export_model(checkpoint, tmp_path / 'out', card=hub.CardOptions(repo_id='me/shirts'))
    assert {path.name: path.read_bytes() for path in (tmp_path / 'pulled').iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()
    }
