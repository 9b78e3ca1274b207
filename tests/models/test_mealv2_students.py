"""The students: registered names and what their configs say."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from timm_mealv2.errors import UserError
from timm_mealv2.models import mealv2_students

NAME = 'mealv2_mobilenetv3_small_075'
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


@pytest.mark.parametrize('pretrained', [False, True])
def test_unknown_tag_lists_the_known_ones(pretrained):
    with pytest.raises(UserError, match=r"no tag 'in22k'.*mealv2_resnet50\.cutmix_in1k"):
        timm.create_model('mealv2_resnet50.in22k', pretrained=pretrained)


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
