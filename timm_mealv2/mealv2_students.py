"""The MEAL V2 (and V1) students as timm models, with the weights that the authors released.

Every student is one of timm's own architectures with another pretrained config: what the weights were trained with
(ImageNet mean and std, bilinear, crop 0.875) and where they are. timm groups models by the name of the module that
registers them, hence the prefix of this file's name.

Weights are checked before timm sees them: the file is read with `weights_only=True`, and its keys and shapes are
compared with the full model that the pretrained config describes, also where timm itself is not strict (another
`num_classes` or `in_chans`, `features_only`). A file that does not fit is an error, never partly loaded.
"""

import hashlib
import http.client
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from filelock import FileLock
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    PretrainedCfg,
    clean_state_dict,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    load_state_dict,
    load_state_dict_from_hf,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._hub import load_state_dict_from_path
from timm.models.efficientnet import tf_efficientnet_b0
from timm.models.mobilenetv3 import tf_mobilenetv3_large_100, tf_mobilenetv3_small_075, tf_mobilenetv3_small_100
from timm.models.resnet import resnet18, resnet50
from torch import Tensor, nn

from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing

_logger = logging.getLogger(__name__)

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

VANILLA_ARCHITECTURE: dict[str, str] = {name: function.__name__ for name, function in _ARCHITECTURES.items()}
"""timm's own name of each student's architecture: what an exported `config.json` names, so that plain timm loads it."""

KNOWN_SHA256: dict[str, str] = {}
"""SHA-256 (hexadecimal) by file name; comes before the digest recorded beside the file.

Empty: the release page was out of reach when this was written, and a digest is pinned only from the file itself.
"""

_SOURCES = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source')


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build timm's architecture of the student `name` with the student's own pretrained config.

    Raises:
        UserError: The tag is unknown, there are no weights, or they do not arrive or do not fit.
    """
    cfg = _resolve(name, kwargs.pop('pretrained_cfg', None), kwargs.pop('pretrained_cfg_overlay', None))
    architecture = _ARCHITECTURES[name]
    if not pretrained:
        return architecture(pretrained=False, pretrained_cfg=cfg, **kwargs)

    cfg = _from_namespace(cfg)
    weights, origin = _read_weights(cfg, kwargs.get('cache_dir'))
    _check_fit(weights, origin, cfg, architecture, kwargs.get('pretrained_model_args') or {})
    # timm gets the very tensors that were checked; a second look at the source could find others.
    loading = replace(cfg, **{**dict.fromkeys(_SOURCES), 'state_dict': weights})
    model = architecture(pretrained=True, pretrained_cfg=loading, **kwargs)
    _restore_source(model, cfg)
    return model


def _resolve(name: str, pretrained_cfg: Any, overlay: dict[str, Any] | None) -> PretrainedCfg:
    known = get_arch_pretrained_cfgs(name)
    if isinstance(pretrained_cfg, str) and pretrained_cfg and f'{name}.{pretrained_cfg}' not in known:
        raise UserError(f'{name} has no tag {pretrained_cfg!r}; there is {", ".join(known)}')
    return replace(resolve_pretrained_cfg(name, pretrained_cfg, overlay), architecture=name)


def _from_namespace(cfg: PretrainedCfg) -> PretrainedCfg:
    """Point `cfg` at `MEALV2_HUB_NAMESPACE`'s repository, unless the user gave another source of the weights."""
    namespace = os.environ.get('MEALV2_HUB_NAMESPACE')
    registered = get_arch_pretrained_cfgs(cfg.architecture).get(f'{cfg.architecture}.{cfg.tag}')
    own_source = cfg.file or cfg.state_dict or cfg.hf_hub_id or cfg.source
    if not namespace or registered is None or own_source or cfg.url != registered.url:
        return cfg
    return replace(cfg, url=None, hf_hub_id=f'{namespace}/{cfg.architecture}.{cfg.tag}')


