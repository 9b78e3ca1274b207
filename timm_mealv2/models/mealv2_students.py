"""The MEAL V2 (and V1) students as timm models, with the weights that the authors released.

Every student is one of timm's own architectures with another pretrained config: what the weights were trained with
(ImageNet mean and std, bilinear, crop 0.875) and where they are: on the authors' release page, or, with the environment
variable MEALV2_HUB_NAMESPACE, in that namespace of the Hub. timm groups models by the name of the module that registers
them, hence the prefix of this file's name.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    clean_state_dict,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.efficientnet import tf_efficientnet_b0
from timm.models.mobilenetv3 import tf_mobilenetv3_large_100, tf_mobilenetv3_small_075, tf_mobilenetv3_small_100
from timm.models.resnet import resnet18, resnet50
from torch import Tensor, nn

from timm_mealv2.errors import UserError, one_line

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

_ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    'mealv1_resnet50': resnet50,
    'mealv2_resnet18': resnet18,
    'mealv2_resnet50': resnet50,
    'mealv2_mobilenetv3_small_075': tf_mobilenetv3_small_075,
    'mealv2_mobilenetv3_small_100': tf_mobilenetv3_small_100,
    'mealv2_mobilenetv3_large_100': tf_mobilenetv3_large_100,
    'mealv2_efficientnet_b0': tf_efficientnet_b0,
}

VANILLA_ARCHITECTURE = {name: architecture.__name__ for name, architecture in _ARCHITECTURES.items()}
"""timm's own name of each student's architecture: what an exported `config.json` names, so that plain timm loads it."""


def _create(name: str, architecture: Callable[..., nn.Module], pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build timm's architecture with the student's own pretrained config; timm loads the weights."""
    cfg = resolve_pretrained_cfg(name, kwargs.pop('pretrained_cfg', None), kwargs.pop('pretrained_cfg_overlay', None))
    cfg = replace(cfg, architecture=name)
    if not pretrained:
        return architecture(pretrained_cfg=cfg, **kwargs)
    registered = get_arch_pretrained_cfgs(name).get(f'{name}.{cfg.tag}')
    namespace = os.environ.get('MEALV2_HUB_NAMESPACE')
    if namespace and registered is not None and cfg == registered:  # not where the user gives another source
        cfg = replace(cfg, url=None, hf_hub_id=f'{namespace}/{name}.{cfg.tag}')
    source = cfg.file or cfg.hf_hub_id or cfg.url
    if source is None and cfg.state_dict is None:
        raise UserError(
            f'{name}: no weights were released; train it with `mealv2-train --recipe {name}_{cfg.input_size[-1]}`, '
            f'or give pretrained_cfg_overlay=dict(file=...).'
        )
    try:
        model: Any = architecture(pretrained=True, pretrained_cfg=cfg, pretrained_filter_fn=_complete, **kwargs)
    except (OSError, RuntimeError) as error:
        source = source or 'the given state_dict'
        raise UserError(f'{source} does not fit {name}, or cannot be read: {one_line(error)}') from error
    for key in ('file', 'state_dict'):  # a path of this machine, and tensors, would be in every checkpoint
        model.pretrained_cfg.pop(key, None)
    return model


def _complete(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Drop the prefix that DataParallel gave the released files' keys; refuse what timm would leave random.

    timm is not strict where another number of classes is asked for.
    """
    state_dict = clean_state_dict(state_dict)
    if missing := [key for key in model.state_dict() if key not in state_dict]:
        raise RuntimeError(f'{len(missing)} keys are missing: {", ".join(missing[:3])}, ...')
    return state_dict


def _register(name: str, architecture: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register a student with timm; return the function that creates it."""

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, architecture, pretrained, **kwargs)

    create.__name__, create.__doc__ = (
        name,
        f'{architecture.__name__} as MEAL trained it; the tags are in `default_cfgs`.',
    )
    return register_model(create)


globals().update({name: _register(name, architecture) for name, architecture in _ARCHITECTURES.items()})
