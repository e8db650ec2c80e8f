"""Calls that repeat: they skip checks and the dispatcher only where nothing of PyTorch's has a part in them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnext.blocks import Bottleneck
from resnext.kernels import (
    BackendError,
    calls,
    conv_affine,
    conv_stats,
    dispatch,
    extension,
    grouped_conv2d,
    grouped_conv2d_dgrad,
    grouped_conv2d_wgrad,
    keep_packed,
    ops,
    use_backend,
)

X = torch.randn(2, 8, 5, 6)
W = torch.randn(8, 2, 3, 3)
VECTOR = torch.randn(8)


def fwd(x=X, weight=W, bias=None, stride=1):
    return grouped_conv2d(x, weight, bias, stride, groups=4)


CALLS = {
    "fwd": fwd,
    "bias": lambda: fwd(bias=VECTOR),
    "dgrad": lambda: grouped_conv2d_dgrad(X, W, (5, 6), 1, 4),
    "wgrad": lambda: grouped_conv2d_wgrad(X, X, (1, 1), 4),
    "affine": lambda: conv_affine(X, W, VECTOR, VECTOR, X, True, 1, 4),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_second_call_is_known_and_gives_the_same(call):
    first = call()
    assert len(calls._serves) == 1
    second = call()
    assert len(calls._serves) == 1
    assert second is not first
    assert torch.equal(second, first)


@pytest.mark.parametrize("residual", [X[:1].half(), X[0], X[:1, :, :1]], ids=["dtype", "dimensions", "expanded"])
def test_a_residual_that_is_converted_is_converted_in_every_call(residual):
    def call():
        return conv_affine(X[:1], W, VECTOR, VECTOR, residual, True, 1, 4)

    first = call()
    assert not calls._serves
    assert torch.equal(call(), first)


@pytest.mark.parametrize("weight", [W, nn.Parameter(W)], ids=["plain", "trained"])
def test_sliced_tensors_are_not_remembered(weight):
    first = fwd(X[..., :5], weight)
    assert not calls._serves
    assert torch.equal(fwd(X[..., :5], weight), first)


def test_a_lazily_negated_tensor_is_not_remembered():
    x = torch.complex(X, X).conj().imag  # -X, by a bit that only the dispatcher looks at
    assert x.is_neg()
    fwd(x.clone())
    assert torch.equal(fwd(x), fwd(-X))


@pytest.fixture
def dispatched(monkeypatch):
    """The names of this library's operators that are called by way of PyTorch, in order."""
    names = []
    call = torch._ops.OpOverload.__call__

    def counted(self, *args, **kwargs):
        if self.namespace == "resnext":
            names.append(self._opname)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", counted)
    return names


def plain_step():
    grouped_conv2d(X.requires_grad_(), nn.Parameter(W), groups=4).sum().backward()
    X.requires_grad_(False).grad = None


def block_step():
    block = Bottleneck(16, 4, groups=2).train()
    block(torch.randn(2, 16, 5, 6, requires_grad=True)).sum().backward()


STEPS = {"plain": plain_step, "block": block_step, "inference": torch.no_grad()(lambda: conv_stats(X, W, None, 1, 4))}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_autograd_alone_needs_no_dispatcher(step, dispatched):
    step()
    assert dispatched == []
    with torch.autocast("cpu", torch.bfloat16):
        step()
    assert dispatched == []
    with FlopCounterMode(display=False):
        step()
    assert dispatched


@pytest.mark.parametrize("function", ["grouped_conv2d", "conv_stats", "block"])
def test_batched_gradients(function):
    """Reverse mode over a batch of gradients, whose tensors look plain and have no memory."""
    block = Bottleneck(8, 2, groups=2).eval()
    functions = {
        "grouped_conv2d": lambda x: grouped_conv2d(x, W, groups=4),
        "conv_stats": lambda x: conv_stats(x, W, None, 1, 4)[0],
        "block": block,
    }
    x = X[:1, :, :2, :2].clone()
    jacobians = [torch.autograd.functional.jacobian(functions[function], x, vectorize=v) for v in (True, False)]
    torch.testing.assert_close(*jacobians)


def test_zeros_without_memory():
    zeros = torch._efficientzerotensor(tuple(X.shape))
    fwd(X)
    assert not fwd(zeros).any()
    assert not conv_stats(zeros, nn.Parameter(W), None, 1, 4)[0].any()


