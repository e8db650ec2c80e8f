"""Triton kernels of the 1x1 convolution: forward, input gradient, weight gradient (pointwise_conv.py).

Conventions. Activations are NHWC. A pointer that is None switches off what it is read for. Pixels are those of the
output, which count through (batch, out_height, out_width); with strides each sees one pixel of the input. Vectors over
channels are float32. A prologue is relu(x_scale * (x - x_center) + x_shift), a gradient prologue adds to the gradient
what z contributes to through its statistics: 2 * z_scale / pixels * (z - z_center) + z_shift / pixels, where z_center
is the mean of z and z_scale and z_shift are the gradients of its variance and mean; before it may multiply the gradient
by a grad_scale. Channels that a block has beyond
the last one load as zeros and stay zeros in both: their vectors are zeros.

With DESCRIPTORS, arguments that are loaded block by block in the loop are tensor descriptors of matrices
(`Launch.blocks`), which load zeros outside of them; else pointers.
"""

import triton
import triton.language as tl

from .grouped_conv_fusion import affine, fold_center, load_vector, relu
from .grouped_conv_tiles import aligned, dot
from .statistics import add_pixels_to_moments, merge_moments, rounded, store_moments


@triton.jit
def input_pixel(pixel, height, width, out_height, out_width, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr):
    """The input pixel that each output pixel sees."""
    if STRIDE_H == 1 and STRIDE_W == 1:
        return pixel
    row = pixel // out_width
    image = row // out_height
    return (image * height + row % out_height * STRIDE_H) * width + pixel % out_width * STRIDE_W


@triton.jit
def load_affine(center_ptr, scale_ptr, shift_ptr, channel, mask, DTYPE: tl.constexpr):
    """Center, scale and constant (`fold_center`) of an affine of DTYPE at some channels; zeros outside the mask."""
    center = load_vector(center_ptr, channel, mask, 0.0)
    scale = load_vector(scale_ptr, channel, mask, 1.0)
    shift = load_vector(shift_ptr, channel, mask, 0.0)
    return center, scale, fold_center(center, scale, shift, DTYPE)


@triton.jit
def load_gradient_affine(mean_ptr, dvar_ptr, dmean_ptr, pixels, channel, mask, DTYPE: tl.constexpr):
    """The same of the affine by which z contributes to its gradient."""
    count = tl.cast(pixels, tl.float32)
    mean = load_vector(mean_ptr, channel, mask, 0.0)
    scale = load_vector(dvar_ptr, channel, mask, 0.0) * (2.0 / count)
    shift = load_vector(dmean_ptr, channel, mask, 0.0) / count
    return mean, scale, fold_center(mean, scale, shift, DTYPE)


