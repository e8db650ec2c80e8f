"""3x3 grouped convolution in Triton: the launchers of forward, input gradient and weight gradient, plain and fused.

    y[n, ho, wo, g*O + o] = sum over kh, kw, i of
        x[n, ho*stride_h + kh - 1, wo*stride_w + kw - 1, g*I + i] * weight[g*O + o, i, kh, kw]

Everything is NHWC inside. Two forms; `config.py` says which serves a problem.

* **strips** (narrow groups, limited by memory). A program owns BLOCK_M strips of STRIP neighbouring columns, a band of
  rows, and one tile of merged groups with its nine block-diagonal weight tiles [K, N]. It walks down the source rows.
  A row is loaded as shifted tiles [BLOCK_M, K], one per source column of the strip, and feeds every destination row it
  touches: each source element is loaded (STRIP + 2) / STRIP times (stride 2: (2 * STRIP + 1) / (2 * STRIP)), not nine.
* **taps** (everything else). An implicit GEMM: [BLOCK_M destination pixels, K] @ [K, BLOCK_N], accumulated over the
  taps and over blocks of the group's channels. The input gradient of a strided convolution is one such GEMM for each
  parity of the destination pixel, over just the taps that reach it.

Kernels: grouped_conv_forward.py, grouped_conv_dgrad.py, grouped_conv_wgrad.py; which one serves a pass, with what grid:
grouped_conv_plan.py; what they compute besides, on load and on store: grouped_conv_fusion.py.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .config import NO_AFFINE, Affine, Config, ConvProblem, Norm, TapsConfig, choose_config, problem_of
from .grouped_conv_plan import fusion_of, is_crowded, partial_rows, plan
from .grouped_conv_tiles import probe_kernel
from .launch import Prepared, empty, nhwc, num_sms, to_layout
from .statistics import PartialSums, merge_partials, sum_partials
from .tuning import lookup, tf32_allowed

merges = True  # As of batch_norm.py.


def probe(device: torch.device) -> None:
    """Compile and run the least of kernels; raises whatever keeps Triton from working with ``device``.

    The first launch in a process needs a C compiler (for Triton's driver stub) and an assembler that knows the GPU.
    """
    out = torch.empty(1, dtype=torch.int32, device=device)
    with torch.cuda.device_of(out):
        probe_kernel[(1,)](out_ptr=out, num_warps=1)


def fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    *,
    config: Config | None = None,
    allow_tf32: bool | None = None,
) -> Tensor:
    """Grouped 3x3 convolution with padding 1.

    Args:
        x: (N, C_in, H, W), dense in the layout ``channels_last`` says; float32, float16 or bfloat16.
        weight: (C_out, C_in / groups, 3, 3), contiguous or channels_last, dtype of ``x``.
        bias: (C_out,), contiguous, dtype of ``x``, or None.
        stride: (stride_h, stride_w), each 1 or 2.
        groups: Number of groups.
        channels_last: Whether ``x`` and the result are dense in ``torch.channels_last`` (else in NCHW).
        config: Launch settings; what was measured (tuning.py) or else the heuristic's choice by default.
        allow_tf32: Whether float32 products may be rounded to TF32; PyTorch's flag for convolutions by default.

    Returns:
        (N, C_out, Ho, Wo) with Ho = (H - 1) // stride_h + 1, Wo alike.
    """
    place = ("fwd", x.shape, weight.shape, stride, groups, x.dtype, x.device, channels_last)
    return _convolve(place, x, weight, {"dst_shift_ptr": bias}, config, allow_tf32)[0]


def dgrad(
    grad: Tensor,
    weight: Tensor,
    input_size: tuple[int, int],
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    *,
    config: Config | None = None,
    allow_tf32: bool | None = None,
) -> Tensor:
    """Gradient of the convolution's input.

    Args:
        grad: (N, C_out, Ho, Wo), the gradient of the output, laid out like ``x`` of `fwd`.
        weight: As in `fwd`.
        input_size: (H, W) of the input.
        stride: As in `fwd`.
        groups: As in `fwd`.
        channels_last: As in `fwd`.
        config: As in `fwd`.
        allow_tf32: As in `fwd`.

    Returns:
        (N, C_in, H, W).
    """
    shape = (grad.shape[0], weight.shape[1] * groups, *input_size)
    place = ("dgrad", shape, weight.shape, stride, groups, grad.dtype, grad.device, channels_last)
    return _convolve(place, grad, weight, {}, config, allow_tf32)[0]


def wgrad(
    grad: Tensor,
    x: Tensor,
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    *,
    config: Config | None = None,
    allow_tf32: bool | None = None,
) -> Tensor:
    """Gradient of the convolution's weight.

    Args:
        grad: (N, C_out, Ho, Wo), the gradient of the output, laid out like ``x``.
        x: (N, C_in, H, W), as in `fwd`.
        stride: As in `fwd`.
        groups: As in `fwd`.
        channels_last: As in `fwd`.
        config: As in `fwd`.
        allow_tf32: As in `fwd`.

    Returns:
        (C_out, C_in / groups, 3, 3), laid out and of the dtype of ``x``; the same bits for the same call.
    """
    shape = (grad.shape[1], x.shape[1] // groups, 3, 3)
    place = ("wgrad", x.shape, shape, stride, groups, x.dtype, x.device, channels_last)
    return _rounded(_correlate(place, grad, x, {}, config, allow_tf32), x.dtype, channels_last)


def conv_stats_fwd(
    x: Tensor,
    prologue: Affine | None,
    weight: Tensor,
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    stats: bool,
    *,
    config: Config | None = None,
    allow_tf32: bool | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Convolve relu(affine(x)), and take the statistics of the result.

    Args:
        x: As in `fwd`.
        prologue: (center or None, scale, shift), each (C_in,), float32: the affine; None to convolve ``x`` itself.
        weight: As in `fwd`.
        stride: As in `fwd`.
        groups: As in `fwd`.
        channels_last: As in `fwd`.
        stats: Whether the statistics are wanted.
        config: As in `fwd`.
        allow_tf32: As in `fwd`.

    Returns:
        z as of `fwd`; the mean and the biased variance of its channels as stored, each (C_out,), float32, or None.
    """
    vectors = _prefixed("src", _vectors(prologue))
    place = ("fwd", x.shape, weight.shape, stride, groups, x.dtype, x.device, channels_last)
    z, partials = _convolve(place, x, weight, vectors, config, allow_tf32, sums=3 if stats else 0)
    mean, var = (None, None) if partials is None else merge_partials(partials)
    return z, mean, var


def conv_norm_fwd(
    x: Tensor,
    prologue: Affine | None,
    weight: Tensor,
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    norm: Norm,
) -> tuple[Tensor, ...]:
    """`conv_stats_fwd`, and what a batch norm makes of the statistics: z, mean, variance, scale and shift."""
    place = ("fwd", x.shape, weight.shape, stride, groups, x.dtype, x.device, channels_last)
    z, partials = _convolve(place, x, weight, _prefixed("src", _vectors(prologue)), None, None, sums=3)
    return z, *merge_partials(partials, norm)  # type: ignore[arg-type]  # there are partials of three sums


def conv_stats_bwd(
    dz: Tensor,
    grad_prologue: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    x: Tensor,
    prologue: Affine | None,
    weight: Tensor,
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    wanted: tuple[bool, bool],
    *,
    config: Config | None = None,
    wgrad_config: Config | None = None,
    allow_tf32: bool | None = None,
    deferred: bool = False,
) -> tuple[Any, ...]:
    """Gradients of `conv_stats_fwd`.

    Args:
        dz: (N, C_out, Ho, Wo), the gradient of z, laid out like ``x``.
        grad_prologue: z, its mean, and the gradients of its mean and variance (dmean, dvar), or None where the
            statistics have none: with n = N * Ho * Wo, dmean / n + 2 * dvar / n * (z - mean) is added to ``dz``.
        x: As in `conv_stats_fwd`, like the next five.
        prologue: The affine.
        weight: The weight.
        stride: (stride_h, stride_w).
        groups: Number of groups.
        channels_last: The layout.
        wanted: Whether the gradients of ``x`` (with those of scale and shift) and of ``weight`` are wanted.
        config: Launch settings of the input gradient, by default as in `fwd`.
        wgrad_config: Launch settings of the weight gradient, likewise.
        allow_tf32: As in `fwd`.
        deferred: As in `pointwise_conv.conv_stats_bwd`.

    Returns:
        dx like ``x``; dscale and dshift (C_in,), float32; dw as of `wgrad`. None for what is not wanted or, without a
        prologue, not there. If ``deferred`` `PartialSums` and None instead of dscale and dshift, and dw is float32.
    """
    dx = dw = None
    dvectors: tuple[Any, ...] = (None, None)
    dz, x = nhwc(dz), nhwc(x)
    z, mean, dmean, dvar = grad_prologue or (None, None, None, None)
    grad_vectors = {"z_ptr": None if z is None else nhwc(z), "center_ptr": mean, "scale_ptr": dvar, "shift_ptr": dmean}
    vectors = _vectors(prologue)
    place = (x.shape, weight.shape, stride, groups, x.dtype, x.device, channels_last)
    if wanted[0]:
        optional = _prefixed("src", grad_vectors) | _prefixed("dst", vectors)
        sums = 0
        if prologue is not None:
            optional["dst_side_ptr"] = x
            sums = 2
        dx, partials = _convolve(("dgrad", *place), dz, weight, optional, config, allow_tf32, sums=sums)
        if partials is not None:
            dvectors = (PartialSums.of(partials, 0, 1), None) if deferred else sum_partials(partials)
    if wanted[1]:
        optional = _prefixed("grad", grad_vectors) | _prefixed("x", vectors)
        dw = _correlate(("wgrad", *place), dz, x, optional, wgrad_config, allow_tf32)
        if not deferred:
            dw = _rounded(dw, x.dtype, channels_last)
    return dx, *dvectors, dw


def conv_affine(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    *,
    config: Config | None = None,
    allow_tf32: bool | None = None,
) -> Tensor:
    """Compute scale * conv(x, weight) + shift + residual, then ReLU, rounded once: a convolution in inference.

    Args:
        x: As in `fwd`.
        weight: As in `fwd`.
        scale: (C_out,), float32, or None for 1.
        shift: (C_out,), float32, or None for 0.
        residual: Like the result, or None for 0.
        relu: Whether ReLU is applied.
        stride: As in `fwd`.
        groups: As in `fwd`.
        channels_last: As in `fwd`.
        config: As in `fwd`.
        allow_tf32: As in `fwd`.

    Returns:
        As `fwd`.
    """
    optional = {"dst_scale_ptr": scale, "dst_shift_ptr": shift}
    optional["dst_side_ptr"] = None if residual is None else nhwc(residual)
    place = ("fwd", x.shape, weight.shape, stride, groups, x.dtype, x.device, channels_last)
    return _convolve(place, x, weight, optional, config, allow_tf32, relu=relu)[0]


def _vectors(affine: Affine | None) -> dict[str, Tensor | None]:
    center, scale, shift = affine or NO_AFFINE
    return {"center_ptr": center, "scale_ptr": scale, "shift_ptr": shift}


def _prefixed(prefix: str, tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {f"{prefix}_{name}": tensor for name, tensor in tensors.items()}


def _convolve(
    place: tuple[Any, ...],
    src: Tensor,
    weight: Tensor,
    optional: dict[str, Tensor | None],
    config: Config | None,
    allow_tf32: bool | None,
    *,
    sums: int = 0,
    relu: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A forward pass or input gradient, and partials (rows, sums, channels) if there are any."""
    tensors = {name: tensor for name, tensor in optional.items() if tensor is not None}
    names = (*tensors, "partials_ptr") if sums else tuple(tensors)
    if allow_tf32 is None:
        allow_tf32 = tf32_allowed(src.dtype)
    prepared = _prepare(names, config, allow_tf32, relu, _taps_outside(weight), *place)
    dst = empty(src, prepared.shape)
    partials = prepared.partials(sums, src)
    if partials is not None:
        tensors["partials_ptr"] = partials
    weight = _arrange_weight(weight, prepared.config)
    prepared.launch(src_ptr=nhwc(src), weight_ptr=weight, dst_ptr=dst, **tensors)
    return to_layout(dst, place[-1]), partials


def _correlate(
    place: tuple[Any, ...],
    grad: Tensor,
    x: Tensor,
    optional: dict[str, Tensor | None],
    config: Config | None,
    allow_tf32: bool | None,
) -> Tensor:
    """A weight gradient, float32."""
    tensors = {name: tensor for name, tensor in optional.items() if tensor is not None}
    if allow_tf32 is None:
        allow_tf32 = tf32_allowed(x.dtype)
    prepared = _prepare(tuple(tensors), config, allow_tf32, False, False, *place)
    partials = torch.empty(prepared.shape, dtype=torch.float32, device=x.device)
    prepared.launch(grad_ptr=nhwc(grad), x_ptr=nhwc(x), partials_ptr=partials, **tensors)
    return partials.sum(0)


def _rounded(dw: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    return dw.to(dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@functools.lru_cache(maxsize=4096)
def _prepare(
    names: tuple[str, ...], config: Config | None, allow_tf32: bool, relu: bool, taps_outside: bool, *place: Any
) -> Prepared:
    """``names``: the optional arguments that there are tensors for; ``place``: as of `problem_of`."""
    problem, fused = problem_of(*place), frozenset(names)
    *_, device, _ = place
    if config is None:
        config = _default_config(problem, device, allow_tf32, fused)
    launch = plan(problem, config, allow_tf32=allow_tf32, fused=fused, relu=relu, taps_outside=taps_outside)
    if problem.op == "wgrad":
        return Prepared(config, launch, (config.splits, problem.out_channels, problem.group_in, 3, 3), 0)
    return Prepared(config, launch, problem.result_shape, partial_rows(problem, config, launch))


def _default_config(problem: ConvProblem, device: torch.device, allow_tf32: bool, fused: frozenset[str]) -> Config:
    fusion = fusion_of(fused)
    entry = lookup(problem, device, fusion=fusion, allow_tf32=allow_tf32)
    if entry is not None and entry.config is not None:
        return entry.config  # type: ignore[return-value]  # of a 3x3 convolution
    fuses, crowded = fusion != "plain", is_crowded(fused)
    return choose_config(problem, fused=fuses, crowded=crowded, allow_tf32=allow_tf32, num_sms=num_sms(device))


def _taps_outside(weight: Tensor) -> bool:
    return weight.shape[1] > 1 and weight.stride(1) == 1


def _arrange_weight(weight: Tensor, config: Config) -> Tensor:
    """Taps walk channel by channel through one tap at a time: (3, 3, C_out, C_in / groups) makes that contiguous."""
    return weight.permute(2, 3, 0, 1).contiguous() if isinstance(config, TapsConfig) else weight
