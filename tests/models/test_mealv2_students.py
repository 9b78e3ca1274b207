"""The students: registered names, what their configs say, and released weights, loaded strictly by timm."""

import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hub_server import connected
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from timm_mealv2.errors import UserError
from timm_mealv2.models import mealv2_students

NAME = 'mealv2_mobilenetv3_small_075'
ARCHITECTURE = 'tf_mobilenetv3_small_075'
ROOT = Path(__file__).parents[2]
RELEASE = 'https://github.com/szq0214/MEAL-V2/releases/download/v1.0.0/'

# name.tag -> released file, image size, first convolution, classifier
STUDENTS = {
    'mealv1_resnet50.in1k': ('MEALV1_ResNet50_224.pth', 224, 'conv1', 'fc'),
    'mealv2_resnet18.in1k': (None, 224, 'conv1', 'fc'),
    'mealv2_resnet50.in1k': ('MEALV2_ResNet50_224.pth', 224, 'conv1', 'fc'),
    'mealv2_resnet50.in1k_380': ('MEALV2_ResNet50_380.pth', 380, 'conv1', 'fc'),
    'mealv2_resnet50.cutmix_in1k': ('MEALV2_ResNet50_224_cutmix.pth', 224, 'conv1', 'fc'),
    'mealv2_mobilenetv3_small_075.in1k': ('MEALV2_MobileNet_V3_Small_0.75_224.pth', 224, 'conv_stem', 'classifier'),
    'mealv2_mobilenetv3_small_100.in1k': ('MEALV2_MobileNet_V3_Small_1.0_224.pth', 224, 'conv_stem', 'classifier'),
    'mealv2_mobilenetv3_large_100.in1k': ('MEALV2_MobileNet_V3_Large_1.0_224.pth', 224, 'conv_stem', 'classifier'),
    'mealv2_efficientnet_b0.in1k': ('MEALV2_EfficientNet_B0_224.pth', 224, 'conv_stem', 'classifier'),
}


ARCHITECTURES = {
    'mealv1_resnet50': 'resnet50',
    'mealv2_resnet18': 'resnet18',
    'mealv2_resnet50': 'resnet50',
    'mealv2_mobilenetv3_small_075': 'tf_mobilenetv3_small_075',
    'mealv2_mobilenetv3_small_100': 'tf_mobilenetv3_small_100',
    'mealv2_mobilenetv3_large_100': 'tf_mobilenetv3_large_100',
    'mealv2_efficientnet_b0': 'tf_efficientnet_b0',
}


@pytest.fixture(autouse=True)
def no_namespace(monkeypatch):
    monkeypatch.delenv('MEALV2_HUB_NAMESPACE', raising=False)


@pytest.fixture
def released(tmp_path):
    """A file as the release has them: the state dict of a DataParallel model."""
    path = tmp_path / 'student.pth'
    torch.manual_seed(0)
    torch.save(torch.nn.DataParallel(timm.create_model(ARCHITECTURE)).state_dict(), path)
    return path


def read(released):
    return {key.removeprefix('module.'): value for key, value in torch.load(released, weights_only=True).items()}


def from_file(path, name=NAME, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'file': str(path)}, **kwargs)


def assert_equal(state, expected, without=()):
    assert state.keys() == expected.keys()
    assert not [key for key in expected if key not in without and not torch.equal(state[key], expected[key])]


def test_every_student_is_registered_under_its_tags():
    assert set(timm.list_models('mealv*', pretrained=True)) == {n for n, student in STUDENTS.items() if student[0]}
    for name in STUDENTS:
        assert timm.is_model(name.partition('.')[0])


def test_only_downloadable_students_are_listed_as_pretrained():
    assert sorted(timm.list_pretrained('mealv[12]_*', exclude_filters='mealv2_ensemble*')) == sorted(
        name for name, student in STUDENTS.items() if student[0]
    )


