"""The operators: grouped convolution in every pass, served by Triton, C++/CUDA or plain PyTorch.

``kernels/`` is imported as ``resnext.kernels``. The bare name belongs to another, well-known package; this one refuses
it.
"""

if __name__ != "resnext.kernels":
    raise ImportError(
        f"this folder is the package resnext.kernels, not {__name__!r}; use `from resnext import kernels`, and "
        "run from another folder if you meant the `kernels` package from PyPI"
    )

from . import flops  # noqa: F401  registers what FLOP counters count
from .attention import affine_gate, affine_mean, excite
from .attention_steps import Excite, Gate, Mean
from .block import BlockStep, run_block
from .block_steps import AddRelu, Conv, ConvNorm, MaxPool
from .config import Running
from .dispatch import BackendError, use_backend
from .fused import (
    affine_add_relu,
    affine_relu_max_pool,
    bn_affine,
    conv_affine,
    conv_norm,
    conv_stats,
    gains_in_channels_last,
    keep_packed,
    laid_out,
    prefers_channels_last,
)
from .fused_checks import why_not_conv_stats
from .ops import grouped_conv2d, grouped_conv2d_dgrad, grouped_conv2d_wgrad
from .reasons import explain, serving_backend

__all__ = [
    "AddRelu",
    "BackendError",
    "BlockStep",
    "Conv",
    "ConvNorm",
    "Excite",
    "Gate",
    "MaxPool",
    "Mean",
    "Running",
    "affine_add_relu",
    "affine_gate",
    "affine_mean",
    "affine_relu_max_pool",
    "bn_affine",
    "conv_affine",
    "conv_norm",
    "conv_stats",
    "excite",
    "explain",
    "gains_in_channels_last",
    "grouped_conv2d",
    "grouped_conv2d_dgrad",
    "grouped_conv2d_wgrad",
    "keep_packed",
    "laid_out",
    "prefers_channels_last",
    "run_block",
    "serving_backend",
    "use_backend",
    "why_not_conv_stats",
]
