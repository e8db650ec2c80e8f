"""What a call must look like: argument checks, their messages, and PyTorch's rule for the output's layout.

Checks return the message instead of raising it: `ops` lets PyTorch raise, so that the class is PyTorch's own, and puts
the message in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

KERNEL_SIZE = (3, 3)


def is_integer(value: object) -> bool:
    """Whether PyTorch takes ``value`` for an integer: numpy's and symbolic ones too, but no bool, float or Tensor."""
    if type(value) is int:
        return True
    return isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)


def pair(value: int | Sequence[int]) -> tuple[int, ...]:
    """(v, v) for an int or a sequence of one, as ``F.conv2d`` reads its size arguments."""
    if isinstance(value, int) or not isinstance(value, Sequence):
        return (value, value)
    return tuple(value) * 2 if len(value) == 1 else tuple(value)


def same_as_one(padding: str | int | Sequence[int], stride: tuple[int, ...], dilation: tuple[int, ...]) -> bool:
    """Whether ``padding`` pads a 3x3 kernel by 1 on every side ("same" does, at stride 1 and dilation 1)."""
    if isinstance(padding, str):
        return padding == "same" and stride == (1, 1) and dilation == (1, 1)
    return pair(padding) == (1, 1)


def is_channels_last(tensor: Tensor) -> bool:
    """PyTorch's own reading of a 4-D tensor's strides (``suggest_memory_format``), ambiguous shapes included.

    Slices of a channels_last tensor count as channels_last; where sizes of 1 leave both readings open, this decides as
    ``is_channels_last_strides_2d`` in c10/core/MemoryFormat.h does.
    """
    if tensor.dim() != 4 or tensor.stride(1) == 0:
        return False
    shape, strides = tensor.shape, tensor.stride()
    least = 0
    for dim in (1, 3, 2, 0):
        if shape[dim] == 0 or strides[dim] < least:
            return False
        if dim == 0 and least == strides[1]:
            return False
        least = strides[dim] * shape[dim] if shape[dim] > 1 else strides[dim]
    return True


def gradient_channels_last(weight: Tensor, channels_last: bool) -> bool:
    """Whether the gradient of a weight, dense in either layout, is made in channels_last: in the weight's own layout.

    In another autograd would copy it. A weight that is dense in both takes the layout of the images, ``channels_last``.
    """
    if weight.is_contiguous():
        return channels_last and weight.is_contiguous(memory_format=torch.channels_last)
    return True


def output_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether ``F.conv2d`` returns channels_last: if the input or the weight is, except on GPUs in float64."""
    if x.dtype == torch.float64 and x.device.type == "cuda":
        return False
    return is_channels_last(x) or is_channels_last(weight)


def memory_format(channels_last: bool) -> torch.memory_format:
    """The dense layout a flag stands for."""
    return torch.channels_last if channels_last else torch.contiguous_format


def vector_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of means, scales and other vectors over the channels of tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """What autocast makes of ``F.conv2d``'s tensors: floating-point ones other than float64 change dtype."""
    x = tensors[0]
    if not isinstance(x, Tensor) or x.device.type not in ("cpu", "cuda"):
        return tensors
    if not torch.is_autocast_enabled(x.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def invalid_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> str | None:
    """What is wrong with a call of ``grouped_conv2d``: "expected ..., got ...; fix", or None."""
    return (
        _invalid_tensors(x, weight, bias)
        or _invalid_sizes(stride, padding, dilation, groups)
        or _invalid_shapes(x, weight, bias, groups)
    )


def _invalid_tensors(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor):
            if name == "bias" and tensor is None:
                continue
            return f"expected {name} to be a Tensor, got {type(tensor).__name__}; convert it with torch.as_tensor"
        if tensor.dtype != x.dtype:
            return (
                f"expected {name} to have x's dtype {x.dtype}, got {tensor.dtype}; convert one of them with "
                ".to(dtype), or run under torch.autocast"
            )
        if tensor.device != x.device:
            return f"expected {name} on x's device {x.device}, got {tensor.device}; move one of them with .to(device)"
    return None


def _invalid_sizes(
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> str | None:
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if type(value) is int and value >= least:
            continue
        if isinstance(value, str):
            if name != "padding" or value not in ("same", "valid"):
                return f"expected {name} to be integers{' or same or valid' * (name == 'padding')}, got {value!r}"
            if value == "same" and pair(stride) != (1, 1):
                return f"expected stride 1 with padding 'same', got stride {stride}; give the padding as a number"
            continue
        sizes = pair(value)
        if len(sizes) != 2 or not all(is_integer(size) and size >= least for size in sizes):
            return f"expected {name} to be one or two integers >= {least}, got {value!r}"
    if not is_integer(groups) or groups < 1:
        return f"expected groups to be an integer >= 1, got {groups!r}"
    return None


def _invalid_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> str | None:
    if weight.dim() != 4:
        return f"expected weight of shape (C_out, C_in/groups, kernel_h, kernel_w), got {tuple(weight.shape)}"
    if x.dim() not in (3, 4):
        return f"expected x of shape (N, C, H, W) or (C, H, W), got {tuple(x.shape)}; add or remove dimensions"
    if weight.shape[0] % groups or weight.shape[0] < groups:
        return f"expected groups to divide C_out, got C_out={weight.shape[0]} (weight.shape[0]) and groups={groups}"
    if x.shape[-3] != weight.shape[1] * groups:
        return (
            f"expected x with weight.shape[1] * groups = {weight.shape[1]} * {groups} = {weight.shape[1] * groups} "
            f"channels, got {x.shape[-3]} (x has shape {tuple(x.shape)}); change groups or the weight's second size"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        return f"expected bias of shape ({weight.shape[0]},), one value per output channel, got {tuple(bias.shape)}"
    return None


def invalid_grad(grad: Tensor, expected: tuple[int, ...]) -> str | None:
    """What is wrong with an output gradient handed to dgrad or wgrad, or None."""
    if tuple(grad.shape) != expected:
        return f"expected grad of the convolution's output shape {expected}, got {tuple(grad.shape)}"
    return None


def output_size(size: Sequence[int], stride: Sequence[int]) -> tuple[int, int]:
    """(H, W) of a 3x3, padding 1, dilation 1 convolution's output: floor((size - 1) / stride) + 1."""
    return (size[0] - 1) // stride[0] + 1, (size[1] - 1) // stride[1] + 1
