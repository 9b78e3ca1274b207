"""Models rebuilt from checkpoints and bare weights."""

import argparse
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from tiny_models import HALF, images, same_state, save_folder, save_training_checkpoint, tiny
from torch import nn

from timm_mealv2.errors import UserError
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import create_ensemble


class TestCheckpoint:
    def test_plain_weights(self, tmp_path):
        model = tiny(0, 'test_resnet')
        torch.save(model.state_dict(), tmp_path / 'a,b=c.pth')
        save_file(model.state_dict(), tmp_path / 'a.safetensors')
        for name in ('a,b=c.pth', 'a.safetensors'):
            ensemble = create_ensemble([f'test_resnet={tmp_path / name}'])
            assert ensemble.num_classes == 10
            torch.testing.assert_close(ensemble(images()), EnsembleTeacher([model])(images()))

    def test_a_flipped_bit_of_the_weights_is_noticed(self, tmp_path):
        path = tmp_path / 'a.pth'
        model = tiny(0, 'test_resnet')
        torch.save(model.state_dict(), path)
        content = bytearray(path.read_bytes())
        place = content.index(model.fc.weight.detach().numpy().tobytes()[:64])
        content[place + 5] ^= 16
        path.write_bytes(content)
        with pytest.raises(UserError, match=r'is not a readable checkpoint: the checksum of .* is wrong'):
            create_ensemble([f'test_resnet={path}'])

    def test_data_parallel_keys_and_another_channel_count(self, tmp_path):
        model = tiny(0, 'test_resnet', in_chans=4, num_classes=3)
        torch.save({f'module.{key}': value for key, value in model.state_dict().items()}, tmp_path / 'a.pth')
        rebuilt: Any = TrainingCheckpoint.read(tmp_path / 'a.pth', 'test_resnet').build()
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
        rebuilt: Any = TrainingCheckpoint.read(path, 'resnet10t').build()
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
        rebuilt: Any = TrainingCheckpoint.read(path, 'resnet10t').build()
        assert same_state(rebuilt.state_dict(), ema.module.state_dict())

    def test_a_file_for_another_architecture_is_refused_by_keys_and_shapes(self, tmp_path):
        torch.save(tiny(0).state_dict(), tmp_path / 'a.pth')
        with pytest.raises(
            UserError,
            match=r'does not fit the architecture resnet10t: .*Unexpected key.* size misma',
        ):
            create_ensemble([f'resnet10t={tmp_path / "a.pth"}'])
        with pytest.raises(UserError, match=r'Missing key\(s\) in state_dict'):
            create_ensemble([f'test_efficientnet={tmp_path / "a.pth"}'])
        state = tiny(0, 'test_resnet').state_dict()
        del state['fc.bias']
        torch.save(state, tmp_path / 'b.pth')
        with pytest.raises(UserError, match=r'Missing key.*fc\.bias'):
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

    def test_batch_norm_is_that_of_the_training(self, tmp_path):
        model = tiny(0, 'test_efficientnet', bn_eps=0.1, bn_momentum=0.3)
        args = argparse.Namespace(model='test_efficientnet', bn_eps=0.1, bn_momentum=0.3)
        torch.save({'state_dict': model.state_dict(), 'args': args}, tmp_path / 'a.pth')
        ensemble = create_ensemble(f'test_efficientnet={tmp_path / "a.pth"}')
        norms = [module for module in ensemble.teachers[0].modules() if isinstance(module, nn.BatchNorm2d)]
        assert {(norm.eps, norm.momentum) for norm in norms} == {(0.1, 0.3)}
        torch.testing.assert_close(ensemble(images()), EnsembleTeacher([model])(images()), rtol=1e-4, atol=1e-4)


