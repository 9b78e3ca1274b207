"""Released files as folders: nobody else's weights are pushed unawares."""

import hashlib
import json
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from timm.data import resolve_model_data_config
from timm.models import save_for_hf

from timm_mealv2.cli import hub
from timm_mealv2.command_line import run_cli
from timm_mealv2.errors import UserError

STUDENT = 'mealv2_mobilenetv3_small_075'


@pytest.fixture(scope='module')
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the authors released them: the state dict of a DataParallel; the weights are random."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('released') / 'MEALV2_MobileNet_V3_Small_0.75_224.pth'
    torch.save(torch.nn.DataParallel(timm.create_model('tf_mobilenetv3_small_075')).state_dict(), path)
    return path


@pytest.fixture(scope='module')
def converted(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('converted') / 'student'
    hub.main(['convert', str(released), '--student', STUDENT, '--out', str(out), '--repo-id', 'me/small'])
    return out


def test_plain_timm_loads_the_released_weights_with_their_own_pixels(released: Path, converted: Path) -> None:
    model = timm.create_model(f'local-dir:{converted}', pretrained=True)
    weights = torch.load(released, weights_only=True)
    assert {f'module.{key}' for key in model.state_dict()} == set(weights)
    assert all(torch.equal(tensor, weights[f'module.{key}']) for key, tensor in model.state_dict().items())
    config = json.loads((converted / 'config.json').read_text())
    assert config['architecture'] == 'tf_mobilenetv3_small_075'
    assert (config['num_classes'], len(config['label_names'])) == (1000, 1000)
    assert config['label_descriptions'][config['label_names'][0]].startswith('tench')
    pixels = resolve_model_data_config(model)
    assert (tuple(pixels['mean']), pixels['interpolation']) == ((0.485, 0.456, 0.406), 'bilinear')  # not timm's own 0.5


def test_the_card_has_no_accuracy_and_no_license_but_the_files_digest(released: Path, converted: Path) -> None:
    card = ModelCard.load(converted / 'README.md')
    assert '## Accuracy' not in card.text
    header = card.data.to_dict()
    assert not {'model-index', 'metrics', 'license', 'base_model'} & header.keys()
    assert 'gave it no license' in card.text
    assert hashlib.sha256(released.read_bytes()).hexdigest() in card.text
    assert "'hf-hub:me/small'" in card.text


def test_the_command_says_that_there_is_no_license(
    released: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.main(['convert', str(released), '--student', f'{STUDENT}.in1k', '--out', str(tmp_path / 'out')])
    assert 'no license' in caplog.text


def test_a_push_needs_the_permission_whatever_became_of_the_folder(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HF_TOKEN', 'hf_ofSomebody')
    again = tmp_path / 'again'
    save_for_hf(timm.create_model(f'local-dir:{converted}', pretrained=True), again, safe_serialization=True)
    for folder in (converted, again):
        with pytest.raises(UserError, match='--i-have-permission'):
            hub.push_model(folder, 'me/small')
        # The tests are offline: with the permission it is the network that is missing.
        with pytest.raises(UserError, match='me/small was not pushed'):
            hub.push_model(folder, 'me/small', has_permission=True)


def test_the_released_file_itself_is_not_pushed(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HF_TOKEN', 'hf_ofSomebody')
    with pytest.raises(UserError, match='does not tell its model'):
        hub.push_model(released, 'me/small', has_permission=True)


@pytest.mark.parametrize(
    ('student', 'message'),
    [
        ('mealv2_resnet50.in1k', 'does not fit mealv2_resnet50'),
        ('mealv2_resnet18.in1k', 'no weights were released for mealv2_resnet18.in1k: name one of mealv1_resnet50.in1k'),
        ('resnet50', 'no weights were released for resnet50'),
        ('mealv2_resnet50.in21k', 'no weights were released for mealv2_resnet50.in21k'),
        ('no_model', 'no weights were released for no_model'),
    ],
)
def test_what_was_not_released_is_refused_in_one_line(
    released: Path, tmp_path: Path, student: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_cli(hub.main, ['convert', str(released), '--student', student, '--out', str(tmp_path / 'out')])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert message in error
    assert not (tmp_path / 'out').exists()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'absent\.pth does not fit .* cannot be read: FileNotFoundError'):
        hub.convert_released(tmp_path / 'absent.pth', STUDENT, tmp_path / 'out')
