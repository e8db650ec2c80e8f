"""Channel attention in Triton: the mean of an activation, its gate, and their gradients.

    affine_mean        mean over H, W of act(affine(z)), act being ReLU or nothing
    affine_gate        out = gate * act(affine(z)), with a residual relu(that + residual)
    affine_gate_bwd    t = dout where out, if there is one, is above 0;  dresidual = its scale * t;
                       dgate = sum over H, W of t * act(affine(z));  the residual's dshift = sum t, dscale likewise
    gated_affine_bwd   t = gate * (dout as above) + added, where act passes it;  dz = scale * t;  dshift = sum t;
                       dscale = sum t * (z - center)

All walk over the pixels and are limited by memory: they read every operand and write every result once. A program owns
BLOCK_C channels of one image and a share of its blocks of BLOCK_M pixels, in either layout; it loads their vectors once
and keeps sums in registers until the end, as in batch_norm.py. Sums over an image are rows of partials of all images'
channels, sums over the batch rows of partials of channels; statistics.py adds either up in order.

Launchers take tensors as batch_norm.py's do; what belongs to a channel of an image is (N, C, 1, 1), float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_kernels import load_affine, relu
from .config import NO_AFFINE, Affine, elementwise_config
from .grouped_conv_tiles import aligned
from .launch import Launch, empty, num_sms
from .statistics import sum_partials


@triton.jit
def own_part(pixels, share, splits, channels, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Image, split of its pixels, channels [BLOCK_C], which there are, and the first and last block of the share."""
    tiles = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    channel = pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    part = pid // tiles
    image, split = part // splits, part % splits
    last = tl.minimum(split * share + share, tl.cdiv(pixels, BLOCK_M))
    return image, split, channel, channel < channels, split * share, last


