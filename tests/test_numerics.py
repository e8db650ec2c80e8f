"""The oracle and the tolerance themselves: right for correct results, wrong for slightly wrong ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resnext.kernels import reference

from .cases import CASES, Case, make_tensors
from .numerics import assert_close, exact


def compute(op, case, tensors):
    if op == "fwd":
        return reference.fwd(tensors["x"], tensors["weight"], tensors["bias"], case.stride, case.groups, False)
    if op == "dgrad":
        return reference.dgrad(
            tensors["grad"], tensors["weight"], case.input_shape[2:], case.stride, case.groups, False
        )
    return reference.wgrad(tensors["grad"], tensors["x"], case.stride, case.groups, False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_oracle_is_autograd_of_conv2d(case):
    tensors = {k: None if t is None else t.double().requires_grad_() for k, t in make_tensors(case).items()}
    y = F.conv2d(tensors["x"], tensors["weight"], tensors["bias"], case.stride, 1, 1, case.groups)
    dx, dw = torch.autograd.grad(y, (tensors["x"], tensors["weight"]), tensors["grad"])
    for op, wanted in (("fwd", y), ("dgrad", dx), ("wgrad", dw)):
        oracle = exact(op, case, {k: None if t is None else t.detach() for k, t in tensors.items()})
        torch.testing.assert_close(oracle.value, wanted, rtol=1e-12, atol=1e-12)
        assert (oracle.magnitude >= oracle.value.abs() * (1 - 1e-12)).all()


@pytest.mark.parametrize("op", ["fwd", "dgrad", "wgrad"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_pytorch_in_float32_is_within_the_bound(op, case):
    tensors = make_tensors(case)
    assert_close(compute(op, case, tensors), exact(op, case, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_border_pixel_without_one_tap_is_caught(dtype):
    """A kernel that skips the halo's neighbour for a single output pixel must not pass."""
    case = Case("gw4", 2, 32, 32, 8, 8, 8)
    tensors = make_tensors(case, dtype)
    oracle = exact("fwd", case, tensors)
    y = oracle.value.clone()
    # Output (0, 0, 0, 0) loses input pixel (0, 1): tap (1, 2) of its first input channel.
    y[0, 0, 0, 0] -= tensors["x"][0, 0, 0, 1].double() * tensors["weight"][0, 0, 1, 2].double()
    assert_close(oracle.value.to(dtype), oracle)
    with pytest.raises(AssertionError, match=r"1 of 4096 wrong by element; worst at \(0, 0, 0, 0\)"):
        assert_close(y.to(dtype), oracle)


def test_biased_long_sum_is_caught_by_the_root_mean_square():
    """An error that the elementwise bound of a long sum forgives everywhere, but that no rounding produces."""
    case = Case("long", 8, 4, 4, 32, 32, 1)
    tensors = make_tensors(case)
    oracle = exact("wgrad", case, tensors)
    assert_close(oracle.value.float(), oracle)
    shifted = oracle.value + 0.5 * oracle.terms * 2.0**-24 * oracle.magnitude
    with pytest.raises(AssertionError, match="root mean square"):
        assert_close(shifted.float(), oracle)


def test_nan_is_caught():
    case = CASES[0]
    oracle = exact("fwd", case, make_tensors(case))
    y = oracle.value.float()
    y[1, 2, 3, 4] = float("nan")
    with pytest.raises(AssertionError, match=r"worst at \(1, 2, 3, 4\)"):
        assert_close(y, oracle)
