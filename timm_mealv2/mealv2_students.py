"""The MEAL V2 (and V1) students as timm models, with the weights that the authors released.

Every student is one of timm's own architectures with another pretrained config: what the weights were trained with
(ImageNet mean and std, bilinear, crop 0.875) and where they are. timm groups models by the name of the module that
registers them, hence the prefix of this file's name.

Weights are checked before timm sees them: the file is read with `weights_only=True`, and its keys and shapes are
compared with the full model that the pretrained config describes, also where timm itself is not strict (another
`num_classes` or `in_chans`, `features_only`). A file that does not fit is an error, never partly loaded.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    PretrainedCfg,
    clean_state_dict,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    load_state_dict,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.efficientnet import tf_efficientnet_b0
from timm.models.mobilenetv3 import tf_mobilenetv3_large_100, tf_mobilenetv3_small_075, tf_mobilenetv3_small_100
from timm.models.resnet import resnet18, resnet50
from torch import Tensor, nn

from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing

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


def _create(name: str, architecture: Callable[..., nn.Module], pretrained: bool, **kwargs: Any) -> nn.Module:
    cfg = resolve_pretrained_cfg(
        name, pretrained_cfg=kwargs.pop('pretrained_cfg', None), pretrained_cfg_overlay=kwargs.pop('pretrained_cfg_overlay', None)
    )
    return architecture(pretrained=pretrained, pretrained_cfg=cfg, **kwargs)


@register_model
def mealv1_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create('mealv1_resnet50', resnet50, pretrained, **kwargs)


@register_model
def mealv2_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create('mealv2_resnet18', resnet18, pretrained, **kwargs)


@register_model
def mealv2_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create('mealv2_resnet50', resnet50, pretrained, **kwargs)


@register_model
def mealv2_mobilenetv3_small_075(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create('mealv2_mobilenetv3_small_075', tf_mobilenetv3_small_075, pretrained, **kwargs)


@register_model
def mealv2_mobilenetv3_small_100(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create('mealv2_mobilenetv3_small_100', tf_mobilenetv3_small_100, pretrained, **kwargs)


@register_model
def mealv2_mobilenetv3_large_100(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create('mealv2_mobilenetv3_large_100', tf_mobilenetv3_large_100, pretrained, **kwargs)


@register_model
def mealv2_efficientnet_b0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create('mealv2_efficientnet_b0', tf_efficientnet_b0, pretrained, **kwargs)
