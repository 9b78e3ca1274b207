"""The ensemble against plain NumPy, and frozen whatever is called."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from tiny_models import (
    HALF,
    MEAN,
    STD,
    Scripted,
    images,
    same_state,
    state_of,
    tiny,
)
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher


class TestArithmetic:
    @pytest.mark.parametrize('num_teachers', [1, 2, 3, 4])
    @pytest.mark.parametrize('num_classes', [2, 10, 1000])
    @pytest.mark.parametrize('weighted', [False, True])
    def test_mean_probability_and_mean_logits_are_those_of_numpy(self, num_teachers, num_classes, weighted):
        rng = np.random.default_rng(num_teachers * num_classes)
        logits = rng.normal(scale=5, size=(num_teachers, 6, num_classes))
        weights = rng.uniform(0.1, 3, num_teachers) if weighted else np.ones(num_teachers)
        ensemble = EnsembleTeacher([Scripted(z) for z in logits], weights.tolist() if weighted else None)

        exp = np.exp(logits - logits.max(axis=2, keepdims=True))
        share = (weights / weights.sum())[:, None, None]
        mean_prob = (share * exp / exp.sum(axis=2, keepdims=True)).sum(axis=0)
        log_probs, mean_logits = ensemble.predict(images(6).double())
        assert log_probs.dtype == torch.float64
        np.testing.assert_allclose(log_probs.numpy(), np.log(mean_prob), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(mean_logits.numpy(), (share * logits).sum(axis=0), rtol=1e-10, atol=1e-10)
        np.testing.assert_array_equal(ensemble.teacher_logits(images(6).double()).numpy(), logits)
        assert sum(ensemble.weights) == pytest.approx(1, abs=1e-12)

    def test_extreme_logits_stay_finite(self):
        ensemble = EnsembleTeacher([Scripted(np.array([[3e4, 0.0]])), Scripted(np.array([[0.0, -3e4]]))])
        assert torch.isfinite(ensemble(images(1))).all()

    def test_half_types_come_out_as_float32(self):
        for dtype in (torch.float16, torch.bfloat16):
            ensemble = EnsembleTeacher([tiny(0), tiny(1)]).to(dtype)
            log_probs, mean_logits = ensemble.predict(images().to(dtype))
            assert log_probs.dtype == mean_logits.dtype == ensemble.teacher_logits(images()).dtype == torch.float32
            torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(3))

    def test_a_teacher_of_weight_zero_does_not_count(self):
        a, b = tiny(0), tiny(1)
        expected = F.log_softmax(a(images()), dim=1)
        torch.testing.assert_close(EnsembleTeacher([a, b], [2, 0])(images()), expected, rtol=1e-4, atol=1e-4)

    def test_an_ensemble_in_an_ensemble_counts_by_its_members(self):
        a, b, c = (Scripted(np.random.default_rng(seed).normal(size=(3, 5))) for seed in range(3))
        nested = EnsembleTeacher([EnsembleTeacher([a, b], [3, 1]), c])
        flat = EnsembleTeacher([a, b, c], [3, 1, 4])
        assert nested.weights == pytest.approx(flat.weights)
        for one, other in zip(nested.predict(images()), flat.predict(images()), strict=True):
            torch.testing.assert_close(one, other)

    def test_answers_can_stand_in_a_loss_of_the_student(self):
        student, ensemble = tiny(5), EnsembleTeacher([tiny(0), tiny(1)])
        log_probs, mean_logits = ensemble.predict(images())
        assert not log_probs.is_inference()
        assert not mean_logits.is_inference()
        output = student(images())
        ((output - mean_logits).pow(2).mean() - (log_probs.exp() * F.log_softmax(output, dim=1)).sum()).backward()
        assert all(p.grad is not None for p in student.parameters())

    def test_the_callers_autocast_does_not_reach_the_teachers(self):
        ensemble = EnsembleTeacher([tiny(0), tiny(1)])
        expected = ensemble(images())
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(ensemble(images()), expected)

    def test_the_teachers_own_dtype_is_their_autocast(self):
        a, b = tiny(0), tiny(1)
        exact = EnsembleTeacher([a, b])(images())
        half = EnsembleTeacher([a, b], autocast_dtype=torch.bfloat16)(images())
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
            by_hand = torch.stack([F.softmax(model(images()).float(), dim=1) for model in (a, b)]).mean(dim=0)
        assert half.dtype == torch.float32
        assert not torch.equal(half, exact)
        torch.testing.assert_close(half.exp(), by_hand, rtol=1e-3, atol=1e-4)

    def test_what_the_autocast_changes_is_said_and_a_large_difference_warned_of(self, caplog):
        coarse = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
        coarse.num_classes = 10
        with torch.no_grad():
            coarse[1].weight += 100 * torch.randn(12)  # a large part that all logits share
        x, quiet = images(16, size=2), tiny(1)
        for teachers, warned in (([quiet], False), ([quiet, coarse], True)):
            caplog.clear()
            ensemble = EnsembleTeacher(
                teachers, autocast_dtype=torch.bfloat16, names=['quiet', 'coarse'][: len(teachers)]
            )
            exact = EnsembleTeacher(teachers)
            expected = (ensemble(x).exp() - exact(x).exp()).abs().max().item()
            with caplog.at_level(logging.INFO):
                ensemble.log_rounding(x)
                exact.log_rounding(x)
            assert caplog.messages[0].startswith('Teachers in bfloat16: on the first batch their mean probability')
            assert f'differs from float32 by {expected:.1e} at most' in caplog.messages[0]
            assert len(caplog.messages) == 1 + warned
            assert ('Teacher coarse differs' in caplog.text) == warned == (expected > 2**-6)
            assert ensemble.autocast_dtypes == (torch.bfloat16,) * len(teachers)

    def test_autocast_to_float32_is_none_and_torch_does_not_warn(self, recwarn):
        a = [tiny(0)]
        assert torch.equal(EnsembleTeacher(a, autocast_dtype=torch.float32)(images()), EnsembleTeacher(a)(images()))
        assert not recwarn.list

    def test_a_class_that_teachers_leave_out_has_probability_zero(self):
        ensemble = EnsembleTeacher(
            [Scripted(np.array([[-np.inf, 1.0, 2.0]])), Scripted(np.array([[-np.inf, 0.0, 0.0]]))]
        )
        log_probs, mean_logits = ensemble.predict(images(1))
        assert log_probs.exp().tolist()[0] == pytest.approx([0, (0.2689414 + 0.5) / 2, (0.7310586 + 0.5) / 2])
        assert mean_logits.tolist() == [[-np.inf, 0.5, 1.0]]


class OfTheImage(nn.Module):
    """Answers by the first pixel of an image, and remembers how many images each call had."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.num_classes, self.calls = 4, []
        slope, offset = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)).double()
        self.register_buffer('slope', slope)
        self.register_buffer('offset', offset)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return x[:, :1, 0, 0] * self.get_buffer('slope') + self.get_buffer('offset')


