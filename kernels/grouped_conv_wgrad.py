"""Triton kernels of the weight gradient, in strips and in taps (grouped_conv.py).

The weight gradient of one tile is, for each tap, [N, pixels] @ [pixels, K]: dy transposed times x shifted. Each program
sums over its share of the pixels and stores float32 partial sums (splits, C_out, C_in / groups, 3, 3), of merged tiles
the diagonal blocks alone; the launcher adds them up in a fixed order. A NaN or Inf stays in its own (out, in) channel
pair, whose nine taps it may all reach.
"""

import triton
import triton.language as tl

from .grouped_conv_fusion import load_columns, load_source, open_source
from .grouped_conv_tiles import aligned, dot, in_registers, zero_tiles


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
    grad_z_ptr,  # as grad
    grad_center_ptr,  # (out_channels,), as the next two; prologues are described in grouped_conv_fusion.py
    grad_scale_ptr,
    grad_shift_ptr,
    x_ptr,  # (batch, height, width, in_channels)
    x_center_ptr,  # (in_channels,), as the next two
    x_scale_ptr,
    x_shift_ptr,
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
    GRAD_PROLOGUE: tl.constexpr,
    X_PROLOGUE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
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
    in_tile_k = (offs_k < MERGED * GROUP_IN) & (channel_k < in_channels)
    in_tile_n = (offs_n < MERGED * GROUP_OUT) & (channel_n < out_channels)
    mask_k = in_tile_k[None, :]
    mask_n = in_tile_n[None, :]
    x_pointers = (x_ptr, None, x_center_ptr, x_scale_ptr, x_shift_ptr)
    grad_pointers = (grad_ptr, grad_z_ptr, grad_center_ptr, grad_scale_ptr, grad_shift_ptr)
    count = tl.cast(batch, tl.float32) * out_height * out_width
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
        x_offs = (image * height * width + column) * in_channels
        x_source = open_source(x_pointers, x_offs, channel_k, in_tile_k, count, X_PROLOGUE)
        grad_offs = (image * out_height * out_width + out_column) * out_channels
        grad_source = open_source(grad_pointers, grad_offs, channel_n, in_tile_n, count, GRAD_PROLOGUE)

        above = zero_tiles(STRIP, BLOCK_M, BLOCK_N, grad_ptr.dtype.element_ty)
        if STRIDE == 1:
            # x row r meets dy rows r - 1 (kernel row 2), r (kernel row 1) and r + 1 (kernel row 0).
            beside = zero_tiles(STRIP, BLOCK_M, BLOCK_N, grad_ptr.dtype.element_ty)
            for i in range(0, rows + 2):
                row = first_row + (i - 1)
                mask_row = mask_m & (row >= 0) & (row < height)
                offset = row * width * in_channels
                x = load_columns(x_source, offset, column, width, in_channels, mask_row, mask_k, columns, X_PROLOGUE)
                offset = (row + 1) * out_width * out_channels
                mask_row = mask_m & (i < rows)
                below = load_columns(
                    grad_source, offset, out_column, out_width, out_channels, mask_row, mask_n, STRIP, GRAD_PROLOGUE
                )
                accs = _accumulate_taps(accs, below, x, 0, 1, PRECISION)
                accs = _accumulate_taps(accs, beside, x, 3, 1, PRECISION)
                accs = _accumulate_taps(accs, above, x, 6, 1, PRECISION)
                above = in_registers(beside, ASSEMBLY)  # the compiler pipelines no loop that hands on what it was given
                beside = below
        else:
            # dy row r meets x rows 2r - 1 (kernel row 0), 2r (1) and 2r + 1 (2), the last together with dy row r + 1.
            for i in range(0, rows + 1):
                row = (first_row + i) * 2
                mask_row = mask_m & (row >= 1) & (row <= height)
                offset = (row - 1) * width * in_channels
                x = load_columns(x_source, offset, column, width, in_channels, mask_row, mask_k, columns, X_PROLOGUE)
                offset = (first_row + i) * out_width * out_channels
                mask_row = mask_m & (i < rows)
                beside = load_columns(
                    grad_source, offset, out_column, out_width, out_channels, mask_row, mask_n, STRIP, GRAD_PROLOGUE
                )
                accs = _accumulate_taps(accs, beside, x, 0, 2, PRECISION)
                accs = _accumulate_taps(accs, above, x, 6, 2, PRECISION)
                offset = row * width * in_channels
                x = load_columns(x_source, offset, column, width, in_channels, mask_row, mask_k, columns, X_PROLOGUE)
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
    grad_z_ptr,  # as grad
    grad_center_ptr,  # (out_channels,), as the next two; prologues are described in grouped_conv_fusion.py
    grad_scale_ptr,
    grad_shift_ptr,
    x_ptr,  # (batch, height, width, in_channels)
    x_center_ptr,  # (in_channels,), as the next two
    x_scale_ptr,
    x_shift_ptr,
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
    GRAD_PROLOGUE: tl.constexpr,
    X_PROLOGUE: tl.constexpr,
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
    in_tile_k = (offs_k < TILE_K) & (channel_k < in_channels)
    in_tile_n = (offs_n < TILE_N) & (channel_n < out_channels)
    x_pointers = (x_ptr, None, x_center_ptr, x_scale_ptr, x_shift_ptr)
    grad_pointers = (grad_ptr, grad_z_ptr, grad_center_ptr, grad_scale_ptr, grad_shift_ptr)
    count = tl.cast(batch, tl.float32) * out_height * out_width

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
        grad_offs = (image * out_pixels + pixel) * out_channels
        grad_source = open_source(grad_pointers, grad_offs, channel_n, in_tile_n, count, GRAD_PROLOGUE)
        grad = load_source(grad_source, 0, mask_m[:, None], in_tile_n[None, :], GRAD_PROLOGUE)
        x_offs = ((image * height + row) * width + column) * in_channels
        x_source = open_source(x_pointers, x_offs, channel_k, in_tile_k, count, X_PROLOGUE)
        mask_row = mask_m & (row >= 0) & (row < height)
        x = load_columns(x_source, 0, column, width, in_channels, mask_row, in_tile_k[None, :], 3, X_PROLOGUE)
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
