"""Convolution, batch norm, ReLU and residual sum as fused operators: normalised activations never reach memory.

A convolution's raw output z is written once. Its batch norm is an *affine*, three vectors over the channels,

    affine(v) = scale * (v - center) + shift      center = mean, scale = gamma * rsqrt(var + eps), shift = beta

which the next convolution applies on load, with ReLU after it (`conv_stats`), or the end of the block
(`affine_add_relu`). The statistics are outputs of the convolution, and differentiable ones: they send

    dz_i += dmean / count + 2 * dvar * (z_i - mean) / count

into the convolution's own backward, where it is applied on load too; batch norm needs no backward pass of its own. The
center is a constant to autograd: `bn_affine` returns the mean's gradient, -scale * dshift, by way of the shift.

The operators under these functions: fused_conv_ops.py, fused_ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import calls, checks, dispatch, fused_conv_ops, fused_ops, reference
from .config import Affine
from .fused_checks import (
    as_taken,
    check_activation,
    check_affine,
    check_conv,
    check_parameters,
    check_vector,
    like_result,
    transformed,
)
from .ops import is_dense


def conv_stats(
    x: Tensor,
    weight: Tensor,
    affine: Affine | None = None,
    stride: int | Sequence[int] = 1,
    groups: int = 1,
    stats: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Convolve relu(affine(x)), or x itself, and take the statistics of the result.

    The kernel is centred: odd sides k, padding k // 2, dilation 1. 3x3 convolutions (grouped) and 1x1 convolutions
    have kernels that fuse all of it; others are composed of PyTorch's convolution and separate passes.

    Differentiable in ``x``, ``weight`` and the affine's scale and shift (not its center), by way of all three results;
    any number of times. Accumulates in float32. Deterministic. Under autocast ``x`` and ``weight`` are cast as
    ``F.conv2d`` casts them.

    Args:
        x: (N, C_in, H, W), in any memory layout; float32, float16, bfloat16 or float64.
        weight: (C_out, C_in / groups, k, k), of x's dtype and device.
        affine: (center or None, scale, shift), each (C_in,), float32 (float64 for float64 x): see `bn_affine`.
        stride: One or two integers, each 1 or 2.
        groups: Number of groups.
        stats: Whether to take the statistics.

    Returns:
        z (N, C_out, H_out, W_out), of x's dtype, channels_last if x or weight is; the mean and the biased variance of
        its channels over N, H and W, (C_out,), float32 (float64), or None and None.

    Raises:
        ValueError: If shapes, dtypes, devices or the convolution's arguments do not fit.
        BackendError: If a forced backend cannot serve the call.

    Source: Ioffe & Szegedy, "Batch Normalization", 2015, algorithm 1; Chan, Golub & LeVeque, "Updating formulae and a
        pairwise algorithm for computing sample variances", 1979.
    """
    x, weight = checks.autocast(x, weight)
    dims = check_conv("conv_stats", x, weight, stride, groups)
    center, scale, shift = check_affine("conv_stats", x, affine)
    if transformed():
        strides, groups, _ = dims
        return fused_conv_ops.conv_stats_formula(x, center, scale, shift, weight, strides, groups, False, stats)
    z, mean, var = fused_conv_ops.CONV_STATS(x, center, scale, shift, weight, *dims, stats)
    return (z, mean, var) if stats else (z, None, None)