def model_config(model: Any, **model_args: Any) -> dict[str, Any]:
    """What training stores of a model, as lists where JSON and YAML have them."""
    plain = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', 'first_conv', 'classifier')
    return {
        'architecture': model.pretrained_cfg['architecture'],
        'num_classes': model.num_classes,
        'in_chans': model.in_chans,
        'model_args': model_args,
        'pretrained_cfg': {key: model.pretrained_cfg[key] for key in plain},
    }


class TestModelConfig:
    def test_the_model_is_made_from_it_and_nothing_is_inferred(self, tmp_path, monkeypatch):
        options = {'channels': [8, 8, 16, 16], 'stem_width': 8, 'global_pool': 'max'}
        model = tiny(0, in_chans=1, global_pool='max')
        model.pretrained_cfg.update(mean=[0.2], std=[0.3], input_size=[1, 64, 64], interpolation='bilinear')
        args = {'model': 'test_vit', 'num_classes': 3, 'gp': 'avg'}  # contradicts it
        saved = {'state_dict': model.state_dict(), 'args': args, 'model_config': model_config(model, **options)}
        torch.save(saved, tmp_path / 'a.pth')
        monkeypatch.setattr(TrainingCheckpoint, '_inferred', None)
        rebuilt: Any = TrainingCheckpoint.read(tmp_path / 'a.pth').build()
        assert same_state(rebuilt.state_dict(), model.state_dict())
        assert rebuilt.global_pool.pool_type == 'max'
        cfg = rebuilt.pretrained_cfg
        assert (cfg['mean'], cfg['std'], cfg['input_size'], cfg['interpolation']) == (
            (0.2,),
            (0.3,),
            (1, 64, 64),
            'bilinear',
        )
        assert (cfg['num_classes'], rebuilt.default_cfg) == (10, cfg)
        x = images(chans=1)
        assert torch.equal(rebuilt.eval()(x), model(x))
        assert TrainingCheckpoint.read(tmp_path / 'a.pth', 'resnet10t').build().num_classes == 10

    @pytest.mark.parametrize('architecture', ['hf-hub:someone/model', 'mealv2_ensemble', 'local-dir:/', 'resnet5'])
    def test_it_decides_neither_code_nor_downloads(self, tmp_path, noting_server, architecture):
        model = tiny(0)
        fetched = {'url': f'{noting_server.url}/weights.pth', 'hf_hub_id': 'someone/model', 'file': '/etc/passwd'}
        config = model_config(model, channels=[8, 8, 16, 16], stem_width=8, pretrained=True, cache_dir=str(tmp_path))
        config['model_args'] |= {'pretrained_cfg_overlay': fetched, 'checkpoint_path': '/etc/passwd'}
        config['pretrained_cfg'] |= {**fetched, 'source': 'hf-hub'}
        torch.save({'state_dict': model.state_dict(), 'model_config': config}, tmp_path / 'a.pth')
        rebuilt = TrainingCheckpoint.read(tmp_path / 'a.pth').build()
        assert same_state(rebuilt.state_dict(), model.state_dict())
        assert not {'url', 'hf_hub_id', 'file', 'source'} & set(rebuilt.pretrained_cfg)
        torch.save(
            {'state_dict': model.state_dict(), 'model_config': {**config, 'architecture': architecture}},
            tmp_path / 'b.pth',
        )
        with pytest.raises(UserError, match='does not tell its model'):
            TrainingCheckpoint.read(tmp_path / 'b.pth').build()
        assert noting_server.requests == []


