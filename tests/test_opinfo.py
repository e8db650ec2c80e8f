"""PyTorch's own samples and error inputs for conv2d, through `grouped_conv2d`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db

from resnext import grouped_conv2d

CONV2D = next(op for op in op_db if op.name == "nn.functional.conv2d")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64]


def ours(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return grouped_conv2d(x, weight, bias, stride, padding, dilation, groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["as-sampled", "padding-1"])
def test_samples(dtype, padded):
    """The samples as they are, and with padding 1 so that those with 3x3 kernels reach our operators."""
    floating = dtype.is_floating_point or dtype.is_complex
    compared = 0
    for sample in CONV2D.sample_inputs("cpu", dtype, requires_grad=floating):
        keywords = sample.kwargs | ({"padding": 1, "dilation": 1} if padded else {})
        wanted = F.conv2d(sample.input, *sample.args, **keywords)
        got = ours(sample.input, *sample.args, **keywords)
        tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 64 * torch.finfo(dtype).eps} if floating else {}
        torch.testing.assert_close(got, wanted, **tolerance)
        assert got.stride() == wanted.stride()
        if floating:
            inputs = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]
            grad = torch.randn_like(wanted)
            for a, b in zip(
                torch.autograd.grad(got, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
            ):
                # PyTorch's own sums in 16 bits are coarser than ours: twice its rounding, on values up to ~100.
                torch.testing.assert_close(a, b, rtol=8 * torch.finfo(dtype).eps, atol=256 * torch.finfo(dtype).eps)
        compared += 1
    assert compared >= 26


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_samples_gradcheck(dtype):
    for sample in CONV2D.sample_inputs("cpu", dtype, requires_grad=True):
        inputs = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]
        call = lambda *tensors, sample=sample: ours(*tensors, **sample.kwargs)  # noqa: E731
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_error_inputs():
    seen = 0
    for error in CONV2D.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            ours(sample.input, *sample.args, **sample.kwargs)
        seen += 1
    assert seen >= 10
