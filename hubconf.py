"""Entry points of `torch.hub.load`: every student; `pretrained_cfg=TAG` chooses the weights, the rest is as in timm."""

import timm

# torch.hub installs nothing, and an older timm fails at some import or other.
if tuple(int(part) for part in timm.__version__.split('.')[:3] if part.isdecimal()) < (1, 0, 31):
    raise ImportError(f'timm_mealv2 needs timm 1.0.31 or newer, found {timm.__version__}: pip install -U timm')

from timm_mealv2.models.mealv2_students import (
    mealv1_resnet50,
    mealv2_efficientnet_b0,
    mealv2_mobilenetv3_large_100,
    mealv2_mobilenetv3_small_075,
    mealv2_mobilenetv3_small_100,
    mealv2_resnet18,
    mealv2_resnet50,
)

__all__ = [
    'mealv1_resnet50',
    'mealv2_efficientnet_b0',
    'mealv2_mobilenetv3_large_100',
    'mealv2_mobilenetv3_small_075',
    'mealv2_mobilenetv3_small_100',
    'mealv2_resnet18',
    'mealv2_resnet50',
]

dependencies = ['torch', 'timm', 'huggingface_hub', 'safetensors', 'filelock']
