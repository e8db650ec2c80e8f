"""Residual blocks beside torchvision's, and how far apart their results may be.

Rounding errors of a chain of layers have no useful a-priori bound, but they are proportional to the unit roundoff, and
of one size for every order of summation. So the error that PyTorch's own block makes in float32, against float64, is
the measure: twice that for ours in float32 (two errors of one size and any sign), and three times that, scaled by
the ratio of the unit roundoffs, for ours in float64, where the oracle has an error of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnext.blocks import BasicBlock, Bottleneck
from resnext.convert import why_not_fused

resnet = pytest.importorskip("torchvision.models").resnet

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PLAIN = {BasicBlock: resnet.BasicBlock, Bottleneck: resnet.Bottleneck}
UNIT_ROUNDOFF_RATIO = 2.0**-29  # float64 to float32

Norm = Callable[[int], nn.Module]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class BlockCase:
    """A block of one of the two kinds, with 4 channels per group in a bottleneck's 3x3 convolution."""

    id: str
    kind: type[BasicBlock] | type[Bottleneck]
    inplanes: int
    planes: int
    stride: int = 1

    def pair(self, norm: Norm = nn.BatchNorm2d, **arguments: Any) -> tuple[nn.Module, nn.Module]:
        """Ours and torchvision's, with the same parameters, none at its initial value; ``arguments`` are for ours."""
        ours = self._make(self.kind, norm, **arguments)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            plain = self._make(PLAIN[self.kind], norm)
            for parameter in plain.parameters():
                parameter.add_(torch.randn_like(parameter) / 4)
        ours.load_state_dict(plain.state_dict())
        return ours, plain

    def _make(self, kind: Any, norm: Norm, **arguments: Any) -> Any:
        out_planes = self.planes * kind.expansion
        downsample = None
        if self.stride != 1 or self.inplanes != out_planes:
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, out_planes, 1, self.stride, bias=False), norm(out_planes)
            )
        widths = {"groups": 4, "base_width": 32} if self.kind is Bottleneck else {}
        return kind(self.inplanes, self.planes, self.stride, downsample, norm_layer=norm, **widths, **arguments)

    def images(self, batch: int = 3, height: int = 7, width: int = 6) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return torch.randn(batch, self.inplanes, height, width, generator=generator)


CASES = [
    BlockCase("bottleneck", Bottleneck, 32, 8),
    BlockCase("bottleneck-projection", Bottleneck, 24, 8),
    BlockCase("bottleneck-stride2", Bottleneck, 24, 8, stride=2),
    BlockCase("basic", BasicBlock, 16, 16),
    BlockCase("basic-projection", BasicBlock, 12, 16),
    BlockCase("basic-stride2", BasicBlock, 12, 16, stride=2),
]
IDENTITY, PROJECTION = CASES[0], CASES[2]


def reason_of(block: nn.Module, x: Tensor | None = None) -> str | None:
    """Why a block would run its children one by one."""
    return why_not_fused(block, x).get("")


def forward_and_gradients(block: nn.Module, x: Tensor) -> Results:
    """The output, and the gradients of the input and of every parameter for a random gradient of the output."""
    x = x.detach().requires_grad_()
    block.zero_grad()
    out = block(x)
    generator = torch.Generator().manual_seed(3)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    results = {"out": out.detach(), "dx": x.grad}
    return results | {f"d {name}": p.grad for name, p in block.named_parameters() if p.grad is not None}


def buffers(block: nn.Module) -> Results:
    return {name: buffer.clone() for name, buffer in block.named_buffers()}


def train_and_evaluate(block: nn.Module, x: Tensor) -> Results:
    """Two training steps, evaluation with and without gradients, and another step."""
    results = {}
    for name in ("first", "second"):
        results |= prefixed(name, {**forward_and_gradients(block.train(), x), **buffers(block)})
        x = x + 1
    results |= prefixed("evaluation", {**forward_and_gradients(block.eval(), x), **buffers(block)})
    with torch.no_grad():
        results["inference"] = block(x)
        results["inference again"] = block(x)
    results |= prefixed("third", {**forward_and_gradients(block.train(), x), **buffers(block)})
    return results


def prefixed(prefix: str, results: Results) -> Results:
    return {f"{prefix}: {name}": value for name, value in results.items()}


def relative_errors(results: Results, exact: Results) -> dict[str, float]:
    assert results.keys() == exact.keys()
    return {
        name: float((results[name].double() - value).norm() / (value.double().norm() or 1.0))
        for name, value in exact.items()
    }


def assert_same_results(
    ours: nn.Module,
    plain: nn.Module,
    x: Tensor,
    dtype: torch.dtype,
    layout: torch.memory_format = torch.contiguous_format,
    protocol: Callable[[nn.Module, Tensor], Results] = forward_and_gradients,
) -> None:
    """What a protocol returns for ours, in ``dtype`` and ``layout``, is what it returns for PyTorch's in float64.

    The modules and ``x`` are float32.
    """
    exact = protocol(copy.deepcopy(plain).double(), x.double())
    narrow = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
    rounding = 0.0
    for each in LAYOUTS.values():
        results = protocol(copy.deepcopy(plain).to(narrow, memory_format=each), x.to(narrow, memory_format=each))
        rounding = max(rounding, *relative_errors(results, exact).values())
    allowed = 3 * rounding * UNIT_ROUNDOFF_RATIO if dtype == torch.float64 else 2 * rounding
    results = protocol(ours.to(dtype, memory_format=layout), x.to(dtype, memory_format=layout))
    assert all(value.dtype in (dtype, torch.int64) for value in results.values())
    wrong = {name: error for name, error in relative_errors(results, exact).items() if not error <= allowed}
    assert not wrong, f"allowed {allowed:.3g}, got {wrong}"