@pytest.mark.parametrize('name', STUDENTS)
def test_config_says_what_the_weights_were_trained_with(name):
    file, size, first_conv, classifier = STUDENTS[name]
    model = timm.create_model(name, device='meta')
    assert timm.data.resolve_model_data_config(model) == {
        'input_size': (3, size, size),
        'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'crop_pct': 0.875,
        'crop_mode': 'center',
    }
    cfg = model.pretrained_cfg
    assert f'{cfg["architecture"]}.{cfg["tag"]}' == name
    assert cfg.get('url') == (file and RELEASE + file)
    assert not cfg.get('hf_hub_id')
    assert (cfg['num_classes'], cfg['first_conv'], cfg['classifier']) == (1000, first_conv, classifier)
    assert (cfg['paper_ids'], cfg['origin_url']) == ('arXiv:2009.08453', 'https://github.com/szq0214/MEAL-V2')
    assert model.get_submodule(first_conv).in_channels == 3
    assert model.get_submodule(classifier).out_features == 1000


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_student_is_timms_architecture(name):
    vanilla = ARCHITECTURES[name]
    assert mealv2_students.VANILLA_ARCHITECTURE[name] == vanilla
    # Tells padding and eps too, in which timm's two kinds of MobileNetV3 differ.
    assert repr(timm.create_model(name, device='meta')) == repr(timm.create_model(vanilla, device='meta'))


def test_student_without_released_file_names_the_recipe():
    with pytest.raises(UserError, match='mealv2-train --recipe mealv2_resnet18_224'):
        timm.create_model('mealv2_resnet18', pretrained=True)


def test_torch_hub_with_an_old_timm_says_so(monkeypatch):
    monkeypatch.setattr(timm, '__version__', '1.0.9')
    with pytest.raises(ImportError, match=r'needs timm 1\.0\.31 or newer, found 1\.0\.9: pip install -U timm'):
        runpy.run_path(str(ROOT / 'hubconf.py'))


def test_torch_hub_offers_every_student_and_needs_no_installed_package(tmp_path):
    offered = {name for name, value in runpy.run_path(str(ROOT / 'hubconf.py')).items() if callable(value)}
    assert offered == set(ARCHITECTURES)
    code = f'import torch; print(torch.hub.load({str(ROOT)!r}, {NAME!r}, source="local", num_classes=3).num_classes)'
    result = subprocess.run(
        [sys.executable, '-I', '-c', code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (result.stdout, result.stderr) == ('3\n', '')


# Released weights: timm's ways of building a model with them


def test_weights_and_nothing_else_come_from_the_file(released):
    model = from_file(released)
    assert_equal(model.state_dict(), read(released))
    assert not {'file', 'state_dict'} & set(model.pretrained_cfg)  # else they would be in checkpoints and config.json
    assert model.training


def test_num_classes_replaces_the_head_alone(released):
    model = from_file(released, num_classes=7)
    weights = read(released)
    head = {'classifier.weight', 'classifier.bias'}
    assert_equal(model.state_dict(), weights, without=head)
    assert model.num_classes == 7
    assert model.classifier.weight.shape == (7, 1024)

    headless = from_file(released, num_classes=0)
    assert_equal(headless.state_dict(), {key: value for key, value in weights.items() if key not in head})


def test_in_chans_sums_the_first_convolution(released):
    model = from_file(released, in_chans=1)
    weights = read(released)
    assert_equal(model.state_dict(), weights, without={'conv_stem.weight'})
    torch.testing.assert_close(model.conv_stem.weight.detach(), weights['conv_stem.weight'].sum(1, keepdim=True))
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 1000)


def test_features_only_has_the_weights(released):
    model = from_file(released, features_only=True, out_indices=(1, 3))
    weights = read(released)
    assert_equal(model.state_dict(), {key: weights[key] for key in model.state_dict()})
    assert [x.shape[1] for x in model(torch.zeros(1, 3, 64, 64))] == model.feature_info.channels() == [16, 40]


def test_checkpoint_path_takes_a_released_file(released):
    assert_equal(timm.create_model(NAME, checkpoint_path=released).state_dict(), read(released))


def test_a_folder_saved_by_timm_is_loaded(tmp_path):
    trained = timm.create_model(NAME, num_classes=5)
    timm.models.save_for_hf(trained, tmp_path / 'saved', safe_serialization=True)
    load = partial(timm.create_model, f'local-dir:{tmp_path / "saved"}', pretrained=True)
    assert_equal(load().state_dict(), trained.state_dict())
    assert load(num_classes=2).num_classes == 2


def test_torch_hub_loads_a_student(released):
    load = partial(torch.hub.load, str(ROOT), source='local')
    model = load(NAME, pretrained=True, pretrained_cfg_overlay={'file': str(released)})
    assert_equal(model.state_dict(), read(released))
    assert load('mealv2_resnet50', pretrained_cfg='in1k_380', device='meta').pretrained_cfg['tag'] == 'in1k_380'


# Files that do not fit


@pytest.mark.parametrize('kwargs', [{}, {'num_classes': 7}, {'in_chans': 1}, {'features_only': True}])
def test_a_file_that_lacks_a_weight_is_refused_whatever_is_asked_for(released, kwargs):
    weights = read(released)
    del weights['conv_stem.weight']
    torch.save(weights, released)
    with pytest.raises(UserError, match=rf'{released} does not fit {NAME}, .*1 keys are missing: conv_stem'):
        from_file(released, **kwargs)


def test_a_file_of_another_architecture_or_class_count_is_refused_in_one_line(released):
    with pytest.raises(UserError, match=r'does not fit mealv2_resnet18, .*: 117 keys are missing: conv1\.weight, '):
        from_file(released, name='mealv2_resnet18')
    torch.save(timm.create_model(ARCHITECTURE, num_classes=999).state_dict(), released)
    with pytest.raises(UserError, match=r'size mismatch for classifier\.weight') as error:
        from_file(released)
    assert '\n' not in str(error.value)


def test_an_absent_or_truncated_file_is_one_line(released, tmp_path):
    with pytest.raises(UserError, match=r'absent\.pth does not fit .* or cannot be read: FileNotFoundError'):
        from_file(tmp_path / 'absent.pth')
    released.write_bytes(released.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r'student\.pth does not fit .* or cannot be read: ') as error:
        from_file(released)
    assert '\n' not in str(error.value)


def test_an_address_that_cannot_be_reached_is_one_line():
    with pytest.raises(UserError, match=r'http://127.0.0.1:1/a\.pth .* cannot be read: .*refused'):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={'url': 'http://127.0.0.1:1/a.pth'})


