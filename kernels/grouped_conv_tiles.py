"""Device functions shared by the grouped-convolution kernels: weight tiles, their products, exact repair.

Conventions. Activations are NHWC. A kernel reads a *source* and writes a *destination*: (x, y) in the forward pass,
(dy, dx) in the input gradient. K indexes the source channels of one tile, N its destination channels; MERGED
neighbouring groups of GROUP_K and GROUP_N channels share a tile. TRANSPOSED is true in the input gradient.
"""

import triton
import triton.language as tl

from .grouped_conv_fusion import load_source, open_source


@triton.jit
def probe_kernel(out_ptr):
    """The least a launch can do: out[0] = 1."""
    tl.store(out_ptr, 1)


@triton.jit
def zero_tiles(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr = tl.float32):
    """A tuple of COUNT zero tiles [ROWS, COLUMNS]."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles += (tl.zeros((ROWS, COLUMNS), dtype=DTYPE),)
    return tiles


@triton.jit
def aligned(size, ALIGN: tl.constexpr):
    """`size`, a multiple of ALIGN, in a form that shows the compiler so: it then loads ALIGN elements at once."""
    return size // ALIGN * ALIGN


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Add a @ b to acc [M, N] in float32."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _moved(tile):
    """The tile after a move from register to register that the compiler cannot see through."""
    per_register: tl.constexpr = 32 // tile.dtype.primitive_bitwidth
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], tile.dtype, True, per_register)


@triton.jit
def in_registers(tiles, SOURCE_IN_REGISTERS: tl.constexpr):
    """The tuple of tiles, with SOURCE_IN_REGISTERS for wgmma to take them from there.

    It takes its first operand from shared memory if that is where a load left it, but not what was computed since.
    """
    moved = ()
    if SOURCE_IN_REGISTERS:
        for i in tl.static_range(len(tiles)):
            moved += (_moved(tiles[i]),)
    else:
        moved = tiles
    return moved


@triton.jit
def weight_tile(
    weight_ptr,
    tile,
    groups,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TAPS_OUTSIDE: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Tap (KH, KW) of MERGED groups, block-diagonal [BLOCK_K, BLOCK_N], from the OIHW weight (OHWI: TAPS_OUTSIDE)."""
    offs_k = tl.arange(0, BLOCK_K)[:, None]
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    first_group = tile.to(tl.int64) * MERGED
    if TRANSPOSED:
        offs_out = first_group * GROUP_K + offs_k
        offs_in = offs_n % GROUP_N
        group_in: tl.constexpr = GROUP_N
    else:
        offs_out = first_group * GROUP_N + offs_n
        offs_in = offs_k % GROUP_K
        group_in: tl.constexpr = GROUP_K
    group_of_k = offs_k // GROUP_K
    mask = (group_of_k == offs_n // GROUP_N) & (group_of_k < MERGED) & (first_group + group_of_k < groups)
    stride_wi: tl.constexpr = 1 if TAPS_OUTSIDE else 9
    stride_wt: tl.constexpr = group_in if TAPS_OUTSIDE else 1
    offs = offs_out * (group_in * 9) + offs_in * stride_wi + (KH * 3 + KW) * stride_wt
    return tl.load(weight_ptr + offs, mask=mask, other=0.0)


@triton.jit
def weight_tiles(
    weight_ptr,
    tile,
    groups,
    FLIPPED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TAPS_OUTSIDE: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """All nine taps as a tuple in (kh, kw) order; FLIPPED turns the kernel by 180 degrees."""
    tiles = ()
    for tap in tl.static_range(9):
        tiles += (
            weight_tile(
                weight_ptr,
                tile,
                groups,
                (8 - tap) // 3 if FLIPPED else tap // 3,
                (8 - tap) % 3 if FLIPPED else tap % 3,
                TRANSPOSED,
                TAPS_OUTSIDE,
                GROUP_K,
                GROUP_N,
                MERGED,
                BLOCK_K,
                BLOCK_N,
            ),
        )
    return tiles


@triton.jit
def accumulate_row(accs, columns, weights, KH: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr):
    """One source row through the three taps of kernel row KH: acc[c] += sum over kw of column[c*STRIDE + kw] @ w."""
    sums = ()
    for c in tl.static_range(len(accs)):
        acc = accs[c]
        for kw in tl.static_range(3):
            acc = dot(columns[c * STRIDE + kw], weights[KH * 3 + kw], acc, PRECISION)
        sums += (acc,)
    return sums


@triton.jit
def exact_tile(
    source_pointers,  # as in open_source
    weight_ptr,
    image,
    row,
    column,
    tile,
    src_height,
    src_width,
    src_channels,
    count,
    stride_wt,
    stride_wo,
    stride_wi,
    mask,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PROLOGUE: tl.constexpr,
):
    """Destination pixels (image, row, column) [M] x the tile's channels, each channel from its own group alone.

    The matrix products multiply the other groups of a merged tile by zero, which turns their NaN and Inf into NaN.
    Tiles where that may have happened are computed again here, without matrix units.
    """
    offs_n = tl.arange(0, BLOCK_N)
    group = tile.to(tl.int64) * MERGED + offs_n // GROUP_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tap in range(0, 9):
        if TRANSPOSED:
            src_row = row + 1 - tap // 3
            src_column = column + 1 - tap % 3
            hit = (src_row >= 0) & (src_row % STRIDE_H == 0) & (src_column >= 0) & (src_column % STRIDE_W == 0)
            src_row = src_row // STRIDE_H
            src_column = src_column // STRIDE_W
        else:
            src_row = row * STRIDE_H - 1 + tap // 3
            src_column = column * STRIDE_W - 1 + tap % 3
            hit = (src_row >= 0) & (src_column >= 0)
        hit = hit & (src_row < src_height) & (src_column < src_width)
        mask_hit = hit[:, None] & mask  # of the weight too: its NaN and Inf count only where a pixel meets them
        offs_pixel = ((image * src_height + src_row) * src_width + src_column) * src_channels
        for k in range(0, GROUP_K):
            channel = group * GROUP_K + k
            source = open_source(source_pointers, offs_pixel, channel, channel < src_channels, count, PROLOGUE)
            value = load_source(source, 0, mask_hit, True, PROLOGUE)
            if TRANSPOSED:
                offs_w = channel * stride_wo + (offs_n % GROUP_N) * stride_wi
            else:
                offs_w = (group * GROUP_N + offs_n % GROUP_N) * stride_wo + k * stride_wi
            weight = tl.load(weight_ptr + (offs_w + tap * stride_wt)[None, :], mask=mask_hit, other=0.0)
            acc += value.to(tl.float32) * weight.to(tl.float32)
    return acc