class TestDrawn:
    """A part of the teachers for each image."""

    @pytest.mark.parametrize(('batch', 'draws'), [(1, 2000), (7, 400), (64, 100)])
    def test_the_mean_of_many_draws_is_the_full_target(self, batch, draws):
        ensemble, x = EnsembleTeacher([OfTheImage(0), OfTheImage(1)], [0.7, 0.3]), images(batch, size=2).double()
        each, (full_log_probs, full_logits) = ensemble.teacher_logits(x), ensemble.predict(x)
        torch.manual_seed(0)
        answers = [ensemble.predict(x, per_sample=1) for _ in range(draws)]
        for drawn, full, of_teachers in (
            ([log_probs.exp() for log_probs, _ in answers], full_log_probs.exp(), each.softmax(dim=2)),
            ([logits for _, logits in answers], full_logits, each),
        ):
            deviation = (0.7 * 0.3 / draws) ** 0.5 * (of_teachers[0] - of_teachers[1]).abs()
            assert ((torch.stack(drawn).mean(dim=0) - full).abs() < 5 * deviation + 1e-9).all()
        # Within a batch the teachers' shares are as even as they can be.
        ensemble.teachers[0].calls.clear()
        for _ in range(20):
            ensemble.predict(x, per_sample=1)
        assert all(abs(count - 0.7 * batch) < 1 for count in ensemble.teachers[0].calls)

    def test_each_teacher_is_drawn_as_often_as_its_weight_says(self):
        x = images(1000, size=2).double()
        places = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        for weights, per_sample in (([0.5, 0.3, 0.2], 2), ([0, 0.6, 0.4], 1), ([1, 1, 1], 2)):
            teachers = [OfTheImage(seed) for seed in range(3)]
            ensemble = EnsembleTeacher(teachers, weights)
            log_probs, _ = ensemble.predict(x, per_sample, places)
            shares = [per_sample * weight for weight in ensemble.weights]
            assert [sum(teacher.calls) for teacher in teachers] == pytest.approx([1000 * s for s in shares], abs=1)
            chosen = [[t for t in range(3) if share[t]] for share in self.drawn_of(ensemble, log_probs, x)]
            assert all(len(of_image) == per_sample for of_image in chosen)

    @staticmethod
    def drawn_of(ensemble, log_probs, x):
        """For each image the teachers, as zeros and ones, whose plain mean the answer is."""
        each = ensemble.teacher_logits(x).softmax(dim=2)
        for image, target in enumerate(log_probs.exp()):
            masks = [mask for mask in np.ndindex(2, 2, 2) if sum(mask)]
            means = [sum(m * p for m, p in zip(mask, each[:, image], strict=True)) / sum(mask) for mask in masks]
            errors = [(mean - target).abs().max().item() for mean in means]
            assert min(errors) < 1e-9
            yield masks[int(np.argmin(errors))]

    def test_all_of_equal_weight_are_the_full_mean(self):
        ensemble = EnsembleTeacher([tiny(0), tiny(1), tiny(2)])
        for drawn, full in zip(ensemble.predict(images(), per_sample=3), ensemble.predict(images()), strict=True):
            torch.testing.assert_close(drawn, full, rtol=1e-5, atol=1e-5)

    def test_a_teacher_runs_once_on_its_part_and_the_rows_come_back_in_order(self):
        ensemble, x = EnsembleTeacher([OfTheImage(seed) for seed in range(3)]), images(4, size=2).double()
        each = ensemble.teacher_logits(x)
        for teacher in ensemble.teachers:
            teacher.calls.clear()
        places = torch.tensor([0.9, 0.1, 0.2, 0.8], dtype=torch.float64)
        log_probs, logits = ensemble.predict(x, 1, places)
        expected = torch.stack([each[2, 0], each[0, 1], each[0, 2], each[2, 3]])
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(log_probs, expected.log_softmax(dim=1))
        assert [teacher.calls for teacher in ensemble.teachers] == [[2], [], [2]]

    def test_the_draw_is_that_of_torchs_cpu_generator(self):
        ensemble, x = EnsembleTeacher([OfTheImage(0), OfTheImage(1)]), images(32, size=2).double()
        answers = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            answers.append(ensemble.predict(x, per_sample=1)[0])
        assert torch.equal(answers[0], answers[1])
        assert not torch.equal(answers[0], answers[2])

    @pytest.mark.parametrize(('weights', 'per_sample', 'most'), [(None, 3, 2), ([3, 1], 2, 1)])
    def test_more_than_the_weights_allow_is_refused(self, weights, per_sample, most):
        ensemble = EnsembleTeacher([tiny(0), tiny(1)], weights)
        with pytest.raises(UserError, match=rf'--teachers-per-sample {per_sample}: resnet10t.*give at most {most}\.'):
            ensemble.predict(images(), per_sample)


