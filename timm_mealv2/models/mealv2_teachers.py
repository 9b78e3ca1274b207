"""The registered ensembles of teachers. timm groups models by the file that registers them, hence this file's name."""

from typing import Any

import torch
from timm.models import (
    PretrainedCfg,
    filter_pretrained_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import TeacherSpec, create_ensemble


def _cfg(**kwargs: Any) -> dict[str, Any]:
    """The pretrained config of an ensemble, which has no weights file of its own."""
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'crop_pct': 0.875,
        'interpolation': 'bilinear',
        'origin_url': 'https://github.com/szq0214/MEAL-V2',
        'paper_name': 'MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks',
        'paper_ids': 'arXiv:2009.08453',
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        'mealv2_ensemble': _cfg(),
        'mealv2_ensemble_gluon': _cfg(),
        'mealv2_ensemble_efficientnet_b4': _cfg(input_size=(3, 380, 380)),
    }
)


# What a config.json may set of `create_ensemble`: what the ensemble is, not what is downloaded or where it runs.
_OF_A_FILE = ('teachers', 'weights', 'img_sizes', 'num_classes', 'in_chans')


def _create(
    name: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> EnsembleTeacher:
    """Create a registered ensemble from what `timm.create_model` hands over; `kwargs` are `create_ensemble`'s.

    `device` and `dtype` are those of the weights, as for every timm model; `img_size` is what all teachers are to see.
    """
    given = pretrained_cfg.to_dict() if isinstance(pretrained_cfg, PretrainedCfg) else pretrained_cfg
    given = {**given} if isinstance(given, dict) else {}
    from_file = given.get('source') in ('local-dir', 'hf-hub')
    # timm hands over the model_args of a config.json among `kwargs`, or, without a key 'pretrained_cfg', in its dict.
    model_args = {**(kwargs.pop('pretrained_model_args', None) or {}), **(given.pop('model_args', None) or {})}
    if from_file and (unknown := [key for key in model_args if key not in _OF_A_FILE]):
        raise UserError(f'model_args of a config.json of {name} must be of {", ".join(_OF_A_FILE)}, got {unknown}.')
    kwargs = {**model_args, **kwargs}
    teachers = kwargs.pop('teachers', ())
    if (img_size := kwargs.pop('img_size', None)) is not None:
        kwargs.setdefault('img_sizes', [img_size])
    specs = TeacherSpec.parse_all([teachers] if isinstance(teachers, str | nn.Module) else teachers)
    if not specs and not pretrained and not from_file:
        specs = [TeacherSpec.parse('resnet18')]  # for programs that create every model of timm's list
    if name != 'mealv2_ensemble' or pretrained_cfg:
        given = given or resolve_pretrained_cfg(name, pretrained_cfg).to_dict()
    if given.get('source') == 'local-dir':  # the paths that a config.json names are taken from its folder
        specs = [spec.under(given['file']) for spec in specs]
    for spec in specs:
        if from_file and spec.kind == 'python':
            raise UserError(f'{spec} is refused in a config.json: code is run only where you name it yourself.')
        if pretrained:
            spec.check()
    ensemble = create_ensemble(specs, pretrained=pretrained, **kwargs)
    changes = {**given, **(pretrained_cfg_overlay or {})}
    ensemble.pretrained_cfg.update(filter_pretrained_cfg(changes, remove_source=True))
    ensemble.pretrained_cfg.update(architecture=name, num_classes=ensemble.num_classes)
    ensemble.pretrained_cfg['input_size'] = (ensemble.in_chans, *ensemble.pretrained_cfg['input_size'][-2:])
    return ensemble.to(device=device, dtype=dtype)


@register_model
def mealv2_ensemble(pretrained: bool = False, **kwargs: Any) -> EnsembleTeacher:
    """An ensemble of the `teachers`, as `create_ensemble` takes them."""
    return _create('mealv2_ensemble', pretrained, **kwargs)


@register_model
def mealv2_ensemble_gluon(pretrained: bool = False, **kwargs: Any) -> EnsembleTeacher:
    """The teachers of most MEAL V2 students: SENet-154 and ResNet-152-s."""
    kwargs.setdefault('teachers', ('senet154.gluon_in1k', 'resnet152s.gluon_in1k'))
    return _create('mealv2_ensemble_gluon', pretrained, **kwargs)


@register_model
def mealv2_ensemble_efficientnet_b4(pretrained: bool = False, **kwargs: Any) -> EnsembleTeacher:
    """The teachers of the MEAL V2 ResNet-50 at 380x380: EfficientNet-B4, NoisyStudent and AutoAugment."""
    kwargs.setdefault('teachers', ('tf_efficientnet_b4.ns_jft_in1k', 'tf_efficientnet_b4.aa_in1k'))
    return _create('mealv2_ensemble_efficientnet_b4', pretrained, **kwargs)
