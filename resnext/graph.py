"""What the forward of a module computes, recorded without running it: a list of nodes.

`torch.fx` runs ``forward`` on placeholders. What it cannot record (a branch on data, say), and what a recording would
freeze (random numbers, attributes set on the way, a computation that differs between training and evaluation), is
refused: a module's record must be true for every later call.
"""

from __future__ import annotations

import collections
import gc
import inspect
import operator
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import fx, nn

from resnext import effects
from resnext.effects import Snapshot
from resnext.layers import original_class

# What every module has, and what belongs to the conversion; a recording may depend on all other attributes.
_OF_CONVERSION = frozenset(("_fused_plans", "_fused_backend", "_fused_from", "fused_forward", "recompute"))
_INTERNAL = _OF_CONVERSION.union(dir(nn.Module()))

# Recording patches what all threads share: one at a time, and for its own thread alone.
_LOCK = threading.RLock()


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
class Watched:
    """A module whose attributes a forward read when it was recorded, and what the record takes for granted of these.

    Attributes:
        name: Its name in the recorded module; "" for that module itself.
        attributes: The plain attributes that were read; None for those that were not there.
        inherited: What was read of its class, and may not be set on the module: methods, plain attributes.
        contents: What was in those that are containers.
    """

    name: str
    attributes: tuple[tuple[str, Any], ...] = ()
    inherited: tuple[tuple[str, Any], ...] = ()
    contents: Snapshot = ()


@dataclass(frozen=True)
class Shell:
    """A module whose forward was recorded rather than called, and what the record takes for granted of it.

    Attributes:
        watched: Its attributes.
        type: Its class, before it was converted itself.
        forward: What that class had for its forward.
        children: The names of its children, and of those that are None.
    """

    watched: Watched
    type: type[nn.Module]
    forward: Any
    children: tuple[tuple[str, bool], ...]

    @property
    def name(self) -> str:
        """Its name in the recorded module; "" for that module itself."""
        return self.watched.name


