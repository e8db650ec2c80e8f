"""Device functions for what a convolution does to elements on load (prologue) and on store (epilogue).

Everything is computed in float32 and rounded once, to the dtype of the memory; vectors are float32, one value per
channel. A *source* is (ptrs, center, scale, constant), and z_ptrs where there is a z; `load_source` reads by PROLOGUE:

* "none": the element v.
* "affine_relu": relu(scale * (v - center) + shift), the batch norm and ReLU before the convolution.
* "gradient": v + scale * (z - center) + shift, the gradient of an output z that its statistics contribute to: center is
  the mean, scale is 2 * dvar / count and shift is dmean / count.

Outside the image a source is zero whatever its prologue. A *target* is (ptrs, center, scale, constant), and side_ptrs
where there is a side tensor; `finish_tile` stores by EPILOGUE, from an accumulator's v. Besides it, a program keeps a
*state*, whose last tile turns NaN or infinite wherever a NaN or Inf may have leaked from one merged group to another:

* "none": v. State: (trace,).
* "affine": scale * v + shift + side, each part where there is one; "affine_relu": ReLU of that. State: (trace,).
* "statistics": v, and the moments of what is stored. State: (count, mean, m2), see statistics.py.
* "relu_backward": scale * t, where t is v where relu(scale * (side - center) + shift) passes a gradient, else 0. State:
  lane by lane (sum of t * (side - center), sum of t).
"""

import triton
import triton.language as tl

from .statistics import add_to_moments, merge_moments, store_moments