class TestWhatAFileMayDecide:
    @pytest.mark.parametrize('arch', ['test_resnet', None])
    def test_nothing_is_fetched_on_its_word(self, tmp_path, noting_server, arch):
        model = tiny(0, 'test_resnet')
        kwargs = {
            'pretrained': True,
            'pretrained_cfg_overlay': {'url': f'{noting_server.url}/weights.pth', 'hf_hub_id': None},
            'pretrained_cfg': {'url': f'{noting_server.url}/weights.pth'},
            'checkpoint_path': '/etc/passwd',
            'cache_dir': str(tmp_path / 'cache'),
            'drop_rate': 0.5,
        }
        args = argparse.Namespace(model='test_resnet', model_kwargs=kwargs)
        torch.save({'state_dict': model.state_dict(), 'args': args}, tmp_path / 'a.pth')
        rebuilt: Any = TrainingCheckpoint.read(tmp_path / 'a.pth', arch).build()
        assert same_state(rebuilt.state_dict(), model.state_dict())
        assert rebuilt.drop_rate == 0.5
        assert noting_server.requests == []
        assert not (tmp_path / 'cache').exists()

    def test_the_name_of_a_repository_is_looked_up_in_the_cache_alone(self, tmp_path):
        model = tiny(0, 'test_resnet')
        args = argparse.Namespace(model='hf-hub:someone/model', model_kwargs={})
        torch.save({'state_dict': model.state_dict(), 'args': args}, tmp_path / 'a.pth')
        with pytest.raises(UserError, match=r"does not tell its model \('hf-hub:someone/model'\): name its"):
            TrainingCheckpoint.read(tmp_path / 'a.pth').build()
        assert TrainingCheckpoint.read(tmp_path / 'a.pth', 'test_resnet').build().num_classes == 10

    def test_a_folder_that_the_training_began_with_tells_the_architecture(self, tmp_path):
        model = tiny(0)
        args = argparse.Namespace(model=save_folder(tmp_path / 'start', model), model_kwargs={})
        torch.save({'state_dict': model.state_dict(), 'args': args}, tmp_path / 'a.pth')
        rebuilt = TrainingCheckpoint.read(tmp_path / 'a.pth').build()
        assert same_state(rebuilt.state_dict(), model.state_dict())


class TestContents:
    def test_what_a_file_says_is_read_once(self, tmp_path):
        model, averaged = tiny(0, 'test_resnet'), tiny(1, 'test_resnet')
        args = argparse.Namespace(model='test_resnet', lr=0.5)
        saved = {'state_dict': model.state_dict(), 'state_dict_ema': averaged.state_dict(), 'args': args, 'epoch': 3}
        saved |= {'class_names': ['a', 'b'], 'data_config': {'mean': [0.5], 'of no interest': 1}}
        torch.save(saved, tmp_path / 'a.pth')
        checkpoint = TrainingCheckpoint.read(tmp_path / 'a.pth')
        (tmp_path / 'a.pth').unlink()
        assert (checkpoint.args['lr'], checkpoint.contents['epoch']) == (0.5, 3)
        assert (checkpoint.class_names, checkpoint.data_config) == (('a', 'b'), {'mean': (0.5,)})
        assert same_state(checkpoint.state_dict(), averaged.state_dict())
        assert same_state(checkpoint.state_dict(ema=False), model.state_dict())
        assert same_state(checkpoint.build(ema=False).state_dict(), model.state_dict())

    def test_weights_without_an_architecture_are_refused(self, tmp_path):
        torch.save(tiny(0, 'test_resnet').state_dict(), tmp_path / 'a.pth')
        checkpoint = TrainingCheckpoint.read(tmp_path / 'a.pth')
        assert (checkpoint.args, checkpoint.data_config, checkpoint.class_names) == ({}, {}, ())
        with pytest.raises(UserError, match='does not tell its model'):
            checkpoint.build()

    def test_a_student_of_ours_is_also_its_vanilla_architecture(self, tmp_path):
        model = timm.create_model('mealv2_resnet18', num_classes=3, in_chans=1)
        args = argparse.Namespace(model='mealv2_resnet18', in_chans=1, gp='max')
        torch.save({'state_dict': model.state_dict(), 'args': args}, tmp_path / 'a.pth')
        rebuilt: Any = TrainingCheckpoint.read(tmp_path / 'a.pth', 'resnet18').build()
        assert (rebuilt.global_pool.pool_type, rebuilt.pretrained_cfg['architecture']) == ('max', 'resnet18')
