"""Dense 3x3 convolutions with stride 1 on the CPU, in float32 and channels_last, with what is fused with them.

The extension computes them by Winograd's algorithm where that is faster; else PyTorch's own, between separate passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import extension, onednn
from .composed import Composed
from .config import Affine
from .extension import keep_packed as keep_packed
from .reference import Stride

_LIBRARY = Composed(extension)


def conv_stats_fwd(x: Tensor, prologue: Affine | None, weight: Tensor, *rest: Any) -> tuple[Any, ...]:
    """`Composed.conv_stats_fwd`, or the extension's."""
    launchers: Any = extension if serves(x.shape, weight.shape) else _LIBRARY
    return launchers.conv_stats_fwd(x, prologue, weight, *rest)


def conv_stats_bwd(
    dz: Tensor,
    grad_prologue: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    x: Tensor,
    prologue: Affine | None,
    weight: Tensor,
    stride: Stride,
    groups: int,
    channels_last: bool,
    wanted: tuple[bool, bool],
) -> tuple[Any, ...]:
    """Gradients of x, scale, shift and weight; ``grad_prologue``: z, mean, dmean, dvar; ``wanted``: x, weight."""
    arguments = (dz, grad_prologue, x, prologue, weight, stride, groups, channels_last)
    if not serves(x.shape, weight.shape, "gradient"):
        return _LIBRARY.conv_stats_bwd(*arguments, wanted)
    if not wanted[0] or serves(x.shape, weight.shape):
        return extension.conv_stats_bwd(*arguments, wanted)
    dx, dscale, dshift, _ = _LIBRARY.conv_stats_bwd(*arguments, (True, False))
    return dx, dscale, dshift, extension.conv_stats_bwd(*arguments, (False, wanted[1]))[3]


def conv_affine(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """`Composed.conv_affine`, in one call of oneDNN where there is one, or the extension's."""
    launchers: Any = _LIBRARY
    if serves(x.shape, weight.shape, "packed_product" if extension.is_kept(weight) else "product"):
        launchers = extension
    elif onednn.serves(x.dtype, x.device):
        launchers = onednn
    return launchers.conv_affine(x, weight, *rest)


def serves(input_shape: Sequence[int], weight_shape: Sequence[int], use: str = "product") -> bool:
    """Whether the extension computes x (N, C_in, H, W) with weight (C_out, C_in, 3, 3); ``use``: see there."""
    return extension.winograd_serves(use, input_shape, weight_shape, 1)
