"""Triton kernel of the input gradient at stride 2, in strips (grouped_conv.py)."""

import triton
import triton.language as tl

from .grouped_conv_fusion import (
    columns_inside,
    finish_tiles,
    load_columns,
    may_have_leaked,
    open_source,
    open_state,
    open_target,
    store_state,
)
from .grouped_conv_tiles import aligned, dot, exact_tile, in_registers, weight_tiles, zero_tiles


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
    src_z_ptr,  # as src
    src_center_ptr,  # (src_channels,), as the next two; prologues are described in grouped_conv_fusion.py
    src_scale_ptr,
    src_shift_ptr,
    weight_ptr,  # (C_out, C_in / groups, 3, 3), or with TAPS_OUTSIDE (C_out, 3, 3, C_in / groups)
    dst_ptr,  # dx (batch, dst_height, dst_width, dst_channels)
    dst_side_ptr,  # as dst
    dst_center_ptr,  # (dst_channels,), as the next two; likewise epilogues
    dst_scale_ptr,
    dst_shift_ptr,
    partials_ptr,  # (programs / tiles, 2, dst_channels), from the epilogue's state
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
    PROLOGUE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SOURCE_IN_REGISTERS: tl.constexpr,
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
    in_tile_k = (offs_k < MERGED * GROUP_K) & (channel_k < src_channels)
    in_tile_n = (offs_n < MERGED * GROUP_N) & (channel_n < dst_channels)
    mask_k = in_tile_k[None, :]
    mask_n = in_tile_n[None, :]

    src_pointers = (src_ptr, src_z_ptr, src_center_ptr, src_scale_ptr, src_shift_ptr)
    src_offs = (image * src_height * src_width + src_column) * src_channels
    count = tl.cast(batch, tl.float32) * src_height * src_width
    source = open_source(src_pointers, src_offs, channel_k, in_tile_k, count, PROLOGUE)
    dst_pointers = (dst_ptr, dst_side_ptr, dst_center_ptr, dst_scale_ptr, dst_shift_ptr)
    dst_offs = (image * dst_height * dst_width + dst_column) * dst_channels
    target = open_target(dst_pointers, dst_offs, channel_n, in_tile_n)
    state = open_state(BLOCK_M, BLOCK_N, EPILOGUE)

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

    # dy row r is the middle of dx row 2r, begins dx row 2r + 1 and ends dx row 2r - 1.
    odd_row = zero_tiles(2 * STRIP, BLOCK_M, BLOCK_N)
    for i in range(0, rows + 1):
        src_row = first_row + i
        mask_row = mask_m & (src_row < src_height)
        offset = src_row * src_width * src_channels
        dy = load_columns(source, offset, src_column, src_width, src_channels, mask_row, mask_k, STRIP + 1, PROLOGUE)
        dy = in_registers(dy, SOURCE_IN_REGISTERS)
        done = _accumulate_strided(odd_row, dy, weights, 0, PRECISION)
        masks = columns_inside(mask_m & (i >= 1) & (src_row * 2 - 1 < dst_height), dst_column, dst_width, 2 * STRIP)
        offset = (src_row * 2 - 1) * dst_width * dst_channels
        state = finish_tiles(target, offset, dst_channels, done, masks, mask_n, state, EPILOGUE)
        odd_row = _accumulate_strided(zero_tiles(2 * STRIP, BLOCK_M, BLOCK_N), dy, weights, 2, PRECISION)
        done = _accumulate_strided(zero_tiles(2 * STRIP, BLOCK_M, BLOCK_N), dy, weights, 1, PRECISION)
        offset = src_row * 2 * dst_width * dst_channels
        masks = columns_inside(mask_m & (i < rows), dst_column, dst_width, 2 * STRIP)
        state = finish_tiles(target, offset, dst_channels, done, masks, mask_n, state, EPILOGUE)

    if MERGED > 1 and may_have_leaked(state, EPILOGUE):
        tl.debug_barrier()  # Overwrites what other threads of this program have just stored.
        state = open_state(BLOCK_M, BLOCK_N, EPILOGUE)
        for i in range(0, 2 * rows):
            dst_row = first_row * 2 + i
            for c in range(0, 2 * STRIP):
                mask = mask_m & (dst_row < dst_height) & (dst_column + c < dst_width)
                value = exact_tile(
                    src_pointers,
                    weight_ptr,
                    image,
                    dst_row,
                    dst_column + c,
                    pid_tile,
                    src_height,
                    src_width,
                    src_channels,
                    count,
                    GROUP_N if TAPS_OUTSIDE else 1,
                    GROUP_N * 9,
                    1 if TAPS_OUTSIDE else 9,
                    mask[:, None] & mask_n,
                    2,
                    2,
                    True,
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
