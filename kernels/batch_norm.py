"""Batch norm's parts in Triton: statistics, affine + add + ReLU at the end of a block, and their gradients.

    statistics        mean, var = mean and biased variance of z over N, H, W
    statistics_bwd    g = dz + dmean / count + 2 * dvar / count * (z - mean)
    affine_add_relu   out = relu(scale * (z - center) + shift + residual), the residual plain or through its own affine
    its gradients     t = dout where out > 0;  dz = scale * t;  dshift = sum t;  dscale = sum t * (z - center)
    bn_affine         scale = gamma / sqrt(var + eps), shift = beta

All but the last walk over the pixels and are limited by memory: they read every operand and write every result once.

A tensor is *images* of *pixels* of C channels: in channels_last one image of N*H*W pixels, in NCHW N images of H*W. A
program owns BLOCK_C channels and a share of all blocks of BLOCK_M pixels. It loads the vectors of its channels once,
and keeps sums element by element in registers until the end of its share, where one reduction leaves a row of float32
partials; statistics.py adds those up in order.

Launchers take activations (N, C, H, W), dense in channels_last or NCHW as ``channels_last`` says, of one dtype
(float32, float16 or bfloat16), and return such; vectors are (C,), float32, contiguous. An *affine* is (center or None,
scale, shift): affine(v) = scale * (v - center) + shift, in float32. Results are the same bits for the same call.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from .batch_norm_kernels import (
    affine_add_relu_bwd_kernel,
    affine_add_relu_kernel,
    bn_affine_bwd_kernel,
    bn_affine_kernel,
    statistics_bwd_kernel,
    statistics_kernel,
)
from .config import NO_AFFINE, Affine, Norm, elementwise_config
from .launch import Launch, empty, num_sms
from .statistics import PartialSums, merge_partials, sum_partials, walk_down

merges = True  # Gradients of an affine come as partial sums if asked to, and statistics with a batch norm's vectors.
scales = True  # Gradients of activations come without their affine's scale if asked to, which is applied on load.
_BLOCKS = 4  # that `statistics` loads at once
# By name, since a kernel's hash would be computed from its source, with compile-time values of its own.
_KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "statistics": (statistics_kernel, {"BLOCKS": _BLOCKS}),
    "statistics_bwd": (statistics_bwd_kernel, {}),
    "affine_add": (affine_add_relu_kernel, {"RELU": False}),
    "affine_add_relu": (affine_add_relu_kernel, {"RELU": True}),
    "affine_add_relu_bwd": (affine_add_relu_bwd_kernel, {"SCALES": True}),
    "affine_add_relu_bwd_unscaled": (affine_add_relu_bwd_kernel, {"SCALES": False}),
}


def statistics(z: Tensor, channels_last: bool, norm: Norm | None = None) -> tuple[Tensor, ...]:
    """Mean and biased variance of each channel of ``z``, each (C,) in float32; ``norm``: as of `merge_partials`."""
    launch, shares = _walk("statistics", z, channels_last)
    partials = torch.empty(shares, 3, z.shape[1], dtype=torch.float32, device=z.device)
    launch(z_ptr=z, partials_ptr=partials)
    return merge_partials(partials, norm, origin=z[0, :, 0, 0])


def statistics_bwd(
    dz: Tensor,
    z: Tensor,
    mean: Tensor,
    dmean: Tensor,
    dvar: Tensor,
    channels_last: bool,
    dz_scale: Tensor | None = None,
) -> Tensor:
    """Gradient of ``z``, like it: from its own, ``dz``, and from those of its statistics.

    ``dz_scale``: (C,), what ``dz`` is yet to be multiplied by; or None.
    """
    g = empty(z, z.shape, channels_last)
    launch, _ = _walk("statistics_bwd", z, channels_last)
    launch(dz_ptr=dz, dz_scale_ptr=dz_scale, z_ptr=z, mean_ptr=mean, dmean_ptr=dmean, dvar_ptr=dvar, g_ptr=g)
    return g


def affine_add_relu(
    z: Tensor, affine: Affine, residual: Tensor | None, residual_affine: Affine | None, channels_last: bool
) -> Tensor:
    """relu(affine(z) + residual), rounded once.

    Args:
        z: Raw convolution output.
        affine: Its batch norm.
        residual: Like ``z``, or None.
        residual_affine: The residual's own batch norm; None for a plain residual.
        channels_last: The layout.
    """
    return _affine_add("affine_add_relu", z, affine, residual, residual_affine, channels_last)


def affine_add(
    z: Tensor, affine: Affine, residual: Tensor | None, residual_affine: Affine | None, channels_last: bool
) -> Tensor:
    """affine(z) + residual, rounded once; arguments as of `affine_add_relu`."""
    return _affine_add("affine_add", z, affine, residual, residual_affine, channels_last)


def _affine_add(
    name: str,
    z: Tensor,
    affine: Affine,
    residual: Tensor | None,
    residual_affine: Affine | None,
    channels_last: bool,
) -> Tensor:
    out = empty(z, z.shape, channels_last)
    launch, _ = _walk(name, z, channels_last)
    center, scale, shift = affine
    residual_center, residual_scale, residual_shift = residual_affine or NO_AFFINE
    launch(
        z_ptr=z,
        center_ptr=center,
        scale_ptr=scale,
        shift_ptr=shift,
        residual_ptr=residual,
        residual_center_ptr=residual_center,
        residual_scale_ptr=residual_scale,
        residual_shift_ptr=residual_shift,
        out_ptr=out,
    )
    return out


def affine_add_relu_bwd(
    dout: Tensor,
    out: Tensor | None,
    z: Tensor,
    affine: Affine,
    residual: Tensor | None,
    residual_affine: Affine | None,
    channels_last: bool,
    wanted: tuple[bool, bool, bool],
    *,
    deferred: bool = False,
    unscaled: bool = False,
) -> tuple[Any, ...]:
    """Gradients of `affine_add_relu`.

    Args:
        dout: Gradient of the result.
        out: The result; None, only where there was no residual, to recompute it from ``z``.
        z: As in `affine_add_relu`.
        affine: As in `affine_add_relu`.
        residual: As in `affine_add_relu`; None for a plain residual, whose values no gradient depends on.
        residual_affine: As in `affine_add_relu`.
        channels_last: The layout.
        wanted: Whether the gradients of z, of the residual, and of the vectors are.
        deferred: Whether those of the vectors may still be partial sums.
        unscaled: Whether dz and dresidual are returned without the factor that is their affine's scale.

    Returns:
        dz, dresidual, dscale, dshift (also that of the residual's shift) and the residual's dscale; None what is not
        wanted. If ``deferred`` the fourth is None, and the third and fifth are `PartialSums` of either affine.
    """
    dz = empty(z, z.shape, channels_last) if wanted[0] else None
    dresidual = empty(z, z.shape, channels_last) if wanted[1] else None
    launch, shares = _walk("affine_add_relu_bwd_unscaled" if unscaled else "affine_add_relu_bwd", z, channels_last)
    center, scale, shift = affine
    residual_center, residual_scale, _ = residual_affine or NO_AFFINE
    partials = None
    if wanted[2]:
        sums = 2 if residual is None else 3
        partials = torch.empty(shares, sums, z.shape[1], dtype=torch.float32, device=z.device)
    launch(
        dout_ptr=dout,
        out_ptr=out,
        z_ptr=z,
        center_ptr=center,
        scale_ptr=scale,
        shift_ptr=shift,
        residual_ptr=residual if wanted[2] else None,
        residual_center_ptr=residual_center,
        residual_scale_ptr=residual_scale,
        dz_ptr=dz,
        dresidual_ptr=dresidual,
        partials_ptr=partials,
    )
    if partials is None:
        return dz, dresidual, None, None, None
    if deferred:
        both = PartialSums.of(partials, scale=1, shift=0)
        return dz, dresidual, both, None, None if residual is None else both._replace(scale=2)
    dshift, dscale, *dresidual_scale = sum_partials(partials)
    return dz, dresidual, dscale, dshift, dresidual_scale[0] if dresidual_scale else None


def bn_affine(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift of the affine, centred at ``mean``, that is a batch norm with these statistics.

    Args:
        mean: (C,), float32.
        var: (C,), float32.
        gamma: (C,), of any dtype, contiguous; None for 1.
        beta: (C,), of any dtype, contiguous; None for 0.
        eps: Added to the variance.
    """
    scale, shift = torch.empty_like(mean), torch.empty_like(mean)
    _bn_affine(len(mean), eps)(var_ptr=var, gamma_ptr=gamma, beta_ptr=beta, scale_ptr=scale, shift_ptr=shift)
    return scale, shift


def bn_affine_bwd(
    dscale: Tensor | PartialSums, dshift: Tensor | None, var: Tensor, gamma: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of mean, var, gamma and beta (of gamma's dtype; None without gamma) of `bn_affine`.

    ``dscale`` may be the partial sums of both gradients, ``dshift`` is None then.
    """
    channels = var.shape[0]
    dmean, dvar = torch.empty_like(var), torch.empty_like(var)
    dgamma, dbeta = (None, None) if gamma is None else (torch.empty_like(gamma), torch.empty_like(gamma))
    rows, sums, places = 1, 1, (0, 0)
    if isinstance(dscale, PartialSums):
        (rows, sums, _), places = dscale.partials.shape, dscale[1:]
        dscale = dshift = dscale.partials
    _bn_affine_bwd(rows, sums, places, channels, eps)(
        dscale_ptr=dscale,
        dshift_ptr=dshift,
        var_ptr=var,
        gamma_ptr=gamma,
        dmean_ptr=dmean,
        dvar_ptr=dvar,
        dgamma_ptr=dgamma,
        dbeta_ptr=dbeta,
    )
    return dmean, dvar, dgamma, dbeta


def _walk(name: str, z: Tensor, channels_last: bool) -> tuple[Launch, int]:
    """The launch of a kernel that walks over the pixels of ``z``, and the number of shares they are divided into."""
    return _plan_walk(name, tuple(z.shape), z.itemsize, channels_last, num_sms(z.device))


@functools.lru_cache(maxsize=4096)
def _plan_walk(
    name: str, shape: tuple[int, ...], itemsize: int, channels_last: bool, num_sms: int
) -> tuple[Launch, int]:
    batch, channels, height, width = shape
    images, pixels = batch, height * width
    if pixels == 1:
        channels_last = True  # the same bytes
    if channels_last:
        images, pixels = 1, batch * height * width
    collects = name == "statistics"
    # One 16-byte load per thread and block; as many programs as run at once, since each ends in a long reduction.
    walk = {"elements": 2048 // itemsize, "programs": 5} if collects else {}
    config = elementwise_config(images, pixels, channels, channels_last, num_sms=num_sms, **walk)
    image_blocks = triton.cdiv(pixels, config.block_m)
    blocks = images * image_blocks
    share = triton.cdiv(blocks, config.splits)
    if collects and share > _BLOCKS:
        share = triton.cdiv(share, _BLOCKS) * _BLOCKS
    shares = triton.cdiv(blocks, share)
    sizes = {"pixels": pixels, "image_blocks": image_blocks, "blocks": blocks, "share": share, "channels": channels}
    constants = {"CHANNELS_LAST": channels_last, "BLOCK_M": config.block_m, "BLOCK_C": config.block_c}
    constants["ALIGN"] = math.gcd(channels if channels_last else pixels, 16)
    options = {"num_warps": config.num_warps, "enable_fp_fusion": True}
    kernel, own = _KERNELS[name]
    return Launch(kernel, triton.cdiv(channels, config.block_c) * shares, sizes, constants | own, options), shares


@functools.lru_cache(maxsize=4096)
def _bn_affine(channels: int, eps: float) -> Launch:
    block = 256
    options = {"num_warps": 1, "enable_fp_fusion": True}
    sizes = {"channels": channels, "eps": eps}
    return Launch(bn_affine_kernel, triton.cdiv(channels, block), sizes, {"BLOCK_C": block}, options)


@functools.lru_cache(maxsize=4096)
def _bn_affine_bwd(rows: int, sums: int, places: tuple[int, int], channels: int, eps: float) -> Launch:
    constants, options = walk_down(rows)
    sizes = {"rows": rows, "sums": sums, "scale_at": places[0], "shift_at": places[1], "eps": eps, "channels": channels}
    programs = 2 * triton.cdiv(channels, constants["BLOCK_C"])  # one half for each gradient
    return Launch(bn_affine_bwd_kernel, programs, sizes, constants, options)
