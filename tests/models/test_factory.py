"""Teachers made from modules and from the texts that name them."""

import copy
import json
import logging
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import timm
import torch
from tiny_models import (
    HALF,
    Scripted,
    images,
    save_folder,
    tiny,
    write_ensemble,
)
from torch.nn import functional as F

from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import TeacherSpec, create_ensemble


class TestParsing:
    def test_texts_are_split_at_commas_that_belong_to_no_path(self):
        texts = ['a.x, b', 'hf-hub:me/a,b', 'local-dir:/x,y', 'resnet18=/p,q/r.pth', 'c,', 'python:a:b,c', 'd,e']
        parsed = TeacherSpec.parse_all(texts)
        expected = ['a.x', 'b', 'hf-hub:me/a,b', 'local-dir:/x,y', 'resnet18=/p,q/r.pth', 'c', 'python:a:b,c', 'd', 'e']
        assert [str(spec) for spec in parsed] == expected

    def test_a_relative_path_is_taken_from_a_folder(self):
        texts = ['local-dir:a/../b', 'resnet18=c=d.pth', 'local-dir:/a', 'resnet18', 'hf-hub:me/a']
        assert [str(TeacherSpec.parse(text).under('/f')) for text in texts] == [
            'local-dir:/f/a/../b',
            'resnet18=/f/c=d.pth',
            *texts[2:],
        ]


class TestGiven:
    def test_one_text_one_module_and_parsed_texts_serve_too(self, tmp_path):
        a, b = tiny(0, 'test_resnet'), tiny(1, 'test_efficientnet')
        torch.save(a.state_dict(), tmp_path / 'a.pth')
        spec = TeacherSpec.parse(f'test_resnet={tmp_path / "a.pth"}')
        expected = create_ensemble([a])(images())
        for teachers in (str(spec), spec, a, [spec], (a,)):
            torch.testing.assert_close(create_ensemble(teachers)(images()), expected, rtol=1e-4, atol=1e-4)
        pair = create_ensemble('test_resnet,test_efficientnet', pretrained=False, num_classes=3)
        assert pair.names == ('test_resnet', 'test_efficientnet')
        assert (
            len(create_ensemble([a, TeacherSpec.parse('test_vit'), b], pretrained=False, num_classes=10).teachers) == 3
        )

    def test_a_text_is_parsed_and_checked_once_and_a_parsed_one_never_again(self, tmp_path, monkeypatch):
        counts = Counter()
        for name in ('parse', 'check'):
            function = getattr(TeacherSpec, name)
            counted = lambda *args, name=name, function=function: (counts.update([name]), function(*args))[1]  # noqa: E731
            monkeypatch.setattr(TeacherSpec, name, counted)
        spec = save_folder(tmp_path / 'a', tiny(0))
        create_ensemble(spec)
        assert counts == {'parse': 1, 'check': 1}
        create_ensemble(TeacherSpec.parse_all([spec]))
        assert counts == {'parse': 2, 'check': 1}


class TestPaths:
    """A file or folder alone is a model: it tells by itself what it is."""

    def test_a_run_folder_is_its_best_checkpoint_or_the_one_that_is_named(self, tmp_path):
        run = tmp_path / 'run'
        run.mkdir()
        models = {name: tiny(seed, 'test_resnet') for seed, name in enumerate(('last', 'model_best'))}
        for name, model in models.items():
            contents = {'state_dict': model.state_dict(), 'args': {'model': 'test_resnet', 'num_classes': 10}}
            torch.save(contents, run / f'{name}.pth.tar')
        for text, name in (
            (run, 'model_best'),
            (f'{run}:last', 'last'),
            (run / 'last.pth.tar', 'last'),
        ):
            torch.testing.assert_close(create_ensemble(str(text)).teachers[0].state_dict(), models[name].state_dict())
        (run / 'model_best.pth.tar').unlink()
        assert str(TeacherSpec.parse(str(run))) == str(run / 'last.pth.tar')
        with pytest.raises(UserError, match=r'neither an export .* nor a run folder with other or other.pth.tar'):
            TeacherSpec.parse(f'{run}:other')

    def test_an_export_is_told_by_its_content(self, tmp_path):
        model = tiny(0)
        save_folder(tmp_path / 'a', model)
        ensemble = create_ensemble(str(tmp_path / 'a'))
        torch.testing.assert_close(ensemble.teachers[0].state_dict(), model.state_dict())

    def test_a_file_of_bare_weights_asks_for_its_architecture(self, tmp_path):
        torch.save(tiny(0).state_dict(), tmp_path / 'a.pth')
        with pytest.raises(UserError, match='name its architecture, as NAME=PATH'):
            create_ensemble(str(tmp_path / 'a.pth'))


