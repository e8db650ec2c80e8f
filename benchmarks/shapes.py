"""The 3x3 grouped convolutions and the blocks of the networks people train, at 224 x 224 pixels, and what they cost.

tests/test_benchmarks.py derives the same tables from the torchvision and timm models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

PASSES = ("fwd", "dgrad", "wgrad")


@dataclass(frozen=True)
class Layer:
    """A 3x3 grouped convolution with padding 1, dilation 1 and no bias, for any batch.

    Attributes:
        in_channels: C_in.
        out_channels: C_out.
        height: Height of the input.
        width: Width of the input.
        stride: 1 or 2, of both axes.
        groups: Number of groups; divides both channel counts.
    """

    in_channels: int
    out_channels: int
    height: int
    width: int
    stride: int
    groups: int

    @property
    def name(self) -> str:
        """What the tables and ``--layers`` call it, e.g. ``128x56x56_s1_gw4``."""
        channels = str(self.in_channels)
        if self.out_channels != self.in_channels:
            channels += f"-{self.out_channels}"
        return f"{channels}x{self.height}x{self.width}_s{self.stride}_gw{self.group_width}"

    @property
    def group_width(self) -> int:
        """Input channels per group."""
        return self.in_channels // self.groups

    @property
    def out_size(self) -> tuple[int, int]:
        """(H_out, W_out)."""
        return (self.height - 1) // self.stride + 1, (self.width - 1) // self.stride + 1

    def input_shape(self, batch: int) -> tuple[int, int, int, int]:
        """(N, C_in, H, W)."""
        return batch, self.in_channels, self.height, self.width

    def output_shape(self, batch: int) -> tuple[int, int, int, int]:
        """(N, C_out, H_out, W_out)."""
        return batch, self.out_channels, *self.out_size

    def weight_shape(self) -> tuple[int, int, int, int]:
        """(C_out, C_in / groups, 3, 3)."""
        return self.out_channels, self.group_width, 3, 3

    def flops(self, batch: int) -> int:
        """Floating-point operations of any one pass, a multiply-add counted as two, padding included."""
        out_height, out_width = self.out_size
        return 2 * 9 * self.group_width * self.out_channels * batch * out_height * out_width

    def bytes(self, batch: int, itemsize: int) -> int:
        """Fewest bytes any one pass can move: the input, the output and the weight, or their gradients, once each."""
        out_height, out_width = self.out_size
        activations = batch * (self.in_channels * self.height * self.width + self.out_channels * out_height * out_width)
        return itemsize * (activations + self.out_channels * self.group_width * 9)


# Network -> its distinct layers and how often each occurs in one pass over the network. torchvision's and timm's names,
# and our own for the ResNeXt that neither has.
NETWORKS: Mapping[str, Mapping[Layer, int]] = {
    "resnext50_32x4d": {
        Layer(128, 128, 56, 56, 1, 32): 3,
        Layer(256, 256, 56, 56, 2, 32): 1,
        Layer(256, 256, 28, 28, 1, 32): 3,
        Layer(512, 512, 28, 28, 2, 32): 1,
        Layer(512, 512, 14, 14, 1, 32): 5,
        Layer(1024, 1024, 14, 14, 2, 32): 1,
        Layer(1024, 1024, 7, 7, 1, 32): 2,
    },
    "resnext50_32x2d": {
        Layer(64, 64, 56, 56, 1, 32): 3,
        Layer(128, 128, 56, 56, 2, 32): 1,
        Layer(128, 128, 28, 28, 1, 32): 3,
        Layer(256, 256, 28, 28, 2, 32): 1,
        Layer(256, 256, 14, 14, 1, 32): 5,
        Layer(512, 512, 14, 14, 2, 32): 1,
        Layer(512, 512, 7, 7, 1, 32): 2,
    },
    "resnext101_32x8d": {
        Layer(256, 256, 56, 56, 1, 32): 3,
        Layer(512, 512, 56, 56, 2, 32): 1,
        Layer(512, 512, 28, 28, 1, 32): 3,
        Layer(1024, 1024, 28, 28, 2, 32): 1,
        Layer(1024, 1024, 14, 14, 1, 32): 22,
        Layer(2048, 2048, 14, 14, 2, 32): 1,
        Layer(2048, 2048, 7, 7, 1, 32): 2,
    },
    "resnext101_64x4d": {
        Layer(256, 256, 56, 56, 1, 64): 3,
        Layer(512, 512, 56, 56, 2, 64): 1,
        Layer(512, 512, 28, 28, 1, 64): 3,
        Layer(1024, 1024, 28, 28, 2, 64): 1,
        Layer(1024, 1024, 14, 14, 1, 64): 22,
        Layer(2048, 2048, 14, 14, 2, 64): 1,
        Layer(2048, 2048, 7, 7, 1, 64): 2,
    },
    "regnety_016": {
        Layer(48, 48, 112, 112, 2, 2): 1,
        Layer(48, 48, 56, 56, 1, 2): 1,
        Layer(120, 120, 56, 56, 2, 5): 1,
        Layer(120, 120, 28, 28, 1, 5): 5,
        Layer(336, 336, 28, 28, 2, 14): 1,
        Layer(336, 336, 14, 14, 1, 14): 16,
        Layer(888, 888, 14, 14, 2, 37): 1,
        Layer(888, 888, 7, 7, 1, 37): 1,
    },
    "regnetx_032": {
        Layer(96, 96, 112, 112, 2, 2): 1,
        Layer(96, 96, 56, 56, 1, 2): 1,
        Layer(192, 192, 56, 56, 2, 4): 1,
        Layer(192, 192, 28, 28, 1, 4): 5,
        Layer(432, 432, 28, 28, 2, 9): 1,
        Layer(432, 432, 14, 14, 1, 9): 14,
        Layer(1008, 1008, 14, 14, 2, 21): 1,
        Layer(1008, 1008, 7, 7, 1, 21): 1,
    },
    "regnety_040": {
        Layer(128, 128, 112, 112, 2, 2): 1,
        Layer(128, 128, 56, 56, 1, 2): 1,
        Layer(192, 192, 56, 56, 2, 3): 1,
        Layer(192, 192, 28, 28, 1, 3): 5,
        Layer(512, 512, 28, 28, 2, 8): 1,
        Layer(512, 512, 14, 14, 1, 8): 11,
        Layer(1088, 1088, 14, 14, 2, 17): 1,
        Layer(1088, 1088, 7, 7, 1, 17): 1,
    },
    "regnety_160": {
        Layer(224, 224, 112, 112, 2, 2): 1,
        Layer(224, 224, 56, 56, 1, 2): 1,
        Layer(448, 448, 56, 56, 2, 4): 1,
        Layer(448, 448, 28, 28, 1, 4): 3,
        Layer(1232, 1232, 28, 28, 2, 11): 1,
        Layer(1232, 1232, 14, 14, 1, 11): 10,
        Layer(3024, 3024, 14, 14, 2, 27): 1,
    },
}


def select_layers(names: Sequence[str]) -> list[Layer]:
    """The layers that a list of network and layer names stands for, each once, in the order of `NETWORKS`.

    Args:
        names: Keys of `NETWORKS`, `Layer.name`s, or ``"all"``.

    Raises:
        ValueError: If a name is neither.
    """
    every = list(dict.fromkeys(layer for network in NETWORKS.values() for layer in network))
    chosen: set[Layer] = set()
    for name in names:
        found = [layer for layer in every if name in ("all", layer.name) or layer in NETWORKS.get(name, {})]
        if not found:
            raise ValueError(
                f"expected layers among all, {', '.join(NETWORKS)} or a name that --list prints, got {name!r}"
            )
        chosen.update(found)
    return [layer for layer in every if layer in chosen]


class Convolution(NamedTuple):
    """A convolution of a block: (C_in, C_out), kernel and stride of both axes, groups, and (H_out, W_out)."""

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    groups: int
    out_size: tuple[int, int]


@dataclass(frozen=True)
class Block:
    """A residual block as torchvision builds it, for any batch.

    Attributes:
        bottleneck: Whether it is a Bottleneck (1x1, 3x3, 1x1) or a BasicBlock (3x3, 3x3).
        in_channels: Channels of the input.
        planes: Its size: channels of the output, or a quarter of them in a bottleneck.
        height: Height of the input.
        width: Width of the input.
        stride: 1 or 2, of its first 3x3 convolution.
        groups: Groups of the bottleneck's 3x3 convolution.
        base_width: Channels per group of that convolution where ``planes`` is 64.
    """

    bottleneck: bool
    in_channels: int
    planes: int
    height: int
    width: int
    stride: int
    groups: int = 1
    base_width: int = 64

    @property
    def name(self) -> str:
        """What the tables and ``--blocks`` call it, e.g. ``bottleneck_256-512x56x56_s2_g32``."""
        kind, groups = ("bottleneck", f"_g{self.groups}") if self.bottleneck else ("basic", "")
        size = f"{self.in_channels}-{self.out_channels}x{self.height}x{self.width}"
        return f"{kind}_{size}_s{self.stride}{groups}"

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.planes * (4 if self.bottleneck else 1)

    @property
    def projects(self) -> bool:
        """Whether the shortcut is a 1x1 convolution and not the input itself."""
        return self.stride != 1 or self.in_channels != self.out_channels

    @property
    def convolutions(self) -> list[Convolution]:
        """The residual branch's convolutions and then the shortcut's."""
        size, stride = (self.height, self.width), self.stride
        out_size = (size[0] - 1) // stride + 1, (size[1] - 1) // stride + 1
        if self.bottleneck:
            middle = self.planes * self.base_width // 64 * self.groups
            found = [
                Convolution(self.in_channels, middle, 1, 1, 1, size),
                Convolution(middle, middle, 3, stride, self.groups, out_size),
                Convolution(middle, self.out_channels, 1, 1, 1, out_size),
            ]
        else:
            found = [
                Convolution(self.in_channels, self.planes, 3, stride, 1, out_size),
                Convolution(self.planes, self.planes, 3, 1, 1, out_size),
            ]
        if self.projects:
            found.append(Convolution(self.in_channels, self.out_channels, 1, stride, 1, out_size))
        return found

    def input_shape(self, batch: int) -> tuple[int, int, int, int]:
        """(N, C_in, H, W)."""
        return batch, self.in_channels, self.height, self.width

    def convolution_bytes(self, batch: int, itemsize: int) -> int:
        """Size of all convolutions' outputs: what moved bytes are set against."""
        return sum(itemsize * batch * c.out_channels * c.out_size[0] * c.out_size[1] for c in self.convolutions)


