"""A frozen model as it runs fastest: in channels_last, with batch norm folded into the convolutions before it."""

import copy
from collections import Counter
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

BOUND = 1e-5
"""How far a probability of the fused model may be from the model's own."""


def fuse_model(model: nn.Module, input_size: tuple[int, int, int]) -> nn.Module:
    """Return a fused copy of a frozen model [B, chans, H, W] -> logits [B, C], which shares the other weights with it.

    It is made and checked in float32 on the CPU, on two seeded images of `input_size`: the result does not depend on
    the machine's device, or on the model's dtype, which the copy has too.

    Raises:
        RuntimeError: If a probability would differ by more than `BOUND`; whatever the model raises, if it fails.
    """
    first = next(model.parameters(), torch.empty(0))
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    plain = _copy_sharing_weights(model).cpu().float()
    with torch.autocast('cpu', enabled=False):
        expected, pairs = _run_and_find_pairs(plain, images)
        fused = _copy_sharing_weights(plain)
        for convolution, norm in pairs:
            _fold(fused, convolution, norm)
        fused.to(memory_format=torch.channels_last)
        with torch.no_grad():
            logits = fused(images.to(memory_format=torch.channels_last))
    difference = (logits.softmax(dim=1) - expected.softmax(dim=1)).abs().max().item()
    if not difference <= BOUND:
        raise RuntimeError(f'a probability would differ by {difference:.1e}')
    return fused.to(device=first.device, dtype=first.dtype)


def _copy_sharing_weights(model: nn.Module) -> nn.Module:
    """Copy a module; the copy's parameters are others, in the same memory."""
    return copy.deepcopy(model, {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()})


def _run_and_find_pairs(model: nn.Module, images: Tensor) -> tuple[Tensor, list[tuple[str, str]]]:
    """Return the logits, and the names of each convolution and batch norm that can be folded into one.

    Each of the two runs once, and the convolution's output goes into the batch norm and nowhere else, which the graph
    of the backward pass shows.
    """
    calls: Counter[str] = Counter()
    outputs: dict[int, tuple[str, Tensor, Any]] = {}  # kept, so that no other tensor gets the same id
    candidates: list[tuple[str, str, Any]] = []

    def hook(name: str, module: nn.Module) -> Any:
        def after_convolution(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            calls[name] += 1
            outputs[id(output)] = name, output, output.grad_fn

        def before_norm(module: nn.Module, args: tuple[Any, ...]) -> None:
            calls[name] += 1
            if id(args[0]) in outputs:
                convolution, _, node = outputs[id(args[0])]
                candidates.append((convolution, name, node))

        if isinstance(module, nn.Conv2d):
            return module.register_forward_hook(after_convolution)
        return module.register_forward_pre_hook(before_norm)

    kinds = (nn.Conv2d, nn.BatchNorm2d)  # timm's BatchNormAct2d is one too
    handles = [hook(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    with torch.enable_grad():
        logits = model(images.clone().requires_grad_())
    for handle in handles:
        handle.remove()
    uses: Counter[Any] = Counter()
    nodes = [logits.grad_fn] if logits.requires_grad else []
    while nodes:
        for node, _ in nodes.pop().next_functions:
            uses[node] += 1
            if node is not None and uses[node] == 1:
                nodes.append(node)
    pairs = [(a, b) for a, b, node in candidates if calls[a] == calls[b] == 1 and uses[node] == 1]
    return logits.detach(), pairs


def _fold(model: nn.Module, convolution: str, norm: str) -> None:
    """Put a batch norm into the convolution before it; what timm's has behind it stays."""
    before: Any = model.get_submodule(convolution)
    former: Any = model.get_submodule(norm)
    model.set_submodule(convolution, fuse_conv_bn_eval(before, former))
    rest = nn.Sequential(former.drop, former.act) if isinstance(former, BatchNormAct2d) else nn.Identity()
    model.set_submodule(norm, rest.eval())
