"""The gate before every timing: our result against a float64 reference, with a bound derived from the arithmetic.

Our kernels run at the full size that is timed. Only slices of what they return are compared, so that the gate takes
less time than what it guards: the first and last image of y and dx, rows of the first and last group of dw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from contenders import Operands, ours, pytorch
from shapes import Layer
from torch import Tensor

_ROWS_OF_DW = 8


def mismatch(pass_: str, operands: Operands, result: Tensor | None = None) -> str | None:
    """Say where the result of one pass is wrong, or None; by default of what our operators compute.

    With o the exact result, P the terms it sums, u the unit roundoff of the output's dtype, v that of the accumulation
    and t that of a factor:

    * y and dx, element by element: ``|error| <= u |o| + (n v + 2 t) sum |P|``, the worst case of any order of n sums;
    * dw, whose n = N H_out W_out terms make the worst case meaningless, in root mean square:
      ``rms(error) <= u rms(o) + (n v + 2 t sqrt(n)) rms(P)``, the spread of n additions one after the other of random
      terms being n v rms(P) / sqrt(6).
    """
    if result is None:
        result = ours(pass_, operands)
    layer, x, weight = operands.layer, operands.x, operands.weight
    shape = {"fwd": operands.grad.shape, "dgrad": x.shape, "wgrad": weight.shape}[pass_]
    if result.shape != shape or result.dtype != x.dtype:
        return f"expected {tuple(shape)} of {x.dtype}, got {tuple(result.shape)} of {result.dtype}"
    if pass_ == "wgrad":
        return _wrong_groups(result, operands)
    for image in sorted({0, len(x) - 1}):
        part = slice(image, image + 1)
        if message := _wrong_image(pass_, result[part], layer, x[part], weight, operands.grad[part]):
            return f"image {image}: {message}"
    return None


def _roundoffs(dtype: torch.dtype, device: torch.device) -> tuple[float, float, float]:
    """(u, v, t) of `mismatch`."""
    factor = 0.0
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        factor = 2.0**-10  # TF32 keeps 10 bits; tensor cores cut the others off
    return torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps / 2, factor


def _wrong_image(pass_: str, result: Tensor, layer: Layer, *tensors: Tensor) -> str | None:
    exact = [tensor.double() for tensor in tensors]
    reference = pytorch(pass_, layer.stride, layer.groups, *exact)
    absolute = pytorch(pass_, layer.stride, layer.groups, *(tensor.abs() for tensor in exact))
    terms = 9 * (layer.group_width if pass_ == "fwd" else layer.out_channels // layer.groups)
    u, v, t = _roundoffs(result.dtype, result.device)
    underflow = torch.finfo(result.dtype).smallest_normal * u
    error = (result.double() - reference).abs()
    # "not <=" rather than ">": NaN is wrong too.
    wrong = ~(error <= u * reference.abs() + (terms * v + 2 * t) * absolute + underflow)
    if not wrong.any():
        return None
    where = tuple(int(index) for index in wrong.nonzero()[0])
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements are wrong, first at {where}: "
        f"expected {reference[where].item():.6g}, got {result[where].item():.6g}"
    )


def _wrong_groups(result: Tensor, operands: Operands) -> str | None:
    layer, x, grad = operands.layer, operands.x, operands.grad
    group_out = layer.out_channels // layer.groups
    rows = min(group_out, _ROWS_OF_DW)
    u, v, t = _roundoffs(result.dtype, result.device)
    for group in sorted({0, layer.groups - 1}):
        # The last rows: a group too wide for one tile has its remainder there.
        out = slice((group + 1) * group_out - rows, (group + 1) * group_out)
        inputs = slice(group * layer.group_width, (group + 1) * layer.group_width)
        part_x, part_grad, part = x[:, inputs].double(), grad[:, out].double(), result[out].double()
        reference = pytorch("wgrad", layer.stride, 1, part_x, part, part_grad)
        squares = pytorch("wgrad", layer.stride, 1, part_x.square(), part, part_grad.square())
        terms = len(grad) * math.prod(layer.out_size)
        allowed = u * rms(reference) + (terms * v + 2 * t * math.sqrt(terms)) * rms((squares / terms).sqrt())
        error = rms(part - reference)
        if not error <= allowed:
            return f"group {group}: expected an error of at most {allowed:.3g} in root mean square, got {error:.3g}"
    return None


def rms(tensor: Tensor) -> float:
    """The root mean square of all elements."""
    return tensor.square().mean().sqrt().item()


def less_accurate(
    ours: Mapping[str, Tensor],
    plain: Sequence[Mapping[str, Tensor]],
    exact: Mapping[str, Tensor],
    dtype: torch.dtype,
    sums: Mapping[str, float] | None = None,
) -> str | None:
    """Say which result of a block or network is worse than PyTorch's own, or None.

    No bound follows an error through a chain of convolutions and batch norms as closely as PyTorch's own error does: in
    root mean square ours may be twice the largest of theirs, and one rounding to ``dtype`` more.

    Args:
        ours: Results by name.
        plain: The same of PyTorch, in each layout.
        exact: The same in float64.
        dtype: What the results are computed in.
        sums: For results that are sums of n float32 terms P in an order of their own: n times the root mean square of
            P, of which one rounding of float32 is allowed besides, as in `mismatch`.
    """
    for name, wanted in exact.items():
        result = ours[name]
        if result.shape != wanted.shape:
            return f"{name}: expected {tuple(wanted.shape)}, got {tuple(result.shape)}"
        error = rms(result.double() - wanted)
        allowed = 2 * max(rms(p[name].double() - wanted) for p in plain) + torch.finfo(dtype).eps / 2 * rms(wanted)
        allowed += torch.finfo(torch.float32).eps / 2 * (sums or {}).get(name, 0.0)
        if not error <= allowed:
            return f"{name}: expected an error of at most {allowed:.3g} in root mean square, got {error:.3g}"
    return None
