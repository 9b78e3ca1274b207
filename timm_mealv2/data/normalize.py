"""Pixels normalized with one mean and std, brought to another: models differ in what they were trained with."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config
from torch import Tensor

from timm_mealv2.errors import UserError

Stats = tuple[float, ...]
"""A mean or a std, one number per channel, in units where a pixel is 0..1."""


def channel_stats(cfg: Mapping[str, Any] | None, in_chans: int) -> tuple[Stats, Stats]:
    """Return the mean and std that a model takes its pixels with, one number per channel.

    As timm's loader does it: ImageNet's where `cfg` (a `pretrained_cfg` or a data config) has none, and the average
    over the channels where their number is not `in_chans`, as for gray pictures and a color config.
    """
    cfg = cfg or {}
    mean = _per_channel(cfg.get('mean') or IMAGENET_DEFAULT_MEAN, in_chans)
    return mean, _per_channel(cfg.get('std') or IMAGENET_DEFAULT_STD, in_chans)


def resolve_pixels(
    settings: Mapping[str, Any], cfg: Mapping[str, Any], in_chans: int, use_test_size: bool = False
) -> dict[str, Any]:
    """Return timm's data config of a model with `in_chans` channels.

    Args:
        settings: What the user says of the pixels, as timm's `resolve_data_config` takes it.
        cfg: The model's `pretrained_cfg`, for the rest.
        in_chans: Channels of the images.
        use_test_size: Take the test size and crop of `cfg`, where it has them.

    Raises:
        UserError: If mean or std cannot be used.
    """
    settings = {**settings, 'in_chans': in_chans}
    try:
        config = resolve_data_config(settings, pretrained_cfg=dict(cfg), use_test_size=use_test_size)
    except AssertionError:
        raise UserError(f'--mean and --std take one value or {in_chans}, one per channel.') from None
    config['input_size'] = (in_chans, *config['input_size'][1:])
    config['mean'], config['std'] = channel_stats(config, in_chans)
    return config


def renormalize(x: Tensor, from_mean: Stats, from_std: Stats, to_mean: Stats, to_std: Stats) -> Tensor:
    """Bring pixels [B, C, H, W] from one normalization to another; with equal statistics, `x` itself is returned.

    (pixel - from_mean) / from_std becomes (pixel - to_mean) / to_std, with one number per channel as `channel_stats`
    gives them. Computed in at least float32, returned in the dtype and memory format of `x`; gradients pass. Waits for
    no device.
    """
    if (from_mean, from_std) == (to_mean, to_std):
        return x
    scale = [a / b for a, b in zip(from_std, to_std, strict=True)]
    shift = [(a - b) / std for a, b, std in zip(from_mean, to_mean, to_std, strict=True)]
    assert len(scale) == len(shift) == x.shape[1], f'{len(scale)} statistics for {x.shape[1]} channels'
    dtype = torch.promote_types(x.dtype, torch.float32)
    # From pageable memory a non-blocking copy of a few bytes is staged at once: safe, and no wait for the stream.
    factors = torch.tensor([scale, shift], dtype=dtype).view(2, -1, 1, 1).to(x.device, non_blocking=True)
    return (x * factors[0] + factors[1]).to(x.dtype)


def _per_channel(stats: Stats | float, in_chans: int) -> Stats:
    stats = tuple(stats) if isinstance(stats, (tuple, list)) else (stats,)
    return stats if len(stats) == in_chans else (sum(stats) / len(stats),) * in_chans
