"""What a convolution is asked to do, and the launch settings the Triton kernels do it with.

Everything here is a pure function of sizes: no Triton, no device query, so it can be tested anywhere.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch


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
    """

    merged: int
    strip: int
    band: int
    block_m: int
    num_warps: int
    num_stages: int
    splits: int = 1


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
    """

    merged: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1


Config = StripsConfig | TapsConfig
MATRIX_WIDTH = 16  # Narrowest matrix product of 16-bit types; the channels that narrow groups are packed into.
_PROGRAM_WAVES = 4  # Programs per resident program from which the last, half-full wave stops mattering.


def round_up_to_block(channels: int) -> int:
    """The narrowest block that holds ``channels``: a power of two, at least `MATRIX_WIDTH`."""
    return max(MATRIX_WIDTH, 1 << (channels - 1).bit_length())


def fits_strips(problem: ConvProblem) -> bool:
    """Whether the strips kernels serve ``problem``."""
    return problem.stride in ((1, 1), (2, 2)) and max(problem.group_in, problem.group_out) <= 32


def choose_config(problem: ConvProblem, arch: tuple[int, int] = (9, 0), num_sms: int = 132) -> Config:
    """Launch settings for one pass, from sizes alone.

    Args:
        problem: What to compute.
        arch: Compute capability.
        num_sms: Streaming multiprocessors of the device.

    Returns:
        `StripsConfig` where `fits_strips`, else `TapsConfig`.
    """
    return _choose_strips(problem, num_sms) if fits_strips(problem) else _choose_taps(problem, num_sms)


def candidates(problem: ConvProblem, arch: tuple[int, int] = (9, 0), num_sms: int = 132) -> list[Config]:
    """Settings worth measuring for one pass, the heuristic's choice first; every one gives right results."""
    chosen = choose_config(problem, arch, num_sms)
    configs = [chosen]
    if isinstance(chosen, StripsConfig):
        for strip, block_m, num_stages in itertools.product((1, 2, 4), (16, 32), (1, 2, 3)):
            configs.append(
                replace(chosen, strip=strip, block_m=block_m, num_warps=block_m // 16, num_stages=num_stages)
            )
    return list(dict.fromkeys(configs))


def _merged_groups(problem: ConvProblem) -> int:
    """As many groups as fit into one narrow matrix tile."""
    return max(1, min(problem.groups, MATRIX_WIDTH // max(problem.group_in, problem.group_out)))


def _walked_size(problem: ConvProblem) -> tuple[int, int]:
    """Height and width of the image whose pixels the programs share out: the smaller of source and destination."""
    return problem.out_height, problem.out_width


def _choose_strips(problem: ConvProblem, num_sms: int) -> StripsConfig:
    merged = _merged_groups(problem)
    tiles = math.ceil(problem.groups / merged)
    height, width = _walked_size(problem)
    strip, block_m, num_warps, num_stages = 2, 16, 1, 2
    strip = min(strip, 1 << (width - 1).bit_length())
    blocks = tiles * math.ceil(problem.batch * math.ceil(width / strip) / block_m)
    wanted = _PROGRAM_WAVES * num_sms * 10 // num_warps
    bands = min(math.ceil(wanted / blocks), math.ceil(height / 4))
    band = math.ceil(height / bands)
    splits = 1
    if problem.op == "wgrad":
        work = blocks // tiles * math.ceil(height / band)
        splits = min(work, math.ceil(wanted / tiles / 2))
    return StripsConfig(merged, strip, band, block_m, num_warps, num_stages, splits)


def _choose_taps(problem: ConvProblem, num_sms: int) -> TapsConfig:
    merged = _merged_groups(problem)
    group_k, group_n = problem.group_in, problem.group_out
    if problem.op == "dgrad":
        group_k, group_n = group_n, group_k
    block_n = min(64, round_up_to_block(merged * group_n))
    if merged > 1 or problem.op == "wgrad":
        block_k = min(64, round_up_to_block(merged * group_k))
    else:
        block_k = min((64, 32, 16), key=lambda block: (math.ceil(group_k / block) * block, -block))
    splits = 1
    pixels = problem.batch * problem.out_height * problem.out_width
    if problem.op == "wgrad":
        blocks = 3 * math.ceil(problem.groups / merged)
        blocks *= math.ceil(merged * group_k / block_k) * math.ceil(merged * group_n / block_n)
        splits = max(1, min(math.ceil(pixels / 256), math.ceil(_PROGRAM_WAVES * 2 * num_sms / blocks)))
    return TapsConfig(merged, 64, block_n, block_k, 4, 3, splits)
