"""Triton kernels of the forward pass, which are also those of the input gradient: strips and taps (grouped_conv.py)."""

import triton
import triton.language as tl

from .grouped_conv_fusion import (
    columns_inside,
    finish_tiles,
    load_columns,
    load_source,
    may_have_leaked,
    open_source,
    open_state,
    open_target,
    store_state,
)
from .grouped_conv_tiles import accumulate_row, aligned, dot, exact_tile, in_registers, weight_tiles, zero_tiles


@triton.jit
def grouped_conv_strips_kernel(
    src_ptr,  # (batch, src_height, src_width, src_channels)
    src_z_ptr,  # as src
    src_center_ptr,  # (src_channels,), as the next two; prologues are described in grouped_conv_fusion.py
    src_scale_ptr,
    src_shift_ptr,
    weight_ptr,  # (C_out, C_in / groups, 3, 3), or with TAPS_OUTSIDE (C_out, 3, 3, C_in / groups)
    dst_ptr,  # (batch, dst_height, dst_width, dst_channels)
    dst_side_ptr,  # as dst
    dst_center_ptr,  # (dst_channels,), as the next two; likewise epilogues
    dst_scale_ptr,
    dst_shift_ptr,
    partials_ptr,  # (programs / tiles, 2 or 3, dst_channels), from the epilogue's state
    batch,
    src_height,
    src_width,
    src_channels,
    dst_height,
    dst_width,
    dst_channels,
    band,
    STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TAPS_OUTSIDE: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    MERGED: tl.constexpr,
    ALIGN: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PROLOGUE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SOURCE_IN_REGISTERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Forward at stride 1 or 2, or (TRANSPOSED) the input gradient at stride 1: a strip-by-band block per program."""
    src_channels = aligned(src_channels, ALIGN)
    dst_channels = aligned(dst_channels, ALIGN)
    tiles = tl.cdiv(src_channels, MERGED * GROUP_K)
    bands = tl.cdiv(dst_height, band)
    strips = tl.cdiv(dst_width, STRIP)
    pid = tl.program_id(0)
    pid_tile = pid % tiles
    pid_band = pid // tiles % bands
    pid_m = (pid // tiles // bands).to(tl.int64)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    image = offs_m // strips
    column = (offs_m % strips).to(tl.int32) * STRIP
    mask_m = image < batch
    first_row = (pid_band * band).to(tl.int64)
    rows = tl.minimum(band, dst_height - pid_band * band)

    offs_k = tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N)
    channel_k = pid_tile * (MERGED * GROUP_K) + offs_k
    channel_n = pid_tile * (MERGED * GROUP_N) + offs_n
    in_tile_k = (offs_k < MERGED * GROUP_K) & (channel_k < src_channels)
    in_tile_n = (offs_n < MERGED * GROUP_N) & (channel_n < dst_channels)
    mask_k = in_tile_k[None, :]
    mask_n = in_tile_n[None, :]

    src_column = column * STRIDE - 1
    src_pointers = (src_ptr, src_z_ptr, src_center_ptr, src_scale_ptr, src_shift_ptr)
    src_offs = (image * src_height * src_width + src_column) * src_channels
    count = tl.cast(batch, tl.float32) * src_height * src_width
    source = open_source(src_pointers, src_offs, channel_k, in_tile_k, count, PROLOGUE)
    dst_pointers = (dst_ptr, dst_side_ptr, dst_center_ptr, dst_scale_ptr, dst_shift_ptr)
    dst_offs = (image * dst_height * dst_width + column) * dst_channels
    target = open_target(dst_pointers, dst_offs, channel_n, in_tile_n)
    state = open_state(BLOCK_M, BLOCK_N, EPILOGUE)

    weights = weight_tiles(
        weight_ptr,
        pid_tile,
        src_channels // GROUP_K,
        TRANSPOSED,
        TRANSPOSED,
        TAPS_OUTSIDE,
        GROUP_K,
        GROUP_N,
        MERGED,
        BLOCK_K,
        BLOCK_N,
    )
    columns: tl.constexpr = (STRIP - 1) * STRIDE + 3

    if STRIDE == 1:
        # Source row r ends destination row r - 1 and goes on with row r and begins row r + 1.
        ending = zero_tiles(STRIP, BLOCK_M, BLOCK_N)
        going = zero_tiles(STRIP, BLOCK_M, BLOCK_N)
        for i in range(0, rows + 2):
            src_row = first_row + (i - 1)
            mask_row = mask_m & (src_row >= 0) & (src_row < src_height)
            offset = src_row * src_width * src_channels
            row = load_columns(source, offset, src_column, src_width, src_channels, mask_row, mask_k, columns, PROLOGUE)
            row = in_registers(row, SOURCE_IN_REGISTERS)
            done = accumulate_row(ending, row, weights, 2, 1, PRECISION)
            ending = accumulate_row(going, row, weights, 1, 1, PRECISION)
            going = accumulate_row(zero_tiles(STRIP, BLOCK_M, BLOCK_N), row, weights, 0, 1, PRECISION)
            offset = (src_row - 1) * dst_width * dst_channels
            masks = columns_inside(mask_m & (i >= 2), column, dst_width, STRIP)
            state = finish_tiles(target, offset, dst_channels, done, masks, mask_n, state, EPILOGUE)
    else:
        # Odd source row 2r - 1 ends destination row r - 1 and begins row r; even row 2r is the middle of row r.
        going = zero_tiles(STRIP, BLOCK_M, BLOCK_N)
        for i in range(0, rows + 1):
            src_row = (first_row + i) * 2
            mask_row = mask_m & (src_row >= 1) & (src_row <= src_height)
            offset = (src_row - 1) * src_width * src_channels
            row = load_columns(source, offset, src_column, src_width, src_channels, mask_row, mask_k, columns, PROLOGUE)
            row = in_registers(row, SOURCE_IN_REGISTERS)
            done = accumulate_row(going, row, weights, 2, 2, PRECISION)
            going = accumulate_row(zero_tiles(STRIP, BLOCK_M, BLOCK_N), row, weights, 0, 2, PRECISION)
            mask_row = mask_m & (i < rows)
            offset = src_row * src_width * src_channels
            row = load_columns(source, offset, src_column, src_width, src_channels, mask_row, mask_k, columns, PROLOGUE)
            row = in_registers(row, SOURCE_IN_REGISTERS)
            going = accumulate_row(going, row, weights, 1, 2, PRECISION)
            offset = (first_row + (i - 1)) * dst_width * dst_channels
            masks = columns_inside(mask_m & (i >= 1), column, dst_width, STRIP)
            state = finish_tiles(target, offset, dst_channels, done, masks, mask_n, state, EPILOGUE)

    if MERGED > 1 and may_have_leaked(state, EPILOGUE):
        tl.debug_barrier()  # Overwrites what other threads of this program have just stored.
        state = open_state(BLOCK_M, BLOCK_N, EPILOGUE)
        group_in: tl.constexpr = GROUP_N if TRANSPOSED else GROUP_K
        for i in range(0, rows):
            dst_row = first_row + i
            for c in range(0, STRIP):
                mask = mask_m & (column + c < dst_width)
                value = exact_tile(
                    src_pointers,
                    weight_ptr,
                    image,
                    dst_row,
                    column + c,
                    pid_tile,
                    src_height,
                    src_width,
                    src_channels,
                    count,
                    group_in if TAPS_OUTSIDE else 1,
                    group_in * 9,
                    1 if TAPS_OUTSIDE else 9,
                    mask[:, None] & mask_n,
                    STRIDE,
                    STRIDE,
                    TRANSPOSED,
                    GROUP_K,
                    GROUP_N,
                    MERGED,
                    BLOCK_M,
                    BLOCK_N,
                    PROLOGUE,
                )
                offset = (dst_row * dst_width + c) * dst_channels
                state = finish_tiles(target, offset, dst_channels, (value,), (mask,), mask_n, state, EPILOGUE)
    store_state(partials_ptr, pid // tiles, dst_channels, channel_n, in_tile_n, state, EPILOGUE)


@triton.jit
def grouped_conv_taps_kernel(
    src_ptr,  # (batch, src_height, src_width, src_channels)
    src_z_ptr,  # as src
    src_center_ptr,  # (src_channels,), as the next two; prologues are described in grouped_conv_fusion.py
    src_scale_ptr,
    src_shift_ptr,
    weight_ptr,  # (3, 3, C_out, C_in / groups)
    dst_ptr,  # (batch, dst_height, dst_width, dst_channels)
    dst_side_ptr,  # as dst
    dst_center_ptr,  # (dst_channels,), as the next two; likewise epilogues
    dst_scale_ptr,
    dst_shift_ptr,
    partials_ptr,  # (programs / tiles, 2 or 3, dst_channels), from the epilogue's state
    batch,
    src_height,
    src_width,
    src_channels,
    dst_height,
    dst_width,
    dst_channels,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    MERGED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PROLOGUE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Forward or (TRANSPOSED) input gradient at any stride: BLOCK_M pixels x BLOCK_N channels per program."""
    src_channels = aligned(src_channels, ALIGN)
    dst_channels = aligned(dst_channels, ALIGN)
    TILE_K: tl.constexpr = MERGED * GROUP_K
    TILE_N: tl.constexpr = MERGED * GROUP_N
    blocks_k: tl.constexpr = (TILE_K + BLOCK_K - 1) // BLOCK_K
    blocks_n: tl.constexpr = (TILE_N + BLOCK_N - 1) // BLOCK_N
    # Destination pixels of one parity form a grid of their own; without a strided gather there is one parity.
    PARITIES_H: tl.constexpr = STRIDE_H if TRANSPOSED else 1
    PARITIES_W: tl.constexpr = STRIDE_W if TRANSPOSED else 1
    grid_height = tl.cdiv(dst_height, PARITIES_H)
    grid_width = tl.cdiv(dst_width, PARITIES_W)

    tiles = tl.cdiv(src_channels, TILE_K)
    pid = tl.program_id(0)
    first_n = pid % blocks_n * BLOCK_N
    pid_tile = pid // blocks_n % tiles
    pid_pixel = pid // blocks_n // tiles
    parity_h = pid_pixel % PARITIES_H
    parity_w = pid_pixel // PARITIES_H % PARITIES_W
    pid_m = (pid_pixel // PARITIES_H // PARITIES_W).to(tl.int64)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    grid_column = (offs_m % grid_width).to(tl.int32)
    grid_row = (offs_m // grid_width % grid_height).to(tl.int32)
    image = offs_m // grid_width // grid_height
    dst_row = grid_row * PARITIES_H + parity_h
    dst_column = grid_column * PARITIES_W + parity_w
    mask_m = (image < batch) & (dst_row < dst_height) & (dst_column < dst_width)

    if TRANSPOSED:
        # dst + 1 - k must be a multiple of the stride: every STRIDE-th tap from first_k on reaches this parity.
        first_kh = (parity_h + 1) % STRIDE_H
        first_kw = (parity_w + 1) % STRIDE_W
        taps_h = (2 - first_kh) // STRIDE_H + 1
        taps_w = (2 - first_kw) // STRIDE_W + 1
        src_row = grid_row
        src_column = grid_column
    else:
        taps_h = 3
        taps_w = 3
        src_row = dst_row * STRIDE_H - 1
        src_column = dst_column * STRIDE_W - 1

    offs_k = tl.arange(0, BLOCK_K)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    channel_n = pid_tile * TILE_N + offs_n
    mask_n = (offs_n < TILE_N) & (channel_n < dst_channels)
    src_pointers = (src_ptr, src_z_ptr, src_center_ptr, src_scale_ptr, src_shift_ptr)
    src_pixel = (image * src_height + src_row) * src_width + src_column
    count = tl.cast(batch, tl.float32) * src_height * src_width
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, taps_h * taps_w * blocks_k):
        tap = step // blocks_k
        if TRANSPOSED:
            kh = first_kh + tap // taps_w * STRIDE_H
            kw = first_kw + tap % taps_w * STRIDE_W
            shift_h = (parity_h + 1 - kh) // STRIDE_H
            shift_w = (parity_w + 1 - kw) // STRIDE_W
        else:
            kh = tap // 3
            kw = tap % 3
            shift_h = kh
            shift_w = kw
        in_tile_k = step % blocks_k * BLOCK_K + offs_k
        channel_k = pid_tile * TILE_K + in_tile_k
        mask_k = (in_tile_k < TILE_K) & (channel_k < src_channels)
        row = src_row + shift_h
        column = src_column + shift_w
        hit = mask_m & (row >= 0) & (row < src_height) & (column >= 0) & (column < src_width)
        offs_src = (src_pixel + (shift_h * src_width + shift_w)) * src_channels
        source = open_source(src_pointers, offs_src, channel_k, mask_k, count, PROLOGUE)
        src = load_source(source, 0, hit[:, None], mask_k[None, :], PROLOGUE)
        mask_w = mask_k[:, None] & mask_n[None, :]
        if MERGED > 1:
            mask_w = mask_w & ((in_tile_k // GROUP_K)[:, None] == (offs_n // GROUP_N)[None, :])
        if TRANSPOSED:
            channel_out = (kh * 3 + kw) * src_channels + channel_k.to(tl.int64)
            offs_w = channel_out[:, None] * GROUP_N + (offs_n % GROUP_N)[None, :]
        else:
            channel_out = (kh * 3 + kw) * dst_channels + channel_n.to(tl.int64)
            offs_w = channel_out[None, :] * GROUP_K + (in_tile_k % GROUP_K)[:, None]
        weight = tl.load(weight_ptr + offs_w, mask=mask_w, other=0.0)
        acc = dot(src, weight, acc, PRECISION)

    if MERGED > 1:
        total = tl.sum(acc * 0.0)
        if total != total:
            group_in: tl.constexpr = GROUP_N if TRANSPOSED else GROUP_K
            out_channels = src_channels if TRANSPOSED else dst_channels
            acc = exact_tile(
                src_pointers,
                weight_ptr,
                image,
                dst_row,
                dst_column,
                pid_tile,
                src_height,
                src_width,
                src_channels,
                count,
                out_channels * group_in,
                group_in,
                1,
                mask_m[:, None] & mask_n[None, :],
                STRIDE_H,
                STRIDE_W,
                TRANSPOSED,
                GROUP_K,
                GROUP_N,
                MERGED,
                BLOCK_M,
                BLOCK_N,
                PROLOGUE,
            )
    dst_pointers = (dst_ptr, dst_side_ptr, dst_center_ptr, dst_scale_ptr, dst_shift_ptr)
    dst_offs = ((image * dst_height + dst_row) * dst_width + dst_column) * dst_channels
    target = open_target(dst_pointers, dst_offs, channel_n, mask_n)
    state = open_state(BLOCK_M, BLOCK_N, EPILOGUE)
    state = finish_tiles(target, 0, 0, (acc,), (mask_m,), mask_n[None, :], state, EPILOGUE)
    store_state(partials_ptr, pid_pixel, dst_channels, channel_n, mask_n, state, EPILOGUE)
