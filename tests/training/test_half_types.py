"""Trainings in float16 and bfloat16, and gradients that are no numbers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from colors import summary, train
from timm.models._registry import _model_entrypoints
from torch import Tensor, nn


class NoGradient(nn.Module):
    """A model whose loss is a number and whose gradient is none."""

    def __init__(self, num_classes: int = 4, in_chans: int = 3, **_: object) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, in_chans
        self.fc = nn.Linear(in_chans, num_classes)
        self.pretrained_cfg = self.default_cfg = {
            'input_size': (in_chans, 32, 32),
            'mean': (0.5,) * 3,
            'std': (0.5,) * 3,
            'classifier': 'fc',
        }

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits + (0 * logits).sqrt()

    def get_classifier(self) -> nn.Module:
        return self.fc


@pytest.fixture
def no_gradient() -> Iterator[str]:
    """The name of that model."""

    def no_gradient_net(pretrained: bool = False, **kwargs: object) -> nn.Module:
        return NoGradient(**{name: value for name, value in kwargs.items() if name in ('num_classes', 'in_chans')})

    no_gradient_net.__module__ = 'timm.models.resnet'
    _model_entrypoints['no_gradient_net'] = no_gradient_net
    yield 'no_gradient_net'
    del _model_entrypoints['no_gradient_net']


def test_a_run_in_float16_of_which_no_update_is_made_stops(
    data: Path, no_gradient: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ('--data-dir', data, '--model', no_gradient, '--amp', '--amp-dtype', 'float16', '--lr', 0.1)
    with caplog.at_level('INFO'), pytest.raises((Exception, SystemExit)) as caught:
        train(tmp_path / 'run', *options, '--epochs', 8)
    assert getattr(caught.value, 'code', 1) == 1
    text = f'{caught.value} {caplog.text}'
    assert 'finite' in text
    assert 'gradient' in text
    assert 4 <= len(summary(tmp_path / 'run')) <= 5  # the 20th update in a row is the last of the fifth epoch


def test_the_average_of_weights_in_float16_moves(data: Path, tmp_path: Path) -> None:
    options = ('--data-dir', data, '--model', 'test_vit', '--model-dtype', 'float16', '--opt', 'momentum')
    options = (*options, '--lr', 0.01, '--model-ema', '--batch-size', 16)  # an epoch is an update
    train(tmp_path / 'one', *options)  # the first makes the average a copy of the weights
    train(tmp_path / 'ten', *options, '--epochs', 10)
    one, ten = (torch.load(tmp_path / name / 'last.pth.tar', weights_only=False) for name in ('one', 'ten'))
    moved, count = 0, 0
    for name, begun in one['state_dict'].items():
        changed = ten['state_dict'][name] != begun
        moved += int((ten['state_dict_ema'][name].float() != begun.float())[changed].sum())
        count += int(changed.sum())
    assert count > 1000
    assert moved / count > 0.95
    assert {value.dtype for value in ten['state_dict_ema'].values()} == {torch.float32}


@pytest.mark.parametrize('clip', [(), ('--clip-grad', 1e-3)], ids=['', 'clipped'])
def test_the_norm_of_the_gradient_is_in_the_summary(clip: tuple, data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    begun = timm.create_model('test_resnet', num_classes=4)
    torch.save(begun.state_dict(), tmp_path / 'start.pth')
    options = ('--data-dir', data, '--initial-checkpoint', tmp_path / 'start.pth', '--batch-size', 16)
    # One update of plain SGD is the gradient times the learning rate.
    row = train(tmp_path / 'plain', *options, '--lr', 1e-2, '--opt', 'momentum')[0]
    trained = timm.create_model('test_resnet', num_classes=4, checkpoint_path=str(tmp_path / 'plain' / 'last.pth.tar'))
    steps = [after - before for after, before in zip(trained.parameters(), begun.parameters(), strict=True)]
    norm = torch.nn.utils.get_total_norm(steps).item() / 1e-2
    assert norm > 0.1
    if clip:  # it is the norm before clipping
        row = train(tmp_path / 'clipped', *options, '--lr', 1e-2, '--opt', 'momentum', *clip)[0]
    assert float(row['train_grad_norm']) == pytest.approx(norm, rel=1e-3)


def test_weights_that_have_exploded_are_said(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = ''
    with caplog.at_level('INFO'):
        try:  # one update, after which all weights are finite
            train(tmp_path / 'run', '--data-dir', data, '--batch-size', 16, '--lr', 1e30, '--opt', 'momentum')
        except (Exception, SystemExit) as error:
            text = str(error)
    assert 'explod' in f'{text} {caplog.text}'.replace(str(tmp_path), '')
