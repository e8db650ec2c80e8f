"""The launchers served by the compiled extension ``resnext._C`` (csrc): C++ on the CPU, CUDA C++ on GPUs.

Both kinds of device share one set of operators, ``torch.ops.resnext_C``: PyTorch's dispatcher sends them to the kernels
of the tensors' device. The operators only fill outputs, which are allocated here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch
from torch import Tensor


@functools.cache
def load() -> str | None:
    """Load the extension once.

    Returns:
        None if it is loaded, otherwise why there is none.

    Raises:
        RuntimeError: If it is there but cannot be loaded: a broken build must not pass for an absent one.
    """
    if importlib.util.find_spec("resnext._C") is None:
        return "the C++ extension is not built; install a C++ compiler and reinstall with --no-build-isolation"
    try:
        importlib.import_module("resnext._C")
    except ImportError as error:
        raise RuntimeError(
            f"resnext._C: expected an extension that loads with torch {torch.__version__}, got {error}; rebuild it "
            "with `python setup.py build_ext --inplace`, or delete the file to do without it"
        ) from error
    return None


@functools.cache
def has_cuda() -> bool:
    """Whether the loaded extension holds the CUDA kernels."""
    return load() is None and torch._C._dispatch_has_kernel_for_dispatch_key("resnext_C::grouped_conv2d_fwd", "CUDA")


def fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], groups: int, channels_last: bool
) -> Tensor:
    """Forward pass: y (N, C_out, H_out, W_out) of x (N, C_in, H, W), dense in the given layout."""
    size = (x.shape[0], weight.shape[0], (x.shape[2] - 1) // stride[0] + 1, (x.shape[3] - 1) // stride[1] + 1)
    out = _empty(size, x, channels_last)
    torch.ops.resnext_C.grouped_conv2d_fwd(x, weight, bias, out, stride[0], stride[1], groups, channels_last)
    return out


def dgrad(
    grad: Tensor,
    weight: Tensor,
    input_size: tuple[int, int],
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """Gradient of the input: dx (N, C_in, H, W) with (H, W) = ``input_size``, dense in the given layout."""
    out = _empty((grad.shape[0], weight.shape[1] * groups, *input_size), grad, channels_last)
    torch.ops.resnext_C.grouped_conv2d_dgrad(grad, weight, out, stride[0], stride[1], groups, channels_last)
    return out


def wgrad(grad: Tensor, x: Tensor, stride: tuple[int, int], groups: int, channels_last: bool) -> Tensor:
    """Gradient of the weight: dw (C_out, C_in/groups, 3, 3), dense in the given layout."""
    out = _empty((grad.shape[1], x.shape[1] // groups, 3, 3), x, channels_last)
    torch.ops.resnext_C.grouped_conv2d_wgrad(grad, x, out, stride[0], stride[1], groups, channels_last)
    return out


def _empty(size: tuple[int, ...], like: Tensor, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)
