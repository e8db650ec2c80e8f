"""What FlopCounterMode, and the tools built on it, count for our operators: PyTorch's own figures for conv2d."""

from __future__ import annotations

import logging

import torch

from . import fused_conv_ops, fused_ops, ops  # noqa: F401  they define the operators

# The import looks for Triton and logs a warning where a CUDA build of torch comes without it.
_logger = logging.getLogger("torch.utils.flop_counter")
_level = _logger.level
_logger.setLevel(logging.ERROR)
from torch.utils import flop_counter  # noqa: E402

_logger.setLevel(_level)


@flop_counter.register_flop_formula(torch.ops.resnext._grouped_conv2d_fwd)
def _fwd_flops(x_shape, weight_shape, *_, out_shape, **__) -> int:
    return flop_counter.conv_flop_count(x_shape, weight_shape, out_shape)


@flop_counter.register_flop_formula(torch.ops.resnext._grouped_conv2d_dgrad)
def _dgrad_flops(grad_shape, weight_shape, *_, out_shape, **__) -> int:
    return _backward_flops(grad_shape, out_shape, weight_shape, (True, False, False), (out_shape, None, None))


@flop_counter.register_flop_formula(torch.ops.resnext._grouped_conv2d_wgrad)
def _wgrad_flops(grad_shape, x_shape, *_, out_shape, **__) -> int:
    return _backward_flops(grad_shape, x_shape, out_shape, (False, True, False), (None, out_shape, None))


def _backward_flops(grad_shape, x_shape, weight_shape, mask, out_shapes) -> int:
    """PyTorch's own count, so that both models report one figure (as of 2.13, PyTorch counts wgrad `groups` times)."""
    unused = (None,) * 4
    count = flop_counter.flop_registry[torch.ops.aten.convolution_backward]
    return count(grad_shape, x_shape, weight_shape, *unused, False, None, None, mask, out_val=out_shapes)


@flop_counter.register_flop_formula([torch.ops.resnext._conv_stats, torch.ops.resnext._conv_norm])
def _conv_stats_flops(x_shape, center, scale, shift, weight_shape, *_, out_shape, **__) -> int:
    return flop_counter.conv_flop_count(x_shape, weight_shape, out_shape[0])


@flop_counter.register_flop_formula(torch.ops.resnext._conv_affine)
def _conv_affine_flops(x_shape, weight_shape, *_, out_shape, **__) -> int:
    return flop_counter.conv_flop_count(x_shape, weight_shape, out_shape)


@flop_counter.register_flop_formula(torch.ops.resnext._conv_stats_bwd)
def _conv_stats_bwd_flops(dz_shape, z, mean, dmean, dvar, x_shape, center, scale, shift, weight_shape, *rest, **_):
    wants_dx, wants_dw = rest[-1]
    out_shapes = (x_shape if wants_dx else None, weight_shape if wants_dw else None, None)
    return _backward_flops(dz_shape, x_shape, weight_shape, (wants_dx, wants_dw, False), out_shapes)
