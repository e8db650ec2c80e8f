"""What the forward of a module computes, recorded without running it: a list of nodes.

`torch.fx` runs ``forward`` on placeholders. What it cannot record (a branch on data, say), and what a recording would
freeze (random numbers, attributes set on the way, a computation that differs between training and evaluation), is
refused: a module's record must be true for every later call.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import fx, nn

from resnext import effects
from resnext.effects import Snapshot
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
        found: list[int] = []
        replaced((self.args, self.kwargs), lambda ref: found.append(ref.index))
        return found


def replaced(argument: Any, by: Callable[[Ref], Any]) -> Any:
    """``argument`` with ``by(ref)`` in the place of each `Ref`, at any depth."""
    if isinstance(argument, Ref):
        return by(argument)
    if isinstance(argument, (tuple, list)):
        return type(argument)([replaced(item, by) for item in argument])
    if isinstance(argument, dict):
        return {name: replaced(item, by) for name, item in argument.items()}
    if isinstance(argument, slice):
        return slice(*[replaced(item, by) for item in (argument.start, argument.stop, argument.step)])
    return argument


@dataclass(frozen=True)
class Shell:
    """A module whose forward was recorded rather than called, and what the record takes for granted of it.

    Attributes:
        name: Its name in the recorded module; "" for that module itself.
        type: Its class, before it was converted itself.
        children: The names of its children, and of those that are None.
        attributes: The plain attributes that were read; None for those that were not there.
        contents: What was in those that are containers.
    """

    name: str
    type: type[nn.Module]
    children: tuple[tuple[str, bool], ...]
    attributes: tuple[tuple[str, Any], ...]
    contents: Snapshot


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
    shells = [module for module in modules if module is root or not is_leaf(module)]
    if any(effects.is_generator(value) for module in shells for value in module.__dict__.values()):
        raise RecordError("it has a generator of random numbers of its own")
    before = [effects.snapshot(module.__dict__) for module in modules]
    states = effects.random_states()
    recordings = []
    try:
        with effects.modes_kept(root), effects.noted_reads() as reads:
            for training in (True, False):
                for module in modules:
                    module.training = training
                tracer = _Tracer(is_leaf, owners)
                with effects.without_autograd_functions(_Value, tracer.refuse), effects.taken_for_tensors(_Value):
                    graph = tracer.trace(root, _defaults(root, tensors))
                recordings.append(_recording(root, tracer, graph, tensors, reads))
    except RecordError:
        raise
    except Exception as error:  # whatever a forward does with placeholders
        text = str(error).strip().splitlines() or [""]
        raise RecordError(f"its forward cannot be recorded ({type(error).__name__}: {text[0][:120]})") from error
    finally:
        changed = [contents for contents in before if not effects.holds(contents)]
        for contents in changed:
            effects.restore(contents)
        drawn = effects.restore_random_states(states)
    if changed:
        raise RecordError("its forward sets attributes")
    if drawn:
        raise RecordError("its forward draws random numbers outside of modules")
    if recordings[0].nodes != recordings[1].nodes:
        raise RecordError("its forward computes something else in training than in evaluation")
    return recordings[1]  # which knows what both have read


def tensor_arguments(module: nn.Module) -> range:
    """The numbers of positional arguments that ``module.forward`` can be called with; empty if it takes any number."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return range(0)
    required = sum(p.default is p.empty for p in parameters)
    return range(max(required, 1), len(parameters) + 1)


def changed_attribute(module: nn.Module, shell: Shell) -> str | None:
    """Which attribute that the forward reads is no longer what a record takes for granted, or None.

    Inside a compiler what is in containers is not looked at.
    """
    for name, value in shell.attributes:
        if not effects.same(getattr(module, name, None), value):
            return name
    if torch.compiler.is_compiling() or effects.holds(shell.contents):
        return None
    return "something in an attribute"


class _Value(fx.Proxy):
    """Stands for a tensor, or for what is computed of one."""

    tracer: _Tracer
    _is_param = _is_buffer = False  # which is how Python asks for an nn.Parameter or nn.Buffer

    def __float__(self) -> float:
        return self.tracer.refuse("its forward depends on values")

    __int__ = __len__ = __float__  # type: ignore[assignment]  # no __index__: C++ would take a value for an integer


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
        self._modes = effects.modes()
        self.refusal = ""
        self.node_owners: dict[fx.Node, str] = {}
        self.shells: dict[str, nn.Module] = {}

    def refuse(self, reason: str) -> NoReturn:
        """Raise; remembered too, as a forward may catch it."""
        self.refusal = self.refusal or reason
        raise RecordError(reason)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refuse("its forward branches on values")

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
        if effects.modes() != self._modes:
            self.refuse("its forward switches gradients or autocast on or off")
        node = super().create_node(*args, **kwargs)
        self.node_owners[node] = self._owner
        return node


def _recording(
    root: nn.Module, tracer: _Tracer, graph: fx.Graph, tensors: int, reads: Mapping[int, set[str]]
) -> Recording:
    if tracer.refusal:
        raise RecordError(tracer.refusal)
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
    named = [(name, module, sorted(reads[id(module)])) for name, module in shells.items()]
    return Recording(tuple(nodes), tuple(_shell(*each) for each in named))


def _shell(name: str, module: nn.Module, reads: Sequence[str]) -> Shell:
    children = tuple((child, value is None) for child, value in module._modules.items())
    attributes = {each: module.__dict__.get(each) for each in reads if _is_setting(module, each)}
    contents = effects.snapshot(tuple(attributes.values()))
    return Shell(name, original_class(module), children, tuple(attributes.items()), contents)


def _is_setting(module: nn.Module, name: str) -> bool:
    """Whether an attribute is the module's own, or nobody's yet: no state, child, method or part of every module."""
    if name in _INTERNAL or name.startswith("__"):
        return False
    kinds = (module._modules, module._parameters, module._buffers)
    return name in module.__dict__ or not (hasattr(type(module), name) or any(name in kind for kind in kinds))


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
