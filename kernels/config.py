"""What a convolution is asked to do, and the launch settings the Triton kernels do it with.

Everything here is a pure function of sizes: no Triton, no device query, so it can be tested anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# (center or None, scale, shift), one value per channel each: the map v -> scale * (v - center) + shift.
Affine = tuple[Tensor | None, Tensor, Tensor]
NO_AFFINE = (None, None, None)  # its parts, where there is none


class Running(NamedTuple):
    """Running statistics of a batch norm, which one step of training moves.

    Attributes:
        mean: (C,), float32, contiguous.
        var: Of the unbiased variance, like ``mean``.
        batches: How many batches there were, an int64 tensor of one number.
        momentum: What of the new statistics counts.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor
    momentum: float


class Norm(NamedTuple):
    """A batch norm: gamma and beta (C,), of any dtype, contiguous, or None for 1 and 0; what is added to a variance."""

    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    running: Running | None = None  # what else is to be updated


@dataclass(frozen=True)
class ConvProblem:
    """One pass of a 3x3 grouped convolution with padding 1 and dilation 1.

    Attributes:
        op: The pass: ``"fwd"``, ``"dgrad"`` (gradient of the input) or ``"wgrad"`` (gradient of the weight).
        batch: N.
        in_channels: Channels of the convolution's input, whatever the pass.
        out_channels: Channels of the convolution's output, whatever the pass.
        height: Height of the convolution's input.
        width: Width of the convolution's input.
        stride: (stride_h, stride_w), each 1 or 2.
        groups: Number of groups; divides both channel counts.
        dtype: dtype of every operand.
        device_type: ``"cpu"`` or ``"cuda"``.
        channels_last: Whether activations are dense in ``torch.channels_last`` (else in NCHW).
    """

    op: Literal["fwd", "dgrad", "wgrad"]
    batch: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    stride: tuple[int, int]
    groups: int
    dtype: torch.dtype
    device_type: str
    channels_last: bool

    @property
    def group_in(self) -> int:
        """Input channels per group."""
        return self.in_channels // self.groups

    @property
    def group_out(self) -> int:
        """Output channels per group."""
        return self.out_channels // self.groups

    @property
    def out_height(self) -> int:
        """Height of the convolution's output."""
        return (self.height - 1) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        """Width of the convolution's output."""
        return (self.width - 1) // self.stride[1] + 1

    @property
    def result_shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W) of what a forward pass or an input gradient computes."""
        if self.op == "dgrad":
            return self.batch, self.in_channels, self.height, self.width
        return self.batch, self.out_channels, self.out_height, self.out_width


def problem_of(
    op: str,
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    groups: int,
    dtype: torch.dtype,
    device: torch.device,
    channels_last: bool,
) -> ConvProblem:
    """The problem of one pass (``"fwd"``, ``"dgrad"``, ``"wgrad"``) of a 4-D convolution."""
    batch, in_channels, height, width = input_shape
    return ConvProblem(
        op=op,  # type: ignore[arg-type]
        batch=batch,
        in_channels=in_channels,
        out_channels=weight_shape[0],
        height=height,
        width=width,
        stride=(stride[0], stride[1]),
        groups=groups,
        dtype=dtype,
        device_type=device.type,
        channels_last=channels_last,
    )


@dataclass(frozen=True)
class StripsConfig:
    """Launch settings of the strips kernels (grouped_conv.py); for narrow groups and strides (1, 1) and (2, 2).

    Attributes:
        merged: Neighbouring groups in one channel tile.
        strip: Neighbouring columns per matrix row: of y in the forward pass and the weight gradient, of dx in the
            input gradient at stride 1, of dy at stride 2.
        band: Rows (of the same image as the columns) that a program walks down.
        block_m: Strips per program.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
        splits: Weight gradient only: partial sums per weight.
        max_registers: Most registers of a thread; None leaves it to the assembler, which may spill a few so that more
            programs fit on a multiprocessor.
        source_in_registers: Not in the weight gradient: whether wgmma takes the source from registers even where
            nothing is computed on load; else from shared memory.
    """

    merged: int
    strip: int
    band: int
    block_m: int
    num_warps: int
    num_stages: int
    splits: int = 1
    max_registers: int | None = None
    source_in_registers: bool = False


@dataclass(frozen=True)
class TapsConfig:
    """Launch settings of the taps kernels (grouped_conv.py); for any group width and any stride.

    Attributes:
        merged: Neighbouring groups in one channel tile; more than one only where the blocks hold them whole.
        block_m: Pixels per program (weight gradient: per step).
        block_n: Channels of the result per program (weight gradient: output channels).
        block_k: Channels summed over per step (weight gradient: input channels per program).
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
        splits: Weight gradient only: partial sums per weight.
        max_registers: As in `StripsConfig`.
    """

    merged: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1
    max_registers: int | None = None


Config = StripsConfig | TapsConfig

MATRIX_WIDTH = 16  # Channels that narrow groups are packed into: the least that 16-bit matrix units multiply.
WIDEST_STRIPS = 32  # Wider groups are limited by arithmetic, and their nine weight tiles fill the registers.
MOST_REGISTERS = 255  # Of a thread, on every GPU.
DESCRIPTOR_ALIGNMENT = 16  # Bytes, of the address and of the rows that a tensor descriptor describes.
_WAVES = 2  # Programs per program that a device holds at once; measured on an H200, bands of half an image do best.
_STRIPS_PER_SM = 10  # Warps of the strips kernels that one multiprocessor holds at 168-200 registers a thread.
_CROWDED_PER_SM = 8  # The same at `MOST_REGISTERS`.


def round_up_to_block(channels: int) -> int:
    """The narrowest block that holds ``channels``: a power of two, at least `MATRIX_WIDTH`."""
    return max(MATRIX_WIDTH, 1 << (channels - 1).bit_length())


def fits_strips(problem: ConvProblem) -> bool:
    """Whether the strips kernels serve ``problem``."""
    return problem.stride in ((1, 1), (2, 2)) and max(problem.group_in, problem.group_out) <= WIDEST_STRIPS


def choose_config(
    problem: ConvProblem, *, fused: bool = False, crowded: bool = False, allow_tf32: bool = True, num_sms: int = 132
) -> Config:
    """Launch settings for one pass, from sizes alone.

    Args:
        problem: What to compute.
        fused: Whether the kernel computes anything besides (grouped_conv_fusion.py), for which it needs registers.
        crowded: Whether that keeps sums, or computes an operand of the weight gradient, for which it needs the most.
        allow_tf32: Whether float32 products may be rounded to TF32.
        num_sms: Streaming multiprocessors of the device.

    Returns:
        `StripsConfig` where that form fits and its tiles fit the registers, else `TapsConfig`.
    """
    if not fits_strips(problem):
        return taps_config(problem, fused=fused, allow_tf32=allow_tf32, num_sms=num_sms)
    # Without TF32 there are no matrix units, and the operands of ordinary multiply-adds fill the registers. So do tiles
    # of 32 channels with two of these: nine accumulators, float32 operands, what a fused kernel computes besides.
    single = problem.dtype == torch.float32
    wide = max(problem.group_in, problem.group_out) > MATRIX_WIDTH
    if (single and not allow_tf32) or (wide and (problem.op == "wgrad") + single + fused >= 2):
        return taps_config(problem, fused=fused, allow_tf32=allow_tf32, num_sms=num_sms)
    return strips_config(problem, fused=fused, crowded=crowded, num_sms=num_sms)


def _merged_groups(problem: ConvProblem) -> int:
    """As many groups as one matrix tile of `MATRIX_WIDTH` holds."""
    return max(1, min(problem.groups, MATRIX_WIDTH // max(problem.group_in, problem.group_out)))


def strips_config(
    problem: ConvProblem, *, fused: bool = False, crowded: bool = False, num_sms: int = 132
) -> StripsConfig:
    """The heuristic's settings for the strips kernels; arguments as in `choose_config`."""
    merged = _merged_groups(problem)
    block = round_up_to_block(merged * max(problem.group_in, problem.group_out))
    # Accumulators and operands of a strip share 255 registers: what fills them leaves narrower strips.
    strip = 4 if problem.stride == (1, 1) and problem.op != "wgrad" else 2
    if crowded or (fused and block > MATRIX_WIDTH):
        strip = 2 if problem.op != "dgrad" else 2 // problem.stride[0]
    if problem.op == "wgrad" or problem.dtype == torch.float32 or (crowded and problem.op == "dgrad"):
        strip = strip * MATRIX_WIDTH // block
    strip = max(1, strip * 2 // problem.dtype.itemsize)
    height, width = problem.out_height, problem.out_width
    while strip > 1 and math.ceil(width / strip) * strip * 7 > width * 8:  # at most an eighth of the columns idle
        strip //= 2
    block_m, num_warps = 16, block // MATRIX_WIDTH
    tiles = math.ceil(problem.groups / merged)
    blocks_m = math.ceil(problem.batch * math.ceil(width / strip) / block_m)
    wanted = _WAVES * num_sms * _STRIPS_PER_SM // num_warps
    # Bands of one image share their border rows: no more of them than fill the device, none lower than four rows.
    bands = max(1, min(math.ceil(wanted / (tiles * blocks_m)), height // 4))
    band = math.ceil(height / bands)
    splits = 1
    limited = num_warps == 1 and (crowded or problem.dtype == torch.float32)
    if problem.op == "wgrad":
        # As many programs as run at once: all have the same work, and a few more would take as long again.
        held = num_sms * (_CROWDED_PER_SM if limited else _STRIPS_PER_SM) // num_warps
        splits = min(blocks_m * math.ceil(height / band), max(1, held // tiles))
    max_registers = MOST_REGISTERS if limited else None
    return StripsConfig(merged, strip, band, block_m, num_warps, 3, splits, max_registers)


def taps_config(
    problem: ConvProblem, *, fused: bool = False, allow_tf32: bool = True, num_sms: int = 132
) -> TapsConfig:
    """The heuristic's settings for the taps kernels; arguments as in `choose_config`."""
    merged = _merged_groups(problem)
    group_k, group_n = problem.group_in, problem.group_out
    if problem.op == "dgrad":
        group_k, group_n = group_n, group_k
    tile_k, tile_n = merged * group_k, merged * group_n
    block_n = min(64, round_up_to_block(tile_n))
    single = problem.dtype == torch.float32
    if problem.op == "wgrad":
        block_k = min(32 if single else 64, round_up_to_block(tile_k))
        block_m = 32 if single or (fused and block_k < 64) else 64  # with 64, fused kernels spill
        blocks = 3 * math.ceil(problem.groups / merged) * math.ceil(tile_k / block_k) * math.ceil(tile_n / block_n)
        splits = _splits(problem, block_m, blocks, programs=8 * num_sms)
        return TapsConfig(merged, block_m, block_n, block_k, num_warps=4, num_stages=2, splits=splits)
    # Steps of 32 where 64 would multiply more zeros (groups of 72 or 96); narrower ones cost more than they save.
    block_m, block_k = 64, round_up_to_block(tile_k)
    if block_k > 64:
        block_k = min((64, 32), key=lambda block: math.ceil(tile_k / block) * block)
    num_stages = 3
    if single:
        block_k = min(block_k, 32)
        if allow_tf32:
            num_stages = 2
        elif block_n > 32:  # the operands of ordinary multiply-adds fill the registers
            block_m = 32
    return TapsConfig(merged, block_m, block_n, block_k, num_warps=4, num_stages=num_stages)


@dataclass(frozen=True)
class ElementwiseConfig:
    """Launch settings of the kernels that walk over the pixels element by element (batch_norm.py, max_pool.py).

    Attributes:
        block_m: Pixels per step.
        block_c: Channels per program.
        splits: Programs that the pixels are divided among.
        num_warps: Warps per program.
    """

    block_m: int
    block_c: int
    splits: int
    num_warps: int


def elementwise_config(
    images: int,
    pixels: int,
    channels: int,
    channels_last: bool,
    *,
    num_sms: int = 132,
    elements: int = 2048,
    programs: int = 16,
) -> ElementwiseConfig:
    """Launch settings from sizes alone.

    Args:
        images: Images, each ``pixels`` x ``channels``; channels_last tensors are one image of N*H*W pixels.
        pixels: Pixels per image.
        channels: C.
        channels_last: Whether neighbours in memory are channels of one pixel (else pixels of one channel).
        num_sms: Streaming multiprocessors of the device.
        elements: Per step; 2048 are 16 per thread, two 16-byte loads of 16-bit numbers of every operand.
        programs: Per multiprocessor; 16 are two to three times what fits at once, so that a slow program does not hold
            up the rest.
    """
    if channels_last:
        block_c = min(64, _power_of_two(channels))
        block_m = elements // block_c
    else:
        block_m = min(512, max(16, _power_of_two(pixels)))
        block_c = min(elements // block_m, _power_of_two(channels))
    blocks = images * math.ceil(pixels / block_m)
    splits = math.ceil(num_sms * programs / math.ceil(channels / block_c))
    return ElementwiseConfig(block_m, block_c, min(blocks, splits), num_warps=4)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


@dataclass(frozen=True)
class PointwiseConfig:
    """Launch settings of the 1x1 convolution's kernels (pointwise_conv.py).

    Attributes:
        block_m: Pixels per program (weight gradient: per step).
        block_n: Channels of the result per program (weight gradient: output channels).
        block_k: Channels summed over per step (weight gradient: input channels per program).
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
        splits: Weight gradient only: partial sums per weight.
        max_registers: As in `StripsConfig`.
        tensor_descriptors: Whether operands are loaded by tensor descriptors (TMA); only where `fits_descriptors`.
        walkers: Forward pass only: programs per block of channels, each of which keeps its part of the weight in shared
            memory and walks over its share of the pixels; None: a program has one block of pixels.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1
    max_registers: int | None = None
    tensor_descriptors: bool = False
    walkers: int | None = None


def fits_descriptors(problem: ConvProblem) -> bool:
    """Whether tensor descriptors serve the operands of a 1x1 convolution, all of them matrices with aligned rows.

    Not x with strides, whose rows are gathered.
    """
    if problem.op != "dgrad" and problem.stride != (1, 1):
        return False
    rows = (problem.in_channels,) if problem.op == "fwd" else (problem.in_channels, problem.out_channels)
    return all(channels * problem.dtype.itemsize % DESCRIPTOR_ALIGNMENT == 0 for channels in rows)


_RIDGE = 184  # Operations per byte from which an H200 is limited by its 16-bit matrix units, not by its memory.
# The same as measured there with what is fused, in bfloat16: libraries' kernels win earlier, in spite of passes more.
_MEASURED_RIDGE = {"fwd": 150, "dgrad": 100, "wgrad": 100}
_HOPPER = 90  # Its architecture; later ones spill with what is best there, earlier ones have less shared memory.
_RESIDENT = 256  # Most input channels whose 128 output channels' weights leave room for the pixels in shared memory.


def fits_stem(
    input_shape: Sequence[int], weight_shape: Sequence[int], groups: int, dtype: torch.dtype, channels_last: bool
) -> bool:
    """Whether the kernels of a network's first convolution (stem_conv.py) are for one of these shapes.

    Images have at most 4 channels. A step of the product holds the taps of a row of the kernel, a program the weights
    of all rows; elements are indexed with 32 bits.
    """
    batch, channels, height, width = input_shape
    rows, columns = weight_shape[2:]
    narrow = channels <= 4 and groups == 1 and max(rows, columns) > 1 and rows <= 7 and columns * channels < 32
    elements = batch * height * width * max(channels, 1)
    return channels_last and narrow and dtype.itemsize <= 4 and elements < 2**31 - 2**16


def pointwise_by_triton(problem: ConvProblem, *, affine: bool = False) -> bool:
    """Whether the fused kernels should serve a 1x1 convolution, and not a library's between elementwise passes.

    True where memory limits: there a pass saved is time saved. Where arithmetic limits, libraries are hard to reach.
    By 2 * C_in * C_out operations a pixel over C_in + C_out elements moved. Measured on an H200 in 16 bits; in float32,
    not yet measured, TF32 has half the rate and twice the bytes.

    Args:
        problem: What to compute.
        affine: Whether the forward pass ends in an affine.
    """
    channels = (problem.in_channels, problem.out_channels)
    ridge = _RIDGE if affine or problem.dtype == torch.float32 else _MEASURED_RIDGE[problem.op]
    return math.prod(channels) / sum(channels) <= ridge


def pointwise_config(
    problem: ConvProblem,
    *,
    affine: bool = False,
    allow_tf32: bool = True,
    num_sms: int = 132,
    arch: int = 90,
) -> PointwiseConfig:
    """Launch settings for one pass of a 1x1 convolution, from sizes alone; in 16 bits on Hopper what was fastest there.

    Args:
        problem: What to compute.
        affine: Whether the forward pass ends in an affine, with or without a residual.
        allow_tf32: Whether float32 products may be rounded to TF32.
        num_sms: Streaming multiprocessors of the device.
        arch: Ten times its compute capability.
    """
    channels_k, channels_n = problem.in_channels, problem.out_channels
    if problem.op == "dgrad":
        channels_k, channels_n = channels_n, channels_k
    single = problem.dtype == torch.float32
    if not single and arch == _HOPPER:
        return _pointwise_on_hopper(problem, channels_k, channels_n, affine=affine, num_sms=num_sms)
    if problem.op == "wgrad":
        block_m, widest, num_warps = (64, 128, 4) if not single else (32, 128, 8) if allow_tf32 else (32, 64, 8)
        block_n = min(64, round_up_to_block(channels_n))
        block_k = min(widest, round_up_to_block(channels_k))
        splits = pointwise_splits(problem, block_m, block_n, block_k, programs=3 * num_sms)
        return PointwiseConfig(block_m, block_n, block_k, num_warps, 2, splits=splits)
    # Epilogues with operands of their own hold many registers: smaller blocks, so that more than one program fits.
    operands = affine or problem.op == "dgrad"
    if single and not allow_tf32:
        return PointwiseConfig(64, min(64, round_up_to_block(channels_n)), 16, num_warps=4, num_stages=2)
    block_n = min(64 if single and operands else 128, round_up_to_block(channels_n))
    block_k = min(32, round_up_to_block(channels_k))
    num_stages = 3 if single else 4
    if operands:
        return PointwiseConfig(64, block_n, block_k, num_warps=4, num_stages=num_stages)
    return PointwiseConfig(128, block_n, block_k, num_warps=8, num_stages=num_stages)


def _pointwise_on_hopper(
    problem: ConvProblem, channels_k: int, channels_n: int, *, affine: bool, num_sms: int
) -> PointwiseConfig:
    if problem.op == "wgrad":
        block_k = min(256, round_up_to_block(channels_k))
        block_n = min(256 if block_k == 128 else 128, round_up_to_block(channels_n))
        num_warps = pointwise_warps(block_n, block_k)
        block_m, programs = (64, 3 * num_sms) if num_warps == 4 else (32, num_sms)
        splits = pointwise_splits(problem, block_m, block_n, block_k, programs=programs)
        return PointwiseConfig(block_m, block_n, block_k, num_warps, num_stages=3, splits=splits)
    block_n, block_k = min(128, round_up_to_block(channels_n)), min(64, round_up_to_block(channels_k))
    if problem.op == "dgrad" or affine:
        block_m = 128 if block_n == 64 and not affine else 64
        return PointwiseConfig(block_m, block_n, block_k, num_warps=4, num_stages=3 - affine)
    if channels_k > _RESIDENT:
        return PointwiseConfig(256, block_n, block_k, num_warps=8, num_stages=3)
    walkers = max(1, 2 * num_sms // math.ceil(channels_n / block_n))
    return PointwiseConfig(64, block_n, block_k, num_warps=4, num_stages=3 if channels_k <= 128 else 2, walkers=walkers)


def pointwise_splits(problem: ConvProblem, block_m: int, block_n: int, block_k: int, *, programs: int) -> int:
    """Partial sums of a weight gradient for about so many programs in all, each with at least four steps."""
    blocks = math.ceil(problem.in_channels / block_k) * math.ceil(problem.out_channels / block_n)
    return _splits(problem, block_m, blocks, programs=programs)


def _splits(problem: ConvProblem, block_m: int, blocks: int, *, programs: int) -> int:
    """The same, of a weight gradient whose result is ``blocks`` blocks, by steps of ``block_m`` pixels."""
    steps = math.ceil(problem.batch * problem.out_height * problem.out_width / block_m)
    return min(math.ceil(steps / 4), math.ceil(programs / blocks))


def pointwise_warps(rows: int, columns: int) -> int:
    """Warps of a program of a 1x1 convolution with so large an accumulator: four up to 64 x 128."""
    return 4 if rows * columns <= 8192 else 8


def bottleneck_tail_config(problem: ConvProblem, out_channels: int, *, allow_tf32: bool = True) -> TapsConfig:
    """Launch settings of the kernel in bottleneck_tail.py: block_n output channels, block_k middle channels at a time.

    Args:
        problem: The grouped 3x3 convolution.
        out_channels: Channels of the 1x1 convolution's result.
        allow_tf32: Whether float32 products may be rounded to TF32.
    """
    # Every block of output channels makes the middle channels anew: blocks as wide as the registers hold.
    narrowest, widest = 32, 256
    if problem.dtype == torch.float32:
        narrowest, widest = (32, 128) if allow_tf32 else (16, 32)
    group = max(problem.group_in, problem.group_out)
    merged = max(1, min(problem.groups, narrowest // group))
    block_k = min(narrowest, round_up_to_block(merged * group))
    block_n = min(widest, round_up_to_block(out_channels))
    num_warps = 8 if block_n > 64 else 4
    return TapsConfig(merged, 64, block_n, block_k, num_warps, num_stages=3, max_registers=MOST_REGISTERS)
