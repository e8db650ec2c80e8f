"""Which launch computes a pass of the 3x3 grouped convolution: kernel, grid, sizes and compile-time constants."""

from __future__ import annotations

import math

import triton

from .config import Config, ConvProblem, StripsConfig, TapsConfig, round_up_to_block
from .grouped_conv_dgrad import grouped_conv_dgrad_strided_kernel
from .grouped_conv_forward import grouped_conv_strips_kernel, grouped_conv_taps_kernel
from .grouped_conv_wgrad import grouped_conv_wgrad_strips_kernel, grouped_conv_wgrad_taps_kernel
from .launch import Launch, interpreted, options, precision

_NOTHING: frozenset[str] = frozenset()
_PROLOGUE = ("src_z_ptr", "src_center_ptr", "src_scale_ptr", "src_shift_ptr")
_EPILOGUE = ("dst_side_ptr", "dst_center_ptr", "dst_scale_ptr", "dst_shift_ptr", "partials_ptr")
_GRAD_PROLOGUE = ("grad_z_ptr", "grad_center_ptr", "grad_scale_ptr", "grad_shift_ptr")
_X_PROLOGUE = ("x_center_ptr", "x_scale_ptr", "x_shift_ptr")
_AFFINE = {"dst_scale_ptr", "dst_shift_ptr", "dst_side_ptr"}  # what an affine at the end reads
_MAX_COUNT = 2**31 - 2**16  # What an int32 index may reach, less the last block's overhang.


def plan(
    problem: ConvProblem,
    config: Config,
    *,
    allow_tf32: bool,
    fused: frozenset[str] = _NOTHING,
    relu: bool = False,
    taps_outside: bool = False,
) -> Launch:
    """The launch that computes one pass with given settings; needs no device and no tensors.

    Args:
        problem: What to compute.
        config: Launch settings; `StripsConfig` only where `fits_strips`.
        allow_tf32: Whether float32 products may be rounded to TF32.
        fused: The kernel's optional pointers that the launch has tensors for; they say what prologue and epilogue it
            has (grouped_conv_fusion.py). By default none.
        relu: Whether the forward pass ends in a ReLU.
        taps_outside: Whether the weight lies in memory as (C_out, 3, 3, C_in / groups), as channels_last leaves it.

    Raises:
        ValueError: If a count passes what the kernels index with 32 bits.
    """
    if problem.op == "wgrad":
        launch, counts = _plan_wgrad(problem, config)
        launch.constants.update(_optional(_GRAD_PROLOGUE + _X_PROLOGUE, fused))
        launch.constants["GRAD_PROLOGUE"] = "gradient" if "grad_z_ptr" in fused else "none"
        launch.constants["X_PROLOGUE"] = "affine_relu" if "x_scale_ptr" in fused else "none"
    else:
        launch, counts = _plan_conv(problem, config, taps_outside)
        launch.constants.update(_optional(_PROLOGUE + _EPILOGUE, fused))
        launch.constants["PROLOGUE"] = _prologue(fused)
        launch.constants["EPILOGUE"] = _epilogue(fused, relu)
    if max(counts) > _MAX_COUNT:
        raise ValueError(
            f"grouped_conv2d: expected at most {_MAX_COUNT} pixels per image, strips and programs for the triton "
            f"backend, got {max(counts)}; split the batch, or use the torch backend"
        )
    launch.constants["PRECISION"] = precision(problem.dtype, allow_tf32)
    launch.options.update(options(config))
    return launch


def _alignment(problem: ConvProblem) -> int:
    """Channels that every pixel starts at a multiple of; Triton itself sees multiples of 16 only, not of 8."""
    return math.gcd(problem.in_channels, problem.out_channels, 16)


def fusion_of(fused: frozenset[str]) -> str:
    """What is fused, as `tuning.FUSIONS` names it; a bias is nothing that would need settings of its own."""
    if fused <= {"dst_shift_ptr"}:
        return "plain"
    return "affine" if fused <= _AFFINE else "stats"


def is_crowded(fused: frozenset[str]) -> bool:
    """Whether what is fused needs the most registers, as `choose_config` asks."""
    return bool(fused & {"partials_ptr", "grad_z_ptr", "x_scale_ptr"})


def _optional(pointers: tuple[str, ...], fused: frozenset[str]) -> dict[str, None]:
    return {name: None for name in pointers if name not in fused}


def _prologue(fused: frozenset[str]) -> str:
    if "src_z_ptr" in fused:
        return "gradient"
    return "affine_relu" if "src_scale_ptr" in fused else "none"


def _epilogue(fused: frozenset[str], relu: bool) -> str:
    if "partials_ptr" in fused:
        return "relu_backward" if "dst_side_ptr" in fused else "statistics"
    if not relu and fused.isdisjoint(_AFFINE):
        return "none"
    return "affine_relu" if relu else "affine"


def partial_rows(problem: ConvProblem, config: Config, launch: Launch) -> int:
    """Rows of partials that a forward pass or input gradient stores: programs that share no channel."""
    blocks = triton.cdiv(problem.groups, config.merged)
    if isinstance(config, TapsConfig):
        group_n = problem.group_in if problem.op == "dgrad" else problem.group_out
        blocks *= triton.cdiv(config.merged * group_n, config.block_n)
    return launch.programs // blocks


