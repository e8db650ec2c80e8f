"""Every launcher in plain PyTorch: oracle of the tests, backend named ``torch``, and formula for double backward.

Same signatures as the Triton and C++ launchers. The convolutions here are 3x3 with padding 1 or 1x1 without padding,
dilation 1, ``stride`` = (h, w); activations and the weight's gradient are dense in the layout that ``channels_last``
names, the weight dense in either. Any dtype that PyTorch's convolution takes.

An *affine* is three vectors over the channels, (center or None, scale, shift), float32 (float64 for float64 tensors):
affine(v) = scale * (v - center) + shift. `composed.py` makes the fused convolutions out of these parts.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import memory_format, vector_dtype
from .config import Affine

Stride = tuple[int, int]

_ALL_BUT_CHANNELS = (0, 2, 3)


def fwd(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Stride, groups: int, channels_last: bool) -> Tensor:
    """Convolve ``x`` (N, C_in, H, W) with ``weight`` (C_out, C_in/groups, k, k)."""
    y = torch.convolution(x, weight, bias, stride, _padding(weight), (1, 1), False, (0, 0), groups)
    return laid_out(y, channels_last)


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
    grad, weight = _for_backward(grad, weight, kernel_size=weight.shape[2], stride=stride)
    # Of x only the shape matters, and the layout, by which PyTorch picks the one it works in: nobody reads this memory.
    layout = memory_format(channels_last)
    size = (grad.shape[0], weight.shape[1] * groups, *input_size)
    x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=layout)
    weight = weight.contiguous(memory_format=layout)
    dx, _, _ = _backward(grad, x, weight, stride, groups, (True, False, False))
    return laid_out(dx.to(dtype), channels_last)


def wgrad(grad: Tensor, x: Tensor, stride: Stride, groups: int, channels_last: bool) -> Tensor:
    """Gradient of the 3x3 weight, (C_out, C_in/groups, 3, 3)."""
    dtype = grad.dtype
    grad, x = _for_backward(grad, x, kernel_size=3, stride=stride)
    weight = grad.new_empty(1).expand(grad.shape[1], x.shape[1] // groups, 3, 3)
    _, dw, _ = _backward(grad, x, weight, stride, groups, (False, True, False))
    return laid_out(dw.to(dtype), channels_last)


def bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Stride,
    groups: int,
    channels_last: bool,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``x`` and ``weight`` in one call, each None if it is not ``wanted``."""
    dtype = grad.dtype
    grad, x, weight = _for_backward(grad, x, weight, kernel_size=weight.shape[2], stride=stride)
    weight = weight.contiguous(memory_format=memory_format(channels_last))
    gradients = _backward(grad, x, weight, stride, groups, (*wanted, False))[:2]
    dx, dw = (laid_out(g.to(dtype), channels_last) if w else None for g, w in zip(gradients, wanted, strict=True))
    return dx, dw