def _blocks(bottleneck: bool, depths: Sequence[int], groups: int = 1, base_width: int = 64) -> Counter[Block]:
    """The blocks of a network of four stages for 224 x 224 pixels, of which the stem leaves 56 x 56."""
    blocks: Counter[Block] = Counter()
    channels, size = 64, 56
    for stage, depth in enumerate(depths):
        for index in range(depth):
            stride = 2 if stage > 0 and index == 0 else 1
            block = Block(bottleneck, channels, 64 << stage, size, size, stride, groups, base_width)
            blocks[block] += 1
            channels, size = block.out_channels, size // stride
    return blocks


# Network -> its distinct blocks and how often each occurs. torchvision's names.
BLOCKS: Mapping[str, Mapping[Block, int]] = {
    "resnet18": _blocks(False, (2, 2, 2, 2)),
    "resnet50": _blocks(True, (3, 4, 6, 3)),
    "resnext50_32x4d": _blocks(True, (3, 4, 6, 3), groups=32, base_width=4),
}


def select_blocks(names: Sequence[str]) -> list[Block]:
    """The blocks that a list of network and block names stands for, as `select_layers` does for layers."""
    every = list(dict.fromkeys(block for network in BLOCKS.values() for block in network))
    chosen: set[Block] = set()
    for name in names:
        found = [block for block in every if name in ("all", block.name) or block in BLOCKS.get(name, {})]
        if not found:
            raise ValueError(
                f"expected blocks among all, {', '.join(BLOCKS)} or a name that --list prints, got {name!r}"
            )
        chosen.update(found)
    return [block for block in every if block in chosen]
