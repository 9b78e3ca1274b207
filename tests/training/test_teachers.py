"""The teachers of a run: read once, and optimized or left as they are."""

import re
from collections import Counter

import pytest
import torch
from quick_training import Train, assert_equal_weights, read_checkpoint, summary
from torch import Tensor

from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import TeacherSpec
from timm_mealv2.training import build_task
from timm_mealv2.training.distributed import Processes


def test_optimized_teachers_teach_the_same(train: Train, teachers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    optimize, fused = EnsembleTeacher.optimize_for_inference, Counter()

    def counted(ensemble: EnsembleTeacher) -> None:
        optimize(ensemble)
        fused.update(
            running is not teacher for running, teacher in zip(ensemble.running, ensemble.teachers, strict=True)
        )

    monkeypatch.setattr(EnsembleTeacher, 'optimize_for_inference', counted)
    # At a rate of 0.05 noise of 3e-8 in the teachers' logits, as rounding is, changes the loss by 1e-3.
    options = ('--teachers', *teachers, '--drop', 0.2, '--lr', 1e-4, '--no-preflight')
    rows = [summary(train(how, *options, '--teacher-optimize', how))[-1] for how in ('on', 'off')]
    assert fused == {True: len(teachers)}
    for column in ('train_loss', 'train_kl', 'eval_loss'):
        assert float(rows[0][column]) == pytest.approx(float(rows[1][column]), abs=1e-5), column


def test_one_teacher_a_sample_costs_one_forward_pass_and_is_evaluated_with_all(
    train: Train, teachers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    predict, asked = EnsembleTeacher.predict, Counter()

    def counted(ensemble: EnsembleTeacher, x: Tensor, per_sample: int | None = None) -> tuple[Tensor, Tensor]:
        asked.update([per_sample])
        return predict(ensemble, x, per_sample)

    monkeypatch.setattr(EnsembleTeacher, 'predict', counted)
    options = ('--teachers', *teachers, '--epochs', 1)
    one, again, both = (
        train(name, *options, *more)
        for name, more in (('a', ('--teachers-per-sample', 1)), ('b', ('--teachers-per-sample', 1)), ('c', ()))
    )
    assert asked == {1: 10, None: 5}  # batches
    assert_equal_weights(one / 'last.pth.tar', again / 'last.pth.tar')
    assert summary(one)[0]['train_kl'] != summary(both)[0]['train_kl']
    assert (one / 'preflight.json').read_text() == (both / 'preflight.json').read_text()
    with pytest.raises(UserError, match='--teachers-per-sample 3: test_resnet'):
        train('d', *options, '--teachers-per-sample', 3)


def test_mixed_precision_reaches_the_teachers_and_a_resumed_run_keeps_what_it_had(
    train: Train, teachers: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    # Not 16 pixels: torch's bfloat16 gradient of a 3x3 convolution on a 1x1 map reads memory that nothing has written.
    options = ['--teachers', *teachers, '--img-size', 32, '--no-preflight', '--epochs', 1, '--lr', 1e-12]
    amp = ['--amp', '--amp-dtype', 'bfloat16']
    kl, text = {}, {}
    for name, more in {'none': [], 'amp': amp, 'exact': [*amp, '--teacher-dtype', 'float32']}.items():
        caplog.clear()
        with caplog.at_level('INFO'):
            folder = train(name, *options, *more)
        kl[name], text[name] = float(summary(folder)[0]['train_kl']), caplog.text
        expected = {'none': None, 'amp': 'bfloat16', 'exact': 'float32'}[name]
        assert read_checkpoint(folder / 'last.pth.tar')['args']['teacher_dtype'] == expected
    assert ['Teachers in bfloat16' in text[name] for name in kl] == [False, True, False]
    assert kl['amp'] != kl['exact']

    older = torch.load(folder / 'last.pth.tar', weights_only=True)  # of a version whose teachers stayed in float32
    older['args']['teacher_dtype'] = None
    torch.save(older, folder / 'last.pth.tar')
    torch.save(older, folder / 'checkpoint-0.pth.tar')
    for name, stays in (('amp', False), ('exact', True)):
        caplog.clear()
        with caplog.at_level('INFO'):
            train(name, *options, *amp, '--epochs', 2, '--resume', 'auto')
        assert ('The teachers stay in float32' in caplog.text) == stays
        assert ('Teachers in bfloat16' in caplog.text) != stays


def test_the_teachers_device_is_one_of_its_own(train: Train, teachers: list[str]) -> None:
    options = ('--teachers', *teachers, '--epochs', 1, '--no-preflight')
    here, there = (train(name, *options, *more) for name, more in (('a', ()), ('b', ('--teacher-device', 'cpu'))))
    assert_equal_weights(here / 'last.pth.tar', there / 'last.pth.tar')
    for number, name in enumerate(('cuda:99', 'cuda:+99', 'xyz', 'cuda:+x')):
        with pytest.raises(UserError, match=rf'^--teacher-device {re.escape(name)} cannot be used: [^\n]*$'):
            train(f'c{number}', *options, '--teacher-device', name)


def test_each_process_has_a_device_for_its_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(build_task, 'choose_device', lambda name, option: chosen.append(name))
    fleet = Processes(torch.device('cuda', 2), 2, 4, object())  # type: ignore[arg-type]
    for name in ('cuda:+4', 'cpu'):
        build_task.choose_teacher_device(name, fleet)
    build_task.choose_teacher_device('cuda:1', Processes(torch.device('cuda', 0)))
    assert chosen == ['cuda:6', 'cpu', 'cuda:1']
    with pytest.raises(UserError, match=r'--teacher-device cuda:1: all processes would share it; cuda:\+N'):
        build_task.choose_teacher_device('cuda:1', fleet)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA devices')
def test_teachers_on_a_second_gpu_teach_the_same(train: Train, teachers: list[str]) -> None:
    options = ('--teachers', *teachers, '--lr', 1e-4, '--device', 'cuda')
    rows = [
        summary(train(name, *options, *more))[-1] for name, more in (('a', ()), ('b', ('--teacher-device', 'cuda:1')))
    ]
    for column in ('train_loss', 'train_kl', 'eval_loss'):
        assert float(rows[0][column]) == pytest.approx(float(rows[1][column]), abs=1e-4), column


def test_a_teachers_text_is_parsed_and_checked_once(
    train: Train, teachers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    parse, check = TeacherSpec.parse, TeacherSpec.check
    monkeypatch.setattr(
        TeacherSpec, 'parse', classmethod(lambda cls, text: (counts.update([('parse', text)]), parse(text))[1])
    )
    monkeypatch.setattr(TeacherSpec, 'check', lambda spec: (counts.update([('check', str(spec))]), check(spec))[1])
    train('run', '--teachers', *teachers, '--epochs', 1)
    assert counts == {(what, text): 1 for what in ('parse', 'check') for text in teachers}
