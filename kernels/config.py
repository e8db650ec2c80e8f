"""What a convolution is asked to do, and the launch settings the Triton kernels do it with.

Everything here is a pure function of sizes: no Triton, no device query, so it can be tested anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
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