class TestInput:
    def test_each_teacher_sees_its_own_normalisation(self):
        imagenet, half = tiny(0), tiny(1)
        half.pretrained_cfg.update(mean=HALF, std=HALF)
        pixels = torch.rand(3, 3, 64, 64)
        by_imagenet = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        with torch.no_grad():
            expected = torch.stack([imagenet(by_imagenet), half((pixels - 0.5) / 0.5)])
        got = EnsembleTeacher([imagenet, half]).teacher_logits(by_imagenet)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)

    def test_what_the_ensembles_config_says_at_the_call_counts(self):
        ensemble = EnsembleTeacher([tiny(0), tiny(1)])
        pixels = torch.rand(3, 3, 64, 64)
        by_imagenet = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        expected = ensemble(by_imagenet)
        ensemble.pretrained_cfg.update(mean=list(HALF), std=list(HALF))
        torch.testing.assert_close(ensemble((pixels - 0.5) / 0.5), expected, rtol=1e-4, atol=1e-3)
        assert timm.data.resolve_model_data_config(ensemble)['mean'] == list(HALF)
        assert ensemble.default_cfg is ensemble.pretrained_cfg

    def test_equal_normalisation_hands_the_very_values_on(self):
        seen = []
        teacher = tiny(0)
        teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        EnsembleTeacher([teacher])(images())
        assert torch.equal(seen[0], images())
        assert seen[0].data_ptr() != 0
        assert seen[0].is_contiguous()

    def test_grey_pictures_take_the_average_of_a_colour_config(self):
        grey = tiny(0, in_chans=1)  # its config has three means
        half = tiny(1, in_chans=1)
        half.pretrained_cfg.update(mean=(0.5,), std=(0.5,))
        ensemble = EnsembleTeacher([grey, half])
        assert ensemble.in_chans == 1
        assert ensemble.pretrained_cfg['input_size'][0] == 1
        pixels = torch.rand(3, 1, 64, 64)
        normalised = (pixels - sum(MEAN) / 3) / (sum(STD) / 3)
        with torch.no_grad():
            expected = torch.stack([grey(normalised), half((pixels - 0.5) / 0.5)])
        torch.testing.assert_close(ensemble.teacher_logits(normalised), expected, rtol=1e-4, atol=1e-3)

    def test_a_teacher_of_fixed_size_gets_its_size_and_the_other_the_input(self):
        vit = timm.create_model('vit_tiny_patch16_224', img_size=32, embed_dim=48, depth=1, num_classes=10).eval()
        nn.init.normal_(vit.head.weight)
        net = tiny(1)
        net.pretrained_cfg.update(mean=HALF, std=HALF)
        ensemble = EnsembleTeacher([vit, net])
        assert ensemble.img_sizes == ((32, 32), None)
        with torch.no_grad():
            small = F.interpolate(images(), (32, 32), mode='bicubic', antialias=True)
            expected = torch.stack([vit(small), net(images())])
        torch.testing.assert_close(ensemble.teacher_logits(images()), expected, rtol=1e-4, atol=1e-3)
        with pytest.raises(UserError, match=r'takes images of \(32, 32\) only, got \(48, 48\)'):
            EnsembleTeacher([vit], img_sizes=[48])

    def test_an_asked_image_size_is_what_the_teacher_sees(self):
        a, b = tiny(0), tiny(1)
        with torch.no_grad():
            expected = torch.stack([a(F.interpolate(images(), (96, 96), mode='bicubic', antialias=True)), b(images())])
        got = EnsembleTeacher([a, b], img_sizes=[96, None]).teacher_logits(images())
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