def _restore_source(model: nn.Module, cfg: PretrainedCfg) -> None:
    """Take the tensors out of every `pretrained_cfg` in `model`; name the source there, but no path of this machine."""
    source = {key: getattr(cfg, key) for key in ('url', 'hf_hub_id', 'hf_hub_filename') if getattr(cfg, key)}
    for module in model.modules():  # feature wrappers keep the model they wrap
        for attribute in ('pretrained_cfg', 'default_cfg'):
            entries = getattr(module, attribute, None)
            if isinstance(entries, dict) and entries.pop('state_dict', None) is not None:
                entries.update(source)


def _read_weights(cfg: PretrainedCfg, cache_dir: str | os.PathLike[str] | None) -> tuple[dict[str, Tensor], str]:
    """Return the state dict (without `module.`) that `cfg` points to, and what to call its source in a message.

    The order of sources is timm's.
    """
    if cfg.source == 'local-dir':
        assert cfg.file is not None
        return _readable(load_state_dict_from_path, cfg.file), cfg.file
    if cfg.source != 'hf-hub':
        if cfg.state_dict:
            return clean_state_dict(cfg.state_dict), 'the given state_dict'
        if cfg.file:
            if not Path(cfg.file).is_file():
                raise UserError(f'{cfg.file}: no such file; expected the weights of {cfg.architecture}')
            return _readable(load_state_dict, cfg.file), str(cfg.file)
    if cfg.hf_hub_id:
        return _read_from_hub(cfg, cache_dir), cfg.hf_hub_id
    if cfg.url:
        return _read_from_url(str(cfg.url), cfg, cache_dir)
    recipe = f'{cfg.architecture}_{cfg.input_size[-1]}'
    raise UserError(
        f'{cfg.architecture}: no weights were released; train it with `mealv2-train --recipe {recipe}`, '
        f'or give pretrained_cfg_overlay=dict(file=...)'
    )


def _readable(load: Callable[..., Any], path: str | os.PathLike[str], name: str | None = None) -> dict[str, Tensor]:
    """Call `load(path)`; whatever torch and safetensors raise for a damaged file is one `UserError`."""
    try:
        return clean_state_dict(load(path))
    except Exception as error:
        reason = str(error).strip().split('\n')[0][:200]
        raise UserError(
            f'{name or path} cannot be read as a state dict (cut off, damaged, or not only weights): '
            f'{type(error).__name__}: {reason}; get the file again'
        ) from error


def _read_from_hub(cfg: PretrainedCfg, cache_dir: str | os.PathLike[str] | None) -> dict[str, Tensor]:
    file = {'filename': cfg.hf_hub_filename} if cfg.hf_hub_filename else {}
    try:
        return clean_state_dict(load_state_dict_from_hf(cfg.hf_hub_id, cache_dir=cache_dir, **file))
    except Exception as error:  # network, missing repository, damaged file: no common base class
        raise UserError(
            f'no weights from {cfg.hf_hub_id} on the Hub: {_first_line(error)}; '
            f'check the network, the token and MEALV2_HUB_NAMESPACE'
        ) from error


def _read_from_url(
    url: str, cfg: PretrainedCfg, cache_dir: str | os.PathLike[str] | None
) -> tuple[dict[str, Tensor], str]:
    """Return the weights of `url` and the path of the file, which is downloaded when the cache lacks it.

    A download enters the cache when it is whole, readable and fits. The digest of the first use is recorded beside
    the file, in the format of `sha256sum`.
    """
    path = Path(cache_dir or Path(torch.hub.get_dir()) / 'checkpoints') / Path(urlparse(url).path).name
    record = Path(f'{path}.sha256')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and record.is_file():  # needs no lock, hence serves a cache that cannot be written
            return _read_checked(path, path, record), str(path)
        with FileLock(path.with_name(f'.{path.name}.lock')):
            if path.is_file():
                weights = _read_checked(path, path, record)
            else:
                with replacing(path) as temporary:
                    _download(url, temporary)
                    weights = _read_checked(temporary, path, record)
                    _check_fit(weights, url, cfg, _ARCHITECTURES[cfg.architecture], {})
            if not record.is_file():
                with replacing(record) as temporary:
                    temporary.write_text(f'{_sha256(path)}  {path.name}\n')
    except OSError as error:
        raise UserError(f'{path} cannot be written: {_first_line(error)}; choose another cache_dir') from error
    return weights, str(path)


