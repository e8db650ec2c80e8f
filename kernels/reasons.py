"""Which backend serves a call, and why not the others: for people to read.

What `dispatch.py` decides is asked there, never decided again.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import checks, dispatch


def explain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> str:
    """Say which backend would serve a call of `grouped_conv2d`, pass by pass, and why not the others.

    Takes the arguments of `grouped_conv2d`; computes nothing. Print the result.

    Raises:
        ValueError: If the call itself is invalid.
    """
    x, weight, bias = checks.autocast(x, weight, bias)
    if message := checks.invalid_conv2d(x, weight, bias, stride, padding, dilation, groups):
        raise ValueError(f"explain: {message}")
    stride, dilation = checks.pair(stride), checks.pair(dilation)
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    channels_last = checks.output_channels_last(batched, weight)
    lines = [
        f"grouped_conv2d of x {tuple(x.shape)} with weight {tuple(weight.shape)}, stride {stride}, "
        f"padding {padding}, groups {groups}, "
        f"{str(x.dtype).removeprefix('torch.')}, {'channels_last' if channels_last else 'contiguous'}, on {x.device}"
    ]
    if reason := dispatch.why_plain_torch(x, weight, stride, padding, dilation, groups):
        return "\n".join([*lines, f"  every pass: plain PyTorch (F.conv2d): {reason}"])
    forced = dispatch.forced_backend()
    for op in ("fwd", "dgrad", "wgrad"):
        problem = dispatch.problem_of(op, batched.shape, weight.shape, stride, groups, x.dtype, x.device, channels_last)
        reasons = {name: dispatch.unsupported(name, x.dtype, x.device) for name in dispatch.BACKENDS}
        if forced is None:
            chosen = dispatch.choose(problem, x.device)
            entry = dispatch.measured(problem, x.device)
            fitting = [name for name, reason in reasons.items() if reason is None]
            reasons = {
                name: reason or dispatch.not_chosen(name, problem, entry=entry, fitting=fitting)
                for name, reason in reasons.items()
            }
        else:
            chosen = forced if reasons[forced] is None else "an error"
            reasons = {name: reason if name == forced else f"{forced} is forced" for name, reason in reasons.items()}
        lines.append(f"  {op}: {chosen}")
        lines += [f"    not {name}: {reason}" for name, reason in reasons.items() if reason and name != chosen]
    return "\n".join(lines)


def serving_backend(
    x: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    fused: bool = False,
) -> str:
    """The name of the backend that would compute the forward of a convolution; `explain` says why.

    Takes the arguments of `grouped_conv2d`; ``fused``: of `conv_stats`, which serves 1x1 convolutions too.

    Raises:
        BackendError: If a forced backend cannot serve it.
    """
    x, weight, _ = checks.autocast(x, weight, None)
    stride, dilation = checks.pair(stride), checks.pair(dilation)
    if not fused and dispatch.why_plain_torch(x, weight, stride, padding, dilation, groups):
        return "torch"
    x = x if x.dim() == 4 else x.unsqueeze(0)
    channels_last = checks.output_channels_last(x, weight)
    problem = ("fwd", x.shape, weight.shape, stride, groups, x.dtype, x.device, channels_last)
    if fused and dispatch.composes(*problem):
        return "torch"
    return dispatch.choose(dispatch.problem_of(*problem), x.device, "stats" if fused else "plain", weight.shape[2])
