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

    `count` is [M], `mean` and `m2` are [M, N]; masks that are None mean all rows. With d = value - mean, the mean moves
    by step = sum d / count, and m2 grows by the sum of (value - old mean) * (value - new mean) = d * (d - step). A lane
    begins at its first value: d is never larger than the spread of the values, so that m2 is as exact as they are,
    however far from zero.
    """
    begins = count == 0.0
    if masks is not None:
        begins = begins & masks[0]
    mean = tl.where(begins[:, None], values[0], mean)
    deltas = ()
    total = tl.zeros(mean.shape, dtype=tl.float32)
    for i in tl.static_range(len(values)):
        delta = values[i] - mean
        if masks is None:
            count += 1.0
        else:
            count += masks[i].to(tl.float32)
            delta = tl.where(masks[i][:, None], delta, 0.0)
        deltas += (delta,)
        total += delta
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
    merged_ptr,  # (shares, 3, channels), or None: there is one share, whose results are
    mean_ptr,  # (channels,), or None
    var_ptr,  # (channels,), or None
    rows,
    share,
    channels,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Moments of one share of the rows, or their mean and biased variance: lanes walk down the rows, then merge."""
    tiles = tl.cdiv(channels, BLOCK_C)
    split = tl.program_id(0) // tiles
    channel = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel < channels
    count = tl.zeros((BLOCK_R,), dtype=tl.float32)
    mean = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    last = tl.minimum(split * share + share, rows)
    for start in range(split * share, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < last)[:, None] & mask_c[None, :]
        ptrs = partials_ptr + row.to(tl.int64) * 3 * channels
        added = tl.load(ptrs, mask=row < last, other=0.0)  # of all channels alike
        ptrs = ptrs[:, None] + channel[None, :]
        delta = tl.load(ptrs + channels, mask=mask, other=0.0) - mean
        delta = tl.where((added > 0.0)[:, None], delta, 0.0)
        weight = added / tl.maximum(count + added, 1.0)
        mean += delta * weight[:, None]
        m2 += tl.load(ptrs + 2 * channels, mask=mask, other=0.0) + delta * delta * (count * weight)[:, None]
        count += added
    total, mean_c, m2_c = merge_moments(count[:, None], mean, m2)
    if merged_ptr is not None:
        store_moments(merged_ptr, split, channels, channel, mask_c, total, mean_c, m2_c)
    else:
        tl.store(mean_ptr + channel, mean_c, mask=mask_c)
        tl.store(var_ptr + channel, m2_c / tl.maximum(total, 1.0), mask=mask_c)


def merge_partials(partials: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics from the moments that programs have stored.

    Args:
        partials: (rows, 3, C), float32, contiguous: count, mean and m2 of disjoint parts of the data; the counts are
            the same for all channels.

    Returns:
        mean (C,) and biased variance (C,), float32; the same bits for the same partials.
    """
    rows, _, channels = partials.shape
    if 3 * rows > _LONGEST_WALK:
        launch, shares = _over_rows("merge", rows, channels)
        merged = partials.new_empty(shares, 3, channels)
        launch(partials_ptr=partials, merged_ptr=merged, mean_ptr=None, var_ptr=None)
        rows, partials = shares, merged
    mean, var = (torch.empty(channels, dtype=torch.float32, device=partials.device) for _ in range(2))
    launch = _over_channels("merge", rows, channels, 1)
    launch(partials_ptr=partials, merged_ptr=None, mean_ptr=mean, var_ptr=var)
    return mean, var


@triton.jit
def sum_partials_kernel(
    partials_ptr,  # (rows, 1 to 3, channels), as many as there are results
    first_ptr,  # (shares, channels), like the others
    second_ptr,  # or None
    third_ptr,  # or None
    rows,
    share,
    channels,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Column sums of one share of the rows, for one of the results: lanes walk down the rows, then add up."""
    results: tl.constexpr = 1 if second_ptr is None else 2 if third_ptr is None else 3
    tiles = tl.cdiv(channels, BLOCK_C)
    result = tl.program_id(0) // tiles % results
    split = tl.program_id(0) // (tiles * results)
    channel = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel < channels
    sums = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    last = tl.minimum(split * share + share, rows)
    for start in range(split * share, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < last)[:, None] & mask_c[None, :]
        ptrs = partials_ptr + ((row.to(tl.int64) * results + result) * channels)[:, None] + channel[None, :]
        sums += tl.load(ptrs, mask=mask, other=0.0)
    total = tl.sum(sums, axis=0)
    offs = split * channels + channel
    tl.store(first_ptr + offs, total, mask=mask_c & (result == 0))
    if second_ptr is not None:
        tl.store(second_ptr + offs, total, mask=mask_c & (result == 1))
    if third_ptr is not None:
        tl.store(third_ptr + offs, total, mask=mask_c & (result == 2))


def sum_partials(partials: Tensor) -> tuple[Tensor, ...]:
    """Add up the rows of partial sums.

    Args:
        partials: (rows, K, C) with K 2 or 3, float32, contiguous.

    Returns:
        K tensors (C,), float32, each with memory of its own; the same bits for the same partials.
    """
    rows, count, channels = partials.shape
    if rows > _LONGEST_WALK:
        launch, shares = _over_rows("sum", rows, count * channels)
        added = partials.new_empty(shares, count, channels)
        launch(partials_ptr=partials, first_ptr=added, second_ptr=None, third_ptr=None)
        rows, partials = shares, added
    sums = tuple(torch.empty(channels, dtype=torch.float32, device=partials.device) for _ in range(count))
    first, second, third = sums if count == 3 else (*sums, None)
    launch = _over_channels("sum", rows, channels, count)
    launch(partials_ptr=partials, first_ptr=first, second_ptr=second, third_ptr=third)
    return sums


# Pieces of 32 bytes that a program reads, one at a time as the memory pipe of a multiprocessor does. Beyond, a launch
# before spreads the rows over all multiprocessors, in pieces of 128 bytes: a prediction from measured 30 GB/s of one.
_LONGEST_WALK = 6144
_MOST_SHARES = 128  # rows that the first launch leaves for the second
_KERNELS = {"merge": merge_partials_kernel, "sum": sum_partials_kernel}


@functools.lru_cache(maxsize=4096)
def _over_rows(name: str, rows: int, channels: int) -> tuple[Launch, int]:
    """The launch that gives every program a share of the rows of some channels, and the number of shares."""
    block_r = 64
    share = triton.cdiv(triton.cdiv(rows, block_r), _MOST_SHARES) * block_r
    shares = triton.cdiv(rows, share)
    return _launch(name, rows, share, channels, shares, block_r, 32), shares


@functools.lru_cache(maxsize=4096)
def _over_channels(name: str, rows: int, channels: int, results: int) -> Launch:
    """The launch that gives every program a few channels and all rows."""
    # Every step waits for memory once: thousands of rows want few, large steps.
    block_r = min(1024, max(16, triton.next_power_of_2(rows)))
    return _launch(name, rows, rows, channels, results, block_r, 8)


def _launch(name: str, rows: int, share: int, channels: int, repeats: int, block_r: int, block_c: int) -> Launch:
    constants = {"BLOCK_R": block_r, "BLOCK_C": block_c}
    options = {"num_warps": max(4, block_r // 64), "enable_fp_fusion": True}
    sizes = {"rows": rows, "share": share, "channels": channels}
    return Launch(_KERNELS[name], triton.cdiv(channels, block_c) * repeats, sizes, constants, options)