class TestCheck:
    @pytest.mark.parametrize(
        ('text', 'message'),
        [
            ('resnet5', 'is no timm model'),
            ('mealv2_resnet18', 'has no pretrained weights'),
            ('resnet5=a.pth', 'is no timm model'),
            ('resnet18=/not/there.pth', 'there is no such file'),
            ('local-dir:/not/there', 'there is no config.json in it'),
            ('python:a', 'must be python:package.module:function'),
        ],
    )
    def test_what_cannot_be_built_is_told_without_building(self, text, message):
        with pytest.raises(UserError, match=message):
            TeacherSpec.parse(text).check()

    def test_what_can_be_built_passes_without_a_download(self, tmp_path):
        torch.save({}, tmp_path / 'a.pth')
        save_folder(tmp_path / 'a', tiny(0))
        texts = [
            'senet154.gluon_in1k',
            'mealv2_ensemble_gluon',
            'hf-hub:me/a',
            'python:a.b:c',
            f'local-dir:{tmp_path}/a',
        ]
        for text in (*texts, f'resnet18={tmp_path}/a.pth'):
            TeacherSpec.parse(text).check()


class TestWhatAConfigMayDecide:
    @pytest.mark.parametrize('key', ['pretrained_cfg_overlay', 'url'])
    def test_nothing_is_fetched_on_its_word(self, tmp_path, noting_server, key):
        """Neither the folder of a model, nor that of an ensemble, sends the program to an address."""
        source = {'url': f'{noting_server.url}/weights.pth', 'hf_hub_id': '', 'source': '', 'file': ''}
        model = tiny(0, 'test_resnet')
        spec = save_folder(tmp_path / 'a', model)
        config = json.loads((tmp_path / 'a/config.json').read_text())
        if key == 'url':
            config['pretrained_cfg'].update(source)
        else:
            config['model_args'] = {key: source, 'pretrained': True, 'cache_dir': str(tmp_path / 'cache')}
        (tmp_path / 'a/config.json').write_text(json.dumps(config))
        ensemble = create_ensemble(spec)
        torch.testing.assert_close(ensemble(images()), EnsembleTeacher([model])(images()), rtol=1e-4, atol=1e-4)
        for rest in ({}, {'pretrained_cfg': {}}):
            outer = write_ensemble(tmp_path / 'e', model_args={'teachers': [spec], key: source}, **rest)
            with pytest.raises(UserError):
                create_ensemble(outer)
        assert noting_server.requests == []
        assert not (tmp_path / 'cache').exists()


class TestRefused:
    @pytest.mark.parametrize(
        ('spec', 'message'),
        [
            ('resnet5', r"'resnet5' is no timm model \(nearest: resnet50"),
            ('resnet50.a1_in2k', r"'resnet50.a1_in2k' is no tag of resnet50 \(nearest: resnet50.a1_in1k"),
            ('timm/resnet50.a1_in1k', 'no such file, and no model of timm'),
            ('resnet50d.', 'is no tag of resnet50d'),
            ('vit_tiny_patch16_18x2', 'is no timm model'),
            ('local-dir:/not/there', 'local-dir:/not/there: there is no config.json in it'),
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

    def test_a_config_that_contradicts_itself_gives_no_head_of_random_weights(self, tmp_path):
        model = tiny(0)
        spec = save_folder(tmp_path / 'a', model)
        config = json.loads((tmp_path / 'a/config.json').read_text())
        config['model_args']['num_classes'] = 12
        (tmp_path / 'a/config.json').write_text(json.dumps(config))
        torch.testing.assert_close(create_ensemble([spec])(images()), EnsembleTeacher([model])(images()))

    def test_weights_that_do_not_fit_are_refused(self, tmp_path):
        spec = save_folder(tmp_path / 'a', tiny(0))
        config = json.loads((tmp_path / 'a/config.json').read_text())
        config['model_args']['channels'] = [8, 8, 16, 24]
        (tmp_path / 'a/config.json').write_text(json.dumps(config))
        with pytest.raises(UserError, match=r'cannot be made: .*size mismatch'):
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

    def test_the_same_model_is_refused_with_other_classes_too(self):
        same = copy.deepcopy(a := tiny(0))
        same.pretrained_cfg = {**a.pretrained_cfg, 'architecture': 'b', 'tag': ''}
        with pytest.raises(UserError, match='have the same weights'):
            create_ensemble([a, same], classes={'b': list(range(9, -1, -1))})

    @pytest.mark.parametrize(
        ('name', 'classes', 'message'),
        [
            ('other', [0, 1], 'Classes are given for other, which is no teacher'),
            ('Scripted', [0, 1, 2], r'expected 2 different classes from 0 to 7, got 3: \[0, 1, 2\]'),
            ('Scripted', [0, 8], r'classes of Scripted: expected .* from 0 to 7, got 2: \[0, 8\]'),
            ('Scripted', [4, 4], r'got 2: \[4, 4\]'),
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

def fails():
    raise RuntimeError('no weights\\nhere')
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
        ensemble = create_ensemble([f'python:{module}:grey'], num_classes=4, in_chans=1)
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
            ('without_count', 'must have num_classes'),
            ('fails', 'cannot be made: RuntimeError: no weights here'),
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
