"""Triton kernels of batch norm's parts; what they compute and how they share the work: batch_norm.py."""

import triton
import triton.language as tl

from .grouped_conv_tiles import aligned
from .statistics import (
    add_to_moments,
    column_sums,
    inverse_deviation,
    merge_moments,
    store_affine,
    store_moments,
)


@triton.jit
def own_channels(channels, BLOCK_C: tl.constexpr):
    """The channels [BLOCK_C] of this program, which of them there are, and the number of its share of the blocks."""
    tiles = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    channel = pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    return channel, channel < channels, pid // tiles


@triton.jit
def block_offsets(
    block,
    pixels,
    image_blocks,
    channels,
    channel,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Where a block lies in memory, int64 [BLOCK_M, BLOCK_C], and which of its pixels [BLOCK_M] there are."""
    if CHANNELS_LAST:  # one image
        pixel = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        return pixel[:, None] * aligned(channels, ALIGN) + channel[None, :], pixel < pixels
    pixel = (block % image_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixels = aligned(pixels, ALIGN)
    plane = (block // image_blocks).to(tl.int64) * channels + channel
    return pixel[:, None] + plane[None, :] * pixels, pixel < pixels


@triton.jit
def load_affine(center_ptr, scale_ptr, shift_ptr, channel, mask):
    """An affine's vectors [BLOCK_C] as rows [1, BLOCK_C]; a center that is None is 0."""
    scale = tl.load(scale_ptr + channel, mask=mask, other=0.0)
    shift = tl.load(shift_ptr + channel, mask=mask, other=0.0)
    center = tl.zeros(scale.shape, dtype=tl.float32)
    if center_ptr is not None:
        center = tl.load(center_ptr + channel, mask=mask, other=0.0)
    return center[None, :], scale[None, :], shift[None, :]


@triton.jit
def relu(value):
    """max(value, 0), NaN where the value is NaN."""
    return tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_blocks(
    z_ptr,
    origin,
    block,
    place,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """BLOCKS blocks of z from `block` on, less `origin`, as tuples of tiles and, if MASKED, of their masks."""
    pixels, image_blocks, last, channels, channel, mask_c = place
    values, masks = (), ()
    for i in tl.static_range(BLOCKS):
        offs, mask_m = block_offsets(block + i, pixels, image_blocks, channels, channel, CHANNELS_LAST, ALIGN, BLOCK_M)
        mask = mask_c[None, :]
        if MASKED:
            mask_m = mask_m & (block + i < last)
            mask = mask & mask_m[:, None]
            masks += (mask_m,)
        values += (tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32) - origin,)
    return values, masks


@triton.jit
def statistics_kernel(
    z_ptr,  # (N, channels, H, W) in either layout
    partials_ptr,  # (shares, 3, channels): moments of z less its first pixel
    pixels,
    image_blocks,
    blocks,
    share,
    channels,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Moments of one share. Less the first pixel: a mean far larger than the spread would round the spread away."""
    channel, mask_c, split = own_channels(channels, BLOCK_C)
    first_pixel = channel if CHANNELS_LAST else channel.to(tl.int64) * pixels
    origin = tl.load(z_ptr + first_pixel, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    count = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    first, last = split * share, tl.minimum(split * share + share, blocks)
    place = (pixels, image_blocks, last, channels, channel, mask_c)
    full = first  # up to which groups of blocks are whole
    if CHANNELS_LAST:
        full += tl.maximum(tl.minimum(last, pixels // BLOCK_M) - first, 0) // BLOCKS * BLOCKS
    for block in tl.range(first, full, BLOCKS, num_stages=3):
        values, _ = load_blocks(z_ptr, origin, block, place, CHANNELS_LAST, ALIGN, BLOCK_M, BLOCKS, False)
        count, mean, m2 = add_to_moments(count, mean, m2, values, None)
    for block in tl.range(full, last, BLOCKS, num_stages=3):
        values, masks = load_blocks(z_ptr, origin, block, place, CHANNELS_LAST, ALIGN, BLOCK_M, BLOCKS, True)
        count, mean, m2 = add_to_moments(count, mean, m2, values, masks)
    total, mean_c, m2_c = merge_moments(count[:, None], mean, m2)
    store_moments(partials_ptr, split, channels, channel, mask_c, total, mean_c, m2_c)


@triton.jit
def statistics_bwd_kernel(
    dz_ptr,
    dz_scale_ptr,  # or None
    z_ptr,
    mean_ptr,
    dmean_ptr,
    dvar_ptr,
    g_ptr,
    pixels,
    image_blocks,
    blocks,
    share,
    channels,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One share of g = dz_scale * dz + dmean / count + 2 * dvar / count * (z - mean)."""
    channel, mask_c, split = own_channels(channels, BLOCK_C)
    mean, slope, constant = load_affine(mean_ptr, dvar_ptr, dmean_ptr, channel, mask_c)
    count = tl.cast(blocks // image_blocks, tl.float32) * tl.cast(pixels, tl.float32)
    if dz_scale_ptr is not None:
        dz_scale = tl.load(dz_scale_ptr + channel, mask=mask_c, other=0.0)[None, :]
    slope *= 2.0 / count
    constant /= count
    for block in range(split * share, tl.minimum(split * share + share, blocks)):
        offs, mask_m = block_offsets(block, pixels, image_blocks, channels, channel, CHANNELS_LAST, ALIGN, BLOCK_M)
        mask = mask_m[:, None] & mask_c[None, :]
        dz = tl.load(dz_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if dz_scale_ptr is not None:
            dz *= dz_scale
        z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        g = dz + constant + slope * (z - mean)
        tl.store(g_ptr + offs, g.to(g_ptr.dtype.element_ty), mask=mask)


@triton.jit
def affine_add_relu_kernel(
    z_ptr,
    center_ptr,  # float32 (channels,) like all vectors, or None
    scale_ptr,
    shift_ptr,
    residual_ptr,  # or None
    residual_center_ptr,  # or None
    residual_scale_ptr,  # None for a plain residual
    residual_shift_ptr,
    out_ptr,
    pixels,
    image_blocks,
    blocks,
    share,
    channels,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One share of out = affine(z) + residual, or with RELU of relu(affine(z) + residual)."""
    channel, mask_c, split = own_channels(channels, BLOCK_C)
    center, scale, shift = load_affine(center_ptr, scale_ptr, shift_ptr, channel, mask_c)
    if residual_scale_ptr is not None:
        residual_center, residual_scale, residual_shift = load_affine(
            residual_center_ptr, residual_scale_ptr, residual_shift_ptr, channel, mask_c
        )
    for block in range(split * share, tl.minimum(split * share + share, blocks)):
        offs, mask_m = block_offsets(block, pixels, image_blocks, channels, channel, CHANNELS_LAST, ALIGN, BLOCK_M)
        mask = mask_m[:, None] & mask_c[None, :]
        total = scale * (tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32) - center) + shift
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            if residual_scale_ptr is not None:
                residual = residual_scale * (residual - residual_center) + residual_shift
            total += residual
        if RELU:
            total = relu(total)
        tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def affine_add_relu_bwd_kernel(
    dout_ptr,
    out_ptr,  # or None: recomputed from z
    z_ptr,
    center_ptr,  # or None
    scale_ptr,
    shift_ptr,
    residual_ptr,  # the operand of the residual's affine, or None
    residual_center_ptr,  # or None
    residual_scale_ptr,  # or None
    dz_ptr,  # or None
    dresidual_ptr,  # or None
    partials_ptr,  # (shares, 2 or 3, channels): dshift, dscale, the residual's dscale; or None
    pixels,
    image_blocks,
    blocks,
    share,
    channels,
    SCALES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One share of the gradients of affine_add_relu; whatever pointer is None is not computed.

    Without SCALES, dz and dresidual are still to be multiplied by their affine's scale.
    """
    channel, mask_c, split = own_channels(channels, BLOCK_C)
    center, scale, shift = load_affine(center_ptr, scale_ptr, shift_ptr, channel, mask_c)
    if residual_scale_ptr is not None:
        residual_center, residual_scale, _ = load_affine(
            residual_center_ptr, residual_scale_ptr, residual_scale_ptr, channel, mask_c
        )
    dshift = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    dscale = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    dresidual_scale = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for block in range(split * share, tl.minimum(split * share + share, blocks)):
        offs, mask_m = block_offsets(block, pixels, image_blocks, channels, channel, CHANNELS_LAST, ALIGN, BLOCK_M)
        mask = mask_m[:, None] & mask_c[None, :]
        t = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if out_ptr is None or partials_ptr is not None:
            z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32) - center
        if out_ptr is None:
            out = relu(scale * z + shift).to(z_ptr.dtype.element_ty)
        else:
            out = tl.load(out_ptr + offs, mask=mask, other=0.0)
        t = tl.where(out <= 0, 0.0, t)  # NaN passes
        if dz_ptr is not None:
            dz = scale * t if SCALES else t
            tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        if dresidual_ptr is not None:
            dresidual = t
            if SCALES and residual_scale_ptr is not None:
                dresidual = residual_scale * t
            tl.store(dresidual_ptr + offs, dresidual.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if partials_ptr is not None:
            dshift += t
            dscale += t * z
            if residual_ptr is not None:
                residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
                dresidual_scale += t * (residual - residual_center)
    if partials_ptr is not None:
        sums: tl.constexpr = 2 if residual_ptr is None else 3
        ptrs = partials_ptr + split.to(tl.int64) * sums * channels + channel
        tl.store(ptrs, tl.sum(dshift, axis=0), mask=mask_c)
        tl.store(ptrs + channels, tl.sum(dscale, axis=0), mask=mask_c)
        if residual_ptr is not None:
            tl.store(ptrs + 2 * channels, tl.sum(dresidual_scale, axis=0), mask=mask_c)


@triton.jit
def bn_affine_kernel(
    var_ptr,
    gamma_ptr,  # any dtype, or None
    beta_ptr,  # any dtype, or None
    scale_ptr,
    shift_ptr,
    eps,
    channels,
    BLOCK_C: tl.constexpr,
):
    """The vectors of the affine that is a batch norm."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < channels
    var = tl.load(var_ptr + channel, mask=mask, other=1.0)
    store_affine(var, eps, gamma_ptr, beta_ptr, scale_ptr, shift_ptr, channel, mask)


@triton.jit
def bn_affine_bwd_kernel(
    dscale_ptr,  # (rows, sums, channels): the gradient is the sum of the vectors `scale_at` of all rows
    dshift_ptr,  # alike, `shift_at`
    var_ptr,
    gamma_ptr,  # any dtype, or None
    dmean_ptr,
    dvar_ptr,
    dgamma_ptr,  # gamma's dtype, or None
    dbeta_ptr,  # gamma's dtype, or None
    rows,
    sums,
    scale_at,
    shift_at,
    eps,
    channels,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients through the vectors. The affine is centred at the mean: the mean's gradient flows through the shift."""
    tiles = tl.cdiv(channels, BLOCK_C)
    channel = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < channels
    inverse = inverse_deviation(tl.load(var_ptr + channel, mask=mask, other=1.0), eps)
    scale = inverse
    if gamma_ptr is not None:
        scale *= tl.load(gamma_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    if tl.program_id(0) < tiles:
        dscale = column_sums(dscale_ptr, scale_at, rows, sums, channels, channel, mask, BLOCK_R)
        tl.store(dvar_ptr + channel, -0.5 * dscale * scale * inverse * inverse, mask=mask)
        if gamma_ptr is not None:
            tl.store(dgamma_ptr + channel, (dscale * inverse).to(dgamma_ptr.dtype.element_ty), mask=mask)
    else:
        dshift = column_sums(dshift_ptr, shift_at, rows, sums, channels, channel, mask, BLOCK_R)
        tl.store(dmean_ptr + channel, -scale * dshift, mask=mask)
        if gamma_ptr is not None:
            tl.store(dbeta_ptr + channel, dshift.to(dbeta_ptr.dtype.element_ty), mask=mask)
