"""Released weights: found, downloaded, compared with their digest, and loaded only where they fit exactly.

Weights are checked before timm sees them: the file is read with `weights_only=True`, and its keys and shapes are
compared with the full model that the pretrained config describes, also where timm itself is not strict (another
`num_classes` or `in_chans`, `features_only`). A file that does not fit is an error, never partly loaded.
"""

import hashlib
import http.client
import logging
import os
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from filelock import FileLock
from timm.models import (
    PretrainedCfg,
    clean_state_dict,
    get_arch_pretrained_cfgs,
    load_state_dict,
    load_state_dict_from_hf,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing

_logger = logging.getLogger(__name__)

KNOWN_SHA256: dict[str, str] = {}
"""SHA-256 (hexadecimal) by file name; comes before the digest recorded beside the file.

Empty: the release page was out of reach when this was written, and a digest is pinned only from the file itself.
"""

_Check = Callable[[dict[str, Tensor], str], dict[str, Tensor]]

_SOURCES = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source')


def create_student(name: str, architecture: Callable[..., nn.Module], pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build timm's architecture of the student `name` with the student's own pretrained config.

    Raises:
        UserError: The tag is unknown, there are no weights, or they do not arrive or do not fit.
    """
    known, given = get_arch_pretrained_cfgs(name), kwargs.pop('pretrained_cfg', None)
    if isinstance(given, str) and given and f'{name}.{given}' not in known:
        raise UserError(f'{name} has no tag {given!r}; there is {", ".join(known)}')
    cfg = resolve_pretrained_cfg(name, given, kwargs.pop('pretrained_cfg_overlay', None))
    cfg = replace(cfg, architecture=name)
    if not pretrained:
        return architecture(pretrained=False, pretrained_cfg=cfg, **kwargs)

    cfg = _from_namespace(cfg)
    check = partial(_fitting, cfg=cfg, architecture=architecture, model_args=kwargs.get('pretrained_model_args') or {})
    weights = _read_weights(cfg, kwargs.get('cache_dir'), check)
    # timm gets the very tensors that were checked; a second look at the source could find others.
    loading = replace(cfg, **{**dict.fromkeys(_SOURCES), 'state_dict': weights})
    model = architecture(pretrained=True, pretrained_cfg=loading, **kwargs)
    _restore_source(model, cfg)
    return model


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


def _read_weights(cfg: PretrainedCfg, cache_dir: str | os.PathLike[str] | None, check: _Check) -> dict[str, Tensor]:
    """Return the state dict (without `module.`) that `cfg` points to, after `check(weights, name of the source)`.

    The order of sources is timm's.
    """
    if cfg.source == 'local-dir':
        names = 'model.safetensors', 'pytorch_model.bin'  # what timm's save_for_hf writes, in timm's order
        paths = [path for name in names if (path := Path(str(cfg.file), name)).is_file()]
        if not paths:
            raise UserError(f'{cfg.file}: no weights there; expected {" or ".join(names)}')
        return check(_readable(paths[0], str(paths[0])), str(paths[0]))
    if cfg.source != 'hf-hub':
        if cfg.state_dict:
            return check(clean_state_dict(cfg.state_dict), 'the given state_dict')
        if cfg.file:
            if not Path(cfg.file).is_file():
                raise UserError(f'{cfg.file}: no such file; expected the weights of {cfg.architecture}')
            return check(_readable(Path(cfg.file), str(cfg.file)), str(cfg.file))
    if cfg.hf_hub_id:
        return check(_read_from_hub(cfg, cache_dir), cfg.hf_hub_id)
    if cfg.url:
        return _read_from_url(str(cfg.url), cache_dir, check)
    recipe = f'{cfg.architecture}_{cfg.input_size[-1]}'
    raise UserError(
        f'{cfg.architecture}: no weights were released; train it with `mealv2-train --recipe {recipe}`, '
        f'or give pretrained_cfg_overlay=dict(file=...)'
    )


def _readable(path: Path, name: str) -> dict[str, Tensor]:
    """Read a state dict; whatever torch and safetensors raise for a damaged file is one `UserError`."""
    try:
        return clean_state_dict(load_state_dict(str(path)))
    except Exception as error:
        raise UserError(
            f'{name} cannot be read as a state dict (cut off, damaged, or not only weights): {_first_line(error)}; '
            f'get the file again'
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


def _read_from_url(url: str, cache_dir: str | os.PathLike[str] | None, check: _Check) -> dict[str, Tensor]:
    """Return the weights of `url`, from the cache or, for the first time, by a download.

    A download enters the cache when it is whole, readable and fits. The digest of the first use is recorded beside
    the file, in the format of `sha256sum`; it outlives the file, so that another file is noticed later.
    """
    path = Path(cache_dir or Path(torch.hub.get_dir()) / 'checkpoints') / Path(urlparse(url).path).name
    record = Path(f'{path}.sha256')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and record.is_file():  # needs no lock, hence serves a cache that cannot be written
            return check(_read_checked(path, path, record)[0], str(path))
        with _locked(path):
            if path.is_file():
                weights, digest = _read_checked(path, path, record)
                check(weights, str(path))
            else:
                with replacing(path) as temporary:
                    _download(url, temporary)
                    weights, digest = _read_checked(temporary, path, record)
                    check(weights, url)
            if not record.is_file():
                with replacing(record) as temporary:
                    temporary.write_text(f'{digest}  {path.name}\n')
    except OSError as error:
        raise UserError(
            f'{path.parent} cannot be used as a cache: {_first_line(error)}; mend that or choose another cache_dir'
        ) from error
    return weights


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time download `path`; a second one then finds it there."""
    lock = path.with_name(f'.{path.name}.lock')
    with FileLock(lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # at worst a process that waits and one that comes later download both


def _download(url: str, path: Path) -> None:
    _logger.info('Downloading %s', url)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=True)
    except (URLError, ssl.SSLError, ConnectionError, TimeoutError, http.client.HTTPException, ValueError) as error:
        raise UserError(
            f'{url} cannot be downloaded: {_first_line(error)}; check the network, or give '
            f'pretrained_cfg_overlay=dict(file=...) with a copy of the file'
        ) from error


def _read_checked(file: Path, path: Path, record: Path) -> tuple[dict[str, Tensor], str]:
    """The weights in `file`, which is or will be `path`, and its digest, which must be the pinned or recorded one."""
    with file.open('rb') as opened:
        digest = hashlib.file_digest(opened, 'sha256').hexdigest()
    expected, where = KNOWN_SHA256.get(path.name), 'KNOWN_SHA256'
    remedy = 'that is not the released file'
    if expected is None and record.is_file():
        expected, where = (record.read_text().split() or ['nothing'])[0], str(record)
        remedy = f'the source has another file than before; delete {record} to accept it'
    if expected not in (None, digest):
        if file == path:
            remedy = f'delete {path} and load again'
        raise UserError(f'{path.name} has SHA-256 {digest}, but {where} says {expected}: {remedy}')
    return _readable(file, str(path)), digest


def _fitting(
    weights: dict[str, Tensor],
    origin: str,
    *,
    cfg: PretrainedCfg,
    architecture: Callable[..., nn.Module],
    model_args: dict[str, Any],
) -> dict[str, Tensor]:
    """Return `weights` (named `origin` in messages) if their keys and shapes are those of the full model.

    `cfg` gives its classes and input channels, whatever the model at hand is built with, `architecture` is timm's
    function, and `model_args` are what an exported folder's `config.json` adds.
    """
    bare = replace(cfg, **dict.fromkeys(_SOURCES))
    full = architecture(pretrained=False, pretrained_cfg=bare, **{**model_args, 'device': 'meta'}).state_dict()
    told = misfit(full, weights)
    if told:
        raise UserError(
            f'{origin} does not fit {cfg.architecture} (weights of a {architecture.__name__} with {cfg.num_classes} '
            f'classes and {cfg.input_size[0]} input channels are expected): {told}'
        )
    return weights


def misfit(expected: Mapping[str, Tensor], received: Mapping[str, Any]) -> str:
    """Return how a state dict differs from the one expected, three keys of each kind; '' if it fits."""
    shape = {key: list(getattr(value, 'shape', ())) for key, value in received.items()}
    problems = {
        'missing': [key for key in expected if key not in received],
        'unexpected': [key for key in received if key not in expected],
        'of another shape': [
            f'{key} {shape[key]} instead of {list(value.shape)}'
            for key, value in expected.items()
            if key in received and (shape[key] != list(value.shape) or not isinstance(received[key], Tensor))
        ],
    }
    return '; '.join(
        f'{len(keys)} {kind} ({", ".join(keys[:3])}{", ..." if len(keys) > 3 else ""})'
        for kind, keys in problems.items()
        if keys
    )


def _first_line(error: Exception) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
