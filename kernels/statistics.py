"""Per-channel statistics in Triton: Welford's update, merging by Chan's formula, and the ordered last stage.

*Moments* of some values are (count, mean, m2), where m2 is the sum of (value - mean)^2. Kernels collect moments lane by
lane, merge them over their rows once at their end and store them as one row of float32 partials (rows, 3, channels);
`merge_partials` merges the rows in a fixed order, as `sum_partials` does with partials that are sums. No sum of squares
is ever subtracted from another. Where a batch norm is made of the statistics, its vectors and running statistics come
from the same launch; gradients of vectors may stay `PartialSums` for the launch that goes on with them.

Sources: Welford (1962); Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances" (1979).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Norm
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
def add_pixels_to_moments(count, mean, m2, values, mask):
    """`add_to_moments` of a tile [M, N] of a matrix product, in the rows `mask` [M]; lanes [M/2] have two rows each.

    Those are two that one thread holds.
    """
    rows: tl.constexpr = values.shape[0] // 2
    masks = halves(mask[:, None])
    masks = (tl.reshape(masks[0], (rows,)), tl.reshape(masks[1], (rows,)))
    return add_to_moments(count, mean, m2, halves(values.to(tl.float32)), masks)


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
    origin_ptr,  # a pixel, `origin_step` between its channels, that the partials are less by; or None
    gamma_ptr,  # any dtype, or None
    beta_ptr,  # any dtype, or None
    scale_ptr,  # of the batch norm with these statistics, (channels,), like its shift; or None
    shift_ptr,
    running_mean_ptr,  # (channels,), like the next; or None
    running_var_ptr,
    batches_ptr,
    rows,
    share,
    channels,
    origin_step,
    eps,
    momentum,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Moments of one share of the rows, or what they come to: lanes walk down the rows, then merge."""
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
        if origin_ptr is not None:
            mean_c += tl.load(origin_ptr + channel.to(tl.int64) * origin_step, mask=mask_c, other=0.0).to(tl.float32)
        var_c = m2_c / tl.maximum(total, 1.0)
        tl.store(mean_ptr + channel, mean_c, mask=mask_c)
        tl.store(var_ptr + channel, var_c, mask=mask_c)
        if scale_ptr is not None:
            store_affine(var_c, eps, gamma_ptr, beta_ptr, scale_ptr, shift_ptr, channel, mask_c)
        if running_mean_ptr is not None:
            running_mean = tl.load(running_mean_ptr + channel, mask=mask_c, other=0.0)
            running_var = tl.load(running_var_ptr + channel, mask=mask_c, other=0.0)
            unbiased = m2_c / (total - 1.0)
            tl.store(running_mean_ptr + channel, (1.0 - momentum) * running_mean + momentum * mean_c, mask=mask_c)
            tl.store(running_var_ptr + channel, (1.0 - momentum) * running_var + momentum * unbiased, mask=mask_c)
            tl.store(batches_ptr, tl.load(batches_ptr) + 1, mask=tl.program_id(0) == 0)


