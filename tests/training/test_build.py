"""What only the parts of a run can tell: told before anything is written, and before the data set where possible."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from quick_training import Train, read_checkpoint

from timm_mealv2.command_line import run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.training import build_data
from timm_mealv2.training.run import main


@pytest.mark.parametrize(
    ('argv', 'text'),
    [
        ('--gp none', 'cannot create --model test_resnet: '),
        ('--model test_vit --img-size 33', 'test_vit cannot take images of 33 x 33'),
        ('--device xpu', '--device xpu cannot be used: '),
        ('--device-modules absent_module', '--device-modules absent_module: '),
        ('--model-kwargs absent=1', "unexpected keyword argument 'absent'"),
        ('--input-img-mode RGBA', '--input-img-mode RGBA has 4 channels, the model takes 3'),
        ('--output {file}', '--output, --experiment: '),
    ],
)
def test_what_only_the_parts_of_a_run_can_tell_is_told_before_it_too(
    capfd: pytest.CaptureFixture[str], image_folder: Path, tmp_path: Path, argv: str, text: str
) -> None:
    (tmp_path / 'file').touch()
    base = ['--model', 'test_resnet', '--num-classes', '3', '--workers', '0', '--data-dir', str(image_folder)]
    base += ['--device', 'cpu', '--output', str(tmp_path / 'out'), '--epochs', '1']
    with pytest.raises(SystemExit) as exit:
        run_cli(main, [*base, *argv.format(file=tmp_path / 'file').split()])
    error = capfd.readouterr().err
    assert exit.value.code == 2
    assert 'Traceback' not in error
    assert error.splitlines()[-1].startswith('error: ')
    assert text in error.splitlines()[-1]
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        (('--teachers', 'resnet18.nonsense'), 'no tag of resnet18'),
        (('--teachers', 'test_resnet=/absent.pth'), 'there is no such file'),
        (('--soft-labels', '/absent'), 'there is no such folder'),
        (('--model', 'test_vit', '--img-size', 33), 'cannot take images of 33'),
        (('--resume', '/absent.pth.tar'), 'o such file'),
    ],
)
def test_what_needs_no_data_is_told_before_the_data_set_is_opened(
    train: Train, options: tuple[Any, ...], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        train('early', '--data-dir', '/no/such/data', *options)


def test_without_a_validation_split_a_seeded_sample_of_the_training_images_is_evaluated(
    train: Train,
    teachers: list[str],
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    flat = tmp_path / 'flat'
    flat.mkdir()
    for number, path in enumerate(sorted((image_folder / 'train').rglob('*.png'))):
        (flat / f'{number}.png').symlink_to(path)
    monkeypatch.setattr(build_data, 'EVALUATED_AT_MOST', 9)
    with caplog.at_level('INFO'):
        train('sampled', '--data-dir', flat, '--teachers', *teachers, '--unlabeled', '--epochs', 1)
    assert 'on 9 of the 21 training images' in caplog.text
    assert 'Before the first step, on 9 images' in caplog.text
    assert 'on 9 images' in caplog.text.split('Before the first step')[1]


def test_the_preflight_is_written_beside_the_run(train: Train, teachers: list[str]) -> None:
    rows = json.loads((train('run', '--teachers', *teachers, '--epochs', 1) / 'preflight.json').read_text())
    assert set(rows) == {'ensemble', *(f'teacher {name}' for name in teachers), 'student (initial)'}
    assert rows['ensemble']['samples'] == 12


def test_the_discriminator_has_the_width_that_was_asked_for(train: Train, teachers: list[str]) -> None:
    folder = train('narrow', '--teachers', *teachers, '--epochs', 1, '--discriminator-reduction', 1)
    weights = read_checkpoint(folder / 'last.pth.tar')['task_state']['discriminator']
    assert weights['fc1.weight'].shape == (3, 3)


def test_a_run_at_weights_and_biases_is_gone_on_with(
    train: Train, teachers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    summary: dict[str, float] = {}

    def init(**options: Any) -> Any:
        calls.append(options)
        return SimpleNamespace(id='abc', summary=summary, log=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=init))
    folder = train('run', '--epochs', 1, '--log-wandb', '--wandb-project', 'p', '--teachers', *teachers)
    assert {'before/ensemble/top1', f'before/teacher {teachers[0]}/top1', 'before/student (initial)/kl'} <= set(summary)
    assert (folder / 'wandb_id.txt').read_text() == 'abc\n'
    resumed = ('--resume', 'auto', '--epochs', 2, '--teachers', *teachers)
    train('run', '--log-wandb', '--wandb-project', 'p', *resumed)
    assert [call.get('resume') for call in calls] == [None, 'allow']
    assert calls[1]['id'] == 'abc'


@pytest.mark.parametrize('tag', ['', '.r160_in1k'])
def test_a_checkpoint_says_what_the_network_is(train: Train, tag: str) -> None:
    options = ('--model', f'test_resnet{tag}', '--model-kwargs', 'stem_width=8', '--drop', 0.1, '--gp', 'max')
    contents = torch.load(train('net', '--epochs', 1, *options) / 'last.pth.tar', weights_only=False)
    config = contents['model_config']
    assert {key: config[key] for key in ('architecture', 'num_classes', 'in_chans', 'model_args')} == {
        'architecture': 'test_resnet',
        'num_classes': 3,
        'in_chans': 3,
        'model_args': {'global_pool': 'max', 'stem_width': 8},
    }
    assert config['pretrained_cfg']['input_size'] == (3, 16, 16)
    assert not {'url', 'file', 'hf_hub_id'} & config['pretrained_cfg'].keys()
    model = timm.create_model('test_resnet', num_classes=3, **config['model_args'])
    model.load_state_dict(contents['state_dict'])