@triton.jit
def load_vector(ptr, channel, mask, default):
    """The vector's values at `channel`, in float32; `default` where there is no vector."""
    values = tl.full(channel.shape, default, dtype=tl.float32)
    if ptr is not None:
        values = tl.load(ptr + channel, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def affine(value, center, scale, constant):
    """The affine scale * (value - center) + shift of every column, in float32; `constant` is from `fold_center`."""
    wide = value.to(tl.float32)
    if value.dtype.primitive_bitwidth > 16:
        wide -= center[None, :]
    return wide * scale[None, :] + constant[None, :]


@triton.jit
def fold_center(center, scale, shift, DTYPE: tl.constexpr):
    """The affine's constant: its shift; or shift - scale * center for values of 16 bits, which that costs no digits."""
    constant = shift
    if DTYPE.primitive_bitwidth == 16:
        constant -= scale * center
    return constant


@triton.jit
def relu(value):
    """max(value, 0), NaN where the value is NaN."""
    return tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def open_source(pointers, offs_m, channel, mask, count, PROLOGUE: tl.constexpr):
    """The source at pixels `offs_m` [M], in elements, and `channel` [K]; pointers (src, z, center, scale, shift).

    In the gradient prologue center, scale and shift are mean, dvar and dmean of `count` values per channel.
    """
    src_ptr, z_ptr, center_ptr, scale_ptr, shift_ptr = pointers
    ptrs = src_ptr + offs_m[:, None] + channel[None, :]
    center = load_vector(center_ptr, channel, mask, 0.0)
    scale = load_vector(scale_ptr, channel, mask, 1.0)
    shift = load_vector(shift_ptr, channel, mask, 0.0)
    if PROLOGUE == "gradient":
        scale *= 2.0 / count
        shift /= count
    source = (ptrs, center, scale, fold_center(center, scale, shift, src_ptr.dtype.element_ty))
    if PROLOGUE == "gradient":
        source += (z_ptr + offs_m[:, None] + channel[None, :],)
    return source


@triton.jit
def load_source(source, offset, mask_pixel, mask_channel, PROLOGUE: tl.constexpr):
    """One tile [M, K], `offset` elements on; zero where the masks, [M, 1] and [1, K], say so."""
    mask = mask_pixel & mask_channel
    value = tl.load(source[0] + offset, mask=mask, other=0.0)
    # Outside the image the value is zero already. Written so, what keeps it zero is chosen in float32; the compiler
    # would move a last `where(mask, value, 0.0)` behind the rounding, to halves of registers.
    if PROLOGUE == "affine_relu":
        wide = affine(value, source[1], source[2], source[3])
        value = relu(tl.where(mask_pixel, wide, value.to(tl.float32))).to(value.dtype)
    if PROLOGUE == "gradient":
        z = tl.load(source[4] + offset, mask=mask, other=0.0)
        added = tl.where(mask_pixel, affine(z, source[1], source[2], source[3]), 0.0)
        value = (value.to(tl.float32) + added).to(value.dtype)
    return value


@triton.jit
def load_columns(
    source, offset, column, width, step, mask_row, mask_channel, COUNT: tl.constexpr, PROLOGUE: tl.constexpr
):
    """COUNT neighbouring columns, from `column` [M] on, each a tile [M, channels]; zero outside the image."""
    tiles = ()
    for j in tl.static_range(COUNT):
        mask = mask_row & (column + j >= 0) & (column + j < width)
        tiles += (load_source(source, offset + j * step, mask[:, None], mask_channel, PROLOGUE),)
    return tiles


@triton.jit
def open_target(pointers, offs_m, channel, mask):
    """The target at pixels `offs_m` [M], in elements, and `channel` [N]; pointers (dst, side, center, scale, shift)."""
    dst_ptr, side_ptr, center_ptr, scale_ptr, shift_ptr = pointers
    ptrs = dst_ptr + offs_m[:, None] + channel[None, :]
    center = load_vector(center_ptr, channel, mask, 0.0)
    scale = load_vector(scale_ptr, channel, mask, 1.0)
    shift = load_vector(shift_ptr, channel, mask, 0.0)
    target = (ptrs, center, scale, fold_center(center, scale, shift, dst_ptr.dtype.element_ty))
    if side_ptr is not None:
        target += (side_ptr + offs_m[:, None] + channel[None, :],)
    return target


@triton.jit
def open_state(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EPILOGUE: tl.constexpr):
    """The state before the first tile."""
    zeros = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    state = (zeros,)
    if EPILOGUE == "statistics":
        state = (tl.zeros((BLOCK_M,), dtype=tl.float32), zeros, zeros)
    elif EPILOGUE == "relu_backward":
        state = (zeros, zeros)
    return state


@triton.jit
def finish_tile(target, offset, acc, mask_pixel, mask_channel, EPILOGUE: tl.constexpr):
    """Store what becomes of `acc` [M, N], `offset` elements on, and return the terms that it adds to the state."""
    ptrs, center, scale, constant = target[0], target[1], target[2], target[3]
    mask = mask_pixel[:, None] & mask_channel
    dtype = ptrs.dtype.element_ty
    if EPILOGUE == "statistics":
        value = acc.to(dtype)
        terms = (value.to(tl.float32),)
    elif EPILOGUE == "relu_backward":
        side = tl.load(target[4] + offset, mask=mask, other=0.0)
        activation = relu(affine(side, center, scale, constant)).to(dtype)
        kept = tl.where(mask_pixel[:, None] & ~(activation <= 0.0), acc, 0.0)
        value = (scale[None, :] * kept).to(dtype)
        terms = (kept * (side.to(tl.float32) - center[None, :]), kept)
    elif EPILOGUE == "none":
        value = acc.to(dtype)
        terms = (acc * 0.0,)
    else:
        wide = acc * scale[None, :] + constant[None, :]
        if len(target) == 5:
            wide += tl.load(target[4] + offset, mask=mask, other=0.0).to(tl.float32)
        if EPILOGUE == "affine_relu":
            wide = relu(wide)
        value = wide.to(dtype)
        terms = (acc * 0.0,)
    tl.store(ptrs + offset, value, mask=mask)
    return terms


@triton.jit
def finish_tiles(target, offset, step, tiles, masks, mask_channel, state, EPILOGUE: tl.constexpr):
    """Finish the tuple of tiles [M, N], `step` elements apart, in the pixels `masks` [M] of each; the next state."""
    values = ()
    for c in tl.static_range(len(tiles)):
        terms = finish_tile(target, offset + c * step, tiles[c], masks[c], mask_channel, EPILOGUE)
        if EPILOGUE == "statistics":
            values += terms
        elif EPILOGUE == "relu_backward":
            state = (state[0] + terms[0], state[1] + terms[1])
        else:
            state = (state[0] + terms[0],)
    if EPILOGUE == "statistics":
        state = add_to_moments(state[0], state[1], state[2], values, masks)
    return state


@triton.jit
def columns_inside(mask_row, column, width, COUNT: tl.constexpr):
    """For each of COUNT columns, from `column` [M] on, the rows [M] of `mask_row` where it is inside the image."""
    masks = ()
    for c in tl.static_range(COUNT):
        masks += (mask_row & (column + c < width),)
    return masks


@triton.jit
def may_have_leaked(state, EPILOGUE: tl.constexpr):
    """Whether a NaN or Inf has come up, which other groups of its tile may have caught."""
    suspect = state[len(state) - 1]
    if EPILOGUE == "statistics" or EPILOGUE == "relu_backward":
        suspect = suspect * 0.0
    total = tl.sum(suspect)
    return total != total


@triton.jit
def store_state(partials_ptr, row, channels, channel, mask, state, EPILOGUE: tl.constexpr):
    """Reduce the state to one row of the partials: (rows, 3, channels) of moments or (rows, 2, channels) of sums."""
    if EPILOGUE == "statistics":
        count, mean, m2 = merge_moments(state[0][:, None], state[1], state[2])
        store_moments(partials_ptr, row, channels, channel, mask, count, mean, m2)
    if EPILOGUE == "relu_backward":
        ptrs = partials_ptr + tl.cast(row, tl.int64) * 2 * channels + channel
        tl.store(ptrs, tl.sum(state[0], axis=0), mask=mask)
        tl.store(ptrs + channels, tl.sum(state[1], axis=0), mask=mask)