@triton.jit
def inverse_deviation(var, eps):
    """1 / sqrt(var + eps), each step rounded to nearest."""
    return tl.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def store_affine(var, eps, gamma_ptr, beta_ptr, scale_ptr, shift_ptr, channel, mask):
    """Store scale and shift of the affine that is a batch norm with the variances `var` of `channel`, both [N]."""
    scale = inverse_deviation(var, eps)
    shift = tl.zeros(channel.shape, dtype=tl.float32)
    if gamma_ptr is not None:
        scale *= tl.load(gamma_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    if beta_ptr is not None:
        shift = tl.load(beta_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(scale_ptr + channel, scale, mask=mask)
    tl.store(shift_ptr + channel, shift, mask=mask)


def merge_partials(partials: Tensor, norm: Norm | None = None, origin: Tensor | None = None) -> tuple[Tensor, ...]:
    """Statistics from the moments that programs have stored.

    Args:
        partials: (rows, 3, C), float32, contiguous: count, mean and m2 of disjoint parts of the data; the counts are
            the same for all channels.
        norm: A batch norm with these statistics; its running ones are updated if it has them.
        origin: (C,), any stride: what the data are less by than those that the statistics are wanted of; None for 0.

    Returns:
        mean (C,) and biased variance (C,), float32; with a ``norm`` also its scale and shift, as of
        `batch_norm.bn_affine`. The same bits for the same partials.
    """
    rows, _, channels = partials.shape
    if 3 * rows > _LONGEST_WALK:
        launch, shares = _over_rows("merge", rows, channels)
        merged = partials.new_empty(shares, 3, channels)
        launch(partials_ptr=partials, merged_ptr=merged)
        rows, partials = shares, merged
    count = 2 if norm is None else 4
    made = tuple(torch.empty(channels, dtype=torch.float32, device=partials.device) for _ in range(count))
    tensors = {"partials_ptr": partials, "mean_ptr": made[0], "var_ptr": made[1]}
    sizes = {} if origin is None else {"origin_step": origin.stride(0)}
    if origin is not None:
        tensors["origin_ptr"] = origin
    if norm is not None:
        tensors |= {"gamma_ptr": norm.gamma, "beta_ptr": norm.beta, "scale_ptr": made[2], "shift_ptr": made[3]}
        sizes["eps"] = norm.eps
        if (running := norm.running) is not None:
            tensors |= {"running_mean_ptr": running.mean, "running_var_ptr": running.var}
            tensors["batches_ptr"] = running.batches
            sizes["momentum"] = running.momentum
    _over_channels("merge", rows, channels, 1, tuple(tensors), **sizes)(**tensors)
    return made


@triton.jit
def column_sums(partials_ptr, at, rows, sums, channels, channel, mask, BLOCK_R: tl.constexpr):
    """Sums [N] of `channel` [N] over the vectors `at` of the rows of partials (rows, sums, channels), in order."""
    total = tl.zeros((BLOCK_R, channel.shape[0]), dtype=tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        ptrs = partials_ptr + ((row.to(tl.int64) * sums + at) * channels)[:, None] + channel[None, :]
        total += tl.load(ptrs, mask=(row < rows)[:, None] & mask[None, :], other=0.0)
    return tl.sum(total, axis=0)


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
    first = split * share
    count = tl.minimum(share, rows - first)
    ptr = partials_ptr + tl.cast(first, tl.int64) * results * channels
    total = column_sums(ptr, result, count, results, channels, channel, mask_c, BLOCK_R)
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
    partials = _shortened(partials)
    rows, count, channels = partials.shape
    sums = tuple(torch.empty(channels, dtype=torch.float32, device=partials.device) for _ in range(count))
    tensors = {"partials_ptr": partials, **dict(zip(_SUMS, sums, strict=False))}
    _over_channels("sum", rows, channels, count, tuple(tensors))(**tensors)
    return sums


class PartialSums(NamedTuple):
    """Gradients of the scale and the shift of an affine that are still to be summed over rows.

    Attributes:
        partials: (rows, K, C), float32, contiguous.
        scale: Which of the K vectors of each row is of the scale's gradient.
        shift: Which is of the shift's.
    """

    partials: Tensor
    scale: int
    shift: int

    @classmethod
    def of(cls, partials: Tensor, scale: int, shift: int) -> PartialSums:
        """With few enough rows for the kernel that makes use of them to sum them up by the way."""
        return cls(_shortened(partials), scale, shift)

    def summed(self) -> tuple[Tensor, Tensor]:
        """The gradients, (C,) each."""
        sums = sum_partials(self.partials)
        return sums[self.scale], sums[self.shift]


def _shortened(partials: Tensor) -> Tensor:
    rows, count, channels = partials.shape
    if rows <= _LONGEST_WALK:
        return partials
    launch, shares = _over_rows("sum", rows, count * channels)
    added = partials.new_empty(shares, count, channels)
    launch(partials_ptr=partials, first_ptr=added)
    return added


# Pieces of 32 bytes that a program reads, one at a time as the memory pipe of a multiprocessor does. Beyond, a launch
# before spreads the rows over all multiprocessors, in pieces of 128 bytes: a prediction from measured 30 GB/s of one.
_LONGEST_WALK = 6144
_MOST_SHARES = 128  # rows that the first launch leaves for the second
_KERNELS = {"merge": merge_partials_kernel, "sum": sum_partials_kernel}
_SUMS = ("first_ptr", "second_ptr", "third_ptr")
# Arguments that may be None, and numbers that only go with some of those.
_OPTIONAL = {
    "merge": [name for name in merge_partials_kernel.arg_names if name.endswith("_ptr") and name != "partials_ptr"],
    "sum": _SUMS,
}
_NUMBERS = {"merge": {"origin_step": 0, "eps": 0.0, "momentum": 0.0}, "sum": {}}


@functools.lru_cache(maxsize=4096)
def _over_rows(name: str, rows: int, channels: int) -> tuple[Launch, int]:
    """The launch that gives every program a share of the rows of some channels, and the number of shares."""
    block_r = 64
    share = triton.cdiv(triton.cdiv(rows, block_r), _MOST_SHARES) * block_r
    shares = triton.cdiv(rows, share)
    names = ("merged_ptr",) if name == "merge" else _SUMS[:1]
    sizes = {"rows": rows, "share": share, "channels": channels}
    blocks, options = {"BLOCK_R": block_r, "BLOCK_C": 32}, {"num_warps": 4, "enable_fp_fusion": True}
    return _launch(name, names, sizes, shares, blocks, options), shares


@functools.lru_cache(maxsize=4096)
def _over_channels(
    name: str, rows: int, channels: int, results: int, names: tuple[str, ...], **numbers: float
) -> Launch:
    """The launch that gives every program a few channels and all rows; ``names``: the tensors that there are."""
    sizes = {"rows": rows, "share": rows, "channels": channels, **numbers}
    return _launch(name, names, sizes, results, *walk_down(rows))


def walk_down(rows: int) -> tuple[dict[str, int], dict[str, Any]]:
    """BLOCK_R and BLOCK_C, and launch options, of programs that each have a few channels of all rows."""
    # Every step waits for memory once: thousands of rows want few, large steps.
    block_r = min(1024, max(16, triton.next_power_of_2(rows)))
    return {"BLOCK_R": block_r, "BLOCK_C": 8}, {"num_warps": max(4, block_r // 64), "enable_fp_fusion": True}


def _launch(
    name: str,
    names: tuple[str, ...],
    sizes: dict[str, float],
    repeats: int,
    blocks: dict[str, int],
    options: dict[str, Any],
) -> Launch:
    absent = dict.fromkeys(set(_OPTIONAL[name]) - set(names))
    programs = triton.cdiv(int(sizes["channels"]), blocks["BLOCK_C"]) * repeats
    return Launch(_KERNELS[name], programs, _NUMBERS[name] | sizes, blocks | absent, options)
