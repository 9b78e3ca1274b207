"""Entry points of `torch.hub.load`: every student; `pretrained_cfg=TAG` chooses the weights, the rest is as in timm."""

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
