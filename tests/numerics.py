"""What a right answer is: the float64 oracle, and error bounds derived from the arithmetic, never tuned.

A pass computes o = sum of n products. With unit roundoff u_acc of the accumulation (float32) and u_out of the output,
any order of summation gives, element by element,

    |o_computed - o| <= u_out * |o| + (n + 1) * u_acc * sum |products|        (Higham, 2002, sections 3.1 and 4.2)

which is what `assert_close` checks. For long sums (weight gradients) that bound is loose, and rounding errors add up
like a random walk: there the root mean square over all elements must be within sqrt(n) instead of n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resnext.kernels import reference

from . import winograd_numerics
from .cases import Case

LONG_SUM = 2000  # terms from which on the root mean square is checked too


@dataclass(frozen=True)
class Exact:
    """One pass in float64: the result, the sum of the products' magnitudes, and how many products each sum has."""

    value: Tensor
    magnitude: Tensor
    terms: int


def exact(op: str, case: Case, tensors: dict[str, Tensor | None], winograd: bool = False) -> Exact:
    """The float64 result of a pass on the same, already rounded inputs; ``winograd``: for a result computed so."""
    plain = _exact(op, case, tensors)
    if not winograd:
        return plain
    names = {"fwd": ("x", "weight"), "dgrad": ("grad", "weight"), "wgrad": ("grad", "x")}[op]
    magnitude = winograd_numerics.magnitude(op, *(tensors[name].double() for name in names), case.groups)
    if op == "fwd" and tensors["bias"] is not None:
        magnitude += tensors["bias"].double().abs()[:, None, None]
    return Exact(plain.value, magnitude, plain.terms + winograd_numerics.ROUNDINGS)


def _exact(op: str, case: Case, tensors: dict[str, Tensor | None]) -> Exact:
    double = {name: None if tensor is None else tensor.double().cpu() for name, tensor in tensors.items()}
    size = double["x"].abs() if op == "wgrad" else double["weight"].abs()
    height, width = case.output_shape[2:]
    if op == "fwd":
        value = reference.fwd(double["x"], double["weight"], double["bias"], case.stride, case.groups, False)
        bias = None if double["bias"] is None else double["bias"].abs()
        magnitude = reference.fwd(double["x"].abs(), size, bias, case.stride, case.groups, False)
        return Exact(value, magnitude, 9 * case.in_channels // case.groups + 1)
    if op == "dgrad":
        arguments = (case.input_shape[2:], case.stride, case.groups, False)
        value = reference.dgrad(double["grad"], double["weight"], *arguments)
        return Exact(
            value, reference.dgrad(double["grad"].abs(), size, *arguments), 9 * case.out_channels // case.groups
        )
    value = reference.wgrad(double["grad"], double["x"], case.stride, case.groups, False)
    magnitude = reference.wgrad(double["grad"].abs(), size, case.stride, case.groups, False)
    return Exact(value, magnitude, case.batch * height * width)


def assert_close(actual: Tensor, expected: Exact, *, out_roundings: float = 1.0, u_acc: float = 2.0**-24) -> None:
    """Check a computed pass against its oracle.

    Args:
        actual: The computed tensor, float32, float16 or bfloat16.
        expected: Its oracle.
        out_roundings: Unit roundoffs of the output dtype allowed: 1 for one rounding to nearest; 2 where the platform
            truncates instead (Triton's interpreter, bfloat16).
        u_acc: Unit roundoff of the products and sums: 2**-24 in float32; 2**-10 where TF32 cuts the operands off.
    """
    assert actual.shape == expected.value.shape, f"shape {tuple(actual.shape)}, not {tuple(expected.value.shape)}"
    info = torch.finfo(actual.dtype)
    value = actual.detach().cpu().double()
    error = (value - expected.value).abs()
    u_out = out_roundings * info.eps / 2
    smallest = out_roundings * info.smallest_normal * info.eps / 2  # half a subnormal step
    bound = u_out * expected.value.abs() + (expected.terms + 1) * u_acc * expected.magnitude + smallest
    require(error, bound, value, expected.value, by=" by element")
    if expected.terms >= LONG_SUM:
        rms = error.square().mean().sqrt()
        bound = u_out * rms_of(expected.value) + expected.terms**0.5 * u_acc * rms_of(expected.magnitude) + smallest
        require(rms[None], bound[None], rms[None], torch.zeros(1), by=" by root mean square")


def rms_of(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()


def require(error: Tensor, bound: Tensor, value: Tensor, wanted: Tensor, *, name: str = "", by: str = "") -> None:
    """Fail with the worst element unless every error is within its bound."""
    wrong = ~(error <= bound)  # NaN is wrong too
    if not wrong.any():
        return
    worst = torch.where(wrong, error / bound, -1.0).nan_to_num(nan=float("inf")).argmax()
    where = tuple(int(i) for i in torch.unravel_index(worst, error.shape))
    raise AssertionError(
        f"{name}{int(wrong.sum())} of {wrong.numel()} wrong{by}; worst at {where}: got {value[where].item():.9g}, "
        f"expected {wanted[where].item():.9g}, error {error[where].item():.3g}, bound {bound[where].item():.3g}"
    )
