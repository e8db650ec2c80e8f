"""The 1x1 convolution of a few pixels as a matrix product, on CPUs in float32.

oneDNN's convolution brings the weight into a layout of its own in every call. Where a weight meets few pixels that
takes longer than the multiplication: a product of the matrices as they lie in memory, (pixels, C_in) @ (C_in, C_out),
does without. Measured on two cores (ResNeXt-50's last stage): 1.7 ms instead of 4.3 at 49 pixels; even from 200 on.

Launchers like those of `composed.py` and `reference.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import output_size
from .reference import Stride

_PIXELS = 256


def serves(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    groups: int,
    dtype: torch.dtype,
    device: torch.device,
    channels_last: bool,
) -> bool:
    """Whether a convolution is faster as a matrix product."""
    if device.type != "cpu" or dtype != torch.float32 or not channels_last:
        return False
    if tuple(weight_shape[2:]) != (1, 1) or groups != 1:
        return False
    height, width = output_size(input_shape[2:], stride)
    return input_shape[0] * height * width <= _PIXELS


def fwd(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Stride, groups: int, channels_last: bool) -> Tensor:
    """Convolve ``x`` (N, C_in, H, W) with ``weight`` (C_out, C_in, 1, 1)."""
    seen = x[:, :, :: stride[0], :: stride[1]]
    filters = weight.flatten(1).t()
    y = torch.mm(_rows(seen), filters) if bias is None else torch.addmm(bias, _rows(seen), filters)
    return _image(y, seen)


def bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Stride,
    groups: int,
    channels_last: bool,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``x`` and ``weight``, each None if it is not ``wanted``."""
    rows = _rows(grad)
    dx = dw = None
    if wanted[0]:
        dx = _image(torch.mm(rows, weight.flatten(1)), grad)
        if tuple(stride) != (1, 1):
            seen = dx
            dx = torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last).zero_()
            dx[:, :, :: stride[0], :: stride[1]] = seen
    if wanted[1]:
        dw = _image(torch.mm(rows.t(), _rows(x[:, :, :: stride[0], :: stride[1]])), weight)
    return dx, dw


def conv_affine(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: Stride,
    groups: int,
    channels_last: bool,
) -> Tensor:
    """Compute scale * conv(x, weight) + shift + residual, then ReLU if asked for."""
    if scale is None:
        y = fwd(x, weight, shift, stride, groups, channels_last)
    else:
        y = fwd(x, weight, None, stride, groups, channels_last).mul_(scale[:, None, None])
        if shift is not None:
            y.add_(shift[:, None, None])
    if residual is not None:
        y.add_(residual)
    return y.relu_() if relu else y


def _rows(image: Tensor) -> Tensor:
    """(pixels, C) of (N, C, H, W) in channels_last: the same memory."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """(N, C, H, W) in channels_last, with N, H and W of ``like``: the same memory."""
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)
