"""Convolution, bias, residual sum and ReLU in one oneDNN call, as PyTorch exposes it: `conv_affine` on CPUs."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .reference import Stride, laid_out, onednn_takes


@functools.cache
def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN takes tensors of ``dtype`` on ``device``."""
    # 16-bit convolutions take 16-bit biases only: the shift would lose its digits.
    return device.type == "cpu" and dtype == torch.float32 and onednn_takes(dtype)


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
    """Compute scale * conv(x, weight) + shift + residual, then ReLU if asked for.

    oneDNN scales no outputs: the weight is scaled instead, in each call. Callers that can keep the product pass it as
    the weight, without a scale.
    """
    if scale is not None:
        weight = weight * scale[:, None, None, None]
    padding = [weight.shape[2] // 2, weight.shape[3] // 2]
    place = (padding, stride, [1, 1], groups)
    if residual is None:
        y = torch.ops.mkldnn._convolution_pointwise(x, weight, shift, *place, "relu" if relu else "none", [], None)
    else:
        after = "relu" if relu else None
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, weight, shift, *place, "add", 1.0, after, [], None
        )
    return laid_out(y, channels_last)
