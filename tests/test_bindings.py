"""The functions of the extension as Python calls them: results, and what is no tensor or no size."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from resnext.kernels import extension

pytestmark = pytest.mark.skipif(extension.load() is not None, reason="the C++ extension is not built")

X = torch.randn(2, 8, 5, 6)
W = torch.randn(8, 4, 3, 3)


def fwd(x=X, weight=W, size=(2, 8, 5, 6), stride=1, groups=2, channels_last=False):
    return extension._C.grouped_conv2d_fwd(x, weight, None, size, stride, stride, groups, channels_last)


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", [(2, 8, 5, 6), (1, 8, 1, 1), (1, 8, 1, 3), (3, 1, 4, 4)], ids=str)
def test_results_have_the_strides_of_new_tensors(shape, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape).contiguous(memory_format=layout)
    y = extension._C.statistics_bwd(x, x, *[torch.zeros(shape[1])] * 3, shape, channels_last)
    assert type(y) is torch.Tensor
    assert y.stride() == torch.empty(shape, memory_format=layout).stride()
    assert torch.equal(y, x)
    assert not y.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_images_have_the_first_tensors_dtype_and_vectors_are_float32(dtype):
    z, mean, var = extension._C.conv_stats_fwd(
        X.to(dtype), None, None, None, W.to(dtype), X.shape, 8, 8, 1, 1, 2, False
    )
    assert (z.dtype, mean.dtype, var.dtype) == (dtype, torch.float32, torch.float32)
    assert (z.shape, mean.shape, var.shape) == (X.shape, (8,), (8,))


def test_a_given_tensor_is_filled_and_not_returned():
    out = torch.zeros_like(X)
    assert fwd(size=out) is None
    assert torch.equal(out, fwd())


def test_results_are_freed():
    y = fwd()
    reference = weakref.ref(y)
    assert y.untyped_storage().nbytes() == y.nbytes
    del y
    gc.collect()
    assert reference() is None


def test_inference_mode():
    with torch.inference_mode():
        assert fwd().is_inference()


def test_calls_from_several_threads():
    wanted = fwd()
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: fwd(), range(64)):
            assert torch.equal(y, wanted)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: extension._C.grouped_conv2d_fwd(X), TypeError, "expected 8 arguments, got 1"),
        (lambda: fwd(weight="W"), RuntimeError, "str"),
        (lambda: fwd(weight=None), RuntimeError, "NoneType"),
        (lambda: fwd(stride="1"), TypeError, "int"),
        (lambda: fwd(stride=2**70), OverflowError, "too (big|large)"),
        (lambda: fwd(size=(2, 8, 5)), RuntimeError, r"expected a size \(N, C, H, W\), got 3 numbers"),
        (lambda: fwd(size=(2, 8, 5, "6")), TypeError, "int"),
        (lambda: fwd(size=(2, 8, 5, -6)), RuntimeError, "negative dimension"),
        (lambda: fwd(size=(2, 8, 5, 7)), RuntimeError, r"expected output of shape \(2, 8, 5, 6\), got \(2, 8, 5, 7\)"),
        (lambda: fwd(size=(2, 8, 2**40, 6)), RuntimeError, "allocate"),
        (lambda: fwd(X.long()), RuntimeError, "expected floating-point numbers or bytes, got DLPack type 0 of 64 bits"),
        (lambda: fwd(X.to("meta")), RuntimeError, "meta"),
        (lambda: fwd(X.to_sparse()), RuntimeError, "storage"),
        (lambda: fwd(torch._efficientzerotensor(2, 8, 5, 6)), RuntimeError, "expected a tensor with memory"),
        (lambda: extension._C.bn_affine(*[torch.ones(3)] * 4, 3, 3, "eps"), TypeError, "must be real number"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
