"""Options of the classifier, of the learning rate, of batch norm and of timm's own distillation."""

from pathlib import Path

import pytest
import timm
import torch
from colors import save_model, train
from timm.optim import create_optimizer_v2

from timm_mealv2 import UserError

TWO_HEADS = ('--model', 'deit_tiny_distilled_patch16_224', '--model-kwargs', 'embed_dim=24', 'depth=1', 'num_heads=2')
TWO_HEADS = (*TWO_HEADS, 'img_size=32')


def two_heads() -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = timm.create_model(
        TWO_HEADS[1], num_classes=4, embed_dim=24, depth=1, num_heads=2, img_size=32
    )
    for head in (model.head, model.head_dist):
        torch.nn.init.constant_(head.weight, 0.2)
        torch.nn.init.constant_(head.bias, 0.1)
    return model


def state(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(folder / 'last.pth.tar', weights_only=False)['state_dict']
    return weights


def test_layer_decay_without_a_schedule(data: Path, tmp_path: Path) -> None:
    options = ('--data-dir', data, '--model', 'test_vit', '--opt', 'momentum', '--lr', 0.1, '--layer-decay', 0.5)
    row = train(tmp_path / 'run', *options)[0]
    model = timm.create_model('test_vit', num_classes=4, img_size=32)
    groups = create_optimizer_v2(model, opt='momentum', lr=0.1, weight_decay=0.0, layer_decay=0.5).param_groups
    expected = [0.1 * group['lr_scale'] for group in groups]
    assert min(expected) < 0.02
    assert float(row['lr']) == pytest.approx(sum(expected) / len(expected))


def test_head_init_scale_scales_the_bias_too(data: Path, tmp_path: Path) -> None:
    save_model(tmp_path / 'start.pth')
    before = torch.load(tmp_path / 'start.pth')['state_dict']
    train(
        tmp_path / 'run',
        *('--data-dir', data, '--initial-checkpoint', tmp_path / 'start.pth', '--head-init-scale', 0.5),
    )
    after = state(tmp_path / 'run')
    torch.testing.assert_close(after['fc.weight'], before['fc.weight'] / 2)
    torch.testing.assert_close(after['fc.bias'], before['fc.bias'] / 2)


@pytest.mark.parametrize(
    ('option', 'weight', 'bias'), [(('--head-init-scale', 0.5), 0.1, 0.05), (('--head-init-bias', -3), 0.2, -3)]
)
def test_both_heads_are_initialized(option: tuple, weight: float, bias: float, data: Path, tmp_path: Path) -> None:
    torch.save(two_heads().state_dict(), tmp_path / 'start.pth')
    start = ('--data-dir', data, *TWO_HEADS, '--initial-checkpoint', tmp_path / 'start.pth')
    train(tmp_path / 'run', *start, *option)
    after = state(tmp_path / 'run')
    for head in ('head', 'head_dist'):
        assert after[f'{head}.weight'].unique().tolist() == pytest.approx([weight])
        assert after[f'{head}.bias'].unique().tolist() == pytest.approx([bias])


def test_initial_weights_with_more_classes(data: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model('test_resnet', num_classes=10).state_dict(), tmp_path / 'ten.pth')
    with pytest.raises(UserError, match='--pretrained-path'):
        train(tmp_path / 'run', '--data-dir', data, '--initial-checkpoint', tmp_path / 'ten.pth')


def test_weights_of_a_file_that_the_student_does_not_take_are_no_pretrained_weights(data: Path, tmp_path: Path) -> None:
    weights = timm.create_model('test_resnet', num_classes=10).state_dict()
    torch.save({f'backbone.{name}': value for name, value in weights.items()}, tmp_path / 'prefix.pth')
    with pytest.raises(UserError, match=r'prefix.pth has 0 of the \d+ weights'):
        train(tmp_path / 'run', '--data-dir', data, '--pretrained-path', tmp_path / 'prefix.pth')
    assert not (tmp_path / 'run').exists()
    torch.save(weights, tmp_path / 'ten.pth')
    train(tmp_path / 'run', '--data-dir', data, '--pretrained-path', tmp_path / 'ten.pth', '--lr', 0)
    torch.testing.assert_close(state(tmp_path / 'run')['conv1.0.weight'], weights['conv1.0.weight'])


def test_a_warm_up_that_is_never_left_is_said(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    warm_up = ('--sched', 'cosine', '--lr', 0.1, '--warmup-epochs', 5, '--warmup-lr', 0, '--epochs', 3)
    with caplog.at_level('INFO'):
        rows = train(tmp_path / 'run', '--data-dir', data, *warm_up)
    assert max(float(row['lr']) for row in rows) < 0.1
    assert sum('--warmup-epochs' in line for line in caplog.messages) == 1


def test_device_modules_may_register_the_model(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / 'registers_a_net.py').write_text(
        'from timm.models import register_model\n'
        'from timm.models.resnet import test_resnet\n\n\n'
        '@register_model\n'
        'def net_of_a_device_module(pretrained=False, **kwargs):\n'
        '    return test_resnet(pretrained, **kwargs)\n\n\n'
        "__all__ = ['net_of_a_device_module']\n"
    )
    save_model(tmp_path / 'start.pth')
    options = (
        '--data-dir',
        data,
        '--device-modules',
        'registers_a_net',
        '--initial-checkpoint',
        tmp_path / 'start.pth',
    )
    assert float(train(tmp_path / 'run', *options, '--model', 'net_of_a_device_module')[0]['eval_top1']) == 100


def test_timms_distillation_takes_a_checkpoint_as_teacher(data: Path, tmp_path: Path) -> None:
    teacher = save_model(tmp_path / 'teacher.pth')
    options = ('--data-dir', data, '--kd-distill-type', 'logit', '--teachers', teacher, '--task-loss-weight', 0)
    row = train(tmp_path / 'run', *options, '--initial-checkpoint', tmp_path / 'teacher.pth')[0]
    assert float(row['train_loss']) == pytest.approx(0, abs=1e-3)  # the student is the teacher
    assert {'train_task_loss', 'train_kd_loss'} <= set(row)
