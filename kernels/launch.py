"""What every Triton launcher needs: a planned launch, arithmetic by dtype, and layouts."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import DESCRIPTOR_ALIGNMENT, Config, PointwiseConfig

_ALIGNMENT = 16  # What Triton compiles for where the addresses of all tensors are multiples of it.


@dataclass(frozen=True)
class Launch:
    """One kernel launch, all but its tensors.

    Triton looks at every argument in every launch, to find what it compiled for their like. That takes longer than
    small kernels run, so what it found is kept for tensors of the same dtypes.

    Attributes:
        kernel: The Triton kernel.
        programs: Grid size; the grid has one axis.
        sizes: Run-time numbers by argument name.
        constants: Compile-time values by argument name.
        options: num_warps, num_stages, enable_fp_fusion and maxnreg.
        blocks: (rows, columns) that the kernel loads at a time, by the names of those arguments that are tensor
            descriptors, of matrices of pixels by channels or, for a weight, of output by input channels.
    """

    kernel: Any
    programs: int
    sizes: Mapping[str, float]
    constants: dict[str, Any]
    options: dict[str, Any]
    blocks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    _compiled: dict[Hashable, Callable[..., None]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def takes(self, **tensors: Tensor) -> bool:
        """Whether the tensors, given by argument name, start where descriptors may if they are to have some."""
        return all(tensors[name].data_ptr() % DESCRIPTOR_ALIGNMENT == 0 for name in self.blocks)

    def __call__(self, **tensors: Tensor | None) -> None:
        """Launch on the tensors, given by argument name; they are NHWC or, if weights, (C_out, C_in, 1, 1).

        The first tensor is not None, and tells the device. Names and their order are the same in every call.
        """
        given = tensors.values()
        device = next(iter(given)).get_device()  # type: ignore[union-attr]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in given]
        known = (device, *[None if tensor is None else tensor.dtype for tensor in given])
        aligned = functools.reduce(operator.or_, addresses) % _ALIGNMENT == 0
        run = self._compiled.get(known) if aligned else None
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run(run, known if aligned else None, addresses, tensors)
        else:
            self._run(run, known if aligned else None, addresses, tensors)

    def _run(
        self,
        run: Callable[..., None] | None,
        known: Hashable | None,
        addresses: Sequence[int],
        tensors: Mapping[str, Tensor | None],
    ) -> None:
        """By ``run``, or by way of Triton, from then on by what that compiled if the tensors are ``known``."""
        if run is not None:
            run(addresses, tensors)
            return
        arguments = {name: self._argument(name, tensor) for name, tensor in tensors.items()}
        compiled = self.kernel[(self.programs,)](**arguments, **self.sizes, **self.constants, **self.options)
        if known is not None and isinstance(compiled, CompiledKernel):  # the interpreter returns nothing
            self._compiled[known] = self._straight_to(compiled, tensors)

    def _straight_to(self, compiled: CompiledKernel, tensors: Mapping[str, Tensor | None]) -> Callable[..., None]:
        """What launches a compiled kernel on tensors of the same names, and as absent ones."""
        values = {**dict.fromkeys(tensors), **self.sizes, **self.constants}
        names = self.kernel.arg_names
        usual = [values[name] for name in names]
        places = [(i, names.index(name)) for i, (name, tensor) in enumerate(tensors.items()) if tensor is not None]
        described = {names.index(name): name for name in self.blocks}
        launch = compiled[(self.programs, 1, 1)]

        def run(addresses: Sequence[int], tensors: Mapping[str, Tensor | None]) -> None:
            arguments = usual.copy()
            for i, place in places:
                arguments[place] = addresses[i]
            for place, name in described.items():
                arguments[place] = self._argument(name, tensors[name])
            launch(*arguments)

        return run

    def _argument(self, name: str, tensor: Tensor | None) -> Tensor | TensorDescriptor | None:
        if tensor is None or name not in self.blocks:
            return tensor
        columns = tensor.shape[1]
        return TensorDescriptor(tensor, [tensor.numel() // columns, columns], [columns, 1], list(self.blocks[name]))


class Prepared(NamedTuple):
    """What convolutions have in common whose tensors have the same shapes, layouts and dtypes.

    Attributes:
        config: Launch settings.
        launch: The launch.
        shape: Of the result; of partial sums for a weight gradient.
        rows: Of the partials that programs leave for sums over all pixels; 0 for a weight gradient.
    """

    config: Any
    launch: Launch
    shape: tuple[int, ...]
    rows: int

    def partials(self, sums: int, like: Tensor) -> Tensor | None:
        """Room for ``sums`` float32 values per row and channel of the result; None for no sums."""
        if not sums:
            return None
        return torch.empty(self.rows, sums, self.shape[1], dtype=torch.float32, device=like.device)


def options(config: Config | PointwiseConfig) -> dict[str, Any]:
    """Triton's launch options."""
    limit = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True, **limit}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return triton.knobs.runtime.interpret


def precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    """How `grouped_conv_tiles.dot` multiplies operands of ``dtype``."""
    if dtype == torch.bfloat16 and interpreted():
        return "upcast"  # The interpreter multiplies the bit patterns of bfloat16 numbers.
    return "tf32" if dtype == torch.float32 and allow_tf32 else "ieee"


@functools.cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors; an H200's for the interpreter's CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def architecture(device: torch.device) -> int:
    """Ten times the compute capability; an H200's for the interpreter's CPU."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


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