# The Hub


def test_namespace_takes_the_weights_from_the_hub(tmp_path, monkeypatch):
    resnet, mobilenet, efficientnet = 'mealv2_resnet18', NAME, 'mealv2_efficientnet_b0'
    cutmix = 'mealv2_resnet50.cutmix_in1k'
    expected = {name: timm.create_model(name).state_dict() for name in (resnet, mobilenet)}
    torch.save(expected[mobilenet], tmp_path / 'pytorch_model.bin')
    monkeypatch.setenv('MEALV2_HUB_NAMESPACE', 'me')
    with connected(monkeypatch, tmp_path) as server:
        server.add_repo(f'me/{resnet}.in1k', {'model.safetensors': safetensors.torch.save(expected[resnet])})
        server.add_repo(f'me/{mobilenet}.in1k', {'pytorch_model.bin': (tmp_path / 'pytorch_model.bin').read_bytes()})
        server.add_repo(f'me/{efficientnet}.in1k', {'model.safetensors': safetensors.torch.save(expected[resnet])})
        for name, weights in expected.items():
            model = timm.create_model(name, pretrained=True)
            assert model.pretrained_cfg['hf_hub_id'] == f'me/{name}.in1k'
            assert_equal(model.state_dict(), weights)
        with pytest.raises(UserError, match=f'^me/{efficientnet}.in1k does not fit {efficientnet}, '):
            timm.create_model(efficientnet, pretrained=True)
        with pytest.raises(UserError, match=f'^me/{cutmix} does not fit mealv2_resnet50, or cannot be read: 404.*$'):
            timm.create_model(cutmix, pretrained=True)
        # What is asked for: safetensors first, then the pickle.
        assert server.count('HEAD', f'/me/{mobilenet}.in1k/resolve/main/model.safetensors')
        assert server.count('HEAD', f'/me/{cutmix}/resolve/main/model.safetensors')


def test_given_weights_come_before_the_namespace(released, monkeypatch):
    monkeypatch.setenv('MEALV2_HUB_NAMESPACE', 'me')
    assert_equal(from_file(released).state_dict(), read(released))
    assert 'hf_hub_id' not in timm.create_model(NAME, device='meta').pretrained_cfg
