"""The launchers served by the compiled extension ``resnext._C`` (csrc): C++ on the CPU, CUDA C++ on GPUs.

Both kinds of device share one set of functions, which choose by their first tensor. Where they are given a size in
place of a tensor, four numbers or a number of channels, they allocate it, in the layout that their last argument tells
(in float32 if it is a vector, or has a fifth number that is true), and return it. PyTorch does not see them: its
dispatcher has had its part when a launcher is called.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import reference
from .checks import gradient_channels_last
from .config import NO_AFFINE, Affine

_NO_STATISTICS = (None, None, None, None)

_C: Any = None  # resnext._C, once it is loaded

adds = True  # as of `pointwise_conv`: 1x1 convolutions on the CPU


def takes_weight(weight: Tensor, x: Tensor) -> bool:
    """Whether fused convolutions of ``x`` round a weight to its dtype themselves, and leave its gradient unrounded."""
    return weight.dtype == torch.float32 and x.dtype.itemsize == 2 and x.device.type == "cpu"


@functools.cache
def load() -> str | None:
    """Load the extension once.

    Returns:
        None if it is loaded, otherwise why there is none.

    Raises:
        RuntimeError: If it is there but cannot be loaded: a broken build must not pass for an absent one.
    """
    global _C
    if importlib.util.find_spec("resnext._C") is None:
        return "the C++ extension is not built; install a C++ compiler and reinstall with --no-build-isolation"
    try:
        _C = importlib.import_module("resnext._C")
    except (AttributeError, ImportError) as error:
        raise RuntimeError(
            f"resnext._C: expected an extension that loads with torch {torch.__version__}, got {error}; rebuild it "
            "with `python setup.py build_ext --inplace`, or delete the file to do without it"
        ) from error
    return None


@functools.cache
def has_cuda() -> bool:
    """Whether the loaded extension holds the CUDA kernels."""
    return load() is None and _C.has_cuda()


def force_cpu_capability(name: str) -> None:
    """Let the CPU kernels use one instruction set; ``""`` is the best that the machine has.

    Args:
        name: ``"amx_bf16"`` (AVX-512, with matrix products of bfloat16), ``"avx512_bf16"`` (with products of pairs),
            ``"avx512"``, ``"avx2"``, ``"portable"``, ``""``.

    Raises:
        RuntimeError: If there is none of that name, or the machine lacks it.
    """
    _C.set_cpu_capability(name)
    _KEPT.clear()  # each instruction set has its own order


def cpu_capability() -> str:
    """The instruction set that the CPU kernels use, by its name for `force_cpu_capability`."""
    return _C.cpu_capability()


def multiplies_pairs(dtype: torch.dtype) -> bool:
    """Whether the CPU kernels multiply values of a dtype as they are: two by two, or as matrices."""
    return dtype == torch.bfloat16 and cpu_capability() in ("amx_bf16", "avx512_bf16")


def fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], groups: int, channels_last: bool
) -> Tensor:
    """Forward pass: y (N, C_out, H_out, W_out) of x (N, C_in, H, W), dense in the given layout."""
    size = _output_size(x, weight, stride)
    return _C.grouped_conv2d_fwd(x, weight, bias, size, stride[0], stride[1], groups, channels_last)


def dgrad(
    grad: Tensor,
    weight: Tensor,
    input_size: tuple[int, int],
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """Gradient of the input: dx (N, C_in, H, W) with (H, W) = ``input_size``, dense in the given layout."""
    size = (grad.shape[0], weight.shape[1] * groups, *input_size)
    return _C.grouped_conv2d_dgrad(grad, weight, size, stride[0], stride[1], groups, channels_last)


def wgrad(grad: Tensor, x: Tensor, stride: tuple[int, int], groups: int, channels_last: bool) -> Tensor:
    """Gradient of the weight: dw (C_out, C_in/groups, 3, 3), dense in the given layout."""
    size = (grad.shape[1], x.shape[1] // groups, 3, 3)
    return _C.grouped_conv2d_wgrad(grad, x, size, stride[0], stride[1], groups, channels_last)


def conv_stats_fwd(
    x: Tensor,
    prologue: Affine | None,
    weight: Tensor,
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Convolve relu(prologue(x)); the result z with the mean and biased variance of its channels if ``stats``."""
    size = _output_size(x, weight, stride)
    vector = size[1] if stats else None
    made = _C.conv_stats_fwd(
        x, *(prologue or NO_AFFINE), weight, size, vector, vector, stride[0], stride[1], groups, channels_last
    )
    return made if stats else (made, None, None)


