"""Fused operators in a row as one node of autograd's graph: what a block in training is.

Recorded one by one (fused_conv_ops.py, fused_ops.py), each operator costs Python and autograd about as much as starting
its kernels. Here one `torch.autograd.Function` runs them all, and its backward runs theirs from the last to the first.
What differentiates a backward pass again goes through the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import calls, dispatch
from .attention_steps import Excite, Gate, Mean
from .block_steps import AddRelu, Conv, ConvNorm, MaxPool, Values
from .operators import through_formula

BlockStep = ConvNorm | Conv | AddRelu | MaxPool | Mean | Excite | Gate


def run_block(
    steps: Sequence[BlockStep], values: Values, result: int, finish: Callable[[Values], None]
) -> Tensor | None:
    """Run steps whose result depends on parameters that all need gradients.

    Args:
        steps: What to run, in order.
        values: Tensors at the places of what is given, None elsewhere; filled.
        result: The place of what to return.
        finish: Called with ``values`` when all of it is there, before anything is recorded.

    Returns:
        The result; None, with nothing having happened, for calls in which more than autograd has a part: modes,
        transforms, tracers, profilers.
    """
    given = [place for place, value in enumerate(values) if value is not None]
    tensors = [values[place] for place in given]
    if calls.attention(tuple(tensors)) is not calls.Attention.GRADIENT:
        return None
    # Past `Function.apply`, as operators do.
    return super(torch.autograd.Function, _Block).apply(steps, values, given, result, finish, *tensors)  # type: ignore[misc]


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, steps, values, given, result, finish, *tensors):
        kept = list(tensors)
        places = {id(tensor): place for place, tensor in enumerate(kept)}
        ctx.made = []
        with torch._C._AutoDispatchBelowAutograd():
            for step in steps:
                channels_last, saved = step.forward(values)
                of_step: list[int | None] = []
                for tensor in saved:
                    if tensor is None:
                        of_step.append(None)
                        continue
                    place = places.setdefault(id(tensor), len(kept))
                    if place == len(kept):
                        kept.append(tensor)
                    of_step.append(place)
                ctx.made.append((step, channels_last, of_step))
        finish(values)
        ctx.save_for_backward(*kept)
        ctx.given, ctx.result, ctx.size = given, result, len(values)
        ctx.backend = dispatch.forced_backend()
        return values[result]

    @staticmethod
    def backward(ctx, dout):
        if ctx.backend is None or dispatch.forced_backend() is not None:
            return *(None,) * 5, *_gradients(ctx, dout)
        with dispatch.use_backend(ctx.backend):
            return *(None,) * 5, *_gradients(ctx, dout)


def _gradients(ctx: Any, dout: Tensor) -> list[Tensor | None]:
    """Of the tensors that the block was given."""
    tensors = ctx.saved_tensors
    needed = ctx.needs_input_grad[5:]
    differentiated = torch.is_grad_enabled()
    if differentiated or calls.attention((dout,)) is calls.Attention.FULL:  # a batch of gradients, for instance

        def again(*tensors: Tensor) -> Tensor:
            values = [None] * ctx.size
            for place, tensor in zip(ctx.given, tensors, strict=True):
                values[place] = tensor
            for step, *_ in ctx.made:
                step.again(values)
            return values[ctx.result]

        with torch.enable_grad():
            return through_formula(again, tensors[: len(needed)], (dout,), needed, differentiated)
    gradients: Values = [None] * ctx.size
    wanted = [True] * ctx.size
    for place, wants in zip(ctx.given, needed, strict=True):
        wanted[place] = wants
    gradients[ctx.result] = dout
    with torch._C._AutoDispatchBelowAutograd():
        for step, channels_last, places in reversed(ctx.made):
            if gradients[step.result] is None:
                continue  # of what the result does not depend on
            saved = [None if place is None else tensors[place] for place in places]
            step.backward(channels_last, saved, gradients, wanted)
        found = []
        for place, wants, tensor in zip(ctx.given, needed, tensors, strict=False):
            gradient = gradients[place] if wants else None
            found.append(None if gradient is None else gradient.to(tensor.dtype))
    return found