@triton.jit
def load_activation(
    x_pointers, first_m, source, mask_m, first_k, in_channels, DESCRIPTORS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Pixels [M] x channels [BLOCK_K] from `first_k` on, behind the prologue; pointers (x, center, scale, shift).

    The pixels are `source`, or with DESCRIPTORS those from `first_m` on.
    """
    x_ptr, center_ptr, scale_ptr, shift_ptr = x_pointers
    channel = first_k + tl.arange(0, BLOCK_K)
    mask_k = channel < in_channels
    if DESCRIPTORS:
        a = x_ptr.load([first_m, first_k])
    else:
        ptrs = x_ptr + source.to(tl.int64)[:, None] * in_channels + channel[None, :]
        a = tl.load(ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
    if scale_ptr is not None:
        center, scale, constant = load_affine(center_ptr, scale_ptr, shift_ptr, channel, mask_k, a.dtype)
        a = relu(affine(a, center, scale, constant)).to(a.dtype)
    return a


@triton.jit
def load_weight(
    weight_ptr, first_n, channel_n, mask_n, first_k, in_channels, DESCRIPTORS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The weight's channels [BLOCK_K] from `first_k` on x `channel_n` [N], which begin with `first_n`."""
    if DESCRIPTORS:
        tile = weight_ptr.load([first_n, first_k]).T
    else:
        channel = first_k + tl.arange(0, BLOCK_K)
        ptrs = weight_ptr + channel_n.to(tl.int64)[None, :] * in_channels + channel[:, None]
        tile = tl.load(ptrs, mask=(channel < in_channels)[:, None] & mask_n[None, :], other=0.0)
    return tile


@triton.jit
def finish_pixels(
    acc, y_pointers, pixel, mask_m, channel, mask_n, out_channels, RELU: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """Store what becomes of `acc` [M, N] and return it; pointers (y, scale, shift, residual)."""
    y_ptr, scale_ptr, shift_ptr, residual_ptr = y_pointers
    mask = mask_m[:, None] & mask_n[None, :]
    offs = pixel.to(tl.int64)[:, None] * out_channels + channel[None, :]
    if scale_ptr is not None:
        acc *= load_vector(scale_ptr, channel, mask_n, 1.0)[None, :]
    if shift_ptr is not None:
        acc += load_vector(shift_ptr, channel, mask_n, 0.0)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        acc = relu(acc)
    y = rounded(acc, y_ptr.dtype.element_ty, ASSEMBLY)
    tl.store(y_ptr + offs, y, mask=mask)
    return y


@triton.jit
def pointwise_conv_fwd_kernel(
    x_ptr,  # (batch, height, width, in_channels), or its descriptor
    x_center_ptr,  # (in_channels,) or None
    x_scale_ptr,  # (in_channels,) or None: no prologue
    x_shift_ptr,  # (in_channels,) or None
    weight_ptr,  # (out_channels, in_channels), or its descriptor
    y_scale_ptr,  # (out_channels,) or None
    y_shift_ptr,  # (out_channels,) or None
    residual_ptr,  # like y, or None
    y_ptr,  # (batch, out_height, out_width, out_channels)
    partials_ptr,  # (walkers, 3, out_channels): moments of y, or None
    pixels,
    height,
    width,
    in_channels,
    out_height,
    out_width,
    out_channels,
    walkers,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ALIGN: tl.constexpr,
    RELU: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    RESIDENT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_N output channels of every walkers-th block of BLOCK_M pixels, and the moments of each channel's pixels.

    RESIDENT blocks of BLOCK_K input channels, all there are, are kept of the weight; with 0, and as many walkers as
    there are blocks of pixels, they are loaded one after the other.
    """
    in_channels = aligned(in_channels, ALIGN)
    out_channels = aligned(out_channels, ALIGN)
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(out_channels, BLOCK_N)
    walker = pid // blocks_n
    first_n = pid % blocks_n * BLOCK_N
    channel_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = channel_n < out_channels
    x_pointers = (x_ptr, x_center_ptr, x_scale_ptr, x_shift_ptr)
    y_pointers = (y_ptr, y_scale_ptr, y_shift_ptr, residual_ptr)
    offs_m = tl.arange(0, BLOCK_M)
    if RESIDENT == 0:
        first_m = walker * BLOCK_M
        pixel = first_m + offs_m
        mask_m = pixel < pixels
        source = input_pixel(pixel, height, width, out_height, out_width, STRIDE_H, STRIDE_W)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for first_k in range(0, in_channels, BLOCK_K):
            a = load_activation(x_pointers, first_m, source, mask_m, first_k, in_channels, DESCRIPTORS, BLOCK_K)
            w = load_weight(weight_ptr, first_n, channel_n, mask_n, first_k, in_channels, DESCRIPTORS, BLOCK_K)
            acc = dot(a, w, acc, PRECISION)
        y = finish_pixels(acc, y_pointers, pixel, mask_m, channel_n, mask_n, out_channels, RELU, ASSEMBLY)
        if partials_ptr is not None:
            # What was stored comes back laid out like memory, a few whole columns in every thread: in the accumulator's
            # own layout the sums over the rows would take several times the instructions and registers.
            tl.debug_barrier()
            mask = mask_m[:, None] & mask_n[None, :]
            offs_y = pixel.to(tl.int64)[:, None] * out_channels + channel_n[None, :]
            value = tl.load(y_ptr + offs_y, mask=mask, other=0.0).to(tl.float32)
            count = tl.minimum(pixels - first_m, BLOCK_M).to(tl.float32)
            mean = tl.sum(value, axis=0) / count
            deviation = tl.where(mask_m[:, None], value - mean[None, :], 0.0)
            m2 = tl.sum(deviation * deviation, axis=0)
            store_moments(partials_ptr, walker, out_channels, channel_n, mask_n, count, mean, m2)
    else:
        weights = ()
        for k in tl.static_range(RESIDENT):
            weights += (
                load_weight(weight_ptr, first_n, channel_n, mask_n, k * BLOCK_K, in_channels, DESCRIPTORS, BLOCK_K),
            )
        if partials_ptr is not None:
            counts = tl.zeros((BLOCK_M // 2,), dtype=tl.float32)
            means = tl.zeros((BLOCK_M // 2, BLOCK_N), dtype=tl.float32)
            m2s = tl.zeros((BLOCK_M // 2, BLOCK_N), dtype=tl.float32)
        for block in range(walker, tl.cdiv(pixels, BLOCK_M), walkers):
            first_m = block * BLOCK_M
            pixel = first_m + offs_m
            mask_m = pixel < pixels
            source = input_pixel(pixel, height, width, out_height, out_width, STRIDE_H, STRIDE_W)
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for k in tl.static_range(RESIDENT):
                a = load_activation(x_pointers, first_m, source, mask_m, k * BLOCK_K, in_channels, DESCRIPTORS, BLOCK_K)
                acc = dot(a, weights[k], acc, PRECISION)
            y = finish_pixels(acc, y_pointers, pixel, mask_m, channel_n, mask_n, out_channels, RELU, ASSEMBLY)
            if partials_ptr is not None:
                counts, means, m2s = add_pixels_to_moments(counts, means, m2s, y, mask_m)
        if partials_ptr is not None:
            count, mean, m2 = merge_moments(counts[:, None], means, m2s)
            store_moments(partials_ptr, walker, out_channels, channel_n, mask_n, count, mean, m2)


@triton.jit
def pointwise_conv_dgrad_kernel(
    grad_ptr,  # (batch, out_height, out_width, out_channels), or its descriptor
    grad_scale_ptr,  # (out_channels,) or None
    z_ptr,  # like grad, or None: no gradient prologue
    z_center_ptr,  # (out_channels,) or None with z_ptr, like the next two
    z_scale_ptr,
    z_shift_ptr,
    weight_ptr,  # (out_channels, in_channels), or its descriptor
    x_ptr,  # like dx, or None: the forward pass had no prologue
    x_center_ptr,  # (in_channels,) or None
    x_scale_ptr,  # (in_channels,) or None with x_ptr, like the next
    x_shift_ptr,
    dx_ptr,  # (batch, height, width, in_channels); with ADDS its first values are what is added
    partials_ptr,  # (blocks of pixels, 2, in_channels): sums for dscale and dshift, or None with x_ptr
    pixels,
    height,
    width,
    in_channels,
    out_height,
    out_width,
    out_channels,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ALIGN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M output pixels, with the input pixels up to the next one's, x BLOCK_N input channels."""
    in_channels = aligned(in_channels, ALIGN)
    out_channels = aligned(out_channels, ALIGN)
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(in_channels, BLOCK_N)
    pid_m = pid // blocks_n

    pixel = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = pixel < pixels
    first_n = pid % blocks_n * BLOCK_N
    channel_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = channel_n < in_channels
    offs_k = tl.arange(0, BLOCK_K)
    offs_grad = pixel.to(tl.int64)[:, None] * out_channels + offs_k[None, :]
    if not DESCRIPTORS:
        weight_ptrs = weight_ptr + offs_k[:, None] * in_channels + channel_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first_k in range(0, out_channels, BLOCK_K):
        mask_k = offs_k < out_channels - first_k
        mask = mask_m[:, None] & mask_k[None, :]
        if DESCRIPTORS:
            grad = grad_ptr.load([pid_m * BLOCK_M, first_k])
        else:
            grad = tl.load(grad_ptr + offs_grad + first_k, mask=mask, other=0.0)
        if z_ptr is not None:
            if DESCRIPTORS:
                z = z_ptr.load([pid_m * BLOCK_M, first_k])
            else:
                z = tl.load(z_ptr + offs_grad + first_k, mask=mask, other=0.0)
            center, scale, constant = load_gradient_affine(
                z_center_ptr, z_scale_ptr, z_shift_ptr, pixels, first_k + offs_k, mask_k, z.dtype
            )
            wide = grad.to(tl.float32)
            if grad_scale_ptr is not None:
                wide *= load_vector(grad_scale_ptr, first_k + offs_k, mask_k, 0.0)[None, :]
            grad = (wide + affine(z, center, scale, constant)).to(grad.dtype)
        if DESCRIPTORS:
            weight = weight_ptr.load([first_k, first_n])
        else:
            weight = tl.load(weight_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            weight_ptrs += BLOCK_K * in_channels
        acc = dot(grad, weight, acc, PRECISION)

    mask = mask_m[:, None] & mask_n[None, :]
    source = input_pixel(pixel, height, width, out_height, out_width, STRIDE_H, STRIDE_W)
    offs_x = source.to(tl.int64)[:, None] * in_channels + channel_n[None, :]
    if x_ptr is not None:
        x = tl.load(x_ptr + offs_x, mask=mask, other=0.0)
        center, scale, constant = load_affine(x_center_ptr, x_scale_ptr, x_shift_ptr, channel_n, mask_n, x.dtype)
        a = relu(affine(x, center, scale, constant)).to(x.dtype)
        acc = tl.where((a <= 0.0) | (mask_m[:, None] == 0), 0.0, acc)
        # Where there is no pixel, zero times a NaN or Inf of the center must not count either.
        products = tl.where(mask_m[:, None], acc * (x.to(tl.float32) - center[None, :]), 0.0)
        partials_ptrs = partials_ptr + pid_m.to(tl.int64) * 2 * in_channels + channel_n
        tl.store(partials_ptrs, tl.sum(products, axis=0), mask=mask_n)
        tl.store(partials_ptrs + in_channels, tl.sum(acc, axis=0), mask=mask_n)
        acc *= scale[None, :]
    if ADDS:
        acc += tl.load(dx_ptr + offs_x, mask=mask, other=0.0).to(tl.float32)
    dx = acc.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + offs_x, dx, mask=mask)
    if not ADDS and (STRIDE_H > 1 or STRIDE_W > 1):
        row = pixel // out_width % out_height * STRIDE_H
        column = pixel % out_width * STRIDE_W
        for skipped in tl.static_range(1, STRIDE_H * STRIDE_W):  # input pixels that no output sees
            below = skipped // STRIDE_W
            right = skipped % STRIDE_W
            inside = mask_m & (row + below < height) & (column + right < width)
            beside = (source + (below * width + right)).to(tl.int64)
            ptrs = dx_ptr + beside[:, None] * in_channels + channel_n[None, :]
            tl.store(ptrs, tl.zeros_like(dx), mask=inside[:, None] & mask_n[None, :])


@triton.jit
def pointwise_conv_wgrad_kernel(
    grad_ptr,  # (batch, out_height, out_width, out_channels), or its descriptor
    grad_scale_ptr,  # (out_channels,) or None
    z_ptr,  # like grad, or None: no gradient prologue
    z_center_ptr,  # (out_channels,) or None with z_ptr, like the next two
    z_scale_ptr,
    z_shift_ptr,
    x_ptr,  # (batch, height, width, in_channels), or its descriptor
    x_center_ptr,  # (in_channels,) or None
    x_scale_ptr,  # (in_channels,) or None: no prologue
    x_shift_ptr,  # (in_channels,) or None with x_scale_ptr
    partials_ptr,  # (splits, out_channels, in_channels)
    pixels,
    height,
    width,
    in_channels,
    out_height,
    out_width,
    out_channels,
    share,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ALIGN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_N output channels x BLOCK_K input channels, summed over `share` pixels in steps of BLOCK_M."""
    in_channels = aligned(in_channels, ALIGN)
    out_channels = aligned(out_channels, ALIGN)
    pid = tl.program_id(0)
    blocks_k = tl.cdiv(in_channels, BLOCK_K)
    blocks_n = tl.cdiv(out_channels, BLOCK_N)
    pid_split = pid // blocks_k // blocks_n
    first_k = pid % blocks_k * BLOCK_K
    first_n = pid // blocks_k % blocks_n * BLOCK_N
    channel_k = first_k + tl.arange(0, BLOCK_K)
    channel_n = first_n + tl.arange(0, BLOCK_N)
    mask_k = channel_k < in_channels
    mask_n = channel_n < out_channels
    dtype: tl.constexpr = x_ptr.dtype if DESCRIPTORS else x_ptr.dtype.element_ty
    x_center, x_scale, x_constant = load_affine(x_center_ptr, x_scale_ptr, x_shift_ptr, channel_k, mask_k, dtype)
    grad_scale = load_vector(grad_scale_ptr, channel_n, mask_n, 1.0)
    z_center, z_scale, z_constant = load_gradient_affine(
        z_center_ptr, z_scale_ptr, z_shift_ptr, pixels, channel_n, mask_n, dtype
    )

    first_pixel = pid_split * share  # a multiple of BLOCK_M
    last_pixel = tl.minimum(first_pixel + share, pixels)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for first in range(first_pixel, last_pixel, BLOCK_M):
        pixel = first + tl.arange(0, BLOCK_M)
        mask_m = (pixel < last_pixel)[:, None]
        offs_grad = pixel.to(tl.int64)[:, None] * out_channels + channel_n[None, :]
        if DESCRIPTORS:
            grad = grad_ptr.load([first, first_n])
        else:
            grad = tl.load(grad_ptr + offs_grad, mask=mask_m & mask_n[None, :], other=0.0)
        if z_ptr is not None:
            if DESCRIPTORS:
                z = z_ptr.load([first, first_n])
            else:
                z = tl.load(z_ptr + offs_grad, mask=mask_m & mask_n[None, :], other=0.0)
            wide = grad.to(tl.float32)
            if grad_scale_ptr is not None:
                wide *= grad_scale[None, :]
            grad = tl.where(mask_m, wide + affine(z, z_center, z_scale, z_constant), 0.0).to(grad.dtype)
        if DESCRIPTORS:
            a = x_ptr.load([first, first_k])
        else:
            source = input_pixel(pixel, height, width, out_height, out_width, STRIDE_H, STRIDE_W)
            offs_x = source.to(tl.int64)[:, None] * in_channels + channel_k[None, :]
            a = tl.load(x_ptr + offs_x, mask=mask_m & mask_k[None, :], other=0.0)
        if x_scale_ptr is not None:
            a = relu(affine(a, x_center, x_scale, x_constant)).to(a.dtype)  # not zero beyond the last pixel: grad is
        acc = dot(tl.trans(grad), a, acc, PRECISION)

    offs_n = pid_split.to(tl.int64) * out_channels + channel_n
    offs = offs_n[:, None] * in_channels + channel_k[None, :]
    tl.store(partials_ptr + offs, acc, mask=mask_n[:, None] & mask_k[None, :])
