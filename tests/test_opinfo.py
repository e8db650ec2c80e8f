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


def tensors_of(sample):
    return [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]


def run(conv, inputs, keywords, grad):
    """Output and gradients of every input, none of them for integers."""
    y = conv(*inputs, **keywords)
    return [y, *torch.autograd.grad(y, inputs, grad)] if y.requires_grad else [y]


def assert_two_computations_agree(got, wanted, magnitude, terms):
    """Both are within the bound of tests/numerics.py, with sums in the dtype itself, as PyTorch's may be."""
    if not (wanted.dtype.is_floating_point or wanted.dtype.is_complex):
        assert torch.equal(got, wanted)
        return
    roundoff = torch.finfo(wanted.dtype).eps / 2
    bound = 2 * roundoff * (wanted.abs().double() + (terms + 1) * magnitude)
    assert ((got - wanted).abs().double() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["as-sampled", "padding-1"])
def test_samples(dtype, padded):
    """The samples as they are, and with padding 1 so that those with 3x3 kernels reach our operators."""
    compared = 0
    for sample in CONV2D.sample_inputs("cpu", dtype, requires_grad=dtype.is_floating_point or dtype.is_complex):
        keywords = sample.kwargs | ({"padding": 1, "dilation": 1} if padded else {})
        inputs = tensors_of(sample)
        y = F.conv2d(*inputs, **keywords)
        grad = torch.randn_like(y) if y.requires_grad else None
        got, wanted = (run(conv, inputs, keywords, grad) for conv in (ours, F.conv2d))
        sizes = [t.detach().abs().double().requires_grad_(grad is not None) for t in inputs]
        magnitudes = run(F.conv2d, sizes, keywords, None if grad is None else grad.abs().double())
        pixels = y[..., 0, :, :].numel()
        terms = [inputs[1][0].numel() + 1, inputs[1].numel(), pixels, pixels]
        assert got[0].stride() == y.stride()
        for a, b, magnitude, count in zip(got, wanted, magnitudes, terms[: len(magnitudes)], strict=False):
            assert a.dtype == b.dtype
            assert_two_computations_agree(a.detach(), b.detach(), magnitude.detach(), count)
            compared += 1
    assert compared >= (26 if dtype == torch.int64 else 78)


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_samples_gradcheck(dtype):
    for sample in CONV2D.sample_inputs("cpu", dtype, requires_grad=True):
        call = lambda *tensors, sample=sample: ours(*tensors, **sample.kwargs)  # noqa: E731
        assert torch.autograd.gradcheck(call, tensors_of(sample), fast_mode=True, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(call, tensors_of(sample), fast_mode=True)


def test_error_inputs():
    seen = 0
    for error in CONV2D.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            ours(sample.input, *sample.args, **sample.kwargs)
        seen += 1
    assert seen >= 10
