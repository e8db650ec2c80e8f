"""Bytes that operators move to and from memory, counted as they run, from the sizes of their tensors.

Every kernel reads each of its operands once and writes each of its results once; caches may serve some of that, and an
operand that a kernel reads twice is still counted once. Counted kernel by kernel:

* PyTorch's operators, and those of our C++/CUDA extension: one kernel each. Views are free, and so is memory that is
  only allocated. Exceptions: backward of a convolution is two kernels, input gradient and weight gradient, that both
  read the output's gradient; batch norm in training reduces its input before it can use it, and so reads it twice, and
  in backward the gradient and the input.
  A weight that was packed before is read as that.
* Our own operators in Python count as what they call.
* A Triton launch moves each tensor it is given once.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnext.kernels import extension

_BACKENDS = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}
# In-place, but the old contents do not matter.
_OVERWRITES = {"aten::copy_", "aten::fill_", "aten::zero_"}
_CONVOLUTION_BACKWARD = {"aten::convolution_backward", "aten::miopen_convolution_backward"}


def moved_bytes(call: Callable[[], object]) -> int:
    """Run ``call`` and return the bytes that its kernels move."""
    counter = _Counter()
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("triton") is not None:
            from resnext.kernels.launch import Launch

            launch = Launch.__call__

            def counted(self: Launch, **tensors: Tensor | None) -> None:
                counter.bytes += _size(tensors.values())
                launch(self, **tensors)

            stack.enter_context(mock.patch.object(Launch, "__call__", counted))
        if extension.load() is None:
            stack.enter_context(mock.patch.object(extension, "_C", _CountedExtension(extension._C, counter)))
        stack.enter_context(counter)
        call()
    return counter.bytes


class _CountedExtension:
    """The functions of the extension, which PyTorch does not see."""

    def __init__(self, module: Any, counter: _Counter) -> None:
        self._module, self._counter = module, counter

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if not callable(function):
            return function

        def counted(*args: Any) -> object:
            results = function(*args)
            packed = name == "conv_affine" and args[2] is not None  # read in place of the weight
            self._counter.bytes += _size([*args[:1], *args[2:]] if packed else args) + _size(tree_leaves(results))
            return results

        return counted


class _Counter(TorchDispatchMode):
    """Adds up what moves while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "resnext":
            device = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)).device
            with self:  # on again, for what the operator calls
                return func.redispatch(torch._C.DispatchKeySet(_BACKENDS[device.type]), *args, **kwargs)
        result = func(*args, **kwargs)
        self.bytes += _moved(func, args, kwargs, result)
        return result


def _moved(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes that one operator moves."""
    name = func._schema.name
    if "empty" in name:
        return 0
    if name in _CONVOLUTION_BACKWARD:
        grad, x, weight = args[:3]
        dx, dw, db = result
        passes = [(grad, weight, dx)] * (dx is not None) + [(grad, x, dw)] * (dw is not None)
        return sum(map(_size, passes)) + _size([db])
    arguments = list(_arguments(func, args, kwargs))
    inputs = [leaf for _, leaf in arguments]
    outputs = tree_leaves(result)
    written = [leaf for argument, leaf in arguments if _is_written(argument)]
    if not written and {_place(t) for t in outputs} & {_place(t) for t in inputs} - {None}:
        return 0  # a view
    if name in _OVERWRITES or ".out" in str(func):
        moved = _size(inputs)
    else:
        moved = _size(inputs) + _size([*written, *outputs])
    if "batch_norm" in name and "elemt" not in name:
        if "backward" in name:
            moved += _size(args[:2])
        elif any(leaf is True for leaf in args):  # training
            moved += _size(args[:1])
    return moved


def _arguments(func: Any, args: Any, kwargs: Any) -> Iterable[tuple[Any, Any]]:
    """(argument of the schema, leaf of its value) for every leaf."""
    declared = func._schema.arguments
    values = dict(zip((argument.name for argument in declared), args, strict=False)) | kwargs
    for argument in declared:
        for leaf in tree_leaves(values.get(argument.name)):
            yield argument, leaf


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _place(tensor: Any) -> int | None:
    return tensor.untyped_storage().data_ptr() if isinstance(tensor, Tensor) and tensor.numel() else None


def _size(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among ``tensors``, each once, and no more of one than it has memory."""
    found = {id(t): t for t in tensors if isinstance(t, Tensor)}
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in found.values())