class Parent(nn.Module):
    """What may be around an ensemble: it is a plain submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.student = tiny(5)
        self.teacher = EnsembleTeacher([tiny(0), tiny(1)])

    def forward(self, x: Tensor) -> Tensor:
        return -(self.teacher(x).exp() * F.log_softmax(self.student(x), dim=1)).sum()


CALLS: dict[str, Callable[[Any], Any]] = {
    'train': lambda parent: parent.train(),
    'own train': lambda parent: parent.teacher.train(),
    'train and eval': lambda parent: parent.eval().train(),
    'requires_grad_': lambda parent: parent.requires_grad_(True),
    'own requires_grad_': lambda parent: parent.teacher.requires_grad_(True),
    'apply': lambda parent: parent.apply(lambda module: module.train()),
    'to': lambda parent: parent.to('cpu').to(torch.float64).to(torch.float32),
}
AROUND: dict[str, Callable[[Any], Any]] = {
    'alone': lambda parent: parent,
    'copied': copy.deepcopy,
    'compiled': lambda parent: torch.compile(parent, backend='eager'),
}


class TestFrozen:
    @pytest.mark.parametrize('around', AROUND)
    @pytest.mark.parametrize('optimized', [False, True])
    def test_whatever_is_called_around_it_changes_nothing(self, around, optimized):
        torch.compiler.reset()
        parent = Parent()
        if optimized:
            parent.teacher.optimize_for_inference()
        before = state_of(parent.teacher)
        outer = AROUND[around](parent)
        teacher = outer.teacher
        answer = teacher(images())
        for call in CALLS.values():
            call(outer)
            optimizers = [torch.optim.SGD(outer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)]
            optimizers.append(torch.optim.AdamW(outer.parameters(), lr=0.1, weight_decay=0.1))
            outer(images()).backward()
            assert all(p.grad is None for p in teacher.parameters())
            assert any(p.grad is not None for p in outer.student.parameters())
            for optimizer in optimizers:
                optimizer.step()
            assert not any(module.training for module in (*teacher.modules(), *teacher.running))
        assert same_state(before, teacher.state_dict())
        assert torch.equal(teacher(images()), answer)

    def test_an_average_around_it_keeps_its_weights(self):
        parent = Parent()
        before = state_of(parent.teacher)
        averaged = torch.optim.swa_utils.AveragedModel(parent)
        ema = ModelEmaV3(parent, decay=0.7)
        for _ in range(3):
            torch.nn.init.normal_(parent.student.fc.weight)
            averaged.update_parameters(parent)
            ema.update(parent)
        for teacher in (parent.teacher, averaged.module.teacher, ema.module.teacher):
            assert same_state(teacher.state_dict(), before)

    def test_its_parameters_ask_for_no_gradient(self):
        assert not any(p.requires_grad for p in copy.deepcopy(EnsembleTeacher([tiny(0), tiny(1)])).parameters())

    def test_weights_travel_by_state_dict_and_dtype(self):
        ensemble, other = EnsembleTeacher([tiny(0), tiny(1)], [2, 1]), EnsembleTeacher([tiny(2), tiny(3)], [2, 1])
        other.load_state_dict(ensemble.state_dict())
        assert torch.equal(other(images()), ensemble(images()))
        torch.testing.assert_close(
            copy.deepcopy(ensemble).double()(images()).float(), ensemble(images()), rtol=1e-3, atol=1e-3
        )

    def test_exported_with_a_dynamic_batch_it_predicts_the_same(self):
        ensemble = EnsembleTeacher([tiny(0), tiny(1)])
        expected = ensemble(images(5))
        ensemble.optimize_for_inference()
        batch = torch.export.Dim('batch', min=2, max=64)
        exported = torch.export.export(ensemble, (images(),), dynamic_shapes=({0: batch},))
        assert exported.state_dict.keys() >= ensemble.state_dict().keys() - {'num_batches_tracked'}
        assert torch.equal(exported.module()(images(5)), expected)  # the teachers as they are


class LeNet(nn.Module):
    """As in the tutorials: it flattens with `view`, which takes no channels_last activations."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4), nn.Linear(4 * 60 * 60, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.linear(x.view(len(x), -1))