@triton.jit
def image_offsets(
    image,
    block,
    pixels,
    channels,
    channel,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Where a block of an image lies in memory, int64 [BLOCK_M, BLOCK_C], and which of its pixels there are."""
    pixel = block * BLOCK_M + tl.arange(0, BLOCK_M)
    wide = tl.cast(image, tl.int64)
    if CHANNELS_LAST:
        offs = (wide * pixels + pixel)[:, None] * aligned(channels, ALIGN) + channel[None, :]
    else:
        offs = pixel[:, None] + (wide * channels + channel)[None, :] * aligned(pixels, ALIGN)
    return offs, pixel < pixels


@triton.jit
def load_affine_or_none(center_ptr, scale_ptr, shift_ptr, channel, mask):
    """As `load_affine`; the identity where there is no scale."""
    center = tl.zeros(channel.shape, dtype=tl.float32)[None, :]
    scale, shift = center + 1.0, center
    if scale_ptr is not None:
        center, scale, shift = load_affine(center_ptr, scale_ptr, shift_ptr, channel, mask)
    return center, scale, shift


@triton.jit
def load_of_image(ptr, image, channels, channel, mask):
    """A number for each channel [1, BLOCK_C] of an image; zeros if the pointer is None."""
    value = tl.zeros(channel.shape, dtype=tl.float32)
    if ptr is not None:
        value = tl.load(ptr + tl.cast(image, tl.int64) * channels + channel, mask=mask, other=0.0)
    return value[None, :]


@triton.jit
def load_passed(dout_ptr, out_ptr, offs, mask):
    """The gradient of a result, zero where the result is that of a ReLU and not above zero; NaN passes."""
    dout = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if out_ptr is not None:
        dout = tl.where(tl.load(out_ptr + offs, mask=mask, other=0.0) <= 0, 0.0, dout)
    return dout


@triton.jit
def load_activation(z_ptr, offs, mask, center, scale, shift, RELU: tl.constexpr):
    """affine(z), or with RELU relu of that."""
    a = scale * (tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32) - center) + shift
    if RELU:
        a = relu(a)
    return a


@triton.jit
def affine_mean_kernel(
    z_ptr,
    center_ptr,  # float32 (channels,) like scale and shift, or None
    scale_ptr,  # None: no affine
    shift_ptr,
    sums_ptr,  # (splits, 1, N * channels)
    pixels,
    share,
    splits,
    images,
    channels,
    factor,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`factor` times the sums over one share of an image."""
    image, split, channel, mask_c, first, last = own_part(pixels, share, splits, channels, BLOCK_M, BLOCK_C)
    center, scale, shift = load_affine_or_none(center_ptr, scale_ptr, shift_ptr, channel, mask_c)
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for block in range(first, last):
        offs, mask_m = image_offsets(image, block, pixels, channels, channel, CHANNELS_LAST, ALIGN, BLOCK_M)
        mask = mask_m[:, None] & mask_c[None, :]
        a = load_activation(z_ptr, offs, mask, center, scale, shift, RELU)
        total += tl.where(mask, a, 0.0)
    ptrs = sums_ptr + (tl.cast(split, tl.int64) * images + image) * channels + channel
    tl.store(ptrs, factor * tl.sum(total, axis=0), mask=mask_c)


@triton.jit
def affine_gate_kernel(
    z_ptr,
    center_ptr,  # float32 (channels,) like all vectors, or None
    scale_ptr,  # None: no affine
    shift_ptr,
    gate_ptr,  # float32 (N, channels)
    residual_ptr,  # or None
    residual_center_ptr,  # or None
    residual_scale_ptr,  # None for a plain residual
    residual_shift_ptr,
    out_ptr,
    pixels,
    share,
    splits,
    images,
    channels,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One share of an image of gate * act(affine(z)), or of relu(that + residual)."""
    image, _, channel, mask_c, first, last = own_part(pixels, share, splits, channels, BLOCK_M, BLOCK_C)
    center, scale, shift = load_affine_or_none(center_ptr, scale_ptr, shift_ptr, channel, mask_c)
    gate = load_of_image(gate_ptr, image, channels, channel, mask_c)
    if residual_ptr is not None:
        residual_center, residual_scale, residual_shift = load_affine_or_none(
            residual_center_ptr, residual_scale_ptr, residual_shift_ptr, channel, mask_c
        )
    for block in range(first, last):
        offs, mask_m = image_offsets(image, block, pixels, channels, channel, CHANNELS_LAST, ALIGN, BLOCK_M)
        mask = mask_m[:, None] & mask_c[None, :]
        a = load_activation(z_ptr, offs, mask, center, scale, shift, RELU)
        out = gate * a
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            out = relu(out + residual_scale * (residual - residual_center) + residual_shift)
        tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def affine_gate_bwd_kernel(
    z_ptr,
    dout_ptr,
    out_ptr,  # None: there was no residual
    center_ptr,
    scale_ptr,  # None: no affine
    shift_ptr,
    residual_ptr,  # the operand of the residual's affine, or None
    residual_center_ptr,
    residual_scale_ptr,  # None for a plain residual
    dresidual_ptr,  # or None
    sums_ptr,  # (splits, 1, N * channels): of the gate's gradient
    partials_ptr,  # (N * splits, 2, channels): the residual's dshift and dscale; or None
    pixels,
    share,
    splits,
    images,
    channels,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One share of an image of the gradients of the gate and the residual."""
    image, split, channel, mask_c, first, last = own_part(pixels, share, splits, channels, BLOCK_M, BLOCK_C)
    center, scale, shift = load_affine_or_none(center_ptr, scale_ptr, shift_ptr, channel, mask_c)
    residual_center, residual_scale, _ = load_affine_or_none(
        residual_center_ptr, residual_scale_ptr, residual_scale_ptr, channel, mask_c
    )
    dgate = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    dshift = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    dscale = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for block in range(first, last):
        offs, mask_m = image_offsets(image, block, pixels, channels, channel, CHANNELS_LAST, ALIGN, BLOCK_M)
        mask = mask_m[:, None] & mask_c[None, :]
        t = load_passed(dout_ptr, out_ptr, offs, mask)
        a = load_activation(z_ptr, offs, mask, center, scale, shift, RELU)
        dgate += t * a
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offs, (residual_scale * t).to(dresidual_ptr.dtype.element_ty), mask=mask)
        if partials_ptr is not None:
            residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            dshift += t
            dscale += t * (residual - residual_center)
    ptrs = sums_ptr + (tl.cast(split, tl.int64) * images + image) * channels + channel
    tl.store(ptrs, tl.sum(dgate, axis=0), mask=mask_c)
    if partials_ptr is not None:
        ptrs = partials_ptr + (tl.cast(image, tl.int64) * splits + split) * 2 * channels + channel
        tl.store(ptrs, tl.sum(dshift, axis=0), mask=mask_c)
        tl.store(ptrs + channels, tl.sum(dscale, axis=0), mask=mask_c)


@triton.jit
def gated_affine_bwd_kernel(
    z_ptr,
    center_ptr,
    scale_ptr,  # None: no affine
    shift_ptr,
    dout_ptr,  # or None
    out_ptr,  # or None
    gate_ptr,  # (N, channels), or None
    added_ptr,  # (N, channels), or None
    dz_ptr,
    partials_ptr,  # (N * splits, 2, channels): dshift and dscale; or None
    pixels,
    share,
    splits,
    images,
    channels,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One share of an image of the gradients of z and of its affine."""
    image, split, channel, mask_c, first, last = own_part(pixels, share, splits, channels, BLOCK_M, BLOCK_C)
    center, scale, shift = load_affine_or_none(center_ptr, scale_ptr, shift_ptr, channel, mask_c)
    gate = load_of_image(gate_ptr, image, channels, channel, mask_c)
    added = load_of_image(added_ptr, image, channels, channel, mask_c)
    dshift = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    dscale = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for block in range(first, last):
        offs, mask_m = image_offsets(image, block, pixels, channels, channel, CHANNELS_LAST, ALIGN, BLOCK_M)
        mask = mask_m[:, None] & mask_c[None, :]
        t = tl.broadcast_to(added, (BLOCK_M, BLOCK_C))
        if dout_ptr is not None:
            t += gate * load_passed(dout_ptr, out_ptr, offs, mask)
        z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32) - center
        if RELU:
            t = tl.where((scale * z + shift).to(z_ptr.dtype.element_ty) <= 0, 0.0, t)  # NaN passes
        t = tl.where(mask, t, 0.0)
        tl.store(dz_ptr + offs, (scale * t).to(dz_ptr.dtype.element_ty), mask=mask)
        dshift += t
        dscale += t * z
    if partials_ptr is not None:
        ptrs = partials_ptr + (tl.cast(image, tl.int64) * splits + split) * 2 * channels + channel
        tl.store(ptrs, tl.sum(dshift, axis=0), mask=mask_c)
        tl.store(ptrs + channels, tl.sum(dscale, axis=0), mask=mask_c)


def affine_mean(z: Tensor, affine: Affine | None, relu: bool, channels_last: bool) -> Tensor:
    """Mean (N, C, 1, 1) of each image's channels of act(affine(z)); ``affine`` None: the identity."""
    launch, splits = _walk("mean", relu, z, channels_last)
    sums = _of_images(z, splits)
    center, scale, shift = affine or NO_AFFINE
    launch(z_ptr=z, center_ptr=center, scale_ptr=scale, shift_ptr=shift, sums_ptr=sums)
    return _added_up(sums, z)


def affine_gate(
    z: Tensor,
    affine: Affine | None,
    relu: bool,
    gate: Tensor,
    residual: Tensor | None,
    residual_affine: Affine | None,
    channels_last: bool,
) -> Tensor:
    """Gate * act(affine(z)), with a residual relu(that + residual); rounded once."""
    out = empty(z, z.shape, channels_last)
    launch, _ = _walk("gate", relu, z, channels_last)
    center, scale, shift = affine or NO_AFFINE
    residual_center, residual_scale, residual_shift = residual_affine or NO_AFFINE
    launch(
        z_ptr=z,
        center_ptr=center,
        scale_ptr=scale,
        shift_ptr=shift,
        gate_ptr=gate,
        residual_ptr=residual,
        residual_center_ptr=residual_center,
        residual_scale_ptr=residual_scale,
        residual_shift_ptr=residual_shift,
        out_ptr=out,
    )
    return out


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
    launch, splits = _walk("gate_bwd", relu, z, channels_last)
    sums = _of_images(z, splits)
    partials = _of_channels(z, splits) if residual is not None else None
    dresidual = empty(z, z.shape, channels_last) if wants_residual else None
    center, scale, shift = affine or NO_AFFINE
    residual_center, residual_scale, _ = residual_affine or NO_AFFINE
    launch(
        z_ptr=z,
        dout_ptr=dout,
        out_ptr=out,
        center_ptr=center,
        scale_ptr=scale,
        shift_ptr=shift,
        residual_ptr=residual,
        residual_center_ptr=residual_center,
        residual_scale_ptr=residual_scale,
        dresidual_ptr=dresidual,
        sums_ptr=sums,
        partials_ptr=partials,
    )
    dshift = dscale = None
    if partials is not None:
        dshift, dscale = sum_partials(partials)
    return _added_up(sums, z), dresidual, dscale, dshift


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

    ``out``: what ReLU made of ``dout``'s tensor, or None.
    """
    dz = empty(z, z.shape, channels_last)
    launch, splits = _walk("gated_affine_bwd", relu, z, channels_last)
    partials = None if affine is None else _of_channels(z, splits)
    center, scale, shift = affine or NO_AFFINE
    launch(
        z_ptr=z,
        center_ptr=center,
        scale_ptr=scale,
        shift_ptr=shift,
        dout_ptr=dout,
        out_ptr=out,
        gate_ptr=gate,
        added_ptr=added,
        dz_ptr=dz,
        partials_ptr=partials,
    )
    if partials is None:
        return dz, None, None
    dshift, dscale = sum_partials(partials)
    return dz, dscale, dshift


def _of_images(z: Tensor, splits: int) -> Tensor:
    return torch.empty(splits, 1, z.shape[0] * z.shape[1], dtype=torch.float32, device=z.device)


def _of_channels(z: Tensor, splits: int) -> Tensor:
    return torch.empty(z.shape[0] * splits, 2, z.shape[1], dtype=torch.float32, device=z.device)


def _added_up(sums: Tensor, z: Tensor) -> Tensor:
    total = sums if sums.shape[0] == 1 else sum_partials(sums)[0]
    return total.view(z.shape[0], z.shape[1], 1, 1)


# By name, since a kernel's hash would be computed from its source, with compile-time values of its own.
_KERNELS: dict[str, Any] = {
    "mean": affine_mean_kernel,
    "gate": affine_gate_kernel,
    "gate_bwd": affine_gate_bwd_kernel,
    "gated_affine_bwd": gated_affine_bwd_kernel,
}


def _walk(name: str, relu: bool, z: Tensor, channels_last: bool) -> tuple[Launch, int]:
    """The launch of a kernel on ``z``, and the number of shares of an image's pixels."""
    return _plan(name, relu, tuple(z.shape), channels_last, num_sms(z.device))


@functools.lru_cache(maxsize=4096)
def _plan(name: str, relu: bool, shape: tuple[int, ...], channels_last: bool, num_sms: int) -> tuple[Launch, int]:
    images, channels, height, width = shape
    pixels = height * width
    config = elementwise_config(images, pixels, channels, channels_last, num_sms=num_sms)
    block_m = min(config.block_m, max(16, triton.next_power_of_2(pixels)))
    blocks = triton.cdiv(pixels, block_m)
    share = triton.cdiv(blocks, min(blocks, triton.cdiv(config.splits, images)))
    splits = triton.cdiv(blocks, share)
    sizes: dict[str, float] = {"pixels": pixels, "share": share, "splits": splits}
    sizes |= {"images": images, "channels": channels}
    if name == "mean":
        sizes["factor"] = 1 / pixels
    constants = {"RELU": relu, "CHANNELS_LAST": channels_last, "BLOCK_M": block_m, "BLOCK_C": config.block_c}
    constants["ALIGN"] = math.gcd(channels if channels_last else pixels, 16)
    options = {"num_warps": config.num_warps, "enable_fp_fusion": True}
    programs = triton.cdiv(channels, config.block_c) * images * splits
    return Launch(_KERNELS[name], programs, sizes, constants, options), splits
