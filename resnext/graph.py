"""What the forward of a module computes, recorded without running it: a list of nodes.

`torch.fx` runs ``forward`` on placeholders. What it cannot record (a branch on data, say), and what a recording would
freeze (random numbers, attributes set on the way, a computation that differs between training and evaluation), is
refused: a module's record must be true for every later call.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import inspect
import operator
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from resnext.layers import original_class

# What every module has, and what belongs to the conversion; a recording may depend on all other attributes.
_INTERNAL = frozenset(vars(nn.Module())) | {"_fused_plans", "_fused_backend", "_compiled_call_impl", "recompute"}


class RecordError(Exception):
    """A forward that cannot be recorded; the message says why."""


@dataclass(frozen=True)
class Ref:
    """Stands for the value of a node among the arguments of a `Node`."""

    index: int


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        kind: "input", "output", "module", "function", "method" or "attribute".
        target: The name of the module or attribute, the function, or the method's name.
        args: Positional arguments, in which `Ref` stands for the values of other nodes, at any depth.
        kwargs: Keyword arguments, likewise.
        owner: Name of the outermost submodule, of those that ``owners`` chose, in which it was recorded; or "".
    """

    kind: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    owner: str = ""

    @property
    def refs(self) -> list[int]:
        """The nodes whose values it takes, one for each time."""
        return [ref.index for ref in _refs((self.args, dict(self.kwargs)))]


@dataclass(frozen=True)
class Shell:
    """A module whose forward was recorded rather than called, and what the record takes for granted of it.

    Attributes:
        name: Its name in the recorded module; "" for that module itself.
        type: Its class, before it was converted itself.
        children: The names of its children, and of those that are None.
        attributes: Its plain attributes, which the forward may have read.
    """

    name: str
    type: type[nn.Module]
    children: tuple[tuple[str, bool], ...]
    attributes: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Recording:
    """The nodes of a module's forward, in the order of execution, and the modules they were recorded from."""

    nodes: tuple[Node, ...]
    shells: tuple[Shell, ...]


def record(
    root: nn.Module, tensors: int, is_leaf: Callable[[nn.Module], bool], owners: Callable[[nn.Module], bool]
) -> Recording:
    """Record ``root.forward`` as called with so many positional tensors and the defaults for the rest.

    Args:
        root: The module; unchanged.
        tensors: How many of forward's arguments are given.
        is_leaf: Whether to record a call of a submodule as one node instead of what its forward does.
        owners: Whether nodes should tell that they come from a submodule (`Node.owner`).

    Raises:
        RecordError: With the reason.
    """
    modules = list(root.modules())
    was_training = [module.training for module in modules]
    before = [_state(module) for module in modules]
    generators = _generators()
    recordings = []
    try:
        for training in (True, False):
            for module in modules:
                module.training = training
            tracer = _Tracer(is_leaf, owners)
            with _no_autograd_functions(), _taken_for_tensors():
                graph = tracer.trace(root, _defaults(root, tensors))
            recordings.append(_recording(root, tracer, graph, tensors))
    except RecordError:
        raise
    except Exception as error:  # whatever a forward does with placeholders
        text = str(error).strip().splitlines() or [""]
        raise RecordError(f"its forward cannot be recorded ({type(error).__name__}: {text[0][:120]})") from error
    finally:
        for module, training in zip(modules, was_training, strict=True):
            module.training = training
        changed = [_restore_state(module, state) for module, state in zip(modules, before, strict=True)]
        drawn = _restore_generators(generators)
    if any(changed):
        raise RecordError("its forward sets attributes")
    if drawn:
        raise RecordError("its forward draws random numbers outside of modules")
    if recordings[0].nodes != recordings[1].nodes:
        raise RecordError("its forward computes something else in training than in evaluation")
    return recordings[0]


def tensor_arguments(module: nn.Module) -> range:
    """The numbers of positional arguments that ``module.forward`` can be called with; empty if it takes any number."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return range(0)
    required = sum(p.default is p.empty for p in parameters)
    return range(max(required, 1), len(parameters) + 1)


def attributes_hold(module: nn.Module, shell: Shell) -> bool:
    """Whether what a record takes for granted of a module's attributes still holds."""
    return all(_equal(getattr(module, name, None), value) for name, value in shell.attributes)


class _Value(fx.Proxy):
    """Stands for a tensor, or for what is computed of one."""

    _is_param = False  # which is how Python asks for an nn.Parameter


