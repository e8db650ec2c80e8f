"""Per-channel statistics in Triton: Welford's update, merging by Chan's formula, and the ordered last stage.

*Moments* of some values are (count, mean, m2), where m2 is the sum of (value - mean)^2. Kernels collect moments lane by
lane, merge them over their rows once at their end and store them as one row of float32 partials (rows, 3, channels);
`merge_partials` merges the rows in a fixed order, as `sum_partials` does with partials that are sums. No sum of squares
is ever subtracted from another.

Sources: Welford (1962); Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances" (1979).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch


@triton.jit
def rounded(wide, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """`wide`, float32, as DTYPE. ASSEMBLY, not for the interpreter: in pairs, whatever the result is used for.

    What goes both to memory, in pairs, and into sums, one by one, the compiler rounds one by one, at an eighth of the
    rate.
    """
    if ASSEMBLY and tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [wide], tl.bfloat16, True, 2)
    if ASSEMBLY and tl.float16 == DTYPE:
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [wide], tl.float16, True, 2)
    return wide.to(DTYPE)


@triton.jit
def halves(tile):
    """The rows of a tile [M, N] in two halves [M/2, N], every other eight: matrix products leave both in one thread."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    first, second = tl.split(tl.permute(tl.reshape(tile, (M // 16, 2, 8, N)), (0, 2, 3, 1)))
    return tl.reshape(first, (M // 2, N)), tl.reshape(second, (M // 2, N))


@triton.jit
def add_to_moments(count, mean, m2, values, masks):
    """Welford's update of every lane by a tuple of tiles [M, N], each in the rows of its mask [M]; the new moments.

    `count` is [M], `mean` and `m2` are [M, N]. With d = value - mean, the mean moves by step = sum d / count, and m2
    grows by the sum of (value - old mean) * (value - new mean) = d * (d - step). A lane begins at its first value: d is
    never larger than the spread of the values, so that m2 is as exact as they are, however far from zero.
    """
    mean = tl.where(((count == 0.0) & masks[0])[:, None], values[0], mean)
    deltas = ()
    total = tl.zeros(mean.shape, dtype=tl.float32)
    for i in tl.static_range(len(values)):
        count += masks[i].to(tl.float32)
        deltas += (tl.where(masks[i][:, None], values[i] - mean, 0.0),)
        total += deltas[i]
    step = total * (1.0 / tl.maximum(count, 1.0))[:, None]
    for i in tl.static_range(len(values)):
        m2 += deltas[i] * (deltas[i] - step)
    return count, mean + step, m2


@triton.jit
def merge_moments(count, mean, m2):
    """Merge the rows of `mean` and `m2` [M, N], `count` [M, N] or [M, 1], into moments [N] (count may be [1])."""
    total = tl.sum(count, axis=0)
    share = count / tl.maximum(total, 1.0)[None, :]
    # The mean of the means, then of what they differ from it: a second step, exact where they are all the same.
    center = tl.sum(mean * share, axis=0)
    center += tl.sum((mean - center[None, :]) * share, axis=0)
    delta = mean - center[None, :]
    return total, center, tl.sum(m2 + delta * delta * count, axis=0)


@triton.jit
def store_moments(partials_ptr, row, channels, channel, mask, count, mean, m2):
    """Store moments [N] of the channels `channel` [N] as row `row` of the partials (rows, 3, channels)."""
    ptrs = partials_ptr + tl.cast(row, tl.int64) * 3 * channels + channel
    tl.store(ptrs, tl.broadcast_to(count, mean.shape), mask=mask)
    tl.store(ptrs + channels, mean, mask=mask)
    tl.store(ptrs + 2 * channels, m2, mask=mask)


@triton.jit
def merge_partials_kernel(
    partials_ptr,  # (rows, 3, channels)
    mean_ptr,  # (channels,)
    var_ptr,  # (channels,)
    rows,
    channels,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and biased variance of BLOCK_C channels: lanes walk down the rows, then merge."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel < channels
    count = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    mean = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & mask_c[None, :]
        ptrs = partials_ptr + (row.to(tl.int64) * 3 * channels)[:, None] + channel[None, :]
        added = tl.load(ptrs, mask=mask, other=0.0)
        delta = tl.load(ptrs + channels, mask=mask, other=0.0) - mean
        delta = tl.where(added > 0, delta, 0.0)
        total = count + added
        share = added / tl.maximum(total, 1.0)
        mean += delta * share
        m2 += tl.load(ptrs + 2 * channels, mask=mask, other=0.0) + delta * delta * count * share
        count = total
    count, mean, m2 = merge_moments(count, mean, m2)
    tl.store(mean_ptr + channel, mean, mask=mask_c)
    tl.store(var_ptr + channel, m2 / tl.maximum(count, 1.0), mask=mask_c)


def merge_partials(partials: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics from the moments that programs have stored.

    Args:
        partials: (rows, 3, C), float32, contiguous: count, mean and m2 of disjoint parts of the data.

    Returns:
        mean (C,) and biased variance (C,), float32; the same bits for the same partials.
    """
    rows, _, channels = partials.shape
    mean, var = (torch.empty(channels, dtype=torch.float32, device=partials.device) for _ in range(2))
    launch = _over_channels(True, rows, channels)
    launch(partials_ptr=partials, mean_ptr=mean, var_ptr=var)
    return mean, var


@triton.jit
def sum_partials_kernel(
    partials_ptr,  # (rows, 2 or 3, channels)
    first_ptr,  # (channels,), like the others
    second_ptr,
    third_ptr,  # None if there are two
    rows,
    channels,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Column sums of BLOCK_C channels: lanes walk down the rows, then add up."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel < channels
    sums: tl.constexpr = 2 if third_ptr is None else 3
    first = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    second = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    third = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & mask_c[None, :]
        ptrs = partials_ptr + (row.to(tl.int64) * sums * channels)[:, None] + channel[None, :]
        first += tl.load(ptrs, mask=mask, other=0.0)
        second += tl.load(ptrs + channels, mask=mask, other=0.0)
        if third_ptr is not None:
            third += tl.load(ptrs + 2 * channels, mask=mask, other=0.0)
    tl.store(first_ptr + channel, tl.sum(first, axis=0), mask=mask_c)
    tl.store(second_ptr + channel, tl.sum(second, axis=0), mask=mask_c)
    if third_ptr is not None:
        tl.store(third_ptr + channel, tl.sum(third, axis=0), mask=mask_c)


def sum_partials(partials: Tensor) -> tuple[Tensor, ...]:
    """Add up the rows of partial sums.

    Args:
        partials: (rows, K, C) with K 2 or 3, float32, contiguous.

    Returns:
        K tensors (C,), float32, each with memory of its own; the same bits for the same partials.
    """
    rows, count, channels = partials.shape
    sums = tuple(torch.empty(channels, dtype=torch.float32, device=partials.device) for _ in range(count))
    first, second, third = sums if count == 3 else (*sums, None)
    launch = _over_channels(False, rows, channels)
    launch(partials_ptr=partials, first_ptr=first, second_ptr=second, third_ptr=third)
    return sums


@functools.lru_cache(maxsize=4096)
def _over_channels(merges: bool, rows: int, channels: int) -> Launch:
    """The launch that gives every program a few channels and all rows, to merge moments or to add up sums."""
    kernel = merge_partials_kernel if merges else sum_partials_kernel
    # Every step waits for memory once: thousands of rows want few, large steps.
    block_r = min(1024, max(16, triton.next_power_of_2(rows)))
    constants = {"BLOCK_R": block_r, "BLOCK_C": 8}
    options = {"num_warps": max(4, block_r // 64), "num_stages": 2, "enable_fp_fusion": True}
    sizes = {"rows": rows, "channels": channels}
    return Launch(kernel, triton.cdiv(channels, constants["BLOCK_C"]), sizes, constants, options)
