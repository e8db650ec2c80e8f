"""Launch settings worth measuring: every form that serves a problem, in the tiles that the machine may hold.

Pure functions, as in config.py. Each setting gives right results; which of them compile without spilling is for
benchmarks/tune.py to find out, and which is the fastest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .config import (
    MATRIX_WIDTH,
    MOST_REGISTERS,
    WIDEST_STRIPS,
    Config,
    ConvProblem,
    PointwiseConfig,
    StripsConfig,
    TapsConfig,
    choose_config,
    fits_descriptors,
    fits_strips,
    pointwise_config,
    pointwise_splits,
    pointwise_warps,
    round_up_to_block,
    strips_config,
    taps_config,
)

_WGMMA = 90  # The architecture that has it, and only that one.
_TMA = 90  # The first architecture with tensor descriptors in hardware.
_SHARED_MEMORY = 220 * 1024  # Of one program on an H100 or H200, less what epilogues take.


def candidates(
    problem: ConvProblem, *, fusion: str = "plain", allow_tf32: bool = True, num_sms: int = 132, arch: int = 90
) -> list[Config]:
    """Settings worth measuring for one pass of a 3x3 convolution, the heuristic's choice first.

    Args:
        problem: What to compute.
        fusion: What is fused, as `tuning.FUSIONS` names it.
        allow_tf32: Whether float32 products may be rounded to TF32.
        num_sms: Streaming multiprocessors of the device.
        arch: Ten times its compute capability.
    """
    fused, crowded = fusion != "plain", fusion == "stats" or problem.dtype == torch.float32
    taps = taps_config(problem, fused=fused, allow_tf32=allow_tf32, num_sms=num_sms)
    chosen = choose_config(problem, fused=fused, crowded=crowded, allow_tf32=allow_tf32, num_sms=num_sms)
    configs: list[Config] = [chosen, taps]
    strips = fits_strips(problem)
    if strips:
        # A prologue leaves the source in registers anyway; with four columns it does not fit there.
        movable = arch == _WGMMA and problem.op != "wgrad" and fusion != "stats" and problem.dtype.itemsize == 2
        for config in _strips(problem, strips_config(problem, fused=fused, crowded=crowded, num_sms=num_sms), crowded):
            configs.append(config)
            if movable and config.num_warps == 4 and config.strip <= 2:
                configs.append(replace(config, source_in_registers=True))
    configs += _taps(problem, taps, few=strips)
    return list(dict.fromkeys(configs))


def _strips(
    problem: ConvProblem, config: StripsConfig, crowded: bool, *, widened: bool = False
) -> Iterator[StripsConfig]:
    """Strips of 1 (rows that slide down), 2 and 4 columns; ``widened``: of tiles twice as wide as they need be."""
    bands, splits, stages = [config.band, max(1, config.band // 2), problem.out_height], [config.splits], [2, 3, 4]
    if problem.op == "wgrad":
        # Partial sums are what costs there, not the border rows of bands.
        bands, splits, stages = [config.band], [config.splits, max(1, config.splits // 2)], [2, 3]
    strips, tiles = [1, 2, 4], [(16, 1), (32, 1), (32, 2)]
    width = config.merged * max(problem.group_in, problem.group_out)
    if width > MATRIX_WIDTH:
        # One warp holds no 32 rows of 32 channels; four and 64 rows use the wide matrix instructions (wgmma).
        tiles = [(16, 1), (16, 2), (32, 2), (64, 4)]
    if widened:
        strips, tiles = [1, 2], [(16, 2), (32, 2)]
    elif 2 * width <= WIDEST_STRIPS and problem.groups >= 2 * config.merged and problem.dtype.itemsize == 2:
        # Rows of 64 bytes: twice the zeros are multiplied, but a copy by rows of 32 reaches 69% of one by whole lines.
        wider = replace(config, merged=2 * config.merged)
        if problem.op == "wgrad":  # as many programs for half as many tiles
            wider = replace(wider, splits=2 * config.splits)
        yield from _strips(problem, wider, crowded, widened=True)
    for strip, (block_m, num_warps), num_stages, band, split in itertools.product(strips, tiles, stages, bands, splits):
        settings: dict[str, Any] = {
            "strip": strip,
            "block_m": block_m,
            "num_warps": num_warps,
            "num_stages": num_stages,
        }
        limits: list[int | None] = [None]
        if crowded and num_warps <= 2:  # without a limit the assembler spills some of these, and others with one
            limits = [MOST_REGISTERS] if num_warps == 1 else [None, MOST_REGISTERS]
        for limit in limits:
            yield replace(config, band=band, splits=split, max_registers=limit, **settings)


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
    problem: ConvProblem, *, affine: bool = False, allow_tf32: bool = True, num_sms: int = 132, arch: int = 90
) -> list[PointwiseConfig]:
    """Settings worth measuring for one pass of a 1x1 convolution, the heuristic's choice first.

    Args:
        problem: What to compute.
        affine: As in `pointwise_config`.
        allow_tf32: Whether float32 products may be rounded to TF32.
        num_sms: Streaming multiprocessors of the device.
        arch: Ten times its compute capability.
    """
    described = arch >= _TMA and fits_descriptors(problem)
    chosen = pointwise_config(problem, affine=affine, allow_tf32=allow_tf32, num_sms=num_sms, arch=arch)
    configs = [chosen]
    for config in _pointwise(problem, chosen, num_sms):
        if _pointwise_memory(problem, config) <= _SHARED_MEMORY:
            configs.append(config)
            rows = config.block_n if problem.op == "wgrad" else config.block_m
            if described and rows >= 64:  # less would leave the wide matrix instructions unused
                configs.append(replace(config, tensor_descriptors=True))
    return list(dict.fromkeys(configs))


def _pointwise(problem: ConvProblem, config: PointwiseConfig, num_sms: int) -> Iterator[PointwiseConfig]:
    """Tiles, with the warps that hold their accumulators."""
    tile = replace(config, walkers=None)
    if problem.op == "wgrad":
        tiles = [(64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (128, 256), (256, 128)]
        for (block_n, block_k), block_m, num_stages in itertools.product(tiles, (32, 64, 128), (2, 3)):
            num_warps = pointwise_warps(block_n, block_k)
            splits = pointwise_splits(problem, block_m, block_n, block_k, programs=num_sms * (12 // num_warps))
            tile = replace(tile, block_m=block_m, block_n=block_n, block_k=block_k, num_warps=num_warps)
            yield replace(tile, num_stages=num_stages, splits=splits)
        return
    tiles = [(64, 64), (64, 128), (128, 64), (64, 256), (128, 128)]
    if problem.op == "fwd":
        for (block_m, block_n), num_stages in itertools.product(tiles, (2, 3)):
            num_warps = pointwise_warps(block_m, block_n)
            # As many programs as a multiprocessor holds at once; only the smallest leave registers for a third.
            programs = num_sms * (3 if block_m * block_n <= 4096 else 8 // num_warps)
            walkers = max(1, programs // math.ceil(problem.out_channels / block_n))
            tile = replace(tile, block_m=block_m, block_n=block_n, block_k=64, num_warps=num_warps)
            yield replace(tile, num_stages=num_stages, walkers=walkers)
        tiles = [(64, 128), (128, 128), (128, 256), (256, 128)]
    block_ks = (64,) if problem.op == "fwd" else (32, 64)
    for (block_m, block_n), block_k, num_stages in itertools.product(tiles, block_ks, (2, 3, 4)):
        num_warps = pointwise_warps(block_m, block_n)
        tile = replace(tile, block_m=block_m, block_n=block_n, block_k=block_k, num_warps=num_warps)
        yield replace(tile, num_stages=num_stages)


def _pointwise_memory(problem: ConvProblem, config: PointwiseConfig) -> int:
    """Bytes of shared memory for operands: dy and z, x and the weight, whichever the pass has."""
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    if problem.op == "wgrad":
        elements = block_m * (2 * block_n + block_k) * config.num_stages
    elif problem.op == "dgrad":
        elements = (2 * block_m + block_n) * block_k * config.num_stages
    elif config.walkers is None:
        elements = (block_m + block_n) * block_k * config.num_stages
    else:
        elements = (block_n + block_m * (config.num_stages - 1)) * problem.in_channels
    return elements * problem.dtype.itemsize
