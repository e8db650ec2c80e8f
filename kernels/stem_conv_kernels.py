"""Triton kernels of convolutions of images (stem_conv.py): forward and weight gradient.

An image has so few channels that one row of the kernel is one step of a matrix product. What an output pixel sees
through that row are TAPS = columns of the kernel * CHANNELS neighbours in memory, its *taps*; a step has room for
BLOCK_K. Taps outside the image are zero.

Conventions as in pointwise_conv_kernels.py. Row sizes and positions in rows of the image count elements, not pixels.
"""

import triton
import triton.language as tl

from .grouped_conv_fusion import affine
from .grouped_conv_tiles import dot, zero_tiles
from .pointwise_conv_kernels import finish_pixels, load_gradient_affine
from .statistics import add_pixels_to_moments, merge_moments, store_moments


@triton.jit
def open_windows(
    x_ptr,
    pixel,
    mask_m,
    height,
    row_size,
    out_height,
    out_width,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    KERNEL_H: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SKIPPED: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What output pixels [M] see through the first row of the kernel, SKIPPED elements, the taps and some more.

    Returns that row of the image [M], pointers [M, BLOCK_K], and which of them are taps, inside the image's columns.
    With PAIRS, for elements of 16 bits, half as many to int32: windows and rows then begin at even elements.
    """
    row = pixel // out_width
    image = row // out_height
    top = row % out_height * STRIDE_H - KERNEL_H // 2
    left = (pixel % out_width * STRIDE_W - TAPS // CHANNELS // 2) * CHANNELS - SKIPPED
    first = (image * height + top) * row_size + left
    if PAIRS:
        element = tl.arange(0, BLOCK_K // 2)
        taps = element * 2 < SKIPPED + TAPS
        left, first, row_size = left >> 1, first >> 1, row_size >> 1
        ptrs = x_ptr.to(tl.pointer_type(tl.int32)) + first[:, None]
    else:
        element = tl.arange(0, BLOCK_K)
        taps = (element >= SKIPPED) & (element < SKIPPED + TAPS)
        ptrs = x_ptr + first[:, None]
    # One comparison for both ends: positions before the first are large unsigned ones.
    inside = (left[:, None] + element[None, :]).to(tl.uint32) < row_size.to(tl.uint32)
    return top, ptrs + element[None, :], inside & mask_m[:, None] & taps[None, :]


@triton.jit
def load_taps(window, height, row_size, kernel_row, TAPS: tl.constexpr, SKIPPED: tl.constexpr, DTYPE: tl.constexpr):
    """The taps [M, BLOCK_K] of one row of the kernel, in their places of a window; all else is zero."""
    top, ptrs, inside = window
    mask = inside & ((top + kernel_row).to(tl.uint32) < height.to(tl.uint32))[:, None]
    if ptrs.dtype.element_ty != DTYPE:
        both = tl.load(ptrs + (row_size >> 1) * kernel_row, mask=mask, other=0)
        pair = tl.arange(0, both.shape[1]) * 2
        kept = tl.where(pair >= SKIPPED, 0xFFFF, 0) | tl.where(pair + 1 < SKIPPED + TAPS, -65536, 0)
        both &= kept[None, :]
        parted = tl.join(both.to(tl.int16), (both >> 16).to(tl.int16))
        taps = tl.reshape(parted, (both.shape[0], both.shape[1] * 2)).to(DTYPE, bitcast=True)
    else:
        taps = tl.load(ptrs + row_size * kernel_row, mask=mask, other=0.0)
    return taps


@triton.jit
def stem_conv_fwd_kernel(
    x_ptr,  # (batch, height, width, channels)
    weight_ptr,  # (out_channels, KERNEL_H, KERNEL_W, channels)
    y_scale_ptr,  # (out_channels,) or None
    y_shift_ptr,  # (out_channels,) or None
    residual_ptr,  # like y, or None
    y_ptr,  # (batch, out_height, out_width, out_channels)
    partials_ptr,  # (walkers, 3, out_channels): moments of y, or None
    pixels,
    height,
    row_size,
    out_height,
    out_width,
    out_channels,
    walkers,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    KERNEL_H: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SKIPPED: tl.constexpr,
    PAIRS: tl.constexpr,
    RELU: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_N output channels of every walkers-th block of BLOCK_M pixels, and the moments of each channel's pixels."""
    blocks_n = tl.cdiv(out_channels, BLOCK_N)
    walker = tl.program_id(0) // blocks_n
    channel = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = channel < out_channels
    tap = tl.arange(0, BLOCK_K) - SKIPPED
    mask_k = (tap >= 0) & (tap < TAPS)
    weights = ()
    for i in tl.static_range(KERNEL_H):
        ptrs = weight_ptr + (channel * (KERNEL_H * TAPS) + i * TAPS)[None, :] + tap[:, None]
        weights += (tl.load(ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0),)
    if partials_ptr is not None:
        counts = tl.zeros((BLOCK_M // 2,), dtype=tl.float32)
        means = tl.zeros((BLOCK_M // 2, BLOCK_N), dtype=tl.float32)
        m2s = tl.zeros((BLOCK_M // 2, BLOCK_N), dtype=tl.float32)
    for block in range(walker, tl.cdiv(pixels, BLOCK_M), walkers):
        pixel = block * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = pixel < pixels
        window = open_windows(
            x_ptr,
            pixel,
            mask_m,
            height,
            row_size,
            out_height,
            out_width,
            STRIDE_H,
            STRIDE_W,
            KERNEL_H,
            TAPS,
            CHANNELS,
            SKIPPED,
            PAIRS,
            BLOCK_K,
        )
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for i in tl.static_range(KERNEL_H):
            taps = load_taps(window, height, row_size, i, TAPS, SKIPPED, x_ptr.dtype.element_ty)
            acc = dot(taps, weights[i], acc, PRECISION)
        y_pointers = (y_ptr, y_scale_ptr, y_shift_ptr, residual_ptr)
        y = finish_pixels(acc, y_pointers, pixel, mask_m, channel, mask_n, out_channels, RELU, ASSEMBLY)
        if partials_ptr is not None:
            counts, means, m2s = add_pixels_to_moments(counts, means, m2s, y, mask_m)
    if partials_ptr is not None:
        count, mean, m2 = merge_moments(counts[:, None], means, m2s)
        store_moments(partials_ptr, walker, out_channels, channel, mask_n, count, mean, m2)


@triton.jit
def stem_conv_wgrad_kernel(
    grad_ptr,  # (batch, out_height, out_width, out_channels)
    z_ptr,  # like grad, or None: no gradient prologue
    z_center_ptr,  # (out_channels,) or None with z_ptr, like the next two
    z_scale_ptr,
    z_shift_ptr,
    x_ptr,  # (batch, height, width, channels)
    partials_ptr,  # (splits, out_channels, KERNEL_H, KERNEL_W, channels)
    pixels,
    height,
    row_size,
    out_height,
    out_width,
    out_channels,
    share,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    KERNEL_H: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SKIPPED: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_N output channels x all taps, summed over `share` pixels in steps of BLOCK_M."""
    blocks_n = tl.cdiv(out_channels, BLOCK_N)
    split = tl.program_id(0) // blocks_n
    channel = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = channel < out_channels
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    center, scale, constant = load_gradient_affine(
        z_center_ptr, z_scale_ptr, z_shift_ptr, pixels, channel, mask_n, dtype
    )
    accs = zero_tiles(KERNEL_H, BLOCK_N, BLOCK_K)
    last_pixel = tl.minimum(split * share + share, pixels)
    for first in range(split * share, last_pixel, BLOCK_M):
        pixel = first + tl.arange(0, BLOCK_M)
        mask_m = pixel < last_pixel
        mask = mask_m[:, None] & mask_n[None, :]
        offs = pixel.to(tl.int64)[:, None] * out_channels + channel[None, :]
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0)
        if z_ptr is not None:
            z = tl.load(z_ptr + offs, mask=mask, other=0.0)
            wide = grad.to(tl.float32) + affine(z, center, scale, constant)
            grad = tl.where(mask_m[:, None], wide, 0.0).to(grad.dtype)
        turned = tl.trans(grad)
        window = open_windows(
            x_ptr,
            pixel,
            mask_m,
            height,
            row_size,
            out_height,
            out_width,
            STRIDE_H,
            STRIDE_W,
            KERNEL_H,
            TAPS,
            CHANNELS,
            SKIPPED,
            PAIRS,
            BLOCK_K,
        )
        sums = ()
        for i in tl.static_range(KERNEL_H):
            taps = load_taps(window, height, row_size, i, TAPS, SKIPPED, x_ptr.dtype.element_ty)
            sums += (dot(turned, taps, accs[i], PRECISION),)
        accs = sums
    tap = tl.arange(0, BLOCK_K) - SKIPPED
    mask = mask_n[:, None] & ((tap >= 0) & (tap < TAPS))[None, :]
    offs = ((split.to(tl.int64) * out_channels + channel) * (KERNEL_H * TAPS))[:, None] + tap[None, :]
    for i in tl.static_range(KERNEL_H):
        tl.store(partials_ptr + offs + i * TAPS, accs[i], mask=mask)