def _download(url: str, path: Path) -> None:
    _logger.info('Downloading %s', url)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=True)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f'{url} cannot be downloaded: {_first_line(error)}; check the network, or give '
            f'pretrained_cfg_overlay=dict(file=...) with a copy of the file'
        ) from error


def _read_checked(file: Path, path: Path, record: Path) -> dict[str, Tensor]:
    """Read `file`, which is or will be `path`, after comparing its digest with the pinned or the recorded one."""
    expected = KNOWN_SHA256.get(path.name)
    where = 'KNOWN_SHA256'
    if expected is None and record.is_file():
        expected, where = (record.read_text().split() or ['nothing'])[0], str(record)
    if expected is not None and (actual := _sha256(file)) != expected:
        raise UserError(
            f'{path} has SHA-256 {actual}, but {where} says {expected}; delete {path} and download it again'
        )
    return _readable(load_state_dict, file, str(path))


def _sha256(path: Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _check_fit(
    weights: Mapping[str, Tensor],
    origin: str,
    cfg: PretrainedCfg,
    architecture: Callable[..., nn.Module],
    model_args: dict[str, Any],
) -> None:
    """Compare keys and shapes of `weights` with the full model that `cfg` describes.

    Args:
        weights: State dict without prefixes.
        origin: What to call it in a message.
        cfg: Gives the number of classes and of input channels, whatever the model at hand is built with.
        architecture: timm's function.
        model_args: The arguments that an exported folder's `config.json` adds.

    Raises:
        UserError: They differ; names the first few keys of each kind and counts them.
    """
    bare = replace(cfg, **dict.fromkeys(_SOURCES))
    full = architecture(pretrained=False, pretrained_cfg=bare, **{**model_args, 'device': 'meta'}).state_dict()
    shape = {key: list(getattr(value, 'shape', ())) for key, value in weights.items()}
    problems = {
        'missing': [key for key in full if key not in weights],
        'unexpected': [key for key in weights if key not in full],
        'of another shape': [
            f'{key} {shape[key]} instead of {list(value.shape)}'
            for key, value in full.items()
            if key in weights and (shape[key] != list(value.shape) or not isinstance(weights[key], Tensor))
        ],
    }
    told = '; '.join(f'{len(keys)} {kind} ({_some(keys)})' for kind, keys in problems.items() if keys)
    if told:
        vanilla = VANILLA_ARCHITECTURE[cfg.architecture]
        raise UserError(
            f'{origin} does not fit {cfg.architecture} (weights of a {vanilla} with {cfg.num_classes} classes and '
            f'{cfg.input_size[0]} input channels are expected): {told}'
        )


def _some(keys: list[str], number: int = 3) -> str:
    return ', '.join(keys[:number]) + (', ...' if len(keys) > number else '')


def _first_line(error: Exception) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'


@register_model
def mealv1_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MEAL V1 ResNet-50."""
    return _create('mealv1_resnet50', pretrained, **kwargs)


@register_model
def mealv2_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MEAL V2 ResNet-18; no weights were released."""
    return _create('mealv2_resnet18', pretrained, **kwargs)


@register_model
def mealv2_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MEAL V2 ResNet-50; tags in1k (224), in1k_380 and cutmix_in1k."""
    return _create('mealv2_resnet50', pretrained, **kwargs)


@register_model
def mealv2_mobilenetv3_small_075(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MEAL V2 MobileNetV3-Small 0.75."""
    return _create('mealv2_mobilenetv3_small_075', pretrained, **kwargs)


@register_model
def mealv2_mobilenetv3_small_100(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MEAL V2 MobileNetV3-Small 1.0."""
    return _create('mealv2_mobilenetv3_small_100', pretrained, **kwargs)


@register_model
def mealv2_mobilenetv3_large_100(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MEAL V2 MobileNetV3-Large 1.0."""
    return _create('mealv2_mobilenetv3_large_100', pretrained, **kwargs)


@register_model
def mealv2_efficientnet_b0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MEAL V2 EfficientNet-B0."""
    return _create('mealv2_efficientnet_b0', pretrained, **kwargs)
