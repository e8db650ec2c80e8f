"""Calls that repeat, and what serves them.

Checks, the choice of a backend and PyTorch's dispatcher cost tens of microseconds, as long as small convolutions take.
A call that was right once, and in which PyTorch has no part (no gradient to record, no transform, mode, tracer or
autocast), goes straight to what served it then. Everything that decides about that is in its key.

Operators (operators.py) ask `attention` what has a part in a call of theirs; autograd and autocast may.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import dispatch

_MOST = 10_000  # images of every size
_TYPES = (Tensor, nn.Parameter)
_NUMBERS = (int, bool, float)
# Looked up once: beside a convolution's data nothing of Python stays in the caches, and each step costs a microsecond.
_is_compiling = torch.compiler.is_dynamo_compiling  # other compilers have modes
_is_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._are_functorch_transforms_active
_autocast = torch._C._is_any_autocast_enabled
_traced = torch._C._get_tracing_state
_profiled = torch._C._autograd._profiler_enabled
_keys_of = torch._C._dispatch_keys


def _plain_keys() -> set[int]:
    """The dispatch keys of plain tensors, and of those made in inference mode."""
    found = set()
    for device in ("CPU", "CUDA"):
        keys = [device, f"Autocast{device}", f"Autograd{device}", "ADInplaceOrView"]
        for names in (keys, keys[:2]):
            keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
            for name in names[1:]:
                keyset = keyset.add(getattr(torch._C.DispatchKey, name))
            found.add(keyset.raw_repr())
    return found


_PLAIN = _plain_keys()
_serves: dict[Any, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {}


def key_of(op: str, tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What a call's checks and dispatch depend on, or None where PyTorch may have a part in it."""
    if _attended() or _autocast():
        return None
    for number in numbers:  # True and 1.0 are equal to 1, but PyTorch refuses them
        if type(number) is not int and not (isinstance(number, tuple) and all(type(each) is int for each in number)):
            return None
    recording = _is_grad_enabled()
    key: list[Any] = [op, dispatch.forced_backend(), numbers]
    for tensor in tensors:
        if tensor is None:
            key.append(None)
        elif not _is_plain(tensor) or (recording and tensor.requires_grad):
            return None
        else:
            key += (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    if (first := tensors[0]) is not None and first.is_cuda:
        key.append(dispatch.rounds_to_tf32(first.dtype, first.device))
    return tuple(key)


def serve(key: tuple[Any, ...] | None, *tensors: Tensor | None) -> Tensor | None:
    """The result of a call with a known key, else None."""
    known = None if key is None else _serves.get(key)
    return None if known is None else known[0](*tensors, *known[1])


def remember(key: tuple[Any, ...], launcher: Callable[..., Tensor], *rest: Any) -> None:
    """Let ``launcher(*tensors, *rest)`` serve the calls of a key from now on."""
    if len(_serves) >= _MOST:
        _serves.clear()
    _serves[key] = (launcher, rest)


def forget() -> None:
    """Let all calls be checked again."""
    _serves.clear()


class Attention(enum.Enum):
    """What of PyTorch's has a part in the call of an operator."""

    NONE = enum.auto()
    GRADIENT = enum.auto()  # no more than autograd, in reverse mode
    FULL = enum.auto()


_NONE, _GRADIENT, _FULL = Attention


def attention(args: tuple[Any, ...]) -> Attention:
    """What has a part in an operator's call. Arguments that PyTorch would have to make others of count too."""
    if _attended():
        return _FULL
    recording = _is_grad_enabled()
    found = _NONE
    for arg in args:
        kind = type(arg)
        if arg is None or kind in _NUMBERS:
            continue
        if kind is tuple:
            if any(type(each) not in _NUMBERS for each in arg):
                return _FULL
        elif not _is_plain(arg):
            return _FULL
        elif recording and arg.requires_grad:
            found = _GRADIENT
    return found


def _is_plain(arg: Any) -> bool:
    """Whether ``arg`` is a dense tensor with memory of its own on a CPU or a CUDA GPU, and no more than that.

    What only the dispatcher looks at is none: lazily negated tensors, zeros without memory, the wrappers of transforms
    (also those that have outlived them), of batched gradients and of compilers.
    """
    return type(arg) in _TYPES and _keys_of(arg).raw_repr() in _PLAIN


def _attended() -> bool:
    """Whether anything of PyTorch's attends to operators, autocast and autograd aside."""
    return bool(
        _is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transforms()
        or _traced()
        or _profiled()
        or forward_ad._current_level >= 0
    )
