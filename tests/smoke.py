"""What a user would try first with an installed wheel; `tests.wheel` runs it in an environment of its own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import resnext
import resnext.cli


class Block(nn.Module):
    """A residual block such as torchvision's, by someone who has never heard of this package."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


def training_step(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The output, all gradients and all buffers after one step."""
    model.zero_grad()
    out = model(images)
    out.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **gradients, **{name: b.clone() for name, b in model.named_buffers()}}


def main() -> None:
    where = Path(resnext.__file__)
    assert Path(sys.prefix) in where.parents, f"resnext comes from {where}, not from {sys.prefix}"
    assert importlib.metadata.version("resnext") == resnext.__version__
    assert (where.parent / "py.typed").exists()

    (command,) = importlib.metadata.entry_points(group="console_scripts", name="resnext")
    assert command.load() is resnext.cli.main

    x, weight = torch.randn(2, 32, 14, 14), torch.randn(32, 4, 3, 3)
    explanation = resnext.explain(x, weight, groups=8)
    built = importlib.util.find_spec("resnext._C") is not None
    assert f"fwd: {'cpu' if built else 'torch'}" in explanation, explanation
    torch.testing.assert_close(
        resnext.grouped_conv2d(x, weight, groups=8), nn.functional.conv2d(x, weight, padding=1, groups=8)
    )

    torch.manual_seed(0)
    plain, fused = Block(32, 8), Block(32, 8)
    fused.load_state_dict(plain.state_dict())
    report = resnext.fuse_(fused)
    assert [found.kind for found in report.fused] == ["block", "convolution"], report
    torch.testing.assert_close(training_step(fused, x), training_step(plain, x))

    model = resnext.resnext50_32x4d(num_classes=10)
    first = training_step(model, torch.randn(2, 3, 64, 64))
    assert all(tensor.isfinite().all() for tensor in first.values() if tensor.is_floating_point())
    print(f"resnext {resnext.__version__} {'with' if built else 'without'} the extension, on torch {torch.__version__}")


if __name__ == "__main__":
    main()
