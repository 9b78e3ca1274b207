"""The registered ensembles, by name and by a folder of their own."""

import argparse
import copy
from typing import Any

import pytest
import timm
import torch
from timm.task import LogitDistillationTask
from tiny_models import (
    HALF,
    MEAN,
    STD,
    images,
    save_folder,
    tiny,
    write_ensemble,
)
from torch.nn import functional as F

from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import create_ensemble


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

    def test_a_program_that_creates_every_model_goes_through(self):
        model = timm.create_model('mealv2_ensemble', num_classes=5, in_chans=1)
        assert model(images(chans=1)).shape == (3, 5)

    def test_one_text_and_one_image_size_serve(self):
        model = timm.create_model(
            'mealv2_ensemble', teachers='test_resnet, test_efficientnet', num_classes=3, img_size=96
        )
        assert model.img_sizes == ((96, 96), (96, 96))
        assert timm.create_model('mealv2_ensemble', teachers=tiny(0)).names == ('resnet10t.c3_in1k',)

    @pytest.mark.parametrize('rest', [{}, {'pretrained_cfg': {}}], ids=['flat', 'nested'])
    def test_a_config_file_sets_what_the_ensemble_is_and_nothing_else(self, tmp_path, rest):
        folder = write_ensemble(tmp_path / 'e', model_args={'teachers': [], 'device': 'cuda'}, **rest)
        with pytest.raises(UserError, match=r"must be of teachers, .*, got \['device'\]"):
            timm.create_model(folder, pretrained=True)

    def test_teachers_are_required(self):
        with pytest.raises(UserError, match='at least one teacher'):
            timm.create_model('mealv2_ensemble', pretrained=True)

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
