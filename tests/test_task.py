"""`MealV2Task`: what a step returns, who is trained, and everything that timm does around a task."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, NativeScaler, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mealv2 import EnsembleTeacher, MealV2Task
from timm_mealv2.errors import UserError
from timm_mealv2.task import scale_discriminator_lr

CLASSES = 10
SIZE = 32
KEYS = {'loss', 'output', 'similarity_loss', 'kl', 'teacher_agreement'}
DISCRIMINATOR_KEYS = {'discriminator_loss', 'discriminator_accuracy'}
MODES = ['official', 'adversarial']


def cnn(num_classes: int = CLASSES, seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model('test_resnet', num_classes=num_classes, **kwargs)


def vit(num_classes: int = CLASSES, seed: int = 0) -> nn.Module:
    """A student without batch statistics, and with parameters of its own that get no weight decay."""
    torch.manual_seed(seed)
    return timm.create_model('test_vit', num_classes=num_classes, img_size=SIZE)


def images(batch: int = 4, seed: int = 9, dtype: torch.dtype = torch.float32, chans: int = 3) -> Tensor:
    return torch.randn(batch, chans, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def labels(batch: int = 4, num_classes: int = CLASSES) -> Tensor:
    return torch.arange(batch) % num_classes


def make_task(student: nn.Module | None = None, teachers: Any = 'two', **kwargs: Any) -> MealV2Task:
    student = student or cnn()
    if teachers == 'two':
        teachers = [cnn(student.num_classes, seed=1), cnn(student.num_classes, seed=2)]
    torch.manual_seed(4)
    return MealV2Task(student, teachers, **{'verbose': False, **kwargs})


def live_discriminator(task: MealV2Task) -> MealV2Task:
    """Lift the last bias, so that no final ReLU is dead whatever was drawn."""
    nn.init.constant_(task.discriminator.fc3.bias, 0.5)
    return task


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def stored_labels(task: MealV2Task, x: Tensor, k: int, hard: Tensor) -> Tensor:
    """What a store would hold for these very pixels."""
    p = task.teacher.predict(x)[0].exp().topk(k, dim=1)
    return torch.cat([hard[:, None].float(), p.indices.float(), p.values.float()], dim=1)


# What a step returns


def test_the_target_is_the_mean_of_the_teachers_that_are_drawn_for_an_image() -> None:
    teachers = [cnn(seed=seed) for seed in (1, 2, 3)]
    task, x = make_task(teachers=teachers, teachers_per_sample=2), images(8)
    torch.manual_seed(11)
    result = task(x, labels(8))
    torch.manual_seed(11)
    log_p, rows = task.teacher.predict(x, per_sample=2)
    log_q = F.log_softmax(result['output'], dim=1)
    torch.testing.assert_close(result['kl'], F.kl_div(log_q, log_p, reduction='batchmean', log_target=True).detach())
    expected = task.get_trainable_module()(x, rows)[1]
    torch.testing.assert_close(result['discriminator_loss'], expected.detach())
    with pytest.raises(UserError, match='--teachers-per-sample 4'):
        make_task(teachers=teachers, teachers_per_sample=4)


@pytest.mark.parametrize('mode', MODES)
def test_a_step_returns_the_named_parts_and_only_loss_and_output_carry_gradient(mode: str) -> None:
    result = make_task(discriminator_mode=mode)(images(), labels())
    assert set(result) == KEYS | DISCRIMINATOR_KEYS
    assert result['output'].shape == (4, CLASSES)
    assert all(value.shape == () for name, value in result.items() if name != 'output')
    assert {name for name, value in result.items() if value.requires_grad} == {'loss', 'output'}


def test_without_discriminator_there_are_no_values_and_no_module_of_it() -> None:
    task = make_task(discriminator_weight=0)
    assert task.discriminator is None
    assert set(task(images(), labels())) == KEYS
    assert task.get_task_state() == {}


@pytest.mark.parametrize('weight', [1.0, 0.25])
def test_the_parts_are_what_the_formulas_say(weight: float) -> None:
    student, teachers = cnn().eval(), [cnn(seed=1), cnn(seed=2)]
    task = make_task(student, teachers, discriminator_weight=weight).eval()
    x = images()
    result = task(x, labels())
    with torch.no_grad():
        z = torch.stack([teacher.eval()(x) for teacher in teachers])
        s = student(x)
        p = z.softmax(dim=2).mean(dim=0)
        similarity = -(p * s.log_softmax(dim=1)).sum(dim=1).mean()
        d = task.discriminator(torch.cat([s, z.mean(dim=0)]))
        truth = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4)
        expected = {
            'output': s,
            'similarity_loss': similarity,
            'kl': F.kl_div(s.log_softmax(dim=1), p, reduction='batchmean'),
            'discriminator_loss': F.binary_cross_entropy_with_logits(d, truth),
            'teacher_agreement': (s.argmax(dim=1) == p.argmax(dim=1)).float().mean(),
        }
        expected['loss'] = similarity + weight * expected['discriminator_loss']
    for name, value in expected.items():
        torch.testing.assert_close(result[name].detach(), value, rtol=1e-5, atol=1e-6, msg=name)


def test_agreement_is_one_for_the_teacher_itself() -> None:
    result = make_task(cnn(seed=1).eval(), [cnn(seed=1)]).eval()(images(), labels())
    assert result['teacher_agreement'].item() == 1
    assert result['kl'].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize('num_classes', [2, 5000])
@pytest.mark.parametrize('mode', MODES)
def test_two_and_many_classes_train(num_classes: int, mode: str) -> None:
    task = make_task(cnn(num_classes), discriminator_mode=mode)
    result = task(images(), labels())
    result['loss'].backward()
    assert result['loss'].isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.get_trainable_module().parameters())


@pytest.mark.parametrize('live', [True, False])
def test_a_float64_student_keeps_float64_everywhere(live: bool) -> None:
    teachers = [cnn(seed=1), cnn(seed=2)]
    task = make_task(cnn().double(), [teacher.double() for teacher in teachers])
    x = images(dtype=torch.float64)
    target = labels()
    if not live:
        target = stored_labels(task, x, 3, target)
        task = make_task(cnn().double(), None)
    result = task(x, target)
    result['loss'].backward()
    assert {value.dtype for value in result.values()} == {torch.float64}
    assert {p.grad.dtype for p in task.get_trainable_module().parameters()} == {torch.float64}


def test_nothing_of_the_teachers_is_in_what_trains() -> None:
    task = make_task()
    teachers = {id(tensor) for tensor in (*task.teacher.parameters(), *task.teacher.buffers())}
    trained = task.get_trainable_module()
    assert teachers
    assert not teachers & {id(tensor) for tensor in (*trained.parameters(), *trained.buffers())}


def test_converting_the_task_converts_student_discriminator_and_teachers() -> None:
    task = make_task().to(torch.float64)
    assert {p.dtype for p in task.parameters()} == {torch.float64}
    assert task(images(dtype=torch.float64), labels())['loss'].dtype == torch.float64


def test_a_half_precision_student_gets_a_float32_discriminator() -> None:
    task = make_task(cnn().to(torch.bfloat16))
    assert {p.dtype for p in task.discriminator.parameters()} == {torch.float32}
    result = task(images(dtype=torch.bfloat16), labels())
    result['loss'].backward()
    assert result['loss'].dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in task.get_trainable_module().parameters())


# Stored labels


@pytest.mark.parametrize('mode', MODES)
def test_stored_labels_of_all_classes_give_the_live_similarity(mode: str) -> None:
    live = make_task(cnn().eval(), discriminator_mode=mode)
    x = images()
    target = stored_labels(live, x, CLASSES, labels())
    stored = make_task(cnn().eval(), None, discriminator_mode=mode)
    a, b = live(x, labels()), stored(x, target)
    for name in ('similarity_loss', 'kl', 'teacher_agreement', 'output'):
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
    assert set(b) == set(a)
    rows = torch.cat([b['output'].log_softmax(dim=1), live.teacher.predict(x)[0]])
    truth = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4)
    expected = F.binary_cross_entropy_with_logits(stored.discriminator(rows), truth)
    torch.testing.assert_close(b['discriminator_loss'], expected.detach(), rtol=1e-5, atol=1e-6)


def test_what_stored_labels_leave_over_is_treated_as_asked() -> None:
    x = images()
    target = stored_labels(make_task(), x, 3, labels())
    losses = {}
    for rest in ('uniform', 'renormalize', 'drop'):
        result = make_task(cnn().eval(), None, discriminator_weight=0, label_rest=rest)(x, target)
        p = target[:, 4:].double()
        p = p / p.sum(dim=1, keepdim=True) if rest == 'renormalize' else p
        log_q = result['output'].detach().double().log_softmax(dim=1)
        losses[rest] = -(p * log_q.gather(1, target[:, 1:4].long())).sum(dim=1).mean().item()
        if rest != 'uniform':
            assert result['similarity_loss'].item() == pytest.approx(losses[rest], rel=1e-5)
        else:
            assert result['similarity_loss'].item() > losses[rest]


def test_stored_labels_work_without_discriminator_and_with_hard_labels_where_known() -> None:
    x = images()
    target = stored_labels(make_task(), x, 3, torch.tensor([1, -1, 2, -1]))
    task = make_task(cnn().eval(), None, discriminator_weight=0, hard_label_weight=0.5)
    result = task(x, target)
    assert set(result) == KEYS | {'hard_label_loss'}
    expected = F.cross_entropy(result['output'][[0, 2]], torch.tensor([1, 2]))
    torch.testing.assert_close(result['loss'] - result['similarity_loss'], 0.5 * expected)


@pytest.mark.parametrize('shape', [(4,), (4, 1), (4, 6), (4, 23), (4, 3, 1)])
def test_a_target_that_holds_no_stored_labels_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match='stored labels'):
        make_task(teachers=None)(images(), torch.zeros(shape))


# Hard labels


def test_hard_labels_add_the_criterion_and_leave_unknown_rows_out() -> None:
    task = make_task(hard_label_weight=0.5)
    result = task(images(), torch.tensor([3, -1, 5, -1]))
    expected = F.cross_entropy(result['output'][[0, 2]], torch.tensor([3, 5]))
    torch.testing.assert_close(result['hard_label_loss'], expected.detach())
    parts = result['similarity_loss'] + result['discriminator_loss'] + 0.5 * expected
    torch.testing.assert_close(result['loss'], parts)


def test_a_batch_of_unknown_labels_has_a_finite_loss_and_gradient() -> None:
    task = make_task(hard_label_weight=1.0)
    result = task(images(), torch.full((4,), -1))
    result['loss'].backward()
    assert result['hard_label_loss'].item() == 0
    assert all(p.grad.isfinite().all() for p in task.get_trainable_module().parameters())


def test_hard_labels_may_be_mixed_by_mixup() -> None:
    x, target = Mixup(mixup_alpha=1.0, num_classes=CLASSES, label_smoothing=0.0)(images(), labels())
    task = make_task(hard_label_weight=1.0, criterion=SoftTargetCrossEntropy())
    result = task(x, target)
    expected = -(target * result['output'].log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(result['hard_label_loss'], expected.detach())


def test_without_a_hard_label_weight_the_target_is_not_looked_at() -> None:
    assert make_task()(images(), None)['loss'].isfinite()


def test_an_ignored_criterion_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make_task(criterion=nn.CrossEntropyLoss())
    assert 'criterion is ignored' in caplog.text


# Pixels


def test_pixels_reach_the_teacher_in_its_own_normalisation() -> None:
    teacher = EnsembleTeacher([cnn(seed=1, pretrained_cfg_overlay={'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6)})])
    student = cnn(pretrained_cfg_overlay={'mean': (0.5, 0.5, 0.5), 'std': (0.25, 0.25, 0.25)})
    task = make_task(student, teacher, discriminator_weight=0)
    pixels = torch.rand(4, 3, SIZE, SIZE)
    mean, std = torch.tensor([0.1, 0.2, 0.3])[:, None, None], torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    result = task((pixels - 0.5) / 0.25, labels())
    p = teacher.predict((pixels - mean) / std)[0].exp()
    expected = -(p * result['output'].log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(result['similarity_loss'], expected.detach())


def test_equal_normalisation_leaves_the_pixels_bit_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task()
    seen = []
    predict = task.teacher.predict
    monkeypatch.setattr(task.teacher, 'predict', lambda x: seen.append(x) or predict(x))
    x = images()
    task(x, labels())
    assert seen[0] is x


def test_normalisation_is_settled_when_the_task_is_made() -> None:
    student = cnn().eval()
    task = make_task(student)
    before = task(images(), labels())['similarity_loss']
    student.pretrained_cfg['mean'] = (0.0, 0.0, 0.0)
    assert torch.equal(task(images(), labels())['similarity_loss'], before)


def test_grey_pictures_use_the_mean_of_colour_statistics() -> None:
    student = cnn(in_chans=1, pretrained_cfg_overlay={'mean': (0.5,), 'std': (0.5,)})
    task = make_task(
        student,
        cnn(seed=1, in_chans=1, pretrained_cfg_overlay={'mean': (0.1, 0.2, 0.6), 'std': (0.2,)}),
        discriminator_weight=0,
    )
    pixels = torch.rand(4, 1, SIZE, SIZE)
    result = task((pixels - 0.5) / 0.5, labels())
    p = task.teacher.predict((pixels - 0.3) / 0.2)[0].exp()
    expected = -(p * result['output'].log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(result['similarity_loss'], expected.detach())


# Teachers


def test_teachers_may_be_a_module_a_list_an_ensemble_or_a_name(tmp_path: Path) -> None:
    x = images()
    expected = make_task(cnn().eval(), [cnn(seed=1)])(x, labels())['similarity_loss']
    torch.save(cnn(seed=1).state_dict(), tmp_path / 'teacher.pth')
    ensemble = EnsembleTeacher([cnn(seed=1)])
    for teacher in (cnn(seed=1), ensemble, f'test_resnet={tmp_path / "teacher.pth"}'):
        task = make_task(cnn().eval(), teacher)
        assert isinstance(task.teacher, EnsembleTeacher)
        assert torch.equal(task(x, labels())['similarity_loss'], expected)
    assert make_task(cnn(), ensemble).teacher is ensemble


def test_a_text_may_name_several_teachers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'b' is no timm model"):
        make_task(cnn(), 'test_resnet,b')


def test_a_teacher_that_shares_weights_with_the_student_is_refused() -> None:
    student = cnn()
    for teachers in ([cnn(seed=1), student], EnsembleTeacher([student])):
        with pytest.raises(UserError, match=r'Teacher test_resnet\.r160_in1k shares weights with the student'):
            make_task(student, teachers)
    assert make_task(student, [copy.deepcopy(student)]).teacher is not None


def test_half_precision_pixels_are_rounded_for_no_teacher() -> None:
    student = cnn(pretrained_cfg_overlay={'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6)}).bfloat16()
    a, b = cnn(seed=1), cnn(seed=2, pretrained_cfg_overlay={'mean': (0.2, 0.3, 0.4), 'std': (0.3, 0.4, 0.5)})
    x = images(dtype=torch.bfloat16)
    kl = [make_task(student, teachers)(x, labels())['kl'] for teachers in ([a, b], [b, a])]
    torch.testing.assert_close(*kl, rtol=1e-5, atol=1e-7)


def test_a_class_that_a_teacher_excludes_leaves_the_losses_finite() -> None:
    teacher = cnn(seed=1)
    nn.init.constant_(teacher.fc.bias[3:4], -torch.inf)
    task = make_task(cnn(), [teacher, cnn(seed=2)])
    result = task(images(), labels())
    result['loss'].backward()
    assert all(value.isfinite().all() for value in result.values())
    assert all(p.grad.isfinite().all() for p in task.get_trainable_module().parameters())
    assert task.nonfinite_teachers(images()) == []


def test_teachers_stay_as_they_were_while_the_task_trains() -> None:
    task = make_task()
    before = copy.deepcopy(task.teacher.state_dict())
    task.train().requires_grad_(True)
    assert not any(module.training for module in task.teacher.modules())
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        task(images(), labels())['loss'].backward()
        optimizer.step()
    assert all(p.grad is None for p in task.teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in task.teacher.state_dict().items())
    task.eval().train()
    assert task.get_eval_model().training
    assert not any(module.training for module in task.teacher.modules())


def test_training_brings_the_student_to_its_teachers() -> None:
    task = make_task(discriminator_mode='adversarial')
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.05, momentum=0.9, weight_decay=0)
    divergence = []
    for _ in range(25):
        optimizer.zero_grad()
        result = task(images(16), None)
        result['loss'].backward()
        optimizer.step()
        divergence.append(result['kl'].item())
    assert divergence[-1] < 0.2 * divergence[0]


# Rejected input


@pytest.mark.parametrize('as_ensemble', [True, False])
def test_another_class_count_of_the_teachers_is_refused(as_ensemble: bool) -> None:
    teacher = cnn(CLASSES + 1)
    with pytest.raises(UserError, match=r'11.*10|10.*11'):
        make_task(cnn(), EnsembleTeacher([teacher]) if as_ensemble else [teacher])


def test_a_student_of_unknown_class_count_is_refused() -> None:
    with pytest.raises(UserError, match='num_classes'):
        MealV2Task(nn.Linear(3, 4), None)


# Checkpoints


def test_state_dict_has_no_teacher_and_loads_strictly() -> None:
    task, other = make_task(), make_task(cnn(seed=5))
    state = task.state_dict()
    assert not any(name.startswith('teacher') for name in state)
    other.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    del state[next(iter(state))]
    with pytest.raises(RuntimeError, match='Missing key'):
        other.load_state_dict(state)


def test_a_state_dict_with_teachers_leaves_them_as_they_are() -> None:
    task = make_task()
    before = {name: value.clone() for name, value in task.teacher.state_dict().items()}
    others = {f'teacher.{name}': value + 1 for name, value in before.items()}
    task.load_state_dict({**task.state_dict(), **others, 'teacher.former': torch.zeros(1)})
    assert all(torch.equal(value, before[name]) for name, value in task.teacher.state_dict().items())


def test_inside_another_module_it_loads_its_own_state_dict() -> None:
    outer, other = nn.Sequential(make_task()), nn.Sequential(make_task(cnn(seed=5)))
    other.load_state_dict(outer.state_dict(), strict=True)
    averaged = torch.optim.swa_utils.AveragedModel(outer)
    averaged.load_state_dict(averaged.state_dict(), strict=True)
    assert not any('teacher' in name for name in outer.state_dict())
    for a, b in zip(outer.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_holds_student_and_discriminator_and_resumes(tmp_path: Path) -> None:
    task = make_task()
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.1, momentum=0.9)
    task.setup_ema(decay=0.5)
    for _ in range(2):
        task(images(), labels())['loss'].backward()
        optimizer.step()
        task.update_ema()
    saver = CheckpointSaver(task.get_trainable_module(), optimizer, checkpoint_dir=str(tmp_path), task=task)
    saver.save_checkpoint(epoch=3)

    path = tmp_path / 'last.pth.tar'
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint['state_dict']) == set(cnn().state_dict())
    assert set(checkpoint['task_state']) == set(checkpoint['task_state_ema']) == {'discriminator'}
    assert not any('teacher' in name for part in checkpoint.values() if isinstance(part, dict) for name in part)

    plain = timm.create_model('test_resnet', num_classes=CLASSES, checkpoint_path=str(path))
    ema = task.get_eval_model(ema=True)
    assert all(torch.equal(value, ema.state_dict()[name]) for name, value in plain.state_dict().items())

    other = make_task(cnn(seed=7))
    nn.init.zeros_(other.discriminator.fc1.weight)
    other.setup_ema(decay=0.5)
    other_optimizer = create_optimizer_v2(other.get_trainable_module(), opt='sgd', lr=0.1, momentum=0.9)
    assert resume_task_checkpoint(other, str(path), other_optimizer) == 4
    load_task_ema_checkpoint(other, str(path))
    for a, b in ((task, other), (task.trainable_module_ema, other.trainable_module_ema)):
        a, b = a.state_dict(), b.state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    for t, o in ((task, optimizer), (other, other_optimizer)):
        o.zero_grad()
        t(images(), labels())['loss'].backward()
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), other.parameters(), strict=True))


def test_the_ema_may_be_started_from_a_checkpoint_without_one(tmp_path: Path) -> None:
    task = make_task()
    torch.save({'state_dict': task.get_eval_model().state_dict(), 'task_state': task.get_task_state()}, tmp_path / 'c')
    other = make_task(cnn(seed=7))
    other.setup_ema()
    load_task_ema_checkpoint(other, str(tmp_path / 'c'))
    expected = task.get_trainable_module().state_dict()
    actual = other.get_trainable_module(ema=True).module.state_dict()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_a_discriminator_that_the_checkpoint_lacks_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    task = make_task()
    before = copy.deepcopy(task.get_task_state())
    with caplog.at_level(logging.WARNING):
        task.load_checkpoint_state(cnn(seed=3).state_dict())
    assert 'no discriminator' in caplog.text
    after = task.get_task_state()['discriminator']
    assert all(torch.equal(value, after[name]) for name, value in before['discriminator'].items())


def test_a_discriminator_that_the_task_lacks_is_refused_unless_lenient() -> None:
    state = make_task().get_task_state()
    task = make_task(discriminator_weight=0)
    with pytest.raises(UserError, match='discriminator_weight'):
        task.load_task_state(state)
    task.load_task_state(state, strict=False)


def test_a_copy_of_the_task_trains_by_itself() -> None:
    task = make_task()
    other = copy.deepcopy(task)
    torch.optim.SGD(other.get_trainable_module().parameters(), lr=1.0)
    other(images(), labels())['loss'].backward()
    assert gradients(other)
    assert not gradients(task)
    assert other.teacher is not task.teacher


# Optimizer and scheduler


def group_of(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    return {id(p): group for group in optimizer.param_groups for p in group['params']}


@pytest.mark.parametrize('layer_decay', [None, 0.5])
def test_the_discriminator_gets_no_weight_decay_and_the_student_its_own(layer_decay: float | None) -> None:
    student = vit()
    task = make_task(student)
    optimizer = create_optimizer_v2(
        task.get_trainable_module(), opt='adamw', lr=0.1, weight_decay=0.05, layer_decay=layer_decay
    )
    of = group_of(optimizer)
    assert set(of) == {id(p) for p in task.get_trainable_module().parameters()}
    assert {of[id(p)]['weight_decay'] for p in task.discriminator.parameters()} == {0}
    plain = create_optimizer_v2(student, opt='adamw', lr=0.1, weight_decay=0.05, layer_decay=layer_decay)
    for p in student.parameters():
        for option in ('weight_decay', 'lr_scale'):
            assert of[id(p)].get(option) == group_of(plain)[id(p)].get(option)
    if layer_decay:
        assert {of[id(p)]['lr_scale'] for p in task.discriminator.parameters()} == {1}
    assert of[id(student.pos_embed)]['weight_decay'] == 0


def test_a_student_without_a_group_matcher_gets_timms_own_layers() -> None:
    class Plain(nn.Sequential):
        num_classes = CLASSES

    torch.manual_seed(0)
    student = Plain(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 16), nn.Linear(16, CLASSES))
    student.pretrained_cfg = {'classifier': '2'}
    task = make_task(student)
    of = group_of(create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.1, layer_decay=0.5))
    plain = group_of(create_optimizer_v2(student, opt='sgd', lr=0.1, layer_decay=0.5))
    assert [of[id(p)]['lr_scale'] for p in student.parameters()] == [
        plain[id(p)]['lr_scale'] for p in student.parameters()
    ]


@pytest.mark.parametrize('opt', ['sgd', 'adamw', 'lookahead_sgd'])
@pytest.mark.parametrize(('weight_decay', 'layer_decay'), [(0.0, None), (0.05, None), (0.0, 0.5), (0.05, 0.5)])
def test_the_discriminators_learning_rate_is_scaled_through_the_schedule(
    opt: str, weight_decay: float, layer_decay: float | None
) -> None:
    task, plain_task = make_task(), make_task()
    arguments = {'opt': opt, 'lr': 0.1, 'weight_decay': weight_decay, 'layer_decay': layer_decay}
    optimizer = create_optimizer_v2(task.get_trainable_module(), **arguments)
    plain = create_optimizer_v2(plain_task.get_trainable_module(), **arguments)
    scale_discriminator_lr(optimizer, task, 0.25)
    scale_discriminator_lr(optimizer, task, 0.25)  # a second call changes nothing
    assert {group_of(optimizer)[id(p)]['lr'] for p in task.discriminator.parameters()} == {0.025}

    schedule = {'sched': 'cosine', 'num_epochs': 4, 'warmup_epochs': 1, 'warmup_lr': 1e-3}
    scheduler, plain_scheduler = (create_scheduler_v2(o, **schedule)[0] for o in (optimizer, plain))
    of_discriminator = {id(p) for p in task.discriminator.parameters()}
    for epoch in range(4):
        task(images(), labels())['loss'].backward()
        optimizer.step()
        of, of_plain = group_of(optimizer), group_of(plain)
        assert len(of) == sum(len(group['params']) for group in optimizer.param_groups)
        for p, q in zip(
            task.get_trainable_module().parameters(), plain_task.get_trainable_module().parameters(), strict=True
        ):
            factor = 0.25 if id(p) in of_discriminator else 1
            assert of[id(p)]['lr'] == pytest.approx(factor * of_plain[id(q)]['lr'])
            assert of[id(p)]['weight_decay'] == of_plain[id(q)]['weight_decay']
        scheduler.step(epoch + 1)
        plain_scheduler.step(epoch + 1)


def test_names_of_parameters_go_with_them() -> None:
    task = make_task()
    optimizer = torch.optim.SGD(list(task.get_trainable_module().named_parameters()), lr=0.1)
    scale_discriminator_lr(optimizer, task, 0.5)
    names = {id(parameter): name for name, parameter in task.get_trainable_module().named_parameters()}
    for group in optimizer.param_groups:
        assert group['param_names'] == [names[id(parameter)] for parameter in group['params']]


def test_scaling_without_a_discriminator_changes_nothing() -> None:
    task = make_task(discriminator_weight=0)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.1)
    before = copy.deepcopy(optimizer.state_dict())
    scale_discriminator_lr(optimizer, task, 0.1)
    assert optimizer.state_dict() == before


# Accumulation, clipping, EMA, mixed precision, compilation


@pytest.mark.parametrize('mode', MODES)
def test_accumulated_halves_give_the_gradient_of_the_whole_batch(mode: str) -> None:
    task = live_discriminator(make_task(vit().double(), [cnn(seed=1).double()], discriminator_mode=mode))
    x = images(8, dtype=torch.float64)
    task(x, None)['loss'].backward()
    expected = gradients(task)
    task.zero_grad()
    with task.no_sync():
        (task(x[:4], None)['loss'] / 2).backward()
    (task(x[4:], None)['loss'] / 2).backward()
    assert expected.keys() == gradients(task).keys()
    assert any('discriminator' in name for name in expected)
    for name, value in gradients(task).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def test_clip_parameters_leave_out_the_students_head_only() -> None:
    task = make_task()
    head, discriminator = list(task.get_eval_model().parameters())[-2:], list(task.discriminator.parameters())
    everything = {id(p) for p in task.get_trainable_module().parameters()}
    assert {id(p) for p in task.get_clip_parameters()} == everything
    without_head = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    assert without_head == everything - {id(p) for p in head}
    assert {id(p) for p in discriminator} <= without_head


@pytest.mark.parametrize('clip_mode', ['norm', 'value', 'agc'])
def test_clipping_bounds_the_discriminators_gradient_too(clip_mode: str) -> None:
    task = live_discriminator(make_task())
    (1000 * task(images(), labels())['loss']).backward()
    before = task.discriminator.fc3.weight.grad.clone()
    dispatch_clip_grad(task.get_clip_parameters(exclude_head='agc' in clip_mode), 0.01, mode=clip_mode)
    after = task.discriminator.fc3.weight.grad
    assert 0 < after.abs().max() < before.abs().max()
    if clip_mode == 'norm':
        norm = torch.stack([p.grad.norm() for p in task.get_trainable_module().parameters()]).norm()
        assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_the_ema_averages_student_and_discriminator_and_evaluates_the_student() -> None:
    task = live_discriminator(make_task())
    task.setup_ema(decay=0.9)
    start = copy.deepcopy(task.get_trainable_module().state_dict())
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    task(images(), labels())['loss'].backward()
    optimizer.step()
    task.update_ema()
    now, ema = task.get_trainable_module().state_dict(), task.get_trainable_module(ema=True).module.state_dict()
    for name in ('student.fc.weight', 'discriminator_loss.discriminator.fc3.weight'):
        assert not torch.equal(now[name], start[name])
        torch.testing.assert_close(ema[name], 0.9 * start[name] + 0.1 * now[name])
    model = task.get_eval_model(ema=True)
    assert type(model) is type(cnn())
    assert torch.equal(model.fc.weight, ema['student.fc.weight'])
    expected = task.get_trainable_module(ema=True).module.discriminator_loss.discriminator.state_dict()
    state = task.get_task_state(ema=True)['discriminator']
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_mixed_precision_steps_with_loss_scaling_train_both(dtype: torch.dtype) -> None:
    task = live_discriminator(make_task(vit(), [cnn(seed=1)]))
    exact = copy.deepcopy(task)
    exact(images(), labels())['loss'].backward()
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.1, momentum=0.9)
    scaler = NativeScaler(device='cpu')
    before = copy.deepcopy(task.get_trainable_module().state_dict())
    for step in range(2):
        optimizer.zero_grad()
        with torch.autocast('cpu', dtype=dtype):
            result = task(images(), labels())
        assert result['output'].dtype == dtype
        assert result['loss'].dtype == torch.float32
        scaler(result['loss'], optimizer, clip_grad=10.0, parameters=task.get_clip_parameters())
        if step == 0:
            for p, q in zip(
                task.get_trainable_module().parameters(), exact.get_trainable_module().parameters(), strict=True
            ):
                assert (p.grad - q.grad).norm() <= 0.1 * q.grad.norm() + 1e-4
    after = task.get_trainable_module().state_dict()
    for name in ('student.head.weight', 'discriminator_loss.discriminator.fc3.weight'):
        assert after[name].isfinite().all()
        assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize(
    ('backend', 'mode'),
    [
        ('aot_eager', 'adversarial'),  # has an autograd function of its own
        pytest.param('aot_eager', 'official', marks=pytest.mark.slow),
        *(pytest.param('inductor', mode, marks=pytest.mark.slow) for mode in MODES),
    ],
)
def test_a_compiled_task_gives_the_same_step_and_the_same_checkpoint(backend: str, mode: str) -> None:
    torch.compiler.reset()
    task = live_discriminator(make_task(discriminator_mode=mode))
    task.setup_ema(decay=0.5)
    compiled = copy.deepcopy(task)
    create_optimizer_v2(compiled.get_trainable_module(), opt='sgd', lr=0.1)
    model = compiled.compile(backend=backend)
    compiled.compile_ema(backend=backend)
    assert compiled.get_eval_model() is model
    for _ in range(2):
        a, b = task(images(), labels()), compiled(images(), labels())
        for name, value in a.items():
            torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-5, msg=name)
        a['loss'].backward()
        b['loss'].backward()
    for p, q in zip(task.get_clip_parameters(), compiled.get_clip_parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5)
    compiled.update_ema()
    for ema in (False, True):
        state = compiled.get_checkpoint_state(ema=ema)
        expected = task.get_checkpoint_state(ema=ema)
        assert {name: set(part) for name, part in state.items()} == {name: set(part) for name, part in expected.items()}
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images()), task.get_eval_model().eval()(images()), rtol=1e-4, atol=1e-5)


# The discriminator's size and health


def test_its_size_is_an_option() -> None:
    task = make_task(cnn(640), [cnn(640, seed=1)], discriminator_reduction=64)
    assert task.discriminator.fc1.out_features == 10


@pytest.mark.parametrize(
    ('dead', 'names'),
    [((), None), ((0,), "'student'"), ((0, 1), "'student' and 'teacher'")],
    ids=['alive', 'one', 'both'],
)
def test_a_dead_discriminator_is_told(dead: tuple[int, ...], names: str | None) -> None:
    task = live_discriminator(make_task())
    with torch.no_grad():
        task.discriminator.fc3.bias[list(dead)] = -100
        task.discriminator.fc2.bias.fill_(1)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    for _ in range(2):
        task(images(), labels())['loss'].backward()
        optimizer.step()
    warning = task.discriminator_warning()
    assert warning is None if names is None else f'The discriminator is dead: its output {names} has not' in warning
    assert make_task(discriminator_weight=0).discriminator_warning() is None