def _record_in_place(operation: Callable[[Any, Any], Any]) -> None:
    # fx knows y + x alone, and Python makes that of y += x where it has to.
    def method(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    setattr(_Value, f"__{operation.__name__}__", method)


for _operation in (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow):
    _record_in_place(_operation)


class _Tracer(fx.Tracer):
    # A forward that changes a buffer does so when it runs, not while it is recorded.
    proxy_buffer_attributes = True

    def __init__(self, is_leaf: Callable[[nn.Module], bool], owners: Callable[[nn.Module], bool]):
        super().__init__()
        self._is_leaf, self._owners = is_leaf, owners
        self._owner = ""
        self._modes = _modes()
        self.node_owners: dict[fx.Node, str] = {}
        self.shells: dict[str, nn.Module] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            name = self.path_of_module(m)
        except NameError:  # made in the forward, as in nn.ReLU()(x)
            return m.forward(*args, **kwargs)
        if self._is_leaf(m):
            return super().call_module(m, forward, args, kwargs)
        self.shells[name] = m
        outermost = not self._owner and self._owners(m)
        if outermost:
            self._owner = name
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            if outermost:
                self._owner = ""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise RecordError("its forward switches gradients or autocast on or off")
        node = super().create_node(*args, **kwargs)
        self.node_owners[node] = self._owner
        return node


@contextlib.contextmanager
def _taken_for_tensors() -> Iterator[None]:
    """Let ``isinstance`` say that a `_Value` is a tensor, as a forward may ask.

    Only where Python asks: C++ would read its memory (which it did with a ``__class__`` that says so).
    """
    kept = builtins.isinstance

    def is_instance(value: Any, classes: Any) -> bool:
        return kept(value, classes) or (type(value) is _Value and issubclass(torch.Tensor, classes))

    builtins.isinstance = is_instance  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.isinstance = kept


@contextlib.contextmanager
def _no_autograd_functions() -> Iterator[None]:
    """Refuse calls of custom autograd Functions: their backward passes would be lost, and with them checkpointing."""
    kept = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if any(type(each) is _Value for each in (*args, *kwargs.values())):
            raise RecordError(f"its forward calls {cls.__name__}, an autograd Function")
        return kept.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = kept  # type: ignore[method-assign]


def _recording(root: nn.Module, tracer: _Tracer, graph: fx.Graph, tensors: int) -> Recording:
    nodes: list[Node] = []
    index: dict[fx.Node, int] = {}
    left_out: set[fx.Node] = set()  # arguments with their defaults, and fx's assertions on them
    kinds = {"call_module": "module", "call_function": "function", "call_method": "method", "get_attr": "attribute"}

    def refs(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: Ref(index[node]))  # type: ignore[arg-type,return-value]

    for node in graph.nodes:
        owner = tracer.node_owners.get(node, "")
        if node.op == "placeholder":
            if len(index) == tensors:
                left_out.add(node)
                continue
            nodes.append(Node("input", node.target))
        elif node.all_input_nodes and left_out.issuperset(node.all_input_nodes):
            left_out.add(node)
            continue
        elif node.op == "output":
            nodes.append(Node("output", "", (refs(node.args[0]),)))
        else:
            if node.op == "get_attr" and not _is_state(root, node.target):
                raise RecordError("its forward makes a tensor of its own, or keeps one outside of its buffers")
            nodes.append(Node(kinds[node.op], node.target, refs(node.args), refs(node.kwargs), owner))
        index[node] = len(nodes) - 1
    shells = {"": root} | tracer.shells
    return Recording(tuple(nodes), tuple(_shell(name, module) for name, module in shells.items()))


def _shell(name: str, module: nn.Module) -> Shell:
    children = tuple((child, value is None) for child, value in module._modules.items())
    return Shell(name, original_class(module), children, tuple(_plain_attributes(module).items()))


def _defaults(root: nn.Module, tensors: int) -> dict[str, Any]:
    parameters = list(inspect.signature(type(root).forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters[tensors:]}


def _is_state(root: nn.Module, name: str) -> bool:
    parent, _, attribute = name.rpartition(".")
    try:
        module = root.get_submodule(parent)
    except AttributeError:
        return False
    return attribute in module._parameters or attribute in module._buffers


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in _INTERNAL}


def _equal(value: Any, other: Any) -> bool:
    if value is other:
        return True
    plain = (bool, int, float, str, tuple)
    return isinstance(value, plain) and type(value) is type(other) and value == other


_State = dict[str, tuple[Any, tuple[Any, ...]]]


def _state(module: nn.Module) -> _State:
    """A module's attributes, and what is in those that are containers."""
    return {name: (value, _contents(value)) for name, value in module.__dict__.items() if name != "training"}


def _contents(value: Any) -> tuple[Any, ...]:
    if isinstance(value, dict):
        return tuple(part for item in value.items() for part in item)
    return tuple(value) if isinstance(value, (list, set)) else ()


def _restore_state(module: nn.Module, state: _State) -> bool:
    """Put a module's attributes back; returns whether that was needed."""
    changed = module.__dict__.keys() - {"training"} != state.keys()
    for name, (value, contents) in state.items():
        now = module.__dict__.get(name)
        same = now is value and len(_contents(now)) == len(contents)
        if same and all(map(operator.is_, _contents(now), contents)):
            continue
        changed = True
        if isinstance(value, dict):
            value.clear()
            value.update(zip(contents[::2], contents[1::2], strict=True))
        elif isinstance(value, (list, set)):
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(contents)
        module.__dict__[name] = value
    for name in module.__dict__.keys() - state.keys() - {"training"}:
        del module.__dict__[name]
    return changed


def _modes() -> tuple[Any, ...]:
    """What a record does not show, since it is no operation."""
    autocast = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _generators() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return random.getstate(), torch.get_rng_state(), None if numpy is None else copy.copy(numpy.random.get_state())


def _restore_generators(states: tuple[Any, ...]) -> bool:
    """Put the generators of random numbers back; returns whether that was needed."""
    of_random, of_torch, of_numpy = states
    now = _generators()
    drawn = now[0] != of_random or not torch.equal(now[1], of_torch)
    random.setstate(of_random)
    torch.set_rng_state(of_torch)
    if of_numpy is not None:
        drawn = drawn or now[2][2] != of_numpy[2] or bool((now[2][1] != of_numpy[1]).any())
        sys.modules["numpy"].random.set_state(of_numpy)
    return drawn


def _refs(argument: Any) -> Iterator[Ref]:
    if isinstance(argument, Ref):
        yield argument
    elif isinstance(argument, (tuple, list)):
        for item in argument:
            yield from _refs(item)
    elif isinstance(argument, dict):
        for item in argument.values():
            yield from _refs(item)
    elif isinstance(argument, slice):
        yield from _refs((argument.start, argument.stop, argument.step))