@dataclass(frozen=True)
class Recording:
    """What a module's forward computes.

    Attributes:
        nodes: In the order of execution.
        shells: The modules they were recorded from.
        watched: Further modules of which attributes were read.
        aliases: Pairs of names of one module.
    """

    nodes: tuple[Node, ...]
    shells: tuple[Shell, ...]
    watched: tuple[Watched, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()


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
    recordings = _recorded(root, tensors, is_leaf, owners, (True, False))
    if recordings[0].nodes != recordings[1].nodes:
        raise RecordError("its forward computes something else in training than in evaluation")
    return recordings[1]  # which knows what both have read


def passes_on(module: nn.Module, name: str) -> Shell | None:
    """What has to hold for a module to return in evaluation the tensor that it is called with; None if it does not.

    Args:
        module: The module; unchanged.
        name: What to call it.
    """
    try:
        (recording,) = _recorded(module, 1, lambda _: False, lambda _: False, (False,))
    except RecordError:
        return None
    last = recording.nodes[-1]
    if len(recording.nodes) != 2 or last.args != (Ref(0),) or recording.watched or recording.aliases:
        return None
    shell, *others = recording.shells
    if others:
        return None
    return replace(shell, watched=replace(shell.watched, name=name))


def _recorded(
    root: nn.Module,
    tensors: int,
    is_leaf: Callable[[nn.Module], bool],
    owners: Callable[[nn.Module], bool],
    modes: Sequence[bool],
) -> list[Recording]:
    """A recording for each mode: True for training."""
    modules = list(root.modules())
    shells = [module for module in modules if module is root or not is_leaf(module)]
    if any(effects.is_generator(value) for module in shells for value in module.__dict__.values()):
        raise RecordError("it has a generator of random numbers of its own")
    if called := [module for module in modules[1:] if type(module).__call__ is not nn.Module.__call__]:
        raise RecordError(f"its {type(called[0]).__name__} has a __call__ of its own")
    with _LOCK:
        before = [effects.snapshot(module.__dict__) for module in modules]
        states = effects.random_states()
        recordings, kept = [], False
        try:
            with effects.modes_kept(root), effects.noted_reads() as reads:
                for training in modes:
                    for module in modules:
                        module.training = training
                    tracer = _Tracer(is_leaf, owners)
                    with (
                        effects.without_autograd_functions(_Value, tracer.refuse),
                        effects.without_modes(tracer.refuse),
                        effects.taken_for_tensors(_Value),
                    ):
                        graph = tracer.trace(root, _defaults(root, tensors))
                    kept = kept or tracer.keeps_values()
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
    if kept:
        raise RecordError("its forward keeps what it computes")
    if drawn:
        raise RecordError("its forward draws random numbers outside of modules")
    return recordings


def tensor_arguments(module: nn.Module) -> range:
    """The numbers of positional arguments that ``module.forward`` can be called with; empty if it takes any number."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return range(0)
    required = sum(p.default is p.empty for p in parameters)
    return range(max(required, 1), len(parameters) + 1)


def changed_attribute(module: nn.Module, watched: Watched) -> str | None:
    """Which attribute that the forward reads is no longer what a record takes for granted, or None.

    Inside a compiler what is in containers is not looked at.
    """
    for name, value in watched.attributes:
        if not effects.same(getattr(module, name, None), value):
            return name
    for name, value in watched.inherited:
        if name in module.__dict__ or not effects.same(getattr(type(module), name, None), value):
            return name
    if torch.compiler.is_compiling() or effects.holds(watched.contents):
        return None
    return "something in an attribute"


class _Value(fx.Proxy):
    """Stands for a tensor, or for what is computed of one."""

    tracer: _Tracer
    _is_param = _is_buffer = False  # which is how Python asks for an nn.Parameter or nn.Buffer

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        if not hasattr(torch.Tensor, name):  # which a forward may try
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        return super().__getattr__(name)

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
        self._thread = threading.get_ident()
        self._values: list[weakref.ref[_Value]] = []
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
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
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
        value = _Value(node, self)
        self._values.append(weakref.ref(value))
        return value

    def keeps_values(self) -> bool:
        """Whether somebody still holds one of the values after the forward."""
        for generation in (1, 2):  # cycles that the forward left are nobody's
            if all(value() is None for value in self._values):
                return False
            gc.collect(generation)
        return any(value() is not None for value in self._values)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if type(a) is collections.OrderedDict:  # of which fx makes a dictionary
            return self.create_node("call_function", collections.OrderedDict, (self.create_arg([*a.items()]),), {})
        if isinstance(a, dict) and type(a) not in (dict, fx.immutable_collections.immutable_dict):
            self.refuse(f"its forward makes a {type(a).__name__}, which is more than a dictionary")
        return super().create_arg(a)

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
    named = dict(root.named_modules())
    names = {id(module): name for name, module in reversed(named.items())}
    watched = [_watched(name, module, reads[id(module)]) for name, module in named.items() if name not in shells]
    return Recording(
        tuple(nodes),
        tuple(_shell(name, module, reads[id(module)]) for name, module in shells.items()),
        tuple(each for each in watched if each.attributes or each.inherited),
        tuple(
            (names[id(module)], name)
            for name, module in root.named_modules(remove_duplicate=False)
            if names[id(module)] != name
        ),
    )


def _shell(name: str, module: nn.Module, reads: set[str]) -> Shell:
    children = tuple((child, value is None) for child, value in module._modules.items())
    original = original_class(module)
    return Shell(_watched(name, module, reads), original, original.forward, children)


def _watched(name: str, module: nn.Module, reads: set[str]) -> Watched:
    """Of what was read: no state, children, or parts of every module."""
    attributes, inherited = {}, {}
    for each in sorted(reads - _INTERNAL):
        if each.startswith("__") or any(
            each in kind for kind in (module._modules, module._parameters, module._buffers)
        ):
            continue
        if each in module.__dict__ or not hasattr(type(module), each):
            attributes[each] = getattr(module, each, None)
        else:
            inherited[each] = getattr(type(module), each)
    contents = effects.snapshot((*attributes.values(), *inherited.values()))
    return Watched(name, tuple(attributes.items()), tuple(inherited.items()), contents)


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