def _plan_conv(problem: ConvProblem, config: Config, taps_outside: bool) -> tuple[Launch, list[int]]:
    """The launch of a forward pass or input gradient, and the counts that must fit 32 bits."""
    transposed = problem.op == "dgrad"
    src = (problem.height, problem.width, problem.in_channels)
    dst = (problem.out_height, problem.out_width, problem.out_channels)
    if transposed:
        src, dst = dst, src
    group_k, group_n = src[2] // problem.groups, dst[2] // problem.groups
    sizes = dict(zip(("src_height", "src_width", "src_channels"), src, strict=True), batch=problem.batch)
    sizes |= zip(("dst_height", "dst_width", "dst_channels"), dst, strict=True)
    constants = {"GROUP_K": group_k, "GROUP_N": group_n, "MERGED": config.merged, "BLOCK_M": config.block_m}
    constants["ALIGN"] = _alignment(problem)
    tiles = triton.cdiv(problem.groups, config.merged)

    if isinstance(config, StripsConfig):
        strips = problem.batch * triton.cdiv(problem.out_width, config.strip)
        programs = tiles * triton.cdiv(problem.out_height, config.band) * triton.cdiv(strips, config.block_m)
        sizes["band"] = config.band
        constants |= {"STRIP": config.strip, "TAPS_OUTSIDE": taps_outside}
        constants["SOURCE_IN_REGISTERS"] = config.source_in_registers and not interpreted()
        constants["BLOCK_K"] = round_up_to_block(config.merged * group_k)
        constants["BLOCK_N"] = round_up_to_block(config.merged * group_n)
        if transposed and problem.stride == (2, 2):
            return Launch(grouped_conv_dgrad_strided_kernel, programs, sizes, constants, {}), [programs]
        constants |= {"STRIDE": problem.stride[0], "TRANSPOSED": transposed}
        return Launch(grouped_conv_strips_kernel, programs, sizes, constants, {}), [programs]

    parities = problem.stride if transposed else (1, 1)
    pixels = problem.batch * triton.cdiv(dst[0], parities[0]) * triton.cdiv(dst[1], parities[1])
    blocks_n = triton.cdiv(config.merged * group_n, config.block_n)
    programs = blocks_n * tiles * parities[0] * parities[1] * triton.cdiv(pixels, config.block_m)
    constants |= {"BLOCK_K": config.block_k, "BLOCK_N": config.block_n}
    constants |= {"STRIDE_H": problem.stride[0], "STRIDE_W": problem.stride[1], "TRANSPOSED": transposed}
    return Launch(grouped_conv_taps_kernel, programs, sizes, constants, {}), [programs]


def _plan_wgrad(problem: ConvProblem, config: Config) -> tuple[Launch, list[int]]:
    """The launch of a weight gradient, and the counts that must fit 32 bits."""
    sizes = {
        "batch": problem.batch,
        "height": problem.height,
        "width": problem.width,
        "in_channels": problem.in_channels,
        "out_height": problem.out_height,
        "out_width": problem.out_width,
        "out_channels": problem.out_channels,
    }
    constants = {
        "GROUP_IN": problem.group_in,
        "GROUP_OUT": problem.group_out,
        "MERGED": config.merged,
        "ALIGN": _alignment(problem),
        "BLOCK_M": config.block_m,
    }
    tiles = triton.cdiv(problem.groups, config.merged)
    if isinstance(config, StripsConfig):
        strips = problem.batch * triton.cdiv(problem.out_width, config.strip)
        blocks = triton.cdiv(strips, config.block_m) * triton.cdiv(problem.out_height, config.band)
        programs = tiles * config.splits
        sizes |= {"band": config.band, "splits": config.splits}
        constants |= {"STRIDE": problem.stride[0], "STRIP": config.strip, "ASSEMBLY": not interpreted()}
        constants["BLOCK_K"] = round_up_to_block(config.merged * problem.group_in)
        constants["BLOCK_N"] = round_up_to_block(config.merged * problem.group_out)
        launch = Launch(grouped_conv_wgrad_strips_kernel, programs, sizes, constants, {})
        return launch, [programs, strips, blocks + config.splits]

    blocks_k = triton.cdiv(config.merged * problem.group_in, config.block_k)
    blocks_n = triton.cdiv(config.merged * problem.group_out, config.block_n)
    programs = blocks_k * blocks_n * 3 * tiles * config.splits
    image_pixels = problem.out_height * problem.out_width
    steps = triton.cdiv(problem.batch * image_pixels, config.block_m)
    sizes["share"] = triton.cdiv(steps, config.splits) * config.block_m
    constants |= {"BLOCK_K": config.block_k, "BLOCK_N": config.block_n}
    constants |= {"STRIDE_H": problem.stride[0], "STRIDE_W": problem.stride[1]}
    launch = Launch(grouped_conv_wgrad_taps_kernel, programs, sizes, constants, {})
    return launch, [programs, image_pixels + sizes["share"]]
