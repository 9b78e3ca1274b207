"""The MEAL V2 (and V1) students as timm models, with the weights that the authors released.

Every student is one of timm's own architectures with another pretrained config: what the weights were trained with
(ImageNet mean and std, bilinear, crop 0.875) and where they are. timm groups models by the name of the module that
registers them, hence the prefix of this file's name.
"""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models.efficientnet import tf_efficientnet_b0
from timm.models.mobilenetv3 import tf_mobilenetv3_large_100, tf_mobilenetv3_small_075, tf_mobilenetv3_small_100
from timm.models.resnet import resnet18, resnet50
from torch import nn

from timm_mealv2.models.pretrained import create_student

RELEASE = 'https://github.com/szq0214/MEAL-V2/releases/download/v1.0.0/'


def _cfg(file: str = '', **kwargs: Any) -> dict[str, Any]:
    """The pretrained config of a student: what its weights were trained with and evaluated on."""
    return {
        'url': RELEASE + file if file else None,
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'crop_mode': 'center',
        'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv_stem',
        'classifier': 'classifier',
        'origin_url': 'https://github.com/szq0214/MEAL-V2',
        'paper_name': 'MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks',
        'paper_ids': 'arXiv:2009.08453',
        **kwargs,
    }


def _resnet_cfg(file: str = '', **kwargs: Any) -> dict[str, Any]:
    return _cfg(file, first_conv='conv1', classifier='fc', **kwargs)


default_cfgs = generate_default_cfgs(
    {
        'mealv1_resnet50.in1k': _resnet_cfg('MEALV1_ResNet50_224.pth'),
        'mealv2_resnet18.in1k': _resnet_cfg(),
        'mealv2_resnet50.in1k': _resnet_cfg('MEALV2_ResNet50_224.pth'),
        'mealv2_resnet50.in1k_380': _resnet_cfg(
            'MEALV2_ResNet50_380.pth', input_size=(3, 380, 380), pool_size=(12, 12)
        ),
        'mealv2_resnet50.cutmix_in1k': _resnet_cfg('MEALV2_ResNet50_224_cutmix.pth'),
        'mealv2_mobilenetv3_small_075.in1k': _cfg('MEALV2_MobileNet_V3_Small_0.75_224.pth'),
        'mealv2_mobilenetv3_small_100.in1k': _cfg('MEALV2_MobileNet_V3_Small_1.0_224.pth'),
        'mealv2_mobilenetv3_large_100.in1k': _cfg('MEALV2_MobileNet_V3_Large_1.0_224.pth'),
        'mealv2_efficientnet_b0.in1k': _cfg('MEALV2_EfficientNet_B0_224.pth'),
    }
)

VANILLA_ARCHITECTURE: dict[str, str] = {
    'mealv1_resnet50': 'resnet50',
    'mealv2_resnet18': 'resnet18',
    'mealv2_resnet50': 'resnet50',
    'mealv2_mobilenetv3_small_075': 'tf_mobilenetv3_small_075',
    'mealv2_mobilenetv3_small_100': 'tf_mobilenetv3_small_100',
    'mealv2_mobilenetv3_large_100': 'tf_mobilenetv3_large_100',
    'mealv2_efficientnet_b0': 'tf_efficientnet_b0',
}
"""timm's own name of each student's architecture: what an exported `config.json` names, so that plain timm loads it."""


@register_model
def mealv1_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MEAL V1 ResNet-50."""
    return create_student('mealv1_resnet50', resnet50, pretrained, **kwargs)


@register_model
def mealv2_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MEAL V2 ResNet-18; no weights were released."""
    return create_student('mealv2_resnet18', resnet18, pretrained, **kwargs)


@register_model
def mealv2_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MEAL V2 ResNet-50; tags in1k (224), in1k_380 and cutmix_in1k."""
    return create_student('mealv2_resnet50', resnet50, pretrained, **kwargs)


@register_model
def mealv2_mobilenetv3_small_075(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MEAL V2 MobileNetV3-Small 0.75."""
    return create_student('mealv2_mobilenetv3_small_075', tf_mobilenetv3_small_075, pretrained, **kwargs)


@register_model
def mealv2_mobilenetv3_small_100(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MEAL V2 MobileNetV3-Small 1.0."""
    return create_student('mealv2_mobilenetv3_small_100', tf_mobilenetv3_small_100, pretrained, **kwargs)


@register_model
def mealv2_mobilenetv3_large_100(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MEAL V2 MobileNetV3-Large 1.0."""
    return create_student('mealv2_mobilenetv3_large_100', tf_mobilenetv3_large_100, pretrained, **kwargs)


@register_model
def mealv2_efficientnet_b0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MEAL V2 EfficientNet-B0."""
    return create_student('mealv2_efficientnet_b0', tf_efficientnet_b0, pretrained, **kwargs)
