"""Triton kernels of the 1x1 convolution: forward, input gradient, weight gradient (pointwise_conv.py).

Conventions. Activations are NHWC. A pointer that is None switches off what it is read for. Pixels are those of the
output, which count through (batch, out_height, out_width); with strides each sees one pixel of the input. Vectors over
channels are float32. A prologue is relu(x_scale * (x - x_center) + x_shift), a gradient prologue adds to the gradient
what z contributes to through its statistics: 2 * z_scale / pixels * (z - z_center) + z_shift / pixels, where z_center
is the mean of z and z_scale and z_shift are the gradients of its variance and mean. Channels that a block has beyond
the last one load as zeros and stay zeros in both: their vectors are zeros.

With DESCRIPTORS, arguments that are loaded block by block in the loop are tensor descriptors of matrices
(`Launch.blocks`), which load zeros outside of them; else pointers.
"""

import triton
import triton.language as tl

from .grouped_conv_fusion import affine, fold_center, load_vector, relu
from .grouped_conv_tiles import aligned, dot
from .statistics import store_moments


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
    partials_ptr,  # (blocks of pixels, 3, out_channels): moments of y, or None
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
    RELU: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M pixels x BLOCK_N output channels, and the moments of each channel's pixels."""
    in_channels = aligned(in_channels, ALIGN)
    out_channels = aligned(out_channels, ALIGN)
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(out_channels, BLOCK_N)
    pid_m = pid // blocks_n

    pixel = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = pixel < pixels
    first_n = pid % blocks_n * BLOCK_N
    channel_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = channel_n < out_channels
    offs_k = tl.arange(0, BLOCK_K)
    source = input_pixel(pixel, height, width, out_height, out_width, STRIDE_H, STRIDE_W)
    if not DESCRIPTORS:
        x_ptrs = x_ptr + source.to(tl.int64)[:, None] * in_channels + offs_k[None, :]
        weight_ptrs = weight_ptr + channel_n.to(tl.int64)[None, :] * in_channels + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first_k in range(0, in_channels, BLOCK_K):
        mask_k = offs_k < in_channels - first_k
        if DESCRIPTORS:
            a = x_ptr.load([pid_m * BLOCK_M, first_k])
        else:
            a = tl.load(x_ptrs + first_k, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if x_scale_ptr is not None:
            center, scale, constant = load_affine(
                x_center_ptr, x_scale_ptr, x_shift_ptr, first_k + offs_k, mask_k, a.dtype
            )
            a = relu(affine(a, center, scale, constant)).to(a.dtype)
        if DESCRIPTORS:
            weight = weight_ptr.load([first_n, first_k]).T
        else:
            weight = tl.load(weight_ptrs + first_k, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = dot(a, weight, acc, PRECISION)

    mask = mask_m[:, None] & mask_n[None, :]
    offs_y = pixel.to(tl.int64)[:, None] * out_channels + channel_n[None, :]
    if y_scale_ptr is not None:
        acc *= load_vector(y_scale_ptr, channel_n, mask_n, 1.0)[None, :]
    if y_shift_ptr is not None:
        acc += load_vector(y_shift_ptr, channel_n, mask_n, 0.0)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offs_y, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        acc = relu(acc)
    tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask)
    if partials_ptr is not None:
        # What was stored comes back laid out like memory, a few whole columns in every thread: in the accumulator's
        # own layout the sums over the rows would take several times the instructions and registers.
        tl.debug_barrier()
        value = tl.load(y_ptr + offs_y, mask=mask, other=0.0).to(tl.float32)
        count = tl.minimum(pixels - pid_m * BLOCK_M, BLOCK_M).to(tl.float32)
        mean = tl.sum(value, axis=0) / count
        deviation = tl.where(mask_m[:, None], value - mean[None, :], 0.0)
        m2 = tl.sum(deviation * deviation, axis=0)
        store_moments(partials_ptr, pid_m, out_channels, channel_n, mask_n, count, mean, m2)


@triton.jit
def pointwise_conv_dgrad_kernel(
    grad_ptr,  # (batch, out_height, out_width, out_channels), or its descriptor
    z_ptr,  # like grad, or None: no gradient prologue
    z_center_ptr,  # (out_channels,) or None with z_ptr, like the next two
    z_scale_ptr,
    z_shift_ptr,
    weight_ptr,  # (out_channels, in_channels), or its descriptor
    x_ptr,  # like dx, or None: the forward pass had no prologue
    x_center_ptr,  # (in_channels,) or None
    x_scale_ptr,  # (in_channels,) or None with x_ptr, like the next
    x_shift_ptr,
    dx_ptr,  # (batch, height, width, in_channels)
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
            grad = (grad.to(tl.float32) + affine(z, center, scale, constant)).to(grad.dtype)
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
    dx = acc.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + offs_x, dx, mask=mask)
    if STRIDE_H > 1 or STRIDE_W > 1:
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
            wide = grad.to(tl.float32) + affine(z, z_center, z_scale, z_constant)
            grad = tl.where(mask_m, wide, 0.0).to(grad.dtype)
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
