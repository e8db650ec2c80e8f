"""The convolution problems that every backend is tested on: small, explicit, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One 3x3, padding 1 convolution; ``id`` says why it is in the list."""

    id: str
    batch: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    groups: int
    stride: tuple[int, int] = (1, 1)
    bias: bool = False

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.in_channels, self.height, self.width

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.in_channels // self.groups, 3, 3

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        height = (self.height - 1) // self.stride[0] + 1
        width = (self.width - 1) // self.stride[1] + 1
        return self.batch, self.out_channels, height, width


CASES = [
    Case("gw1-depthwise", 2, 16, 16, 7, 6, 16),
    Case("gw2", 2, 32, 32, 6, 7, 16),
    Case("gw3-not-a-power-of-two", 1, 12, 12, 5, 9, 4),
    Case("gw4-resnext50-stage1", 2, 32, 32, 8, 8, 8),
    Case("gw6-padded-lanes", 1, 18, 18, 5, 5, 3),
    Case("gw8-stride2-resnext50-stage2", 2, 32, 32, 8, 8, 4, (2, 2), True),
    Case("gw12-bias", 1, 24, 24, 6, 5, 2, bias=True),
    Case("gw16-stride2-odd", 1, 32, 32, 7, 9, 2, (2, 2)),
    Case("gw24-regnet", 1, 48, 48, 5, 6, 2),
    Case("gw32-7x7", 2, 64, 64, 7, 7, 2),
    Case("gw40-odd-blocks", 1, 80, 80, 4, 5, 2, (2, 2)),
    Case("gw48", 1, 48, 48, 4, 4, 1),
    Case("gw56-regnet16", 1, 112, 112, 3, 4, 2),
    Case("gw64-stride2", 1, 128, 128, 5, 5, 2, (2, 2)),
    Case("gw112-regnet16", 1, 112, 112, 3, 3, 1),
    Case("gw128", 1, 128, 128, 3, 3, 1),
    Case("dense-narrow", 1, 3, 5, 6, 6, 1, bias=True),
    Case("widens-in-group", 1, 8, 24, 6, 6, 4, bias=True),
    Case("narrows-in-group", 1, 32, 8, 5, 6, 4, (2, 2)),
    Case("channel-multiplier", 2, 6, 12, 5, 4, 6),
    Case("1x1-image", 3, 16, 16, 1, 1, 4, bias=True),
    Case("1x1-image-stride2", 2, 16, 16, 1, 1, 4, (2, 2)),
    Case("2x2-image-stride2", 1, 16, 16, 2, 2, 4, (2, 2)),
    Case("one-row", 1, 8, 8, 1, 9, 2),
    Case("one-column", 1, 8, 8, 9, 1, 2, (2, 2)),
    Case("stride-2-1", 1, 16, 16, 7, 6, 4, (2, 1)),
    Case("stride-1-2", 2, 16, 16, 6, 7, 4, (1, 2), True),
    Case("even-image-stride2", 1, 16, 16, 6, 8, 4, (2, 2)),
    Case("batch-prime", 7, 16, 16, 3, 3, 4),
    Case("wider-than-a-tile", 1, 16, 16, 3, 67, 4),
    Case("taller-than-a-band", 1, 16, 16, 67, 3, 4, (2, 2)),
]


def make_tensors(
    case: Case,
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = False,
    integers: bool = False,
    seed: int = 0,
) -> dict[str, torch.Tensor | None]:
    """Random ``x``, ``weight``, ``bias`` and ``grad`` of a case; small integers if exact results are wanted."""
    generator = torch.Generator().manual_seed(seed)

    def make(shape):
        if integers:
            return torch.randint(-3, 4, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    layout = torch.channels_last if channels_last else torch.contiguous_format
    return {
        "x": make(case.input_shape).contiguous(memory_format=layout),
        "weight": make(case.weight_shape).contiguous(memory_format=layout),
        "bias": make((case.out_channels,)) if case.bias else None,
        "grad": make(case.output_shape).contiguous(memory_format=layout),
    }


# Large enough for Winograd's algorithm on the CPU (csrc/cpu/winograd.inl.h), in channels_last.
WINOGRAD_CASES = [
    Case("winograd-groups", 2, 128, 128, 20, 21, 2, bias=True),
    Case("winograd-odd-panels-within-an-image", 2, 45, 48, 13, 15, 1),
    Case("winograd-rest-of-a-group", 2, 100, 104, 29, 26, 2),
    Case("winograd-odd-panels-of-images", 4, 40, 40, 9, 9, 1),
    Case("winograd-panels-across-images", 3, 44, 44, 10, 18, 1),
    Case("winograd-widens", 1, 42, 75, 20, 21, 1, bias=True),
    Case("winograd-wgrad-in-blocks", 1, 70, 135, 8, 12, 1),
    Case("winograd-rows-longer-than-a-chunk", 1, 40, 44, 6, 460, 1),
]
