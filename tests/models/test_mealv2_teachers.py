"""The ensemble against plain NumPy, frozen whatever is called, and made from names, folders and checkpoints."""

import argparse
import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.task import LogitDistillationTask
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

import timm_mealv2  # noqa: F401  (registers the ensembles)
from timm_mealv2.errors import UserError
from timm_mealv2.models.mealv2_teachers import EnsembleTeacher, create_ensemble, create_from_checkpoint, parse_teachers

HALF = (0.5, 0.5, 0.5)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tiny(seed: int = 0, name: str = 'resnet10t', **kwargs: Any) -> Any:
    """A small real model whose answers differ clearly from class to class."""
    torch.manual_seed(seed)
    if name == 'resnet10t':
        kwargs = {'channels': (8, 8, 16, 16), 'stem_width': 8, **kwargs}
    model = timm.create_model(name, **{'num_classes': 10, **kwargs})
    with torch.no_grad():
        model.get_classifier().weight.mul_(20)
    # Statistics unlike the initial ones: BatchNorm in the wrong mode, or its buffers lost, would show.
    model.train()
    with torch.no_grad():
        model(torch.randn(4, model.in_chans, 64, 64))
    return model.eval()


def images(count: int = 3, chans: int = 3, size: int = 64) -> Tensor:
    return torch.randn(count, chans, size, size, generator=torch.Generator().manual_seed(7))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Scripted(nn.Module):
    """Answers with given logits, so that NumPy can take the very same."""

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.num_classes = logits.shape[1]
        self.register_buffer('logits', torch.from_numpy(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_buffer('logits')[: len(x)].to(x.dtype)


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
        half = EnsembleTeacher([a, b], dtype=torch.bfloat16)(images())
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
            by_hand = torch.stack([F.softmax(model(images()).float(), dim=1) for model in (a, b)]).mean(dim=0)
        assert half.dtype == torch.float32
        assert not torch.equal(half, exact)
        torch.testing.assert_close(half.exp(), by_hand, rtol=1e-3, atol=1e-4)

    def test_an_answer_of_another_width_is_refused(self):
        teacher = Scripted(np.zeros((3, 5)))
        teacher.num_classes = 6
        with pytest.raises(UserError, match=r'Teacher Scripted must answer with logits \[3, 6\]'):
            EnsembleTeacher([teacher])(images())


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
        assert seen[0].is_contiguous(memory_format=torch.channels_last)

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
    def __init__(self) -> None:
        super().__init__()
        self.student = tiny(5)
        self.teacher = EnsembleTeacher([tiny(0), tiny(1)])


class TestFrozen:
    @pytest.mark.parametrize(
        'call',
        [
            lambda parent: parent.train(),
            lambda parent: parent.teacher.train(),
            lambda parent: parent.requires_grad_(True),
            lambda parent: parent.teacher.requires_grad_(True),
            lambda parent: parent.apply(lambda module: module.train()),
            lambda parent: [module.train() for module in parent.modules()],
            lambda parent: parent.apply(lambda m: m.reset_parameters() if hasattr(m, 'reset_parameters') else None),
        ],
        ids=['train', 'own train', 'requires_grad_', 'own requires_grad_', 'apply', 'each module', 'apply an init'],
    )
    @pytest.mark.parametrize('copied', [False, True])
    def test_training_a_parent_changes_nothing(self, call, copied):
        parent = Parent()
        if copied:
            parent = copy.deepcopy(parent)
        before, answer = state_of(parent.teacher), parent.teacher(images())
        call(parent)
        optimizer = torch.optim.SGD(parent.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        adam = torch.optim.AdamW(parent.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(2):
            loss = -(parent.teacher(images()).exp() * F.log_softmax(parent.student(images()), dim=1)).sum()
            loss.backward()
            optimizer.step()
            adam.step()
        assert all(p.grad is None for p in parent.teacher.parameters())
        assert not any(module.training for module in parent.teacher.modules())
        assert same_state(before, parent.teacher.state_dict())
        assert torch.equal(parent.teacher(images()), answer)

    def test_own_parameters_ask_for_no_gradient(self):
        ensemble = EnsembleTeacher([tiny(0), tiny(1)])
        assert not any(p.requires_grad for p in copy.deepcopy(ensemble.train().requires_grad_(True)).parameters())

    def test_weights_travel_by_state_dict_and_dtype(self):
        ensemble, other = EnsembleTeacher([tiny(0), tiny(1)], [2, 1]), EnsembleTeacher([tiny(2), tiny(3)], [2, 1])
        other.load_state_dict(ensemble.state_dict())
        assert torch.equal(other(images()), ensemble(images()))
        torch.testing.assert_close(
            copy.deepcopy(ensemble).double()(images()).float(), ensemble(images()), rtol=1e-3, atol=1e-3
        )

    def test_compiled_it_answers_the_same(self):
        ensemble = EnsembleTeacher([tiny(0), tiny(1)])
        ensemble.pretrained_cfg.update(mean=HALF, std=HALF)
        compiled = torch.compile(ensemble, backend='aot_eager')
        torch.testing.assert_close(compiled(images()), ensemble(images()), rtol=1e-4, atol=1e-4)
        assert not compiled(images()).is_inference()


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
        with pytest.raises(UserError, match=r'same num_classes, got resnet10t.c3_in1k 10, .* 7'):
            EnsembleTeacher([tiny(0), tiny(1, num_classes=7)])

    def test_no_class_count(self):
        with pytest.raises(UserError, match='Sequential has no num_classes'):
            EnsembleTeacher([nn.Sequential(nn.Flatten())])

    @pytest.mark.parametrize('weights', [[1], [1, 1, 1], [0, 0], [1, -1], [1, float('nan')], [1, float('inf')]])
    def test_weights_that_are_none(self, weights):
        with pytest.raises(UserError, match='Teacher weights must be'):
            EnsembleTeacher([tiny(0), tiny(1)], weights)

    @pytest.mark.parametrize(
        ('spec', 'message'),
        [
            ('resnet5', r"'resnet5' is no timm model \(nearest: resnet50"),
            ('resnet50.a1_in2k', r"'resnet50.a1_in2k' is no tag of resnet50 \(nearest: resnet50.a1_in1k"),
            ('timm/resnet50.a1_in1k', 'is no timm model'),
            ('resnet50d.', 'is no tag of resnet50d'),
            ('vit_tiny_patch16_18x2', 'is no timm model'),
            ('local-dir:/not/there', 'local-dir:/not/there cannot be loaded: Config file not found'),
            ('resnet18=/not/there.pth', 'there is no such file'),
            ('mealv2_resnet18', 'has no pretrained weights'),
        ],
    )
    def test_names_that_lead_nowhere(self, spec, message):
        with pytest.raises(UserError, match=message) as info:
            create_ensemble([spec])
        assert '\n' not in str(info.value)

    def test_another_class_count_is_refused_before_anything_is_downloaded(self):
        with pytest.raises(UserError, match=r'senet154.gluon_in1k has 1000 classes, but 10 are asked for'):
            timm.create_model('mealv2_ensemble_gluon', pretrained=True, num_classes=10)

    def test_modules_with_another_class_or_channel_count(self):
        with pytest.raises(UserError, match='has 10 classes, but 1000 are asked for'):
            create_ensemble([tiny(0)], num_classes=1000)
        with pytest.raises(UserError, match='has 3 input channels, but 1 are asked for'):
            create_ensemble([tiny(0)], in_chans=1)


def save_folder(folder: Path, model: nn.Module) -> str:
    # As hub tools write it: contiguous tensors in model.safetensors, the architecture and its arguments in config.json.
    save_for_hf(copy.deepcopy(model).to(memory_format=torch.contiguous_format), str(folder), safe_serialization=True)
    return f'local-dir:{folder}'


def save_training_checkpoint(folder: Path, model: nn.Module, ema: nn.Module | None = None, **args) -> Path:
    """A checkpoint as training writes it, by timm's own saver."""
    folder.mkdir()
    saver = CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        args=argparse.Namespace(model='resnet10t', **args),
        model_ema=ema,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
    )
    saver.save_checkpoint(0, 1.0)
    return folder / 'last.pth.tar'


class TestLocalDir:
    def test_model_args_are_honoured(self, tmp_path):
        a, b = tiny(0, in_chans=1), tiny(1, in_chans=1)
        specs = [save_folder(tmp_path / 'a', a), save_folder(tmp_path / 'b', b)]
        ensemble = create_ensemble(specs, num_classes=10, in_chans=1)
        assert ensemble.names == tuple(specs)
        expected = EnsembleTeacher([a, b])(images(chans=1))
        torch.testing.assert_close(ensemble(images(chans=1)), expected)

    def test_its_own_class_count_is_never_replaced(self, tmp_path):
        spec = save_folder(tmp_path / 'a', tiny(0))
        with pytest.raises(UserError, match=r'local-dir:.*a has 10 classes, but 12 are asked for'):
            create_ensemble([spec], num_classes=12)
        assert create_ensemble([spec]).num_classes == 10

    def test_a_config_that_contradicts_itself_is_refused(self, tmp_path):
        spec = save_folder(tmp_path / 'a', tiny(0))
        config = json.loads((tmp_path / 'a/config.json').read_text())
        config['model_args']['num_classes'] = 12
        (tmp_path / 'a/config.json').write_text(json.dumps(config))
        with pytest.raises(UserError, match=r'contradicts itself: .* 12 classes, its pretrained_cfg 10'):
            create_ensemble([spec])

    def test_weights_that_do_not_fit_are_refused(self, tmp_path):
        spec = save_folder(tmp_path / 'a', tiny(0))
        config = json.loads((tmp_path / 'a/config.json').read_text())
        config['model_args']['channels'] = [8, 8, 16, 24]
        (tmp_path / 'a/config.json').write_text(json.dumps(config))
        with pytest.raises(UserError, match=r'cannot be loaded: .*size mismatch'):
            create_ensemble([spec])

    def test_grey_pictures_adapt_a_colour_teacher(self, tmp_path, caplog):
        model = tiny(0)
        spec = save_folder(tmp_path / 'a', model)
        with caplog.at_level(logging.INFO, 'timm_mealv2'):
            ensemble = create_ensemble([spec], in_chans=1)
        assert 'adapted from 3 to 1 input channels' in caplog.text
        grey = images(chans=1)
        ensemble.pretrained_cfg.update(mean=HALF, std=HALF)
        teacher: Any = ensemble.teachers[0]
        teacher.pretrained_cfg.update(mean=HALF, std=HALF)
        with torch.no_grad():
            expected = F.log_softmax(model(grey.expand(-1, 3, -1, -1)), dim=1)
        torch.testing.assert_close(ensemble(grey), expected, rtol=1e-4, atol=1e-3)

    def test_without_pretrained_the_weights_are_random(self, tmp_path):
        spec = save_folder(tmp_path / 'a', tiny(0))
        ensemble = create_ensemble([spec], pretrained=False, num_classes=4)
        assert ensemble(images()).shape == (3, 4)


class TestCheckpoint:
    def test_plain_weights(self, tmp_path):
        model = tiny(0, 'test_resnet')
        torch.save(model.state_dict(), tmp_path / 'a,b=c.pth')
        save_file(model.state_dict(), tmp_path / 'a.safetensors')
        for name in ('a,b=c.pth', 'a.safetensors'):
            ensemble = create_ensemble(parse_teachers([f'test_resnet={tmp_path / name}']))
            assert ensemble.num_classes == 10
            torch.testing.assert_close(ensemble(images()), EnsembleTeacher([model])(images()))

    def test_data_parallel_keys_and_another_channel_count(self, tmp_path):
        model = tiny(0, 'test_resnet', in_chans=4, num_classes=3)
        torch.save({f'module.{key}': value for key, value in model.state_dict().items()}, tmp_path / 'a.pth')
        rebuilt: Any = create_from_checkpoint('test_resnet', tmp_path / 'a.pth')
        assert (rebuilt.in_chans, rebuilt.num_classes) == (4, 3)
        assert rebuilt.pretrained_cfg['input_size'] == (4, 160, 160)
        assert 'hf_hub_id' not in rebuilt.pretrained_cfg
        assert same_state(rebuilt.state_dict(), model.state_dict())

    def test_a_training_checkpoint_is_rebuilt_from_its_arguments(self, tmp_path):
        kwargs = {'channels': (8, 8, 16, 16), 'stem_width': 8}
        model = tiny(0, in_chans=1)
        path = save_training_checkpoint(
            tmp_path / 'run',
            model,
            model_kwargs=kwargs,
            num_classes=None,
            in_chans=1,
            gp=None,
            mean=[0.2],
            std=[0.3],
            img_size=64,
            input_size=None,
            interpolation='',
            crop_pct=1.0,
        )
        rebuilt: Any = create_from_checkpoint('resnet10t', path)
        assert same_state(rebuilt.state_dict(), model.state_dict())
        cfg = rebuilt.pretrained_cfg
        assert (cfg['mean'], cfg['std'], cfg['crop_pct']) == ((0.2,), (0.3,), 1.0)
        assert (cfg['input_size'], cfg['num_classes'], cfg['interpolation']) == ((1, 64, 64), 10, 'bicubic')

    def test_the_recorded_data_config_wins(self, tmp_path):
        model = tiny(0, 'test_resnet')
        data_config = {'input_size': [3, 96, 96], 'mean': list(HALF), 'std': list(HALF), 'crop_pct': 0.9}
        torch.save({'state_dict': model.state_dict(), 'data_config': data_config}, tmp_path / 'a.pth')
        cfg = create_ensemble([f'test_resnet={tmp_path / "a.pth"}']).pretrained_cfg
        assert (cfg['mean'], cfg['std'], cfg['input_size'], cfg['crop_pct']) == (HALF, HALF, (3, 96, 96), 0.9)

    def test_ema_weights_where_the_file_has_them(self, tmp_path):
        model = tiny(0)
        ema = ModelEmaV3(tiny(1))
        path = save_training_checkpoint(
            tmp_path / 'run', model, ema, model_kwargs={'channels': [8, 8, 16, 16], 'stem_width': 8}
        )
        rebuilt: Any = create_from_checkpoint('resnet10t', path)
        assert same_state(rebuilt.state_dict(), ema.module.state_dict())

    def test_a_file_for_another_architecture_is_refused_by_keys_and_shapes(self, tmp_path):
        torch.save(tiny(0).state_dict(), tmp_path / 'a.pth')
        with pytest.raises(
            UserError, match=r'does not fit the architecture: .*of other shape \(conv1.0.weight is \[6, 3, 3, 3\] for'
        ):
            create_ensemble([f'resnet10t={tmp_path / "a.pth"}'])
        with pytest.raises(UserError, match=r'missing \(.*; \d+ unknown \('):
            create_ensemble([f'test_efficientnet={tmp_path / "a.pth"}'])
        state = tiny(0, 'test_resnet').state_dict()
        del state['fc.bias']
        torch.save(state, tmp_path / 'b.pth')
        with pytest.raises(UserError, match=r'1 missing \(fc.bias\)'):
            create_ensemble([f'test_resnet={tmp_path / "b.pth"}'])

    @pytest.mark.parametrize('content', [b'', b'not a checkpoint', None])
    def test_a_file_that_cannot_be_read_is_refused(self, tmp_path, content):
        path = tmp_path / 'a.pth'
        torch.save(tiny(0, 'test_resnet').state_dict(), path)
        path.write_bytes(path.read_bytes()[:5000] if content is None else content)
        with pytest.raises(UserError, match='is not a readable checkpoint'):
            create_ensemble([f'test_resnet={path}'])

    def test_a_file_without_weights_is_refused(self, tmp_path):
        torch.save({'epoch': 3}, tmp_path / 'a.pth')
        with pytest.raises(UserError, match='holds no state dict'):
            create_ensemble([f'test_resnet={tmp_path / "a.pth"}'])

    def test_its_class_count_is_compared(self, tmp_path):
        torch.save(tiny(0, 'test_resnet').state_dict(), tmp_path / 'a.pth')
        with pytest.raises(UserError, match='has 10 classes, but 1000 are asked for'):
            create_ensemble([f'test_resnet={tmp_path / "a.pth"}'], num_classes=1000)

    def test_a_vit_is_built_for_the_image_size_of_its_run(self, tmp_path):
        model = timm.create_model('vit_tiny_patch16_224', img_size=32, embed_dim=48, depth=1, num_classes=10)
        torch.save(
            {
                'state_dict': model.state_dict(),
                'args': argparse.Namespace(
                    model='vit_tiny_patch16_224', img_size=32, model_kwargs={'embed_dim': 48, 'depth': 1}
                ),
            },
            tmp_path / 'a.pth',
        )
        ensemble = create_ensemble([f'vit_tiny_patch16_224={tmp_path / "a.pth"}'])
        assert ensemble.img_sizes == ((32, 32),)
        assert ensemble(images()).shape == (3, 10)


def test_parse_teachers():
    texts = ['a.x, b', 'hf-hub:me/a,b', 'local-dir:/x,y', 'resnet18=/p,q/r.pth', 'c,']
    assert parse_teachers(texts) == ['a.x', 'b', 'hf-hub:me/a,b', 'local-dir:/x,y', 'resnet18=/p,q/r.pth', 'c']


class TestClasses:
    def test_a_subset_is_renormalized_as_numpy_does_it(self):
        rng = np.random.default_rng(0)
        wide, narrow, chosen = rng.normal(scale=3, size=(6, 8)), rng.normal(scale=3, size=(6, 3)), [5, 0, 2]
        teachers = [Scripted(wide), Scripted(narrow)]
        teachers[0].pretrained_cfg = {'architecture': 'wide'}  # type: ignore[assignment]
        ensemble = create_ensemble(teachers, num_classes=3, weights=[3, 1], classes={'wide': chosen})

        wide_prob, narrow_prob = (np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) for z in (wide, narrow))
        part = wide_prob[:, chosen] / wide_prob[:, chosen].sum(axis=1, keepdims=True)
        log_probs, mean_logits = ensemble.predict(images(6).double())
        np.testing.assert_allclose(log_probs.exp().numpy(), 0.75 * part + 0.25 * narrow_prob, rtol=1e-10)
        np.testing.assert_allclose(mean_logits.numpy(), 0.75 * wide[:, chosen] + 0.25 * narrow, rtol=1e-10)
        np.testing.assert_array_equal(ensemble.teacher_logits(images(6).double())[0].numpy(), wide[:, chosen])
        assert ensemble.num_classes == ensemble.pretrained_cfg['num_classes'] == 3

    def test_pixels_and_size_are_those_of_the_teacher_and_copies_answer_alike(self):
        teacher = timm.create_model('test_vit', num_classes=10, img_size=32, dynamic_img_size=False)
        teacher.pretrained_cfg.update(mean=HALF, std=HALF, tag='')
        whole = EnsembleTeacher([tiny(1), teacher]).teacher_logits(images())[1]
        ensemble = create_ensemble([tiny(1, num_classes=2), teacher], classes={'test_vit': [7, 3]})
        assert ensemble.img_sizes == (None, (32, 32))
        torch.testing.assert_close(ensemble.teacher_logits(images())[1], whole[:, [7, 3]])
        assert torch.equal(copy.deepcopy(ensemble)(images()), ensemble(images()))
        assert not any(p.requires_grad for p in ensemble.train().parameters())
        assert not any(module.training for module in ensemble.modules())

    def test_files_folders_and_ensembles_serve_a_subset(self, tmp_path):
        a, b = tiny(0, 'test_resnet'), tiny(1)
        torch.save(a.state_dict(), tmp_path / 'a.pth')
        folder, checkpoint = save_folder(tmp_path / 'b', b), f'test_resnet={tmp_path / "a.pth"}'
        inner = write_ensemble(tmp_path / 'e', model_args={'teachers': [folder, checkpoint]}, pretrained_cfg={})
        expected = create_ensemble([folder, checkpoint]).teacher_logits(images())[:, :, [9, 1]]
        for teachers in ([folder, checkpoint], [inner]):
            ensemble = create_ensemble(teachers, num_classes=2, classes={name: [9, 1] for name in teachers})
            torch.testing.assert_close(ensemble.teacher_logits(images()), expected)
        config = {'teachers': ['local-dir:../b'], 'classes': {'local-dir:../b': [9, 1]}}
        outer = write_ensemble(tmp_path / 'o', model_args=config, pretrained_cfg={})
        torch.testing.assert_close(create_ensemble([outer], num_classes=2).teacher_logits(images()), expected[:1])

    def test_the_same_model_is_refused_with_other_classes_too(self):
        same = copy.deepcopy(a := tiny(0))
        same.pretrained_cfg = {**a.pretrained_cfg, 'architecture': 'b', 'tag': ''}
        with pytest.raises(UserError, match='have the same weights'):
            create_ensemble([a, same], classes={'b': list(range(9, -1, -1))})

    @pytest.mark.parametrize(
        ('name', 'classes', 'message'),
        [
            ('other', [0, 1], 'Classes are given for other, which is no teacher'),
            ('Scripted', [0, 1, 2], 'must have one class for each of the 2, got 3'),
            ('Scripted', [0, 8], 'Teacher Scripted: .* from 0 to 7, got 8'),
            ('Scripted', [0, -1], 'from 0 to 7, got -1'),
            ('Scripted', [4, 4], 'must differ, got 4 more than once'),
            ('Scripted', [0, 0.5], 'must be whole numbers'),
        ],
    )
    def test_impossible_classes(self, name, classes, message):
        with pytest.raises(UserError, match=message):
            create_ensemble([Scripted(np.zeros((1, 8)))], num_classes=2, classes={name: classes})


CODE = """
import timm, torch
from torch import nn

class Grey(nn.Module):
    num_classes, in_chans = 4, 1
    pretrained_cfg = {'mean': (0.5,), 'std': (0.25,), 'input_size': (1, 8, 8)}

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 4)

    def forward(self, x):
        return self.linear(x.mean((2, 3)))

def grey():
    torch.manual_seed(0)
    return Grey()

def without_count():
    return nn.Flatten()

def no_module():
    return 3

def fails():
    raise RuntimeError('no weights\\nhere')

def no_tensor():
    model = nn.Module()
    model.num_classes, model.forward = 4, lambda x: {'logits': x}
    return model
"""


class TestPython:
    @pytest.fixture
    def module(self, tmp_path, monkeypatch):
        """The name of a module in the working directory, which an installed program does not have on its path."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'path', [path for path in sys.path if path])
        (tmp_path / 'my').mkdir()
        (tmp_path / 'my/teachers.py').write_text(CODE)
        yield 'my.teachers'
        for name in ('my', 'my.teachers'):
            sys.modules.pop(name, None)

    def test_a_function_of_the_working_directory_makes_a_teacher(self, module):
        ensemble = create_ensemble(parse_teachers([f'python:{module}:grey']), num_classes=4, in_chans=1)
        assert ensemble.names == ('python:my.teachers:grey',)
        assert ensemble.pretrained_cfg['input_size'] == (1, 8, 8)
        ensemble.pretrained_cfg.update(mean=(0.0,), std=(1.0,))
        x = images(2, chans=1, size=8)
        linear: Any = ensemble.teachers[0].get_submodule('linear')
        expected = F.linear((x.mean((2, 3)) - 0.5) / 0.25, linear.weight, linear.bias)
        torch.testing.assert_close(ensemble.teacher_logits(x)[0], expected, rtol=1e-4, atol=1e-5)
        classes = {f'python:{module}:grey': [2, 0]}
        assert create_ensemble([f'python:{module}:grey'], num_classes=2, classes=classes).num_classes == 2

    @pytest.mark.parametrize(
        ('function', 'message'),
        [
            ('without_count', 'has no num_classes'),
            ('no_module', 'must return an nn.Module, got int'),
            ('fails', 'RuntimeError: no weights here'),
            ('absent', "cannot be made: AttributeError: .*'absent'"),
            ('', 'must be python:package.module:function'),
        ],
    )
    def test_functions_that_make_none(self, module, function, message):
        with pytest.raises(UserError, match=message):
            create_ensemble([f'python:{module}:{function}'])

    def test_a_module_that_is_not_there(self):
        with pytest.raises(UserError, match=r'python:not\.there:f cannot be made: ModuleNotFoundError'):
            create_ensemble(['python:not.there:f'])

    def test_an_answer_that_is_no_tensor(self, module):
        with pytest.raises(UserError, match=r'must answer with logits .*, got dict'):
            create_ensemble([f'python:{module}:no_tensor'])(images())

    def test_commas_do_not_split_it(self):
        assert parse_teachers(['python:a:b,c', 'd,e']) == ['python:a:b,c', 'd', 'e']

    def test_a_config_file_cannot_run_code(self, module, tmp_path):
        (tmp_path / 'my/trap.py').write_text('raise SystemExit("the code of a config.json was run")')
        folder = write_ensemble(tmp_path / 'e', model_args={'teachers': ['python:my.trap:f']}, pretrained_cfg={})
        for make in (lambda: create_ensemble([folder]), lambda: timm.create_model(folder, pretrained=True)):
            with pytest.raises(UserError, match=r'python:my\.trap:f is refused in a config\.json'):
                make()
        (tmp_path / 'e/config.json').write_text(
            json.dumps({'architecture': 'mealv2_ensemble', 'teachers': 'python:my.trap:f'})
        )
        with pytest.raises(UserError):
            create_ensemble([folder])


def write_ensemble(folder: Path, **config) -> str:
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps({'architecture': 'mealv2_ensemble', **config}))
    return f'local-dir:{folder}'


class TestRegistered:
    def test_names_are_listed_but_nothing_to_download(self):
        names = ['mealv2_ensemble', 'mealv2_ensemble_efficientnet_b4', 'mealv2_ensemble_gluon']
        assert timm.list_models('mealv2_ensemble*') == names
        assert timm.list_pretrained('mealv2_ensemble*') == []
        assert all(timm.is_model(name) for name in names)

    def test_published_pairs_are_pinned_by_tag(self):
        b4 = timm.create_model('mealv2_ensemble_efficientnet_b4', num_classes=3)
        assert b4.names == ('tf_efficientnet_b4.ns_jft_in1k', 'tf_efficientnet_b4.aa_in1k')
        assert b4.pretrained_cfg['input_size'] == (3, 380, 380)
        assert b4.pretrained_cfg['mean'] == MEAN
        assert timm.models.get_pretrained_cfg('mealv2_ensemble_gluon').num_classes == 1000

    def test_random_members_take_what_timm_passes(self):
        model = timm.create_model(
            'mealv2_ensemble',
            teachers=['test_resnet', 'test_efficientnet'],
            num_classes=7,
            in_chans=1,
            device='cpu',
            dtype=torch.bfloat16,
            weights=[2, 1],
            img_sizes=[96],
            pretrained_cfg_overlay={'mean': (0.1,), 'std': (0.2,)},
        )
        assert (model.num_classes, model.in_chans, model.pretrained_cfg['mean']) == (7, 1, (0.1,))
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.weights == pytest.approx((2 / 3, 1 / 3))
        assert model.img_sizes == ((96, 96), (96, 96))
        assert model(images(chans=1)).shape == (3, 7)
        assert copy.deepcopy(model)(images(chans=1)).dtype == torch.float32

    def test_teachers_are_required_and_files_belong_to_them(self):
        with pytest.raises(UserError, match='at least one teacher'):
            timm.create_model('mealv2_ensemble', pretrained=True)
        with pytest.raises(UserError, match='has no weights file of its own'):
            timm.create_model(
                'mealv2_ensemble', pretrained=True, teachers=['test_vit'], pretrained_cfg_overlay={'file': 'a.pth'}
            )

    def test_the_first_teachers_normalisation_unless_set(self):
        model = timm.create_model('mealv2_ensemble', teachers=['test_vit', 'resnet10t'])
        assert model.pretrained_cfg['mean'] == HALF
        assert model.pretrained_cfg['architecture'] == 'mealv2_ensemble'

    @pytest.mark.parametrize('flat', [False, True])
    def test_a_folder_names_its_teachers_relative_to_itself(self, tmp_path, flat, monkeypatch):
        a, b = tiny(0), tiny(1)
        save_folder(tmp_path / 'e/a', a)
        b_kwargs = {'channels': (8, 8, 16, 16), 'stem_width': 8}
        args = argparse.Namespace(model='resnet10t', model_kwargs=b_kwargs)
        torch.save({'state_dict': b.state_dict(), 'args': args}, tmp_path / 'e/b.pth')
        config: dict[str, Any] = {'model_args': {'teachers': ['local-dir:a', 'resnet10t=b.pth'], 'weights': [3, 1]}}
        if not flat:
            config |= {'num_classes': 10, 'pretrained_cfg': {'mean': HALF, 'std': HALF}}
        write_ensemble(tmp_path / 'e', **config)
        monkeypatch.chdir(tmp_path)
        model = timm.create_model('local-dir:e', pretrained=True, num_classes=10)
        assert model.weights == (0.75, 0.25)
        expected = EnsembleTeacher([a, b], [3, 1])
        if not flat:
            assert tuple(model.pretrained_cfg['mean']) == HALF
            expected.pretrained_cfg.update(mean=HALF, std=HALF)
        torch.testing.assert_close(model(images()), expected(images()))

    @pytest.mark.parametrize('rest', [{}, {'pretrained_cfg': {}}], ids=['flat', 'nested'])
    def test_a_folder_of_an_ensemble_can_be_a_teacher(self, tmp_path, rest):
        specs = [save_folder(tmp_path / name, tiny(seed)) for seed, name in enumerate('abc')]
        inner = write_ensemble(tmp_path / 'e', model_args={'teachers': specs[:2]}, **rest)
        assert create_ensemble([inner, specs[2]], num_classes=10).weights == (0.25, 0.25, 0.5)

    def test_timms_own_distillation_gets_the_mean_probability(self, tmp_path):
        a, b = tiny(0), tiny(1)
        b.pretrained_cfg.update(mean=HALF, std=HALF)
        specs = [save_folder(tmp_path / 'a', a), save_folder(tmp_path / 'b', b)]
        teacher = write_ensemble(tmp_path / 'e', model_args={'teachers': specs}, pretrained_cfg={})
        student = tiny(5)
        student.pretrained_cfg.update(mean=HALF, std=HALF)
        task = LogitDistillationTask(student, teacher, temperature=1.0, task_loss_weight=0.0, verbose=False)
        task.train()
        pixels = torch.rand(4, 3, 64, 64)
        result = task((pixels - 0.5) / 0.5, torch.zeros(4, dtype=torch.long))
        result['loss'].backward()

        by_imagenet = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        with torch.no_grad():
            p = (F.softmax(a(by_imagenet), dim=1) + F.softmax(b((pixels - 0.5) / 0.5), dim=1)) / 2
            q = F.log_softmax(result['output'], dim=1)
        expected = (p * (p.log() - q)).sum(dim=1).mean()
        torch.testing.assert_close(result['loss'].detach(), expected, rtol=1e-4, atol=1e-5)
        assert all(p.grad is None for p in task.teacher.parameters())

    def test_timms_own_distillation_refuses_another_class_count(self, tmp_path):
        teacher = write_ensemble(
            tmp_path / 'e', model_args={'teachers': [save_folder(tmp_path / 'a', tiny(0))]}, pretrained_cfg={}
        )
        with pytest.raises(UserError, match='has 10 classes, but 5 are asked for'):
            LogitDistillationTask(tiny(5, num_classes=5), teacher, verbose=False)
