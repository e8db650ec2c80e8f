"""The blocks, fused, beside torchvision's: outputs, gradients, running statistics, and what batch norm may be set to."""

import copy

import pytest
import torch
from torch import Tensor, nn

from resnext.blocks import Bottleneck

from .block_cases import (
    CASES,
    IDENTITY,
    LAYOUTS,
    PROJECTION,
    assert_same_results,
    buffers,
    forward_and_gradients,
    relative_errors,
    train_and_evaluate,
)

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_torchvisions_block(case, dtype, layout, recompute):
    ours, plain = case.pair(recompute=recompute) if False else case.pair()
    ours.recompute = recompute
    assert ours.why_not_fused() is None
    assert_same_results(ours, plain, case.images(), dtype, layout, train_and_evaluate)
