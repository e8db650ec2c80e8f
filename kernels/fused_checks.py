"""Checks of the calls of fused.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks
from .config import Affine
from .ops import is_dense, is_dense_weight


def why_not_conv_stats(
    weight_shape: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> str | None:
    """Why `conv_stats` and `conv_affine` do not take a convolution, or None if they do."""
    kernel_size = tuple(weight_shape[2:])
    if len(kernel_size) != 2 or any(k % 2 == 0 for k in kernel_size):
        return f"the kernel is {'x'.join(map(str, kernel_size))}; both sides must be odd"
    if checks.pair(dilation) != (1, 1):
        return f"dilation is {dilation}, not 1"
    centred = tuple(k // 2 for k in kernel_size)
    if isinstance(padding, str) or checks.pair(padding) != centred:
        return f"padding is {padding!r}, not {centred}"
    if any(s not in (1, 2) for s in checks.pair(stride)):
        return f"stride is {stride}, neither 1 nor 2"
    return None


def transformed() -> bool:
    """Whether the formula in plain PyTorch must serve: inside torch.func transforms and forward-mode AD.

    Transforms know one layout; results are then dense in NCHW.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def check_activation(name: str, x: Tensor) -> None:
    """Refuse an input of other dimensions or dtypes than fused operators take."""
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"{name}: expected an input (N, C, H, W) without empty dimensions, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point input, got {x.dtype}; convert it with .to(dtype)")


_Dims = tuple[tuple[int, int], int, bool]
# Of convolutions that were right: most calls repeat one.
_right: dict[tuple[Any, ...], _Dims] = {}


def check_conv(
    name: str, x: Tensor, weight: Tensor, stride: int | Sequence[int], groups: int, casts: bool = False
) -> _Dims:
    """Strides, groups and whether the result is channels_last; ``casts``: the weight is yet to be cast to x's dtype."""
    integers = type(groups) is int and isinstance(stride, tuple) and all(type(each) is int for each in stride)
    plain = type(x) is Tensor and isinstance(weight, Tensor)  # whose shapes are not symbolic, so have a hash
    strided = plain and x.layout is weight.layout is torch.strided
    if not (integers and strided) or torch.compiler.is_compiling():
        return _checked_conv(name, x, weight, stride, groups, casts)
    key = (
        *(stride, groups, casts, x.shape, x.stride(), x.dtype, x.device),
        *(weight.shape, weight.stride(), weight.dtype, weight.device),
    )
    if (dims := _right.get(key)) is None:
        if len(_right) > 10_000:  # images of every size
            _right.clear()
        dims = _right[key] = _checked_conv(name, x, weight, stride, groups, casts)
    return dims


def _checked_conv(name: str, x: Tensor, weight: Tensor, stride: int | Sequence[int], groups: int, casts: bool) -> _Dims:
    weight = weight.to(x.dtype) if casts else weight
    padding = tuple(k // 2 for k in weight.shape[2:])
    if message := checks.invalid_conv2d(x, weight, None, stride, padding or 0, 1, groups):
        raise ValueError(f"{name}: {message}")
    check_activation(name, x)
    if reason := why_not_conv_stats(weight.shape, stride, padding, 1, groups):
        raise ValueError(f"{name}: {reason}; use F.conv2d and F.batch_norm")
    height, width = checks.pair(stride)
    return (height, width), groups, checks.output_channels_last(x, weight)


def check_affine(name: str, x: Tensor, affine: Affine | None, prefix: str = "") -> Any:
    """The three vectors, the center cut off from autograd; three times None for None."""
    if affine is None:
        return None, None, None
    center, scale, shift = affine
    dtype, shape = checks.vector_dtype(x.dtype), (x.shape[1],)
    for vector_name, vector in (("center", center), ("scale", scale), ("shift", shift)):
        if vector is not None:
            check_vector(name, prefix + vector_name, vector, shape, dtype, x.device)
    if center is not None and (center.requires_grad or transformed()):
        center = center.detach()
    return center, scale, shift


def check_vector(
    name: str, vector_name: str, vector: Tensor, shape: tuple[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse a vector over the channels that is not what it should be."""
    if vector.shape != shape or vector.dtype != dtype or vector.device != device:
        raise ValueError(
            f"{name}: expected {vector_name} of shape {shape}, {dtype}, on {device}, got "
            f"{tuple(vector.shape)}, {vector.dtype}, on {vector.device}"
        )


def check_parameters(
    name: str, gamma: Tensor | None, beta: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> None:
    """Refuse a batch norm's parameters that are not one value per channel, or elsewhere."""
    for parameter_name, parameter in (("gamma", gamma), ("beta", beta)):
        if parameter is None:
            continue
        if parameter.shape != shape:
            raise ValueError(f"{name}: expected {parameter_name} of shape {tuple(shape)}, got {tuple(parameter.shape)}")
        if parameter.device != device:
            raise ValueError(
                f"{name}: expected {parameter_name} on {device}, got {parameter.device}; move it with .to(device)"
            )


def as_taken(x, weight, scale, shift, residual, shape, channels_last) -> bool:
    """Whether launchers of ``conv_affine`` take these tensors as they are given."""
    like_result = residual is None or (
        tuple(residual.shape) == shape and residual.dtype == x.dtype and is_dense(residual, channels_last)
    )
    vectors = all(vector is None or vector.is_contiguous() for vector in (scale, shift))
    return like_result and vectors and is_dense(x, channels_last) and is_dense_weight(weight)


def like_result(name: str, residual: Tensor, like: Tensor, shape: Sequence[int]) -> Tensor:
    """The residual, of the dtype and shape of the result it is added to."""
    if residual.device != like.device:
        raise ValueError(f"{name}: expected residual on {like.device}, got {residual.device}; move it with .to(device)")
    try:
        residual = residual.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected residual of a shape that expands to {tuple(shape)}, got {tuple(residual.shape)}"
        ) from None
    return residual.to(like.dtype)
