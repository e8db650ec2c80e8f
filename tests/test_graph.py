"""What a recording of a forward must refuse, because it would lose it."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resnext


class StraightThrough(torch.autograd.Function):
    """Rounds, and lets the gradient pass as if it did not: recorded as ``round``, the gradient would be zero."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, dout: Tensor) -> Tensor:
        return dout


class Block(nn.Module):
    """A residual block that passes its input, or its branch, through a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.function = function

    def branch(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.function(self, x) + x)


CUSTOM = {
    "custom Function": (lambda block, x: block.branch(StraightThrough.apply(x)), "StraightThrough"),
    "checkpoint, reentrant": (
        lambda block, x: checkpoint(block.branch, x, use_reentrant=True),
        "CheckpointFunction",
    ),
}


@pytest.mark.parametrize(("function", "name"), CUSTOM.values(), ids=CUSTOM.keys())
def test_autograd_functions_are_called_and_not_recorded(function, name):
    plain = Block(function).double()
    block = copy.deepcopy(plain)
    assert resnext.fuse_(block).skipped[0].reason == f"its forward calls {name}, an autograd Function"
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    gradients = []
    for module in (block, plain):
        module(images := x.clone().requires_grad_()).square().sum().backward()
        gradients.append(images.grad)
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


def test_autograd_functions_work_as_ever_after_recording():
    before = torch.autograd.Function.__dict__["apply"]
    resnext.fuse_(Block(CUSTOM["custom Function"][0]))
    assert torch.autograd.Function.__dict__["apply"] is before


def test_checkpoint_without_reentrance_is_not_recorded():
    report = resnext.fuse_(Block(lambda block, x: checkpoint(block.branch, x, use_reentrant=False)))
    assert not report.fused
    assert [each.reason for each in report.skipped] == ["its forward branches on values"]
