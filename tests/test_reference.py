"""The plain PyTorch backend: in which dtype it lets PyTorch compute 16-bit gradients on the CPU."""

from __future__ import annotations

import pytest
import torch

from resnext.kernels import reference

BOTH = (True, True)


def dtypes_of_backward(monkeypatch, dtype, kernel, size, stride, library=True):
    """What dtype PyTorch's backward is given, and whether the gradients come back in that of the tensors."""
    given = []
    backward = reference._backward
    monkeypatch.setattr(reference, "onednn_takes", lambda dtype: library)
    monkeypatch.setattr(reference, "_backward", lambda grad, *rest: given.append(grad.dtype) or backward(grad, *rest))
    x, weight = torch.randn(2, 4, *size).to(dtype), torch.randn(6, 4, kernel, kernel).to(dtype)
    grad = reference.fwd(x, weight, None, stride, 1, False)
    gradients = reference.bwd(grad, x, weight, stride, 1, False, BOTH)
    assert [each.dtype for each in gradients] == [dtype, dtype]
    wanted = reference.bwd(grad.double(), x.double(), weight.double(), stride, 1, False, BOTH)
    for actual, exact in zip(gradients, wanted, strict=True):
        assert (actual.double() - exact).abs().max() <= 2**-7 * exact.abs().max()
    return given[0]


@pytest.mark.skipif(not reference.onednn_takes(torch.bfloat16), reason="oneDNN has no bfloat16 on this CPU")
@pytest.mark.parametrize(("kernel", "size", "stride"), [(3, (4, 5), (1, 1)), (3, (3, 3), (2, 2)), (1, (2, 3), (1, 1))])
def test_bfloat16_is_left_to_onednn(monkeypatch, kernel, size, stride):
    assert dtypes_of_backward(monkeypatch, torch.bfloat16, kernel, size, stride) == torch.bfloat16


@pytest.mark.parametrize(
    ("kernel", "size", "stride"),
    [(3, (2, 5), (2, 1)), (3, (1, 5), (1, 1)), (3, (5, 2), (2, 2)), (1, (4, 5), (1, 2)), (1, (4, 5), (2, 2))],
    ids=["one-row", "a-row", "one-column", "1x1-strided-columns", "1x1-strided"],
)
def test_bfloat16_is_widened_where_onednn_is_wrong(monkeypatch, kernel, size, stride):
    assert dtypes_of_backward(monkeypatch, torch.bfloat16, kernel, size, stride) == torch.float32


def test_bfloat16_is_widened_without_onednn(monkeypatch):
    assert dtypes_of_backward(monkeypatch, torch.bfloat16, 3, (4, 5), (1, 1), library=False) == torch.float32
    monkeypatch.undo()
    with torch.backends.mkldnn.flags(enabled=False):
        assert dtypes_of_backward(monkeypatch, torch.bfloat16, 3, (4, 5), (1, 1)) == torch.float32


def test_float16_is_widened(monkeypatch):
    assert dtypes_of_backward(monkeypatch, torch.float16, 3, (4, 5), (1, 1)) == torch.float32
