"""Every pass in plain PyTorch: the oracle in tests, and the backend named ``torch``.

Same signatures as the Triton and C++ launchers: 3x3, padding 1, dilation 1, ``stride`` = (h, w), activations
and the weight's gradient dense in the layout that ``channels_last`` names, the weight dense in either. Any
dtype that PyTorch's convolution takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import memory_format

Stride = tuple[int, int]


def fwd(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Stride, groups: int, channels_last: bool) -> Tensor:
    """Convolve ``x`` (N, C_in, H, W) with ``weight`` (C_out, C_in/groups, 3, 3)."""
    y = torch.ops.aten.convolution(x, weight, bias, stride, (1, 1), (1, 1), False, (0, 0), groups)
    return y.contiguous(memory_format=memory_format(channels_last))


def dgrad(
    grad: Tensor,
    weight: Tensor,
    input_size: tuple[int, int],
    stride: Stride,
    groups: int,
    channels_last: bool,
) -> Tensor:
    """Gradient of the input, (N, C_in, H, W) with ``input_size`` = (H, W)."""
    dtype = grad.dtype
    grad, weight = _wide_on_cpu(grad, weight)
    # Only the shape of x matters here. PyTorch picks the layout it works in by x and the weight.
    x = grad.new_empty(1).expand(grad.shape[0], weight.shape[1] * groups, *input_size)
    weight = weight.contiguous(memory_format=memory_format(channels_last))
    dx, _, _ = _backward(grad, x, weight, stride, groups, (True, False, False))
    return dx.to(dtype).contiguous(memory_format=memory_format(channels_last))


def wgrad(grad: Tensor, x: Tensor, stride: Stride, groups: int, channels_last: bool) -> Tensor:
    """Gradient of the weight, (C_out, C_in/groups, 3, 3)."""
    dtype = grad.dtype
    grad, x = _wide_on_cpu(grad, x)
    weight = grad.new_empty(1).expand(grad.shape[1], x.shape[1] // groups, 3, 3)
    _, dw, _ = _backward(grad, x, weight, stride, groups, (False, True, False))
    return dw.to(dtype).contiguous(memory_format=memory_format(channels_last))


def _wide_on_cpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    """float32 for 16-bit tensors on the CPU.

    There, PyTorch's own 16-bit backward sums float16 in float16 (dgrad), and leaves bfloat16 weight gradients of taps
    that meet no pixel (an image of one row or column at stride 2) uninitialised; seen in 2.13.
    """
    narrow = tensors[0].device.type == "cpu" and tensors[0].dtype in (torch.float16, torch.bfloat16)
    return tuple(tensor.float() for tensor in tensors) if narrow else tensors


def _backward(grad, x, weight, stride, groups, mask):
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, (1, 1), (1, 1), False, (0, 0), groups, mask
    )
