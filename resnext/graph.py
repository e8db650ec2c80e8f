"""What the forward of a module computes, recorded without running it: a list of nodes.

`torch.fx` runs ``forward`` on placeholders. What it cannot record (a branch on data, say), and what a recording would
freeze (random numbers, attributes set on the way, a computation that differs between training and evaluation), is
refused: a module's record must be true for every later call.
"""

from __future__ import annotations

import copy
import inspect
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
    was_training = [(module, module.training) for module in root.modules()]
    before = {module: _plain_attributes(module) for module in root.modules()}
    generators = _generators()
    recordings = []
    try:
        for training in (True, False):
            for module, _ in was_training:
                module.training = training
            tracer = _Tracer(is_leaf, owners)
            recordings.append(_recording(root, tracer, tracer.trace(root, _defaults(root, tensors)), tensors))
    except RecordError:
        raise
    except Exception as error:  # whatever a forward does with placeholders
        text = str(error).strip().splitlines() or [""]
        raise RecordError(f"its forward cannot be recorded ({type(error).__name__}: {text[0][:120]})") from error
    finally:
        for module, training in was_training:
            module.training = training
        changed = [module for module, kept in before.items() if not _same(_plain_attributes(module), kept)]
        for module in changed:
            for name in _plain_attributes(module):
                del module.__dict__[name]
            module.__dict__.update(before[module])
        drawn = _restore_generators(generators)
    if changed:
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


class _Tracer(fx.Tracer):
    # A forward that changes a buffer does so when it runs, not while it is recorded.
    proxy_buffer_attributes = True

    def __init__(self, is_leaf: Callable[[nn.Module], bool], owners: Callable[[nn.Module], bool]):
        super().__init__()
        self._is_leaf, self._owners = is_leaf, owners
        self._owner = ""
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

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.node_owners[node] = self._owner
        return node


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


def _same(attributes: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    return attributes.keys() == others.keys() and all(value is others[name] for name, value in attributes.items())


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
