"""Triton kernels of the backward pass: strided input gradient, and weight gradient in strips and in taps.

The weight gradient of one tile is, for each tap, [N, pixels] @ [pixels, K]: dy transposed times x shifted. Each program
sums over its share of the pixels and stores float32 partial sums (splits, C_out, C_in / groups, 3, 3), of merged tiles
the diagonal blocks alone; the launcher adds them up in a fixed order. A NaN or Inf stays in its own (out, in) channel
pair, whose nine taps it may all reach.
"""

import triton
import triton.language as tl

from .grouped_conv_tiles import (
    aligned,
    dot,
    exact_tile,
    load_columns,
    nan_trace,
    store_columns,
    weight_tiles,
    zero_tiles,
)


@triton.jit
def _accumulate_strided(accs, dy, weights, KH: tl.constexpr, PRECISION: tl.constexpr):
    """One dy row through kernel row KH into the 2 * STRIP dx columns of a strip; dy[j + 1] is right of dy[j]."""
    sums = ()
    for j in tl.static_range(len(accs) // 2):
        sums += (dot(dy[j], weights[KH * 3 + 1], accs[2 * j], PRECISION),)
        odd = dot(dy[j], weights[KH * 3 + 2], accs[2 * j + 1], PRECISION)
        sums += (dot(dy[j + 1], weights[KH * 3], odd, PRECISION),)
    return sums


@triton.jit
def grouped_conv_dgrad_strided_kernel(
    src_ptr,  # dy (batch, src_height, src_width, src_channels)
    weight_ptr,  # (C_out, C_in / groups, 3, 3), or with TAPS_OUTSIDE (C_out, 3, 3, C_in / groups)
    dst_ptr,  # dx (batch, dst_height, dst_width, dst_channels)
    batch,
    src_height,
    src_width,
    src_channels,
    dst_height,
    dst_width,
    dst_channels,
    band,
    TAPS_OUTSIDE: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    MERGED: tl.constexpr,
    ALIGN: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Input gradient at stride 2: a 2x2 block of dx per dy pixel, walking down the rows of dy."""
    src_channels = aligned(src_channels, ALIGN)
    dst_channels = aligned(dst_channels, ALIGN)
    tiles = tl.cdiv(src_channels, MERGED * GROUP_K)
    bands = tl.cdiv(src_height, band)
    strips = tl.cdiv(src_width, STRIP)
    pid = tl.program_id(0)
    pid_tile = pid % tiles
    pid_band = pid // tiles % bands
    pid_m = (pid // tiles // bands).to(tl.int64)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    image = offs_m // strips
    src_column = (offs_m % strips).to(tl.int32) * STRIP
    dst_column = src_column * 2
    mask_m = image < batch
    first_row = (pid_band * band).to(tl.int64)
    rows = tl.minimum(band, src_height - pid_band * band)

    offs_k = tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N)
    channel_k = pid_tile * (MERGED * GROUP_K) + offs_k
    channel_n = pid_tile * (MERGED * GROUP_N) + offs_n
    mask_k = ((offs_k < MERGED * GROUP_K) & (channel_k < src_channels))[None, :]
    mask_n = ((offs_n < MERGED * GROUP_N) & (channel_n < dst_channels))[None, :]
    src_ptrs = src_ptr + (image * src_height * src_width + src_column)[:, None] * src_channels + channel_k[None, :]
    dst_ptrs = dst_ptr + (image * dst_height * dst_width + dst_column)[:, None] * dst_channels + channel_n[None, :]

    weights = weight_tiles(
        weight_ptr,
        pid_tile,
        src_channels // GROUP_K,
        False,
        True,
        TAPS_OUTSIDE,
        GROUP_K,
        GROUP_N,
        MERGED,
        BLOCK_K,
        BLOCK_N,
    )
    no_bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    trace = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    # dy row r is the middle of dx row 2r, begins dx row 2r + 1 and ends dx row 2r - 1.
    odd_row = zero_tiles(2 * STRIP, BLOCK_M, BLOCK_N)
    for i in range(0, rows + 1):
        src_row = first_row + i
        row_ptrs = src_ptrs + src_row * src_width * src_channels
        mask_row = mask_m & (src_row < src_height)
        dy = load_columns(row_ptrs, src_column, src_width, src_channels, mask_row, mask_k, STRIP + 1)
        done = _accumulate_strided(odd_row, dy, weights, 0, PRECISION)
        mask_row = mask_m & (i >= 1) & (src_row * 2 - 1 < dst_height)
        out_ptrs = dst_ptrs + (src_row * 2 - 1) * dst_width * dst_channels
        store_columns(out_ptrs, done, no_bias, dst_column, dst_width, dst_channels, mask_row, mask_n, 1)
        trace = nan_trace(trace, done)
        odd_row = _accumulate_strided(zero_tiles(2 * STRIP, BLOCK_M, BLOCK_N), dy, weights, 2, PRECISION)
        done = _accumulate_strided(zero_tiles(2 * STRIP, BLOCK_M, BLOCK_N), dy, weights, 1, PRECISION)
        out_ptrs = dst_ptrs + src_row * 2 * dst_width * dst_channels
        store_columns(out_ptrs, done, no_bias, dst_column, dst_width, dst_channels, mask_m & (i < rows), mask_n, 1)
        trace = nan_trace(trace, done)

    if MERGED > 1:
        total = tl.sum(trace)
        if total != total:
            tl.debug_barrier()  # Overwrites what other threads of this program have just stored.
            for i in range(0, 2 * rows):
                dst_row = first_row * 2 + i
                for c in range(0, 2 * STRIP):
                    mask = (mask_m & (dst_row < dst_height) & (dst_column + c < dst_width))[:, None] & mask_n
                    value = exact_tile(
                        src_ptr,
                        weight_ptr,
                        image,
                        dst_row,
                        dst_column + c,
                        pid_tile,
                        src_height,
                        src_width,
                        src_channels,
                        GROUP_N if TAPS_OUTSIDE else 1,
                        GROUP_N * 9,
                        1 if TAPS_OUTSIDE else 9,
                        mask,
                        2,
                        2,
                        True,
                        GROUP_K,
                        GROUP_N,
                        MERGED,
                        BLOCK_M,
                        BLOCK_N,
                    )
                    out_ptrs = dst_ptrs + (dst_row * dst_width + c) * dst_channels
                    tl.store(out_ptrs, value.to(dst_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _accumulate_taps(accs, dy, x, FIRST: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr):
    """acc[FIRST + kw] += sum over the strip's dy columns c of dy[c]^T @ x[c * STRIDE + kw]; the others as they are."""
    sums = ()
    for tap in tl.static_range(len(accs)):
        acc = accs[tap]
        if tap >= FIRST and tap < FIRST + 3:
            for c in tl.static_range(len(dy)):
                acc = dot(tl.trans(dy[c]), x[c * STRIDE + tap - FIRST], acc, PRECISION)
        sums += (acc,)
    return sums


@triton.jit
def _store_partials(
    partials_ptr,
    accs,
    pid_split,
    tile,
    first_n,
    first_k,
    first_tap,
    out_channels,
    in_channels,
    GROUP_IN: tl.constexpr,
    GROUP_OUT: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store the diagonal blocks of tap tiles [BLOCK_N, BLOCK_K] into partials (splits, C_out, C_in / groups, 9)."""
    offs_k = first_k + tl.arange(0, BLOCK_K)[None, :]
    offs_n = first_n + tl.arange(0, BLOCK_N)[:, None]
    channel_k = tile * (MERGED * GROUP_IN) + offs_k
    channel_n = tile * (MERGED * GROUP_OUT) + offs_n
    mask = (offs_k // GROUP_IN == offs_n // GROUP_OUT) & (offs_k < MERGED * GROUP_IN)
    mask = mask & (channel_k < in_channels) & (channel_n < out_channels)
    offs = ((pid_split.to(tl.int64) * out_channels + channel_n) * GROUP_IN + offs_k % GROUP_IN) * 9
    for tap in tl.static_range(len(accs)):
        tl.store(partials_ptr + offs + (first_tap + tap), accs[tap], mask=mask)


@triton.jit
def grouped_conv_wgrad_strips_kernel(
    grad_ptr,  # (batch, out_height, out_width, out_channels)
    x_ptr,  # (batch, height, width, in_channels)
    partials_ptr,  # (splits, C_out, C_in / groups, 3, 3)
    batch,
    height,
    width,
    in_channels,
    out_height,
    out_width,
    out_channels,
    band,
    splits,
    STRIDE: tl.constexpr,
    GROUP_IN: tl.constexpr,
    GROUP_OUT: tl.constexpr,
    MERGED: tl.constexpr,
    ALIGN: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weight gradient of one tile over every splits-th strip-by-band block; x slides past the dy rows it meets."""
    in_channels = aligned(in_channels, ALIGN)
    out_channels = aligned(out_channels, ALIGN)
    tiles = tl.cdiv(in_channels, MERGED * GROUP_IN)
    bands = tl.cdiv(out_height, band)
    strips = tl.cdiv(out_width, STRIP)
    pid = tl.program_id(0)
    pid_tile = pid % tiles
    pid_split = pid // tiles

    offs_k = tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N)
    channel_k = pid_tile * (MERGED * GROUP_IN) + offs_k
    channel_n = pid_tile * (MERGED * GROUP_OUT) + offs_n
    mask_k = ((offs_k < MERGED * GROUP_IN) & (channel_k < in_channels))[None, :]
    mask_n = ((offs_n < MERGED * GROUP_OUT) & (channel_n < out_channels))[None, :]
    columns: tl.constexpr = (STRIP - 1) * STRIDE + 3

    accs = zero_tiles(9, BLOCK_N, BLOCK_K)
    for block in range(pid_split, tl.cdiv(batch * strips, BLOCK_M) * bands, splits):
        offs_m = (block // bands) * BLOCK_M + tl.arange(0, BLOCK_M)
        image = (offs_m // strips).to(tl.int64)
        out_column = offs_m % strips * STRIP
        column = out_column * STRIDE - 1
        mask_m = image < batch
        first_row = (block % bands * band).to(tl.int64)
        rows = tl.minimum(band, out_height - block % bands * band)
        x_ptrs = x_ptr + (image * height * width + column)[:, None] * in_channels + channel_k[None, :]
        grad_image = image * out_height * out_width + out_column
        grad_ptrs = grad_ptr + grad_image[:, None] * out_channels + channel_n[None, :]

        above = zero_tiles(STRIP, BLOCK_M, BLOCK_N, grad_ptr.dtype.element_ty)
        if STRIDE == 1:
            # x row r meets dy rows r - 1 (kernel row 2), r (kernel row 1) and r + 1 (kernel row 0).
            beside = zero_tiles(STRIP, BLOCK_M, BLOCK_N, grad_ptr.dtype.element_ty)
            for i in range(0, rows + 2):
                row = first_row + (i - 1)
                mask_row = mask_m & (row >= 0) & (row < height)
                row_ptrs = x_ptrs + row * width * in_channels
                x = load_columns(row_ptrs, column, width, in_channels, mask_row, mask_k, columns)
                row_ptrs = grad_ptrs + (row + 1) * out_width * out_channels
                below = load_columns(row_ptrs, out_column, out_width, out_channels, mask_m & (i < rows), mask_n, STRIP)
                accs = _accumulate_taps(accs, below, x, 0, 1, PRECISION)
                accs = _accumulate_taps(accs, beside, x, 3, 1, PRECISION)
                accs = _accumulate_taps(accs, above, x, 6, 1, PRECISION)
                above = beside
                beside = below
        else:
            # dy row r meets x rows 2r - 1 (kernel row 0), 2r (1) and 2r + 1 (2), the last together with dy row r + 1.
            for i in range(0, rows + 1):
                row = (first_row + i) * 2
                mask_row = mask_m & (row >= 1) & (row <= height)
                row_ptrs = x_ptrs + (row - 1) * width * in_channels
                x = load_columns(row_ptrs, column, width, in_channels, mask_row, mask_k, columns)
                grad_row_ptrs = grad_ptrs + (first_row + i) * out_width * out_channels
                beside = load_columns(
                    grad_row_ptrs, out_column, out_width, out_channels, mask_m & (i < rows), mask_n, STRIP
                )
                accs = _accumulate_taps(accs, beside, x, 0, 2, PRECISION)
                accs = _accumulate_taps(accs, above, x, 6, 2, PRECISION)
                row_ptrs = x_ptrs + row * width * in_channels
                x = load_columns(row_ptrs, column, width, in_channels, mask_m & (i < rows), mask_k, columns)
                accs = _accumulate_taps(accs, beside, x, 3, 2, PRECISION)
                above = beside

    _store_partials(
        partials_ptr,
        accs,
        pid_split,
        pid_tile,
        0,
        0,
        0,
        out_channels,
        in_channels,
        GROUP_IN,
        GROUP_OUT,
        MERGED,
        BLOCK_K,
        BLOCK_N,
    )


@triton.jit
def grouped_conv_wgrad_taps_kernel(
    grad_ptr,  # (batch, out_height, out_width, out_channels)
    x_ptr,  # (batch, height, width, in_channels)
    partials_ptr,  # (splits, C_out, C_in / groups, 3, 3)
    batch,
    height,
    width,
    in_channels,
    out_height,
    out_width,
    out_channels,
    share,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    GROUP_IN: tl.constexpr,
    GROUP_OUT: tl.constexpr,
    MERGED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weight gradient of one kernel row (three taps) of a BLOCK_N x BLOCK_K channel block over `share` pixels."""
    in_channels = aligned(in_channels, ALIGN)
    out_channels = aligned(out_channels, ALIGN)
    TILE_K: tl.constexpr = MERGED * GROUP_IN
    TILE_N: tl.constexpr = MERGED * GROUP_OUT
    blocks_k: tl.constexpr = (TILE_K + BLOCK_K - 1) // BLOCK_K
    blocks_n: tl.constexpr = (TILE_N + BLOCK_N - 1) // BLOCK_N
    tiles = tl.cdiv(in_channels, TILE_K)
    pid = tl.program_id(0)
    first_k = pid % blocks_k * BLOCK_K
    first_n = pid // blocks_k % blocks_n * BLOCK_N
    kh = pid // blocks_k // blocks_n % 3
    pid_tile = pid // blocks_k // blocks_n // 3 % tiles
    pid_split = pid // blocks_k // blocks_n // 3 // tiles

    offs_k = first_k + tl.arange(0, BLOCK_K)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    channel_k = pid_tile * TILE_K + offs_k
    channel_n = pid_tile * TILE_N + offs_n
    mask_k = ((offs_k < TILE_K) & (channel_k < in_channels))[None, :]
    mask_n = ((offs_n < TILE_N) & (channel_n < out_channels))[None, :]

    # 64-bit division once; inside the loop pixels count from the first image of this share.
    out_pixels = out_height * out_width
    first_pixel = pid_split.to(tl.int64) * share
    first_image = first_pixel // out_pixels
    first_offset = (first_pixel % out_pixels).to(tl.int32)
    accs = zero_tiles(3, BLOCK_N, BLOCK_K)
    for start in range(0, share, BLOCK_M):
        offs_m = first_offset + start + tl.arange(0, BLOCK_M)
        image = first_image + offs_m // out_pixels
        pixel = offs_m % out_pixels
        row = pixel // out_width * STRIDE_H - 1 + kh
        column = pixel % out_width * STRIDE_W - 1
        mask_m = image < batch
        grad_ptrs = grad_ptr + (image * out_pixels + pixel)[:, None] * out_channels + channel_n[None, :]
        grad = tl.load(grad_ptrs, mask=mask_m[:, None] & mask_n, other=0.0)
        x_pixel = (image * height + row) * width + column
        x_ptrs = x_ptr + x_pixel[:, None] * in_channels + channel_k[None, :]
        mask_row = mask_m & (row >= 0) & (row < height)
        x = load_columns(x_ptrs, column, width, in_channels, mask_row, mask_k, 3)
        accs = _accumulate_taps(accs, (grad,), x, 0, 1, PRECISION)

    _store_partials(
        partials_ptr,
        accs,
        pid_split,
        pid_tile,
        first_n,
        first_k,
        kh * 3,
        out_channels,
        in_channels,
        GROUP_IN,
        GROUP_OUT,
        MERGED,
        BLOCK_K,
        BLOCK_N,
    )