def conv_norm(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    affine: Affine | None = None,
    stride: int | Sequence[int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Affine]:
    """Convolve relu(affine(x)), or x itself, and make the affine that is a batch norm of the result.

    `conv_stats` and `bn_affine` in one, for statistics that are used as they are. Differentiable in ``x``, ``weight``,
    ``gamma``, ``beta`` and the affine's scale and shift, any number of times, by way of z and of the new affine; the
    statistics are constants.

    Args:
        x: As of `conv_stats`, like the next.
        weight: The weight.
        gamma: (C_out,), any floating-point dtype, or None for 1: batch norm's weight.
        beta: (C_out,), or None for 0: batch norm's bias.
        eps: Added to the variance.
        affine: As of `conv_stats`, like the next two.
        stride: The stride.
        groups: Number of groups.

    Returns:
        z, mean and biased variance as of `conv_stats`, and (center, scale, shift) as of `bn_affine`.

    Raises:
        ValueError: If shapes, dtypes, devices or the convolution's arguments do not fit.
        BackendError: If a forced backend cannot serve the call.
    """
    name = "conv_norm"
    x, weight = checks.autocast(x, weight)
    dims = check_conv(name, x, weight, stride, groups)
    center, scale, shift = check_affine(name, x, affine)
    check_parameters(name, gamma, beta, (weight.shape[0],), x.device)
    if transformed():
        z, mean, var = conv_stats(x, weight, affine, stride, groups)
        return z, mean.detach(), var.detach(), bn_affine(mean, var, gamma, beta, eps)  # type: ignore[arg-type, union-attr]
    z, mean, var, *new = fused_conv_ops.CONV_NORM(x, center, scale, shift, weight, gamma, beta, eps, *dims)
    return z, mean, var, (mean, *new)


def conv_affine(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None = None,
    relu: bool = True,
    stride: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Compute relu(scale * conv(x, weight) + shift + residual): a convolution with the batch norm behind it folded.

    For inference. Differentiable too, then made of `conv_stats` and separate passes. Convolutions as in `conv_stats`.

    Args:
        x: (N, C_in, H, W), in any memory layout.
        weight: (C_out, C_in / groups, k, k), of x's dtype and device.
        scale: (C_out,), float32 (float64 for float64 x), or None for 1.
        shift: (C_out,), like scale, or None for 0.
        residual: Of the result's shape, or one that expands to it; any floating-point dtype, any layout.
        relu: Whether to apply ReLU at the end.
        stride: One or two integers, each 1 or 2.
        groups: Number of groups.

    Returns:
        (N, C_out, H_out, W_out), of x's dtype, channels_last if x or weight is; rounded once.

    Raises:
        ValueError: If shapes, dtypes, devices or the convolution's arguments do not fit.
        BackendError: If a forced backend cannot serve the call.
    """
    name = "conv_affine"
    key = calls.key_of(name, (x, weight, scale, shift, residual), (int(relu), stride, groups))
    if (y := calls.serve(key, x, weight, scale, shift, residual)) is not None:
        return y
    x, weight = checks.autocast(x, weight)
    strides, groups, channels_last = check_conv(name, x, weight, stride, groups)
    out_channels = weight.shape[0]
    for vector_name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None:
            check_vector(name, vector_name, vector, (out_channels,), checks.vector_dtype(x.dtype), x.device)
    shape = (x.shape[0], out_channels, *checks.output_size(x.shape[2:], strides))
    given = residual
    if residual is not None:
        residual = like_result(name, residual, x, shape)
    tensors = (x, weight, scale, shift, residual)
    if not transformed() and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        if key is not None and as_taken(x, weight, scale, shift, given, shape, channels_last):
            problem = ("fwd", x.shape, weight.shape, strides, groups, x.dtype, x.device, channels_last)
            launcher = dispatch.affine_launchers(*problem).conv_affine
            calls.remember(key, launcher, relu, strides, groups, channels_last)
        return fused_conv_ops.CONV_AFFINE(x, weight, scale, shift, residual, relu, strides, groups, channels_last)
    z, _, _ = conv_stats(x, weight, None, strides, groups, stats=False)
    affine = reference.default_affine(scale, shift, z)
    if relu:
        return affine_add_relu(z, affine, residual)
    return reference.affine_add(z, affine, residual, None, channels_last)


def keep_packed(weight: Tensor, x: Tensor, stride: int | Sequence[int] = 1, groups: int = 1) -> bool:
    """Let `conv_affine` keep what its kernel makes of a weight before multiplying, where there is one that gains by it.

    Takes memory like that of the weight in float32 (16/9 as much by Winograd's algorithm; half where bfloat16 is
    multiplied as it is), from the first call on that gains by it, as long as this very tensor object lives; a write to
    it undoes it.

    Args:
        weight: (C_out, C_in / groups, k, k), which `conv_affine` will be called with.
        x: A tensor of the dtype, device and memory format that it will be called with.
        stride: One or two integers, each 1 or 2.
        groups: Number of groups.

    Returns:
        Whether there is such a kernel. The CPU's are: they compute all but dense convolutions in NCHW, which are a
        library's.
    """
    if x.device.type != "cpu" or weight.dtype != x.dtype or weight.is_inference():  # which do not tell of writes
        return False
    if torch.is_autocast_enabled("cpu"):  # `conv_affine` will see another tensor
        return False
    shape = (1, weight.shape[1] * groups, 1, 1)
    channels_last = checks.is_channels_last(x)
    problem = ("fwd", shape, weight.shape, checks.pair(stride), groups, x.dtype, x.device, channels_last)
    launchers = dispatch.affine_launchers(*problem)
    if not hasattr(launchers, "keep_packed"):
        return False
    launchers.keep_packed(weight)
    return True


def prefers_channels_last(x: Tensor) -> bool:
    """Whether convolutions that `gains_in_channels_last` are enough faster there to be worth turning an NCHW tensor.

    Those on the CPU are, in the dtypes that it has kernels of its own for. False for a tensor that is not dense, empty,
    or in channels_last as well.

    Args:
        x: Anything; True only for (N, C, H, W).
    """
    if x.dim() != 4 or x.device.type != "cpu" or not x.is_contiguous() or is_dense(x, True) or 0 in x.shape:
        return False
    autocast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    return _fuses_1x1_in_channels_last(torch.get_autocast_dtype("cpu") if autocast else x.dtype)


def _fuses_1x1_in_channels_last(dtype: torch.dtype) -> bool:
    problem = ("fwd", (1, 16, 1, 1), (16, 16, 1, 1), (1, 1), 1, dtype, torch.device("cpu"), True)
    return hasattr(dispatch.fused_launchers(*problem), "keep_packed")


# As torch.compiler.assume_constant_result does, without importing the compiler: not to be traced into.
_fuses_1x1_in_channels_last._dynamo_marked_constant = True  # type: ignore[attr-defined]


def gains_in_channels_last(weight_shape: Sequence[int], stride: tuple[int, ...], groups: int) -> bool:
    """Whether CPUs have a kernel in channels_last only for a convolution in float32, if its images are large enough.

    They have for dense 1x1 convolutions; for 3x3 ones with stride 1 and as many channels per group as Winograd's
    algorithm is for; and with AVX-512 for all dense 3x3 ones.

    Args:
        weight_shape: (C_out, C_in / groups, k, k).
        stride: (stride_h, stride_w).
        groups: Number of groups.
    """
    if tuple(weight_shape[2:]) == (1, 1):
        return groups == 1
    if tuple(weight_shape[2:]) != checks.KERNEL_SIZE:
        return False
    large = (64, weight_shape[1] * groups, 64, 64)
    place = (stride, groups, torch.float32, torch.device("cpu"), True)
    return dispatch.gains_in_channels_last(dispatch.problem_of("fwd", large, weight_shape, *place))


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    """The tensor itself if it is dense in a layout, else a copy that is.

    ``x.contiguous`` with a kernel for the CPU. Differentiable any number of times; the gradient is passed on as it
    comes.

    Args:
        x: (N, C, H, W), any dtype, device and layout.
        channels_last: Whether to channels_last, or to NCHW.

    Raises:
        ValueError: If ``x`` does not have four dimensions.
    """
    if x.dim() != 4:
        raise ValueError(f"laid_out: expected x (N, C, H, W), got {tuple(x.shape)}")
    if is_dense(x, channels_last):
        return x
    if 0 in x.shape or not x.is_floating_point() or transformed():
        return x.contiguous(memory_format=checks.memory_format(channels_last))
    return fused_ops.LAID_OUT(x, channels_last)


def bn_affine(mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Affine:
    """Make the affine that is a batch norm: center = mean, scale = gamma * rsqrt(var + eps), shift = beta.

    Differentiable in all tensors, by way of scale and shift; the center comes back detached. (With c the mean's value,
    the shift is beta - (mean - c) * scale: equal to beta, with the mean's gradient.)

    Args:
        mean: (C,), float32 or float64.
        var: (C,), like mean; the biased variance.
        gamma: (C,), any floating-point dtype, or None for 1: batch norm's weight.
        beta: (C,), or None for 0: batch norm's bias.
        eps: Added to the variance.

    Returns:
        (center, scale, shift), each (C,), of mean's dtype.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    if mean.dim() != 1 or mean.shape != var.shape or mean.dtype != var.dtype or mean.device != var.device:
        raise ValueError(
            f"bn_affine: expected mean and var of one shape (C,), one dtype and one device, got {tuple(mean.shape)} "
            f"{mean.dtype} on {mean.device} and {tuple(var.shape)} {var.dtype} on {var.device}"
        )
    check_parameters("bn_affine", gamma, beta, mean.shape, mean.device)
    center = mean.detach()
    if transformed():
        return center, *fused_ops.bn_affine_formula(mean, var, gamma, beta, eps)
    return center, *fused_ops.BN_AFFINE(mean, var, gamma, beta, eps)


def affine_add_relu(
    z: Tensor,
    affine: Affine,
    residual: Tensor | None = None,
    residual_affine: Affine | None = None,
    keeps_result: bool = True,
) -> Tensor:
    """Compute relu(affine(z) + residual), the end of a residual block, in one pass.

    Differentiable in ``z``, ``residual`` and the affines' scales and shifts, any number of times.

    Args:
        z: (N, C, H, W), in any memory layout; float32, float16, bfloat16 or float64.
        affine: (center or None, scale, shift), each (C,), float32 (float64 for float64 z).
        residual: Of z's shape, or one that expands to it; any floating-point dtype, any layout.
        residual_affine: An affine for the residual, where it is a raw convolution output too.
        keeps_result: Whether backward keeps the result, whose signs it needs. Otherwise it keeps the residual and
            computes the result again: for callers that keep the residual anyway, and not the result.

    Returns:
        (N, C, H, W), of z's dtype and layout. Computed in float32, rounded once.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit.
    """
    name = "affine_add_relu"
    check_activation(name, z)
    center, scale, shift = check_affine(name, z, affine)
    if residual_affine is not None and residual is None:
        raise ValueError(f"{name}: expected a residual with residual_affine, got None; leave out both, or give both")
    if residual is not None:
        residual = like_result(name, residual, z, z.shape)
    vectors = check_affine(name, z, residual_affine, "residual_")
    if transformed():
        other = None if residual_affine is None else vectors
        return reference.affine_add_relu(z, (center, scale, shift), residual, other, False)
    channels_last = checks.is_channels_last(z)
    return fused_ops.AFFINE_ADD_RELU(z, center, scale, shift, residual, *vectors, channels_last, keeps_result)


def affine_relu_max_pool(z: Tensor, affine: Affine) -> Tensor:
    """Pool relu(affine(z)) with a 3x3 window, stride 2 and padding 1: the end of ResNet's stem, in one pass.

    Ties and NaN as in ``F.max_pool2d``: of equal values the first in row-major order has the gradient; NaN wins.
    Differentiable in ``z`` and the affine's scale and shift, any number of times.

    Args:
        z: (N, C, H, W), in any memory layout; float32, float16, bfloat16 or float64.
        affine: (center or None, scale, shift), each (C,), float32 (float64 for float64 z).

    Returns:
        (N, C, (H + 1) // 2, (W + 1) // 2), of z's dtype and layout.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit.
    """
    name = "affine_relu_max_pool"
    check_activation(name, z)
    affine = check_affine(name, z, affine)
    if transformed():
        return reference.affine_relu_max_pool(z, affine, False, False)[0]
    channels_last = checks.is_channels_last(z)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (z, *affine))
    return fused_ops.POOL(z, *affine, channels_last, wanted)[0]
