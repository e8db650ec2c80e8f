"""Dense 3x3 convolutions on the CPU, in float32 and channels_last, with what is fused with them.

The extension computes them, by Winograd's algorithm or by sums as grouped ones, where that is faster; else PyTorch's
own, between separate passes.
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


def conv_stats_fwd(x: Tensor, prologue: Affine | None, weight: Tensor, stride: Stride, *rest: Any) -> tuple[Any, ...]:
    """`Composed.conv_stats_fwd`, or the extension's."""
    launchers: Any = extension if serves(x.shape, weight.shape, stride) else _LIBRARY
    return launchers.conv_stats_fwd(x, prologue, weight, stride, *rest)


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
    if not serves(x.shape, weight.shape, stride, "gradient"):
        return _LIBRARY.conv_stats_bwd(*arguments, wanted)
    if not wanted[0] or serves(x.shape, weight.shape, stride):
        return extension.conv_stats_bwd(*arguments, wanted)
    dx, dscale, dshift, _ = _LIBRARY.conv_stats_bwd(*arguments, (True, False))
    return dx, dscale, dshift, extension.conv_stats_bwd(*arguments, (False, wanted[1]))[3]


def conv_affine(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: Stride,
    *rest: Any,
) -> Tensor:
    """`Composed.conv_affine`, in one call of oneDNN where there is one, or the extension's."""
    launchers: Any = _LIBRARY
    if serves(x.shape, weight.shape, stride, "packed_product" if extension.is_kept(weight) else "product"):
        launchers = extension
    elif onednn.serves(x.dtype, x.device):
        launchers = onednn
    return launchers.conv_affine(x, weight, scale, shift, residual, relu, stride, *rest)


def serves(input_shape: Sequence[int], weight_shape: Sequence[int], stride: Stride, use: str = "product") -> bool:
    """Whether the extension computes x (N, C_in, H, W) with weight (C_out, C_in, 3, 3); all was measured.

    Args:
        input_shape: Of x.
        weight_shape: Of the weight.
        stride: (stride_h, stride_w), each 1 or 2.
        use: ``"product"`` (forward, or input gradient), ``"packed_product"`` (forward with a weight that is kept
            packed) or ``"gradient"`` (of the weight).
    """
    if stride == (1, 1) and extension.winograd_serves(use, input_shape, weight_shape, 1):
        return True
    capability = extension.cpu_capability()
    if capability == "portable":
        return False
    batch, in_channels, height, width = input_shape
    if use == "gradient":
        return in_channels >= 16  # a vector of them
    pixels = ((height - 1) // stride[0] + 1) * ((width - 1) // stride[1] + 1)
    if capability == "avx2":  # whose few registers make sums slower than the library's, but where weights are the work
        return use == "packed_product" and stride == (1, 1) and batch * pixels <= 64
    # For a single pixel most of the weight is packed in vain.
    return use == "packed_product" or pixels > 1