def statistics(z: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of ``z`` (N, C, H, W)."""
    var, mean = torch.var_mean(_wide(z), _ALL_BUT_CHANNELS, correction=0)
    return mean, var


def statistics_bwd(dz: Tensor, z: Tensor, mean: Tensor, dmean: Tensor, dvar: Tensor, channels_last: bool) -> Tensor:
    """Gradient of ``z`` from its own, ``dz``, and those of its statistics."""
    count = z.numel() // z.shape[1]
    g = _wide(dz) + _per_channel(dmean / count) + _per_channel(dvar * (2 / count)) * (_wide(z) - _per_channel(mean))
    return _stored(g, z, channels_last)


def affine_add_relu(
    z: Tensor, affine: Affine, residual: Tensor | None, residual_affine: Affine | None, channels_last: bool
) -> Tensor:
    """Compute relu(affine(z) + residual), the residual through an affine of its own if there is one."""
    return _stored(torch.relu(_affine_sum(z, affine, residual, residual_affine)), z, channels_last)


def affine_add(
    z: Tensor, affine: Affine, residual: Tensor | None, residual_affine: Affine | None, channels_last: bool
) -> Tensor:
    """Compute affine(z) + residual, the residual through an affine of its own if there is one."""
    return _stored(_affine_sum(z, affine, residual, residual_affine), z, channels_last)


def default_affine(scale: Tensor | None, shift: Tensor | None, z: Tensor) -> Affine:
    """The affine of ``z`` (N, C, H, W) with 1 for a scale and 0 for a shift that are None."""
    if scale is None:
        scale = z.new_ones(z.shape[1], dtype=vector_dtype(z.dtype))
    return None, scale, torch.zeros_like(scale) if shift is None else shift


def affine_add_relu_bwd(
    dout: Tensor,
    out: Tensor | None,
    z: Tensor,
    affine: Affine,
    residual: Tensor | None,
    residual_affine: Affine | None,
    channels_last: bool,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of z, the residual, scale, shift and the residual's scale; ``wanted``: z, residual, the vectors.

    ``out`` None, where there is no residual, stands for what `affine_add_relu` makes of ``z``. ``residual`` is there
    only with an affine of its own. The residual's shift has the gradient of the shift.
    """
    if out is None:
        out = affine_add_relu(z, affine, None, None, channels_last)
    t = _passed(dout, out)
    dz = dresidual = dscale = dshift = dresidual_scale = None
    if wanted[0]:
        dz = _stored(t * _per_channel(affine[1]), z, channels_last)
    if wanted[1]:
        dresidual = _stored(t if residual_affine is None else t * _per_channel(residual_affine[1]), z, channels_last)
    if wanted[2]:
        dshift = t.sum(_ALL_BUT_CHANNELS)
        dscale = (t * _centered(z, affine[0])).sum(_ALL_BUT_CHANNELS)
        if residual is not None and residual_affine is not None:
            dresidual_scale = (t * _centered(residual, residual_affine[0])).sum(_ALL_BUT_CHANNELS)
    return dz, dresidual, dscale, dshift, dresidual_scale


def affine_mean(z: Tensor, affine: Affine | None, relu: bool, channels_last: bool) -> Tensor:
    """Mean (N, C, 1, 1) of each image's channels of act(affine(z)); act is ReLU or nothing, no affine the identity."""
    return _activated(z, affine, relu).mean((2, 3), keepdim=True)


def affine_gate(
    z: Tensor,
    affine: Affine | None,
    relu: bool,
    gate: Tensor,
    residual: Tensor | None,
    residual_affine: Affine | None,
    channels_last: bool,
) -> Tensor:
    """Compute gate * act(affine(z)), with a residual relu(that + residual); ``gate``: (N, C, 1, 1)."""
    out = gate * _activated(z, affine, relu)
    if residual is not None:
        out = torch.relu(out + _apply(residual_affine, residual))
    return _stored(out, z, channels_last)


def affine_gate_bwd(
    dout: Tensor,
    out: Tensor | None,
    z: Tensor,
    affine: Affine | None,
    relu: bool,
    residual: Tensor | None,
    residual_affine: Affine | None,
    channels_last: bool,
    wants_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the gate, the residual, and its scale and shift; of the rest: `gated_affine_bwd`.

    ``out``: there with a residual. ``residual`` is there only with an affine of its own.
    """
    t = _passed(dout, out)
    dgate = (t * _activated(z, affine, relu)).sum((2, 3), keepdim=True)
    dresidual = dscale = dshift = None
    if wants_residual:
        dresidual = _stored(t if residual_affine is None else t * _per_channel(residual_affine[1]), z, channels_last)
    if residual is not None and residual_affine is not None:
        dshift = t.sum(_ALL_BUT_CHANNELS)
        dscale = (t * _centered(residual, residual_affine[0])).sum(_ALL_BUT_CHANNELS)
    return dgate, dresidual, dscale, dshift


def gated_affine_bwd(
    z: Tensor,
    affine: Affine | None,
    relu: bool,
    dout: Tensor | None,
    out: Tensor | None,
    gate: Tensor | None,
    added: Tensor | None,
    channels_last: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of z, scale and shift, where that of act(affine(z)) is gate * dout + added.

    ``dout`` and ``gate``: of `affine_gate`, whose result is ``out`` with a residual, or None; ``added``: (N, C, 1, 1),
    a pixel's share of a mean's gradient, or None.
    """
    t = torch.zeros_like(_wide(z)) if dout is None or gate is None else gate * _passed(dout, out)
    if added is not None:
        t = t + added
    if relu:
        t = t.masked_fill(_apply(affine, z).to(z.dtype) <= 0, 0)
    if affine is None:
        return _stored(t, z, channels_last), None, None
    dscale = (t * _centered(z, affine[0])).sum(_ALL_BUT_CHANNELS)
    return _stored(t * _per_channel(affine[1]), z, channels_last), dscale, t.sum(_ALL_BUT_CHANNELS)


def bn_affine(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Make scale and shift of the affine, centred at ``mean``, that is a batch norm with these statistics."""
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = scale * gamma.to(var.dtype)
    # A copy: an operator's result may not be its argument.
    shift = torch.zeros_like(mean) if beta is None else beta.to(mean.dtype, copy=True)
    return scale, shift


def bn_affine_bwd(
    dscale: Tensor, dshift: Tensor, var: Tensor, gamma: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of mean, var, gamma and beta; the mean's, since the affine is centred there, by way of the shift."""
    rstd = torch.rsqrt(var + eps)
    scale = rstd if gamma is None else rstd * gamma.to(var.dtype)
    dmean, dvar = -scale * dshift, dscale * scale * rstd.square() * -0.5
    if gamma is None:
        return dmean, dvar, None, None
    return dmean, dvar, (dscale * rstd).to(gamma.dtype), dshift.to(gamma.dtype, copy=True)


def affine_relu_max_pool(z: Tensor, affine: Affine, channels_last: bool, taps: bool) -> tuple[Tensor, Tensor | None]:
    """Pool relu(affine(z)) (3x3, stride 2, padding 1), with the place 3*kh + kw of each maximum in its window."""
    a = affine_add_relu(z, affine, None, None, channels_last)
    out, indices = F.max_pool2d(a, 3, 2, 1, return_indices=True)
    out = laid_out(out, channels_last)
    if not taps:
        return out, None
    width = z.shape[3]
    first_row = torch.arange(out.shape[2], device=z.device)[:, None] * 2 - 1
    first_column = torch.arange(out.shape[3], device=z.device) * 2 - 1
    picked = (indices // width - first_row) * 3 + indices % width - first_column
    return out, laid_out(picked.to(torch.uint8), channels_last)


def affine_relu_max_pool_bwd(
    dout: Tensor, taps: Tensor, z: Tensor, affine: Affine, channels_last: bool, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of z, scale and shift; ``wanted``: z, the vectors."""
    width = z.shape[3]
    row = torch.arange(dout.shape[2], device=z.device)[:, None] * 2 - 1 + taps // 3
    column = torch.arange(dout.shape[3], device=z.device) * 2 - 1 + taps % 3
    da = torch.zeros(z.shape, dtype=vector_dtype(z.dtype), device=z.device)
    da.flatten(2).scatter_add_(2, (row * width + column).flatten(2), _wide(dout).flatten(2))
    da = da.view(z.shape)
    dz, _, dscale, dshift, _ = affine_add_relu_bwd(
        da, None, z, affine, None, None, channels_last, (wanted[0], False, wanted[1])
    )
    return dz, dscale, dshift


def _per_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _centered(v: Tensor, center: Tensor | None) -> Tensor:
    return _wide(v) if center is None else _wide(v) - _per_channel(center)


def _apply(affine: Affine | None, v: Tensor) -> Tensor:
    if affine is None:
        return _wide(v)
    center, scale, shift = affine
    return _per_channel(scale) * _centered(v, center) + _per_channel(shift)


def _activated(z: Tensor, affine: Affine | None, relu: bool) -> Tensor:
    value = _apply(affine, z)
    return torch.relu(value) if relu else value


def _passed(dout: Tensor, out: Tensor | None) -> Tensor:
    """What ReLU lets through of the gradient of its result."""
    return _wide(dout) if out is None else _wide(dout).masked_fill(out <= 0, 0)


def _affine_sum(z: Tensor, affine: Affine, residual: Tensor | None, residual_affine: Affine | None) -> Tensor:
    total = _apply(affine, z)
    if residual is None:
        return total
    return total + _apply(residual_affine, residual)


def _stored(value: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    return laid_out(value.to(like.dtype), channels_last)


def laid_out(tensor: Tensor, channels_last: bool) -> Tensor:
    """The tensor dense in the given layout, with the very strides that a new one has."""
    tensor = tensor.contiguous(memory_format=memory_format(channels_last))
    _, channels, height, width = tensor.shape
    image = channels * height * width
    strides = (image, 1, width * channels, channels) if channels_last else (image, height * width, width, 1)
    # No view: results of operators may be written to.
    return tensor if tensor.stride() == strides else tensor.clone(memory_format=memory_format(channels_last))


def _padding(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2] // 2, weight.shape[3] // 2


def _for_backward(grad: Tensor, *others: Tensor, kernel_size: int, stride: Stride) -> tuple[Tensor, ...]:
    """The operands of PyTorch's backward: on the CPU in float32 where it is not right in 16 bits.

    There, it sums float16 in float16 (dgrad), bfloat16 only where oneDNN takes it in float32, and leaves bfloat16
    weight gradients uninitialised: of taps that meet no pixel (grad has one row or column), and of 1x1 convolutions
    with a stride, where it also writes past their end; seen in 2.13.
    """
    tensors = (grad, *others)
    if grad.device.type != "cpu":
        return tensors
    right = stride == (1, 1) if kernel_size == 1 else min(grad.shape[2:]) > 1
    if right and grad.dtype == torch.bfloat16 and torch.backends.mkldnn.enabled and onednn_takes(grad.dtype):
        return tensors
    return tuple(_wide(tensor) for tensor in tensors)


@functools.cache
def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether PyTorch's convolutions in ``dtype`` are oneDNN's on this CPU, and not its own, many times slower."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def _backward(grad, x, weight, stride, groups, mask):
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, _padding(weight), (1, 1), False, (0, 0), groups, mask
    )
