"""What every Triton launcher needs: a planned launch, arithmetic by dtype, and layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One kernel launch, all but its tensors.

    Attributes:
        kernel: The Triton kernel.
        programs: Grid size; the grid has one axis.
        sizes: Run-time numbers by argument name.
        constants: Compile-time values by argument name.
        options: num_warps, num_stages and enable_fp_fusion.
    """

    kernel: Any
    programs: int
    sizes: Mapping[str, float]
    constants: dict[str, Any]
    options: dict[str, Any]

    def __call__(self, **tensors: Tensor | None) -> None:
        """Launch on the tensors, given by argument name."""
        self.kernel[(self.programs,)](**tensors, **self.sizes, **self.constants, **self.options)


def precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    """How `grouped_conv_tiles.dot` multiplies operands of ``dtype``."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return "upcast"  # The interpreter multiplies the bit patterns of bfloat16 numbers.
    return "tf32" if dtype == torch.float32 and allow_tf32 else "ieee"


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors; an H200's for the interpreter's CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def nhwc(tensor: Tensor) -> Tensor:
    """``tensor`` in channels_last, copied if it is not."""
    return tensor.contiguous(memory_format=torch.channels_last)


def empty(like: Tensor, shape: Sequence[int], channels_last: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised dense tensor on the device of ``like``, of its dtype unless another is given."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def to_layout(result: Tensor, channels_last: bool) -> Tensor:
    """A channels_last ``result`` in the caller's layout."""
    # A copy even where both layouts hold the same bytes (one channel, one pixel): their strides differ.
    return result if channels_last else torch.empty_like(result, memory_format=torch.contiguous_format).copy_(result)
