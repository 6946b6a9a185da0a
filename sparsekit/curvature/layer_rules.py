"""Rules by which a layer's per-example gradients follow from its inputs and the gradients of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight


@dataclass(frozen=True)
class LayerRule:
    """How the gradients of a layer, by example, follow from its input a (b, …) and its output's gradient d (b, …).

    Attributes:
        weight: (module, a, d) -> (b, *weight.shape).
        bias: (module, a, d) -> (b, *bias.shape).
        dimensions: module -> the fewest dimensions that a has when its first counts examples.
        applies: whether the module is of the plain kind that the rule is for.
        positions: d -> T, at which the weight is applied; 0 where its gradients are no products Σ_t d_t a_tᵀ.
        factors: (module, a, d) -> A (groups, b, T, in/groups) and D (groups, b, T, out/groups); with `positions` alone.
    """

    weight: Callable[[Any, Tensor, Tensor], Tensor]
    bias: Callable[[Any, Tensor, Tensor], Tensor]
    dimensions: Callable[[Any], int]
    applies: Callable[[Any], bool] = lambda module: True
    positions: Callable[[Tensor], int] = lambda d: 0
    factors: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


def _linear_weight(_module: nn.Linear, a: Tensor, d: Tensor) -> Tensor:
    return d.reshape(len(d), -1, d.shape[-1]).mT @ a.reshape(len(a), -1, a.shape[-1])  # (b, T, out)ᵀ (b, T, in)


def _linear_factors(_module: nn.Linear, a: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    return a.reshape(1, len(a), -1, a.shape[-1]), d.reshape(1, len(d), -1, d.shape[-1])


def _convolution_factors(module: nn.Conv1d | nn.Conv2d, a: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    b, groups = len(a), module.groups
    patches = input_patches(module, a)
    A, D = (X.reshape(b, groups, -1, patches.shape[-1]).permute(1, 0, 3, 2) for X in (patches, d))
    return A, D


def _convolution_weight(module: nn.Conv1d | nn.Conv2d, a: Tensor, d: Tensor) -> Tensor:
    b, groups, positions = len(a), module.groups, d[0, 0].numel()
    if groups * positions < module.out_channels:
        # The patches each position sees take less room than the gradients; products with them are fastest.
        patches = input_patches(module, a).view(b, groups, -1, positions)  # (b, g, in/g·k, T)
        return (d.reshape(b, groups, -1, positions) @ patches.mT).view(b, *module.weight.shape)
    # The weight gradient of one wide convolution, to which each example is `groups` groups of channels: it is not
    # summed over the examples, and makes no patches.
    image, size, stride, padding, dilation = _as_image(module, a)
    d = d.reshape(1, -1, *(d.shape[2:] if image.dim() == d.dim() else (1, d.shape[2])))
    wide = (b * module.out_channels, module.in_channels // groups, *size)
    image = image.reshape(1, -1, *image.shape[2:])
    return conv2d_weight(image, wide, d, stride, padding, dilation, b * groups).view(b, *module.weight.shape)


def _as_image(
    module: nn.Conv1d | nn.Conv2d, a: Tensor
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The input, padded where the padding has a name, and kernel size, stride, padding, dilation, all of 2 axes."""
    size, stride, dilation, padding = module.kernel_size, module.stride, module.dilation, module.padding
    if isinstance(padding, str):  # 'same' pads the right side more where the total is odd
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, size, strict=True)]
        a = F.pad(a, [side for t in reversed(total) for side in (t // 2, t - t // 2)])
        padding = (0,) * len(size)
    if isinstance(module, nn.Conv1d):  # images of one row
        return a.unsqueeze(2), (1, *size), (1, *stride), (0, *padding), (1, *dilation)
    return a, size, stride, padding, dilation


def input_patches(module: nn.Conv1d | nn.Conv2d, a: Tensor) -> Tensor:
    """(b, in·k, T): the inputs that each output position of a convolution sees."""
    a, size, stride, padding, dilation = _as_image(module, a)
    return F.unfold(a, size, dilation=dilation, padding=padding, stride=stride)


def _over_trailing_features(d: Tensor) -> Tensor:
    return d.reshape(len(d), -1, d.shape[-1]).sum(1)


def _over_channels(d: Tensor) -> Tensor:
    return d.reshape(*d.shape[:2], -1).sum(2)


def _batch_normed(module: nn.BatchNorm1d | nn.BatchNorm2d, a: Tensor) -> Tensor:
    return F.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)


def _over_positions(module: nn.LayerNorm, d: Tensor) -> Tensor:
    return d.reshape(len(d), -1, *module.normalized_shape).sum(1)


def _embedding_weight(module: nn.Embedding, a: Tensor, d: Tensor) -> Tensor:
    tokens, b = a.reshape(len(a), -1), len(a)
    d = d.reshape(b, -1, module.embedding_dim)
    if module.padding_idx is not None:
        d = d.masked_fill((tokens == module.padding_idx)[..., None], 0.0)
    out = d.new_zeros(b, module.num_embeddings, module.embedding_dim)
    return out.scatter_add_(1, tokens[..., None].expand_as(d), d)


_CONVOLUTION = LayerRule(
    weight=_convolution_weight,
    bias=lambda _, a, d: _over_channels(d),
    dimensions=lambda module: 2 + len(module.kernel_size),
    applies=lambda module: module.padding_mode == "zeros",
    positions=lambda d: d[0, 0].numel(),
    factors=_convolution_factors,
)
_BATCH_NORM = LayerRule(
    weight=lambda module, a, d: _over_channels(d * _batch_normed(module, a)),
    bias=lambda _, a, d: _over_channels(d),
    dimensions=lambda _: 2,
    applies=lambda module: module.running_mean is not None,
)
LAYER_RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: LayerRule(
        weight=_linear_weight,
        bias=lambda _, a, d: _over_trailing_features(d),
        dimensions=lambda _: 2,
        positions=lambda d: d[0].numel() // d.shape[-1],
        factors=_linear_factors,
    ),
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.GroupNorm: LayerRule(
        weight=lambda module, a, d: _over_channels(d * F.group_norm(a, module.num_groups, eps=module.eps)),
        bias=lambda _, a, d: _over_channels(d),
        dimensions=lambda _: 2,
    ),
    nn.LayerNorm: LayerRule(
        weight=lambda module, a, d: _over_positions(
            module, d * F.layer_norm(a, module.normalized_shape, eps=module.eps)
        ),
        bias=lambda module, a, d: _over_positions(module, d),
        dimensions=lambda module: 1 + len(module.normalized_shape),
    ),
    nn.Embedding: LayerRule(
        weight=_embedding_weight,
        bias=lambda module, a, d: d,
        dimensions=lambda _: 1,
        applies=lambda module: module.max_norm is None and not module.scale_grad_by_freq and not module.sparse,
    ),
}


def has_rule(module: nn.Module) -> bool:
    """Whether the module's gradients follow a rule; not those of a derived class, which may compute anything."""
    rule = LAYER_RULES.get(type(module))
    return rule is not None and rule.applies(module)