def test_a_tensor_that_has_outlived_its_transform():
    """The dispatcher takes the transform's wrapper off; it has no memory of its own."""
    kept = []

    def double(x):
        kept.append(2 * x)
        return kept[0].sum()

    torch.func.grad(double)(X)
    fwd(X.clone())
    vectors = (None, VECTOR, VECTOR)
    for call in (fwd, lambda x: conv_stats(x, nn.Parameter(W), vectors, (1, 1), 4)[0]):
        torch.testing.assert_close(call(kept[0]), call(2 * X))


def test_a_profiler_sees_known_calls():
    fwd()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        fwd()
    assert "resnext::_grouped_conv2d_fwd" in {event.name for event in profiler.events()}


def test_a_known_call_checks_nothing(monkeypatch):
    wanted = fwd()
    monkeypatch.setattr(ops.checks, "invalid_conv2d", lambda *_: pytest.fail("checked"))
    assert torch.equal(fwd(), wanted)


@pytest.mark.parametrize(
    "other",
    [
        lambda: fwd(X.double(), W.double()),
        lambda: fwd(X.contiguous(memory_format=torch.channels_last)),
        lambda: fwd(X[..., :5]),
        lambda: fwd(stride=2),
        lambda: fwd(bias=VECTOR),
        lambda: fwd(nn.Parameter(X)),
    ],
    ids=["dtype", "layout", "shape", "stride", "bias", "gradient"],
)
def test_other_calls_are_not_known(other, monkeypatch):
    fwd()
    checked = []
    invalid = ops.checks.invalid_conv2d
    monkeypatch.setattr(ops.checks, "invalid_conv2d", lambda *args: checked.append(args) or invalid(*args))
    other()
    assert checked


@pytest.mark.parametrize("stride", [1.0, True], ids=str)
def test_what_equals_a_known_number_is_still_refused(stride):
    fwd()
    with pytest.raises(TypeError):
        fwd(stride=stride)


def test_modes_transforms_and_autocast_see_known_calls():
    wanted = fwd()
    with FlopCounterMode(display=False) as counter:
        fwd()
    assert counter.get_total_flops() == 2 * wanted.numel() * 2 * 9
    with torch.autocast("cpu", torch.bfloat16):
        assert fwd().dtype == torch.bfloat16
    _, tangent = torch.func.jvp(fwd, (X,), (X,))
    torch.testing.assert_close(tangent, wanted)
    with torch.device("meta"):  # a mode of __torch_function__
        assert torch.equal(fwd(), wanted)


def test_gradients_are_recorded_after_a_known_call():
    fwd()
    weight = nn.Parameter(W)
    with torch.no_grad():
        fwd(weight=weight)
    fwd(weight=weight).sum().backward()
    assert weight.grad is not None


def test_a_forced_backend_counts():
    fwd()
    with use_backend("cuda"), pytest.raises(BackendError):
        fwd()
    with use_backend("torch"):
        fwd()
    assert len(calls._serves) == 2


def test_there_is_a_limit(monkeypatch):
    monkeypatch.setattr(calls, "_MOST", 2)
    for size in range(3, 8):
        fwd(torch.randn(1, 8, size, size))
        assert len(calls._serves) <= 2


@pytest.mark.skipif(extension.load() is not None, reason="the C++ extension is not built")
def test_which_weights_are_kept_packed():
    x = X.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 8, 1, 1)
    assert keep_packed(weight, x)
    assert extension.is_kept(weight)
    assert not keep_packed(weight, X)  # in NCHW a library convolves
    assert keep_packed(torch.randn(16, 8, 3, 3), x)
    assert keep_packed(torch.randn(16, 8, 3, 3), x, stride=2)
    assert not keep_packed(torch.randn(16, 8, 3, 3), X)
    assert keep_packed(W, x, groups=4)
    assert keep_packed(W, X, groups=4)
    assert not keep_packed(weight.double(), x.double())
    for dtype in (torch.float16, torch.bfloat16):
        assert keep_packed(weight.to(dtype), x.to(dtype)) == dispatch._products_by_cpu(dtype)
        dense = torch.randn(16, 8, 3, 3, dtype=dtype)
        ours = dispatch._products_by_cpu(dtype)
        assert keep_packed(dense, x.to(dtype), stride=2) == ours
        assert keep_packed(dense, X.to(dtype)) == (ours and not dispatch.onednn_takes(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert not keep_packed(weight, x)
