"""Launch settings worth measuring: every form that serves a problem, in the tiles that the machine may hold.

Pure functions, as in config.py. Each setting gives right results; which of them compile without spilling is for
benchmarks/tune.py to find out, and which is the fastest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from .config import (
    MATRIX_WIDTH,
    Config,
    ConvProblem,
    PointwiseConfig,
    StripsConfig,
    TapsConfig,
    choose_config,
    fits_strips,
    pointwise_config,
    round_up_to_block,
    strips_config,
    taps_config,
)

_SHARED_MEMORY = 220 * 1024  # Of one program on an H100 or H200, less what epilogues take.


def candidates(
    problem: ConvProblem, *, fused: bool = False, allow_tf32: bool = True, num_sms: int = 132
) -> list[Config]:
    """Settings worth measuring for one pass of a 3x3 convolution, the heuristic's choice first.

    Args:
        problem: What to compute.
        fused: As in `choose_config`.
        allow_tf32: Whether float32 products may be rounded to TF32.
        num_sms: Streaming multiprocessors of the device.
    """
    taps = taps_config(problem, fused=fused, allow_tf32=allow_tf32, num_sms=num_sms)
    configs: list[Config] = [choose_config(problem, fused=fused, allow_tf32=allow_tf32, num_sms=num_sms), taps]
    strips = fits_strips(problem)
    if strips:
        configs += _strips(problem, strips_config(problem, fused=fused, num_sms=num_sms))
    configs += _taps(problem, taps, few=strips)
    return list(dict.fromkeys(configs))


def _strips(problem: ConvProblem, config: StripsConfig) -> Iterator[StripsConfig]:
    """Strips of 1 (rows that slide down), 2 and 4 columns."""
    bands, splits, stages = [config.band, max(1, config.band // 2), problem.out_height], [config.splits], [1, 2, 3]
    if problem.op == "wgrad":
        # Partial sums are what costs there, not the border rows of bands; and its loop is not pipelined.
        bands, splits, stages = [config.band], [config.splits, max(1, config.splits // 2), 2 * config.splits], [1]
    tiles = [(16, 1), (16, 2), (32, 1), (32, 2)]
    if config.merged * max(problem.group_in, problem.group_out) > MATRIX_WIDTH:
        # One warp holds no 32 rows of 32 channels; four and 64 rows use the wide matrix instructions (wgmma).
        tiles = [(16, 1), (16, 2), (32, 2), (64, 4)]
    for strip, (block_m, num_warps), num_stages, band, split in itertools.product(
        (1, 2, 4), tiles, stages, bands, splits
    ):
        settings = {"strip": strip, "block_m": block_m, "num_warps": num_warps, "num_stages": num_stages}
        yield replace(config, band=band, splits=split, **settings)


def _taps(problem: ConvProblem, config: TapsConfig, *, few: bool) -> Iterator[TapsConfig]:
    """Tiles of an implicit GEMM; ``few``: the heuristic's channels only."""
    group_k, group_n = problem.group_in, problem.group_out
    if problem.op == "dgrad":
        group_k, group_n = group_n, group_k
    blocks_n, blocks_k = [config.block_n], [config.block_k]
    if config.merged == 1 and not few:
        blocks_n = [block for block in (32, 64, 128) if block <= round_up_to_block(group_n)]
        blocks_k = [block for block in (16, 32, 64) if block <= round_up_to_block(group_k)]
    for block_m, block_n, block_k, num_warps, num_stages in itertools.product(
        (64, 128), blocks_n, blocks_k, (4, 8), (2, 3) if few else (2, 3, 4)
    ):
        blocks = {"block_m": block_m, "block_n": block_n, "block_k": block_k}
        yield replace(config, num_warps=num_warps, num_stages=num_stages, **blocks)


def pointwise_candidates(
    problem: ConvProblem, *, affine: bool = False, allow_tf32: bool = True, num_sms: int = 132
) -> list[PointwiseConfig]:
    """Settings worth measuring for one pass of a 1x1 convolution, the heuristic's choice first."""
    chosen = pointwise_config(problem, affine=affine, allow_tf32=allow_tf32, num_sms=num_sms)
    configs = [chosen]
    for block_m, block_n, block_k, num_warps, num_stages in itertools.product(
        (32, 64, 128), (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4)
    ):
        # Elements per step: dy and z, x and the weight, whichever the pass has.
        elements = block_m * (2 * block_n + block_k) if problem.op == "wgrad" else (2 * block_m + block_n) * block_k
        if elements * num_stages * problem.dtype.itemsize <= _SHARED_MEMORY:
            blocks = {"block_m": block_m, "block_n": block_n, "block_k": block_k}
            configs.append(replace(chosen, num_warps=num_warps, num_stages=num_stages, **blocks))
    return list(dict.fromkeys(configs))