class TestCallersModule:
    def test_it_is_frozen_and_otherwise_left_as_it_is(self):
        model = LeNet()
        before = state_of(model)
        ensemble = EnsembleTeacher([model])
        assert ensemble.teachers[0] is model
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        assert same_state(model.state_dict(), before)

    def test_optimized_a_model_that_flattens_by_view_runs_as_it_is(self, caplog):
        model = LeNet()
        model.pretrained_cfg = {'input_size': (3, 64, 64)}  # type: ignore[assignment]
        ensemble = EnsembleTeacher([model])
        expected = ensemble(images())
        with caplog.at_level(logging.INFO):
            ensemble.optimize_for_inference()
        assert 'Teacher LeNet is not optimized, and runs as it is: view size is not compatible' in caplog.text
        assert ensemble.running == [model]
        assert torch.equal(ensemble(images()), expected)


class TestNested:
    def test_autocast_and_modules_are_kept(self):
        inner = EnsembleTeacher([tiny(0), tiny(1)], autocast_dtype=torch.bfloat16)
        expected = inner(images())
        nested = EnsembleTeacher([torch.compile(inner, backend='eager')])
        assert list(nested.teachers) == list(inner.teachers)
        assert nested.autocast_dtypes == (torch.bfloat16,) * 2
        assert torch.equal(nested(images()), expected)
        outer = EnsembleTeacher([inner, tiny(2)], autocast_dtype=torch.float16)
        assert outer.autocast_dtypes == (torch.bfloat16, torch.bfloat16, torch.float16)


class TestRefused:
    def test_no_teacher(self):
        with pytest.raises(UserError, match='at least one teacher'):
            EnsembleTeacher([])

    def test_the_same_weights_twice_by_both_names(self):
        a = tiny(0)
        a.pretrained_cfg['tag'] = 'one'
        b = copy.deepcopy(a)
        b.pretrained_cfg['tag'] = 'two'
        with pytest.raises(UserError, match=r'resnet10t\.one and resnet10t\.two have the same weights'):
            EnsembleTeacher([a, tiny(1), b])

    def test_the_same_module_twice(self):
        with pytest.raises(UserError, match='the same weights'):
            EnsembleTeacher([tiny(0)] * 2)

    def test_one_other_buffer_is_another_teacher(self):
        a, b = tiny(0), tiny(0)
        b.bn1.running_mean.add_(1)
        assert len(EnsembleTeacher([a, b]).teachers) == 2

    def test_class_counts_that_differ(self):
        with pytest.raises(UserError, match=r'num_classes, and the same, got resnet10t.c3_in1k 10, .* 7'):
            EnsembleTeacher([tiny(0), tiny(1, num_classes=7)])

    def test_no_class_count(self):
        with pytest.raises(UserError, match='must have num_classes, and the same, got Sequential 0'):
            EnsembleTeacher([nn.Sequential(nn.Flatten())])

    @pytest.mark.parametrize('weights', [[1], [1, 1, 1], [0, 0], [1, -1], [1, float('nan')], [1, float('inf')]])
    def test_weights_that_are_none(self, weights):
        with pytest.raises(UserError, match='Teacher weights must be'):
            EnsembleTeacher([tiny(0), tiny(1)], weights)
