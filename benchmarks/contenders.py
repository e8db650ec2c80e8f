"""What is timed: our operators and PyTorch's, each pass of a layer on the same values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from shapes import Layer
from torch import Tensor

try:
    from resnext.kernels import checks, dispatch, grouped_conv2d, grouped_conv2d_dgrad, grouped_conv2d_wgrad
except ModuleNotFoundError as error:
    if error.name != "resnext":
        raise
    raise SystemExit(
        "resnext is not installed for this Python; run `pip install --no-build-isolation -e .` in the repository's root"
    ) from None

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
EAGER = tuple(FORMATS)
COMPILED = tuple(f"compiled_{layout}" for layout in FORMATS)
BASELINES = (*EAGER, *COMPILED)


@dataclass(frozen=True)
class Operands:
    """A layer's tensors: x (N, C_in, H, W), weight (C_out, C_in/groups, 3, 3) and grad (N, C_out, H_out, W_out)."""

    layer: Layer
    x: Tensor
    weight: Tensor
    grad: Tensor

    @classmethod
    def random(cls, layer: Layer, batch: int, dtype: torch.dtype, device: torch.device) -> Operands:
        """Normal values, the same in every run, the weight scaled so that outputs have the size of inputs."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: tuple[int, ...], std: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(std).to(dtype)

        return cls(
            layer,
            normal(layer.input_shape(batch)),
            normal(layer.weight_shape(), 1 / math.sqrt(9 * layer.group_width)),
            normal(layer.output_shape(batch)),
        )

    def to(self, layout: str) -> Operands:
        """All three tensors in one layout, as ``model.to(memory_format=...)`` leaves them."""
        tensors = (tensor.contiguous(memory_format=FORMATS[layout]) for tensor in (self.x, self.weight, self.grad))
        return Operands(self.layer, *tensors)


def ours(pass_: str, operands: Operands) -> Tensor:
    """One pass by this library, on whichever backend dispatch chooses."""
    layer, x, weight, grad = operands.layer, operands.x, operands.weight, operands.grad
    if pass_ == "fwd":
        return grouped_conv2d(x, weight, None, layer.stride, 1, 1, layer.groups)
    if pass_ == "dgrad":
        return grouped_conv2d_dgrad(grad, weight, x.shape[2:], layer.stride, layer.groups)
    return grouped_conv2d_wgrad(grad, x, layer.stride, layer.groups)


def pytorch(pass_: str, stride: int, groups: int, x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    """One pass by PyTorch: cuDNN on CUDA, oneDNN on the CPU; on float64 tensors the oracle."""
    if pass_ == "fwd":
        return torch.nn.functional.conv2d(x, weight, None, stride, 1, 1, groups)
    one, wanted = [1, 1], [pass_ == "dgrad", pass_ == "wgrad", False]
    gradients = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride, stride], one, one, False, [0, 0], groups, wanted
    )
    return gradients[wanted.index(True)]


def baseline(name: str, pass_: str, operands: Operands) -> Callable[[], Tensor]:
    """One of `BASELINES` as a function of nothing. ``operands`` may be in any layout."""
    operands = operands.to(name.removeprefix("compiled_"))
    run = torch.compile(pytorch, dynamic=False) if name in COMPILED else pytorch
    layer, tensors = operands.layer, (operands.x, operands.weight, operands.grad)
    return lambda: run(pass_, layer.stride, layer.groups, *tensors)


def serving_backend(pass_: str, operands: Operands) -> str:
    """The backend that serves `ours`."""
    layer, x, weight = operands.layer, operands.x, operands.weight
    channels_last = checks.output_channels_last(x, weight)
    problem = dispatch.problem_of(
        pass_, x.shape, weight.shape, (layer.stride, layer.stride), layer.groups, x.dtype, x.device, channels_last
    )
    return dispatch.choose(problem, x.device)