def conv_stats_bwd(
    dz: Tensor,
    grad_prologue: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    x: Tensor,
    prologue: Affine | None,
    weight: Tensor,
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    wanted: tuple[bool, bool],
    onto: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, scale, shift and weight; ``grad_prologue``: z, mean, dmean, dvar; ``wanted``: x, weight.

    ``onto``: like x, in channels_last; that of x is added to it, and it is returned, where the operator can. The
    weight's gradient has its layout and its dtype, which may be float32 where `takes_weight`.
    """
    dx = dscale = dshift = dw = None
    statistics_of_z = grad_prologue or _NO_STATISTICS
    geometry = (stride[0], stride[1], groups, channels_last)
    if wanted[0]:
        if prologue or x.is_cuda or weight.shape[2] != 1:
            onto = None
        vector = x.shape[1] if prologue else None
        masked = (x, *prologue) if prologue else (None, *NO_AFFINE)
        results = (x.shape if onto is None else onto, vector, vector)
        made = _C.conv_stats_dgrad(dz, *statistics_of_z, weight, *masked, *results, onto, *geometry)
        dx, dscale, dshift = made if prologue else (made if onto is None else onto, None, None)
    if wanted[1]:
        size = (*weight.shape, weight.dtype != x.dtype, gradient_channels_last(weight, channels_last))
        dw = _C.conv_stats_wgrad(dz, *statistics_of_z, x, *(prologue or NO_AFFINE), size, *geometry)
    return dx, dscale, dshift, dw


def conv_affine(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """Compute scale * conv(x, weight) + shift + residual, then ReLU if asked for."""
    size, packed = _output_size(x, weight, stride), _packed_of(weight, x, stride, groups, channels_last)
    return _C.conv_affine(
        x, weight, packed, scale, shift, residual, relu, size, stride[0], stride[1], groups, channels_last
    )


class _Kept(NamedTuple):
    """What is kept of a weight: its version when it was to be packed, and what it was packed to, by kind and groups."""

    version: int
    packed: dict[tuple[str, int], Tensor]


_KEPT: WeakIdKeyDictionary = WeakIdKeyDictionary()


def keep_packed(weight: Tensor) -> None:
    """Pack a weight for `conv_affine` once, instead of in every call with this very tensor: by the first that gains.

    The copy lives as long as the tensor; after a write to the tensor it does not count.
    """
    _KEPT[weight] = _Kept(weight._version, {})


def is_kept(weight: Tensor) -> bool:
    """Whether `keep_packed` counts for a weight."""
    return _kept(weight) is not None


def _kept(weight: Tensor) -> _Kept | None:
    kept = _KEPT.get(weight)
    return None if kept is None or kept.version != weight._version else kept


def _packed_of(weight: Tensor, x: Tensor, stride: tuple[int, int], groups: int, channels_last: bool) -> Tensor | None:
    if (kept := _kept(weight)) is None or weight.dtype != x.dtype:
        return None
    kind = _kind_of_packing(weight, x, stride, groups, channels_last)
    if kind is None:
        return None
    if (packed := kept.packed.get((kind, groups))) is None:
        packed = kept.packed[kind, groups] = _PACK[kind](weight, groups)
    return packed


def _kind_of_packing(
    weight: Tensor, x: Tensor, stride: tuple[int, int], groups: int, channels_last: bool
) -> str | None:
    """How the kernel that `conv_affine` takes wants a weight packed; None for one that takes it as it is."""
    if weight.shape[2] == 1:
        return "pointwise"
    if channels_last and stride == (1, 1) and not _in_pairs(weight):
        use = "packed_product" if groups == 1 else "product"
        if winograd_serves(use, x.shape, weight.shape, groups):
            return "winograd" if groups == 1 else None
    return "filters"


def _in_pairs(weight: Tensor) -> bool:
    return weight.shape[1] % 2 == 0 and multiplies_pairs(weight.dtype)


def _pack_pointwise(weight: Tensor, groups: int) -> Tensor:
    # [tile of destination channels][source channel][channel of the tile], as csrc/cpu/kernels.h has it
    out_channels, in_channels = weight.shape[:2]
    tiles = -(-out_channels // 32)
    if _in_pairs(weight):  # two source channels beside each other
        packed = weight.new_empty(tiles, -(-in_channels // 32) * 16, 32, 2)
    else:
        packed = weight.new_empty(tiles, -(-in_channels // 16) * 16, 32, dtype=torch.float32)
    _C.pack_pointwise(weight, packed)
    return packed


def _pack_winograd(weight: Tensor, groups: int) -> Tensor:
    # [tile of output channels][position, input channel, channel of the tile], as csrc/cpu/winograd.inl.h has it
    out_channels, in_channels = weight.shape[:2]
    packed = weight.new_empty(-(-out_channels // 32), 16 * in_channels * 32, dtype=torch.float32)
    _C.pack_winograd(weight, packed)
    return packed


def _pack_filters(weight: Tensor, groups: int) -> Tensor:
    out_channels, group_in = weight.shape[:2]
    size = _C.packed_filters_size(out_channels, group_in * groups, groups, weight.dtype == torch.bfloat16)
    return _C.pack_filters(weight, size, groups)


_PACK = {"pointwise": _pack_pointwise, "winograd": _pack_winograd, "filters": _pack_filters}


def winograd_serves(use: str, input_shape: Sequence[int], weight_shape: Sequence[int], groups: int) -> bool:
    """Whether Winograd's algorithm is the faster way for a 3x3 convolution with stride 1 in channels_last on the CPU.

    Args:
        use: ``"product"`` (forward, or input gradient), ``"packed_product"`` (forward with a weight that is kept
            packed) or ``"gradient"`` (of the weight).
        input_shape: (N, C_in, H, W).
        weight_shape: (C_out, C_in / groups, 3, 3).
        groups: Number of groups.
    """
    batch, in_channels, height, width = input_shape
    return _C.winograd_serves(use, batch, in_channels, weight_shape[0], height, width, groups)


def statistics(z: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel."""
    channels = z.shape[1]
    return _C.statistics(z, channels, channels, channels_last)


def statistics_bwd(dz: Tensor, z: Tensor, mean: Tensor, dmean: Tensor, dvar: Tensor, channels_last: bool) -> Tensor:
    """Gradient of ``z`` from its own, ``dz``, and those of its statistics."""
    return _C.statistics_bwd(dz, z, mean, dmean, dvar, z.shape, channels_last)


def bn_affine(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Make scale and shift of the affine, centred at ``mean``, that is a batch norm with these statistics."""
    if not _in_float32(gamma, beta):
        return reference.bn_affine(mean, var, gamma, beta, eps)
    channels = mean.shape[0]
    return _C.bn_affine(mean, var, gamma, beta, channels, channels, eps)


def bn_affine_bwd(
    dscale: Tensor, dshift: Tensor, var: Tensor, gamma: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of mean, var, gamma and beta; the mean's, since the affine is centred there, by way of the shift."""
    if not _in_float32(gamma):
        return reference.bn_affine_bwd(dscale, dshift, var, gamma, eps)
    channels = var.shape[0]
    if gamma is None:
        return *_C.bn_affine_bwd(dscale, dshift, var, gamma, channels, channels, None, None, eps), None, None
    return _C.bn_affine_bwd(dscale, dshift, var, gamma, channels, channels, channels, channels, eps)


def _in_float32(*parameters: Tensor | None) -> bool:
    return all(each is None or each.dtype == torch.float32 for each in parameters)


def affine_add_relu(
    z: Tensor, affine: Affine, residual: Tensor | None, residual_affine: Affine | None, channels_last: bool
) -> Tensor:
    """relu(affine(z) + residual), the residual through an affine of its own if there is one."""
    return _C.affine_add_relu(z, *affine, residual, *(residual_affine or NO_AFFINE), z.shape, channels_last)


affine_add = reference.affine_add


def affine_add_relu_bwd(
    dout: Tensor,
    out: Tensor | None,
    z: Tensor,
    affine: Affine,
    residual: Tensor | None,
    residual_affine: Affine | None,
    channels_last: bool,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of z, the residual, scale, shift and the residual's scale; ``wanted``: z, residual, the vectors.

    ``out`` None, where there is no residual, stands for what `affine_add_relu` makes of ``z``. ``residual`` is there
    only with an affine of its own. The residual's shift has the gradient of the shift.
    """
    size = z.shape
    vector = size[1] if wanted[2] else None
    residual_center, residual_scale, _ = residual_affine or NO_AFFINE
    sizes = (
        size if wanted[0] else None,
        size if wanted[1] else None,
        vector,
        vector,
        vector if residual_affine else None,
    )
    made = _C.affine_add_relu_bwd(
        dout, out, z, *affine, residual, residual_center, residual_scale, *sizes, channels_last
    )
    return placed(made, sizes)


def affine_relu_max_pool(z: Tensor, affine: Affine, channels_last: bool, taps: bool) -> tuple[Tensor, Tensor | None]:
    """Pool relu(affine(z)) (3x3, stride 2, padding 1), with the place 3*kh + kw of each maximum in its window."""
    size = (z.shape[0], z.shape[1], (z.shape[2] - 1) // 2 + 1, (z.shape[3] - 1) // 2 + 1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    places = torch.empty(size, dtype=torch.uint8, device=z.device, memory_format=layout) if taps else None
    return _C.affine_relu_max_pool(z, *affine, size, places, channels_last), places


def affine_relu_max_pool_bwd(
    dout: Tensor, taps: Tensor, z: Tensor, affine: Affine, channels_last: bool, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of z, scale and shift; ``wanted``: z, the vectors."""
    vector = z.shape[1] if wanted[1] else None
    sizes = (z.shape if wanted[0] else None, vector, vector)
    return placed(_C.affine_relu_max_pool_bwd(dout, taps, z, *affine, *sizes, channels_last), sizes)


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    """A copy of a tensor on the CPU that is dense in the other layout."""
    return _C.laid_out(x, x.shape, channels_last)


def _output_size(x: Tensor, weight: Tensor, stride: tuple[int, int]) -> tuple[int, int, int, int]:
    batch, _, height, width = x.shape
    return batch, weight.shape[0], (height - 1) // stride[0] + 1, (width - 1) // stride[1] + 1


def placed(made: Any, sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """What was made of some sizes, in their order, and None where there was none."""
    results = iter(made if isinstance(made, tuple) else (made,))
    return tuple(None if size is None else next(results) for size in sizes)
