"""What an operator is: a node in the graphs of PyTorch's compilers, a plain function where PyTorch has no part in it.

Every operator picks its backend when it runs. One that is differentiated has a `torch.autograd.Function` registered as
its Autograd kernel, so that compilers and export see one node per pass and never trace the Function.

A trip through PyTorch's dispatcher into Python costs about as much as starting a kernel, and a convolution in training
would make four. Calls that nothing but autograd attends to make none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import calls, dispatch

_LIBRARY = torch.library.Library("resnext", "DEF")
DIMS = "SymInt[2] stride, SymInt groups, bool channels_last"  # of a convolution, in schemas


class Operator:
    """One functional operator, ``torch.ops.resnext.<name>``.

    Args:
        name: Its name.
        schema: Its arguments and results, as ``torch.library.define`` takes them.

    Attributes:
        overload: What PyTorch knows.
        kernel: What runs on CPU and CUDA tensors, past PyTorch's dispatcher.
    """

    def __init__(self, name: str, schema: str) -> None:
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        self.overload: torch._ops.OpOverload = getattr(torch.ops.resnext, name).default

    def register(
        self,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        function: type[torch.autograd.Function] | None = None,
    ) -> None:
        """Give it what runs on CPU and CUDA tensors, its fake and, if it is differentiated, its derivative.

        The forward of ``function`` calls `below_autograd`.
        """
        name = self.overload._opname
        self.kernel = kernel
        self._function = self._recorded = None
        if function is not None:
            self._function = _bound_to_backend(function, direct=False)
            self._recorded = _bound_to_backend(function, direct=True)
        for device_type in ("CPU", "CUDA"):
            _LIBRARY.impl(name, kernel, device_type)
        torch.library.register_fake(self.overload, fake, lib=_LIBRARY)
        if function is not None:
            _LIBRARY.impl(name, self._autograd, "Autograd")

    def __call__(self, *args: Any) -> Any:
        """The results: by way of PyTorch where it has a part in the call, else of what serves it."""
        attention = calls.attention(args)
        if attention is calls.Attention.NONE:
            with torch._C._AutoDispatchBelowAutograd():
                return self.kernel(*args)
        if attention is calls.Attention.GRADIENT and self._recorded is not None:
            # Past `Function.apply`, which looks after torch.func's transforms: there are none.
            return super(torch.autograd.Function, self._recorded).apply(*args)  # type: ignore[misc]
        return self.overload(*args)

    def below_autograd(self, ctx: Any, *args: Any) -> Any:
        """The results, in the forward of the operator's function: nothing is recorded."""
        with torch._C._AutoDispatchBelowAutograd():
            return self.kernel(*args) if ctx.direct else self.overload(*args)

    def _autograd(self, *args: Any) -> Any:
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return self._function.apply(*args)  # type: ignore[union-attr]
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)


def _bound_to_backend(function: type[torch.autograd.Function], *, direct: bool) -> type[torch.autograd.Function]:
    """A function whose backward uses the backend that was forced in its forward, unless another one is by then.

    ``direct``: whether forward goes to the operator's kernel past PyTorch's dispatcher.
    """

    def forward(ctx, *args):
        ctx.direct = direct
        ctx.backend = dispatch.forced_backend()
        return function.forward(ctx, *args)

    def backward(ctx, *grads):
        if ctx.backend is None or dispatch.forced_backend() is not None:
            return function.backward(ctx, *grads)
        with dispatch.use_backend(ctx.backend):
            return function.backward(ctx, *grads)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(function.__name__, (function,), methods)


# --- what operators with several results share ---


def or_empty(like: Tensor, *results: Tensor | None) -> tuple[Tensor, ...]:
    """Operators return tensors only: an empty one stands for None."""
    return tuple(like.new_empty(0) if result is None else result for result in results)


def if_wanted(wanted: bool, gradient: Tensor) -> Tensor | None:
    """Functions return None for what no gradient is wanted of."""
    return gradient if wanted else None


def through_formula(
    function: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
    differentiated: bool = True,
) -> list[Tensor | None]:
    """Autograd's gradients, through the formula in plain PyTorch; which can be ``differentiated`` themselves.

    One of the tensors may have been made of another, or be it: the gradients are of aliases, which have not.
    """
    tensors = [t.view_as(t) if n and t is not None else t for t, n in zip(tensors, needed, strict=True)]
    outputs = function(*tensors)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None and o.requires_grad]
    inputs = [t for t, n in zip(tensors, needed, strict=True) if n and t is not None]
    if not pairs:
        return [None] * len(tensors)
    outputs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=differentiated, allow_unused=True))
    return [next(found) if n else None for n in needed]
