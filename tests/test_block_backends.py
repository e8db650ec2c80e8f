"""The blocks on each backend by name: C++ in this process, Triton's kernels on a GPU or in Triton's interpreter.

The interpreter must be chosen before Triton is first imported: without a GPU, `test_in_the_interpreter` runs this file
in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resnext import use_backend
from resnext.kernels import extension

from .block_cases import (
    CASES,
    LAYOUTS,
    Results,
    assert_same_results,
    buffers,
    forward_and_gradients,
    prefixed,
    train_and_evaluate,
)
from .interpreter import DEVICE, INTERPRETED, here, not_here, run_tests


@not_here
def test_in_the_interpreter():
    pytest.importorskip("triton")
    run_tests(__file__, timeout=1200)


@pytest.mark.skipif(INTERPRETED, reason="not about Triton")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_cpp(case, layout):
    if reason := extension.load():
        pytest.skip(reason)
    ours, plain = case.pair()

    def protocol(block: nn.Module, x: Tensor) -> Results:
        with use_backend("cpu" if block is ours else "auto"):
            return train_and_evaluate(block, x)

    assert_same_results(ours, plain, case.images(), torch.float32, layout, protocol)


@here
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_triton(case):
    ours, plain = (block.to(DEVICE) for block in case.pair())

    def protocol(block: nn.Module, x: Tensor) -> Results:
        with use_backend("triton" if block is ours else "auto"):
            results = {}
            for name in ("first", "second"):  # whose running statistics are others
                results |= prefixed(name, {**forward_and_gradients(block.train(), x), **buffers(block)})
                with torch.no_grad():
                    results |= prefixed(name, {"inference": block.eval()(x)})
            return results

    images = case.images(2, 5, 4).to(DEVICE)
    assert_same_results(ours, plain, images, torch.float32, torch.channels_last, protocol)
