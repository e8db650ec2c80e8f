"""The fused launchers of the compiled extension on the CPU, in every instruction set, layout and dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resnext.kernels import extension

from . import fused_numerics
from .fused_numerics import ELEMENTWISE_SHAPES, GROUPED_CASES, FusedCase, make, make_affine

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (True, False)

# Shapes that fused_numerics.py leaves out: several parts of an image, blocks that only larger images fill, and channels
# that fill no vector.
LARGER = [
    FusedCase("gw2-several-parts", 2, 40, 40, 11, 61, 20, stride=(2, 1)),
    FusedCase("gw8-last-block-moved-back", 1, 48, 48, 5, 31, 6),
    FusedCase("gw12-padded-lanes", 1, 24, 24, 6, 5, 2, stride=(1, 2)),
    FusedCase("gw40-three-vectors", 1, 80, 80, 4, 17, 2),
    FusedCase("narrows-in-group", 1, 32, 8, 5, 6, 4, stride=(2, 2)),
    FusedCase("2x2-image-stride2", 1, 16, 16, 2, 2, 4, stride=(2, 2)),
    FusedCase("wgrad-in-chunks", 3, 16, 16, 31, 33, 4),
]
SHAPES = {**ELEMENTWISE_SHAPES, "several-parts": (3, 20, 21, 63), "several-parts-of-a-plane": (1, 2, 70, 80)}


@pytest.mark.parametrize("case", [*GROUPED_CASES, *LARGER], ids=lambda case: case.id)
def test_convolutions(capability, case):
    for dtype in DTYPES:
        for channels_last in LAYOUTS:
            layout = {"channels_last": channels_last}
            fused_numerics.check_conv_stats(extension, case, dtype, **layout, weight_channels_last=channels_last)
            fused_numerics.check_conv_affine(extension, case, dtype, **layout)


@pytest.mark.parametrize("case", [GROUPED_CASES[0], GROUPED_CASES[3], LARGER[2]], ids=lambda case: case.id)
def test_convolutions_without_their_options(capability, case):
    for channels_last in LAYOUTS:
        layout = {"channels_last": channels_last}
        fused_numerics.check_conv_stats(extension, case, **layout, centered=False)
        fused_numerics.check_conv_stats(extension, case, **layout, prologue=False)
        fused_numerics.check_conv_stats(extension, case, **layout, stats=False)
        fused_numerics.check_conv_affine(extension, case, **layout, relu=False)
        fused_numerics.check_conv_affine(extension, case, **layout, scaled=False, residual=False)
        fused_numerics.check_conv_affine(extension, case, **layout, shifted=False, residual=False, relu=False)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_elementwise(capability, shape):
    for dtype in DTYPES:
        for channels_last in LAYOUTS:
            generator = torch.Generator().manual_seed(3)
            z = make(shape, dtype, generator, channels_last=channels_last)
            fused_numerics.check_statistics(extension, z, channels_last)
            for residual in ("none", "plain", "affine"):
                options = {"channels_last": channels_last, "residual": residual, "centered": residual != "plain"}
                fused_numerics.check_affine_add_relu(extension, shape, dtype, **options)
            fused_numerics.check_pool(extension, z, make_affine(shape[1], generator), channels_last)
