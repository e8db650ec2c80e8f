"""What a forward may do or depend on besides the operations that a recording shows: state, random numbers, modes."""

from __future__ import annotations

import builtins
import collections
import contextlib
import functools
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

Contents = tuple[Any, ...]
Snapshot = tuple[tuple[Any, Contents], ...]
"""Containers, each with what was in it."""

_DEPTH = 3
_OPAQUE = (Tensor, nn.Module, type, functools.partial, types.ModuleType, types.FunctionType, types.MethodType)


def snapshot(value: Any) -> Snapshot:
    """The dictionaries, lists, sets and plain objects in ``value``, a few levels deep, and what is in each."""
    return tuple((container, _contents(container)) for container in _containers(value, _DEPTH))


def holds(before: Snapshot) -> bool:
    """Whether in all containers of a snapshot there is what was in them: the same objects, or equal plain values."""
    for container, contents in before:
        now = _contents(container)
        if len(now) != len(contents) or not all(map(same, now, contents)):
            return False
    return True


def restore(before: Snapshot) -> None:
    """Put back into the containers of a snapshot what was in them."""
    for container, contents in before:
        container.clear()
        if isinstance(container, dict):
            container.update(zip(contents[::2], contents[1::2], strict=True))
        elif isinstance(container, (list, collections.deque)):
            container.extend(contents)
        else:
            container.update(contents)


def same(value: Any, other: Any) -> bool:
    """Whether two values are one object, or equal and plain."""
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, tuple):
        return len(value) == len(other) and all(map(same, value, other))
    return isinstance(value, (bool, int, float, str, bytes, types.MethodType)) and value == other


def is_generator(value: Any) -> bool:
    """Whether ``value`` draws random numbers from a state of its own."""
    return isinstance(value, (random.Random, torch.Generator)) or type(value).__module__.startswith("numpy.random")


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its own mode back, training or evaluation."""
    kept = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in kept:
            module.training = training


# As they are when nothing is recorded (`without_modes`).
_is_autocast_enabled, _get_autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
_is_grad_enabled, _is_inference_mode_enabled = torch.is_grad_enabled, torch.is_inference_mode_enabled


def modes() -> tuple[Any, ...]:
    """What decides about gradients and dtypes of the operations that follow."""
    autocast = [(_is_autocast_enabled(device), _get_autocast_dtype(device)) for device in ("cpu", "cuda")]
    return _is_grad_enabled(), _is_inference_mode_enabled(), *autocast


@contextlib.contextmanager
def without_modes(refuse: Callable[[str], Any]) -> Iterator[None]:
    """Call ``refuse`` where a forward sets what `modes` tells, even to what it is, or asks for it: calls may differ."""
    thread = threading.get_ident()
    asked = ["is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled"]
    asked += ["get_autocast_dtype", "get_autocast_cpu_dtype", "get_autocast_gpu_dtype"]
    places: list[tuple[Any, str]] = [(torch, name) for name in asked]
    places += [(torch.autocast, "__enter__"), (torch.inference_mode, "__enter__"), (torch._C, "_set_grad_enabled")]
    kept = [getattr(place, name) for place, name in places]

    def refusing(usual: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                refuse("its forward switches gradients or autocast on or off, or asks whether they are on")
            return usual(*args, **kwargs)

        return instead

    for (place, name), usual in zip(places, kept, strict=True):
        setattr(place, name, refusing(usual))
    try:
        yield
    finally:
        for (place, name), usual in zip(places, kept, strict=True):
            setattr(place, name, usual)


def random_states() -> tuple[Any, ...]:
    """The states of the generators that everybody shares: Python's, PyTorch's on the CPU, numpy's."""
    numpy = sys.modules.get("numpy")
    with _disable_current_modes():  # those of fake tensors, for instance
        of_torch = torch.get_rng_state()
    return random.getstate(), of_torch, None if numpy is None else numpy.random.get_state()


def restore_random_states(states: tuple[Any, ...]) -> bool:
    """Put the generators back; returns whether that was needed."""
    of_random, of_torch, of_numpy = states
    now = random_states()
    with _disable_current_modes():
        drawn = now[0] != of_random or not torch.equal(now[1], of_torch)
        torch.set_rng_state(of_torch)
    random.setstate(of_random)
    if of_numpy is not None:
        drawn = drawn or now[2][2] != of_numpy[2] or bool((now[2][1] != of_numpy[1]).any())
        sys.modules["numpy"].random.set_state(of_numpy)
    return drawn


@contextlib.contextmanager
def taken_for_tensors(stand_in: type) -> Iterator[None]:
    """Let ``isinstance`` say that a ``stand_in`` is a tensor, as a forward may ask.

    Only where Python asks: C++ would read its memory (which it did with a ``__class__`` that says so).
    """
    kept = builtins.isinstance

    def is_instance(value: Any, classes: Any) -> bool:
        return kept(value, classes) or (type(value) is stand_in and issubclass(Tensor, classes))

    builtins.isinstance = is_instance  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.isinstance = kept


@contextlib.contextmanager
def noted_reads() -> Iterator[dict[int, set[str]]]:
    """Note the names of the attributes that are read of modules, by the module's ``id``."""
    reads: dict[int, set[str]] = collections.defaultdict(set)
    thread = threading.get_ident()
    kept = nn.Module.__dict__.get("__getattribute__")
    usual = kept or object.__getattribute__

    def read(self: nn.Module, name: str) -> Any:
        if threading.get_ident() == thread:
            reads[id(self)].add(name)
        return usual(self, name)

    nn.Module.__getattribute__ = read  # type: ignore[method-assign,assignment]
    try:
        yield reads
    finally:
        if kept is None:
            del nn.Module.__getattribute__
        else:
            nn.Module.__getattribute__ = kept  # type: ignore[method-assign]


@contextlib.contextmanager
def without_autograd_functions(stand_in: type, refuse: Callable[[str], Any]) -> Iterator[None]:
    """Call ``refuse`` where a custom autograd Function is applied: its backward would be lost, and checkpointing."""
    kept = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if any(type(each) is stand_in for each in (*args, *kwargs.values())):
            refuse(f"its forward calls {cls.__name__}, an autograd Function")
        return kept.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = kept  # type: ignore[method-assign]


def _containers(value: Any, depth: int) -> Iterator[Any]:
    if isinstance(value, _OPAQUE) or is_generator(value):
        return
    inside: Any = ()
    if isinstance(value, (dict, list, set, collections.deque)):
        yield value
        inside = value.values() if isinstance(value, dict) else value
    elif isinstance(value, tuple):
        inside = value
    elif isinstance(getattr(value, "__dict__", None), dict):
        yield value.__dict__
        inside = value.__dict__.values()
    if depth:
        for each in inside:
            yield from _containers(each, depth - 1)


def _contents(container: Any) -> Contents:
    if isinstance(container, dict):
        return tuple(part for item in container.items() for part in item)
    return tuple(container)
