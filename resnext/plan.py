"""From what a module computes (`resnext.graph`) to steps of fused operators: one list for training, one for inference.

Training: a batch norm behind a convolution stays three vectors (`resnext.kernels.conv_stats`), which the next
convolution applies as it reads, together with the ReLU between them, or the end of the block, or the stem's pooling.
Inference: batch norm, residual sum and ReLU are applied by the convolution (`resnext.kernels.conv_affine`). Whatever is
neither is called as it was recorded: squeeze-and-excitation, blur pooling, stochastic depth, and so on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from resnext import batch_norm
from resnext.graph import Node, RecordError, Recording, Ref, Shell, Watched, passes_on, record, replaced
from resnext.kernels import gains_in_channels_last, why_not_conv_stats
from resnext.layers import is_layer, is_plain_conv, original_class

_RELUS = {F.relu: False, torch.relu: False, F.relu_: True, torch.relu_: True, "relu": False, "relu_": True}
_SUMS = {operator.add: False, operator.iadd: True, torch.add: False, "add": False, "add_": True}
_IN_PLACE = (operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.setitem)
# Modules that pass their input on in evaluation.
_DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)

# What asks for strides or depends on them, by the names of methods and functions; where other functions are harmless.
_OF_LAYOUT = frozenset(
    ("view", "view_as", "as_strided", "as_strided_", "stride", "is_contiguous", "dim_order", "data_ptr", "storage")
    + ("untyped_storage", "storage_offset", "resize_", "resize_as_", "set_")
)
_HOMES = frozenset(("torch", "_operator", "math", "builtins", "resnext"))

NONE = -1
"""The slot of a value that is not there."""


@dataclass(frozen=True)
class ConvStats:
    """Convolve ``x``, or relu(prologue(x)); with the affine of the norm behind it if there is one."""

    conv: str
    norm: str
    x: int
    prologue: int
    out: int
    affine: int


@dataclass(frozen=True)
class BlockEnd:
    """`ConvStats`, and relu(its affine of its result + residual), or + residual_affine(residual).

    ``in_place``: whether the sum has the branch's dtype whatever the residual's is.
    """

    conv: str
    norm: str
    x: int
    prologue: int
    residual: int
    residual_affine: int
    in_place: bool
    out: int


@dataclass(frozen=True)
class Activation:
    """relu(affine(z)), for those who cannot apply it as they read."""

    z: int
    affine: int
    out: int


@dataclass(frozen=True)
class Pool:
    """3x3 max pooling, stride 2, of relu(affine(z)): the end of a stem."""

    z: int
    affine: int
    out: int


@dataclass(frozen=True)
class ConvAffine:
    """A convolution with its batch norm folded, residual and ReLU; ``in_place`` as in `BlockEnd`."""

    pair: tuple[str, str]
    x: int
    residual: int
    in_place: bool
    relu: bool
    out: int


@dataclass(frozen=True)
class Call:
    """A node as it was recorded.

    ``kind``: of a module, its class before it was converted; what takes its place may do something else.
    ``sees_layout``: what it does may depend on the layout of the tensors it is given.
    """

    node: Node
    out: int
    kind: type[nn.Module] | None
    sees_layout: bool


Step = ConvStats | BlockEnd | Activation | Pool | ConvAffine | Call


@dataclass(frozen=True)
class Program:
    """Steps in order, each with the slots that are not needed after it, and what to return, with `Ref` for values."""

    steps: tuple[tuple[Step, tuple[int, ...]], ...]
    output: Any


@dataclass(frozen=True)
class Segment:
    """Fused steps in a row whose last result is the only value of theirs that others need.

    Such are all steps of a residual block, a network's stem, what is before and after an attention in a block.

    Attributes:
        steps: The steps, without those that are called as they were recorded.
        reads: The slots of what they are given: tensors.
    """

    steps: tuple[Step, ...]
    reads: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """How to run a module fused.

    Attributes:
        kind: "block" if there is a residual sum in it, else "chain".
        slots: Number of slots for values; the first ones are the arguments.
        train: Steps that are right in every mode.
        infer: Steps for evaluation without gradients.
        pairs: Names of the convolutions and the norms behind them that the steps stand for.
        folds: Those of them that ``infer`` runs with the norm folded into the convolution.
        convs: Names of further convolutions, without a norm.
        entries: Names of those convolutions that are given the first argument.
        roles: Names of further modules that the steps stand for, with their classes.
        dropouts: The modules that ``infer`` leaves out, which pass their input on in evaluation.
        shells: The modules whose forwards the steps replace.
        watched: Further modules of whose attributes the steps depend.
        aliases: Pairs of names of one module.
        in_channels_last: How many of the convolutions `gains_in_channels_last`.
        writes: Whether a node that is called as it was recorded writes into memory that it is given.
        flags: Names of the modules that are called, with their ``inplace``.
        segments: The segments of ``train``, by the number of their first step.
    """

    kind: str
    slots: int
    train: Program
    infer: Program
    pairs: tuple[tuple[str, str], ...]
    folds: tuple[tuple[str, str], ...]
    convs: tuple[str, ...]
    entries: tuple[str, ...]
    roles: tuple[tuple[str, type[nn.Module]], ...]
    dropouts: tuple[Shell, ...]
    shells: tuple[Shell, ...]
    watched: tuple[Watched, ...]
    aliases: tuple[tuple[str, str], ...]
    in_channels_last: int
    writes: bool
    flags: tuple[tuple[str, Any], ...]
    segments: dict[int, Segment]

    @property
    def every_conv(self) -> tuple[str, ...]:
        """Names of all convolutions that the steps stand for."""
        return _every_conv(self.pairs, self.convs)


def _every_conv(pairs: Iterable[tuple[str, str]], convs: Iterable[str]) -> tuple[str, ...]:
    return (*(conv for conv, _ in pairs), *convs)


def plan(root: nn.Module, recording: Recording) -> Plan | None:
    """Plan what was recorded of ``root``; None if nothing in it would be fused that is not fused in a submodule."""
    seen: dict[tuple[str, Any, int], bool] = {}

    def sees_layout(node: Node) -> bool:
        key = node.kind, node.target, len(node.args)
        return seen[key] if key in seen else seen.setdefault(key, _sees_layout(root, node))

    train, infer = (_Planner(root, recording, sees_layout, inference) for inference in (False, True))
    if not train.gains():
        return None
    train_program, infer_program = train.program(), infer.program()
    pairs = tuple(dict.fromkeys((*infer.pairs, *train.pairs)))
    steps = [step for step, _ in train_program.steps]
    called = {
        step.node.target
        for step, _ in (*train_program.steps, *infer_program.steps)
        if isinstance(step, Call) and step.kind is not None
    }
    return Plan(
        kind="block" if any(isinstance(step, BlockEnd) for step in steps) else "chain",
        slots=len(train.ops),
        train=train_program,
        infer=infer_program,
        pairs=pairs,
        folds=tuple(dict.fromkeys(step.pair for step, _ in infer_program.steps if isinstance(step, ConvAffine))),
        convs=tuple(train.convs),
        entries=tuple(op.name for op in train.ops if op.role == "conv" and op.inputs == [0]),
        roles=tuple(dict.fromkeys((*train.roles, *infer.roles))),
        dropouts=tuple(infer.dropouts),
        shells=recording.shells,
        watched=recording.watched,
        aliases=recording.aliases,
        in_channels_last=sum(_gains(root.get_submodule(conv)) for conv in _every_conv(pairs, train.convs)),
        writes=train.writes(train_program) or infer.writes(infer_program),
        flags=tuple((name, root.get_submodule(name).__dict__.get("inplace")) for name in sorted(called)),
        segments=_segments(train_program),
    )


def _segments(program: Program) -> dict[int, Segment]:
    """The shortest segments, from the first step on: what is kept for backward is freed segment by segment."""
    found: dict[int, Segment] = {}
    position = 0
    while position < len(program.steps):
        segment = _segment(program, position)
        if segment is not None:
            found[position] = segment
        position += 1 if segment is None else len(segment.steps)
    return found


def _segment(program: Program, start: int) -> Segment | None:
    steps = [step for step, _ in program.steps]
    needed = set(Node("output", "", (program.output,)).refs)
    affines, writes, reads = {NONE}, set[int](), list[int]()
    for end, step in enumerate(steps[start:], start + 1):
        if isinstance(step, Call | ConvAffine) or not affines.issuperset(_reads_affines(step)):
            break
        reads += [slot for slot in _reads(step) if slot not in writes]
        if isinstance(step, ConvStats) and step.norm:
            affines.add(step.affine)
        elif not writes & needed.union(*map(_reads, steps[end:])) and (end - start > 1 or isinstance(step, BlockEnd)):
            return Segment(tuple(steps[start:end]), tuple(dict.fromkeys(reads)))
        writes.update(_writes(step))
    return None


@dataclass
class _Op:
    """A node and what it is to us: "input", "conv", "norm", "relu", "add", "pool", "dropout", or "" for the rest.

    A norm that is one module with the ReLU behind it becomes two of these, the first one with ``two_in_one``.
    """

    node: Node
    role: str
    in_place: bool = False
    two_in_one: bool = False

    @property
    def inputs(self) -> list[int]:
        return self.node.refs

    @property
    def name(self) -> str:
        return self.node.target if self.node.kind == "module" else ""


class _Planner:
    """Makes the program for training or for inference."""

    def __init__(self, root: nn.Module, recording: Recording, sees_layout: Callable[[Node], bool], inference: bool):
        self.root, self.sees_layout, self.inference = root, sees_layout, inference
        self.ops: list[_Op] = []
        self.pairs: list[tuple[str, str]] = []
        self.convs: list[str] = []
        self.roles: list[tuple[str, type[nn.Module]]] = []
        self.dropouts: list[Shell] = []
        self._read(recording)
        self.users: list[list[int]] = [[] for _ in self.ops]
        for index, op in enumerate(self.ops):
            for ref in op.inputs:
                self.users[ref].append(index)
        # All by number of the op: of a relu, the norm before it; of a pooling, likewise; of the last op of a
        # residual sum (a relu, or the sum itself), the norm that ends the branch and the shortcut.
        self.activations: dict[int, int] = {}
        self.pools: dict[int, int] = {}
        self.ends: dict[int, tuple[int, int]] = {}
        self._match()

    # --- what the nodes are ---

    def _read(self, recording: Recording) -> None:
        value: list[int] = []  # of each node: the op that has it
        for node in recording.nodes:
            args, kwargs = replaced((node.args, node.kwargs), lambda ref: Ref(value[ref.index]))
            node = replace(node, args=args, kwargs=kwargs)
            role, in_place = self._role(node)
            if role == "identity":
                self.roles.append((node.target, nn.Identity))
                value.append(node.refs[0])
                continue
            if role == "dropout" and self.inference and (shell := _dropout(self.root, node.target)) is not None:
                self.dropouts.append(shell)
                value.append(node.refs[0])
                continue
            two_in_one = role == "norm" and batch_norm.has_relu(self.root.get_submodule(node.target))
            self.ops.append(_Op(node, role, in_place, two_in_one))
            if two_in_one:
                relu = Node("module", f"{node.target}.act", (Ref(len(self.ops) - 1),), owner=node.owner)
                self.ops.append(_Op(relu, "relu"))
            value.append(len(self.ops) - 1)

    def _role(self, node: Node) -> tuple[str, bool]:
        """The role, and whether the op writes into memory that it is given."""
        if node.kind in ("input", "output"):
            return node.kind, False
        if node.kind == "module":
            module = self.root.get_submodule(node.target)
            in_place = bool(getattr(module, "inplace", False))
            alone = len(node.args) == 1 and isinstance(node.args[0], Ref) and not node.kwargs
            return (_role_of(module) if alone else ""), in_place
        refs = node.refs
        if node.target in _SUMS:
            two = node.args == tuple(map(Ref, refs)) and len(refs) == 2 and refs[0] != refs[1] and not node.kwargs
            return ("add" if two else ""), _SUMS[node.target]
        if node.target in _RELUS:
            flags = (*node.args[1:], *node.kwargs.values())
            return ("relu" if len(refs) == 1 and len(flags) < 2 else ""), _RELUS[node.target] or True in flags
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place = name.endswith("_") or node.target in _IN_PLACE or "out" in node.kwargs
        return "", in_place or bool(node.kwargs.get("inplace"))

    # --- which of them go together ---

    def _match(self) -> None:
        for index, op in enumerate(self.ops):
            if op.role == "relu":
                (before,) = op.inputs
                if self.users[before] != [index]:
                    continue
                if self._is_pair(before) and not self._writes(before, index):
                    self.activations[index] = before
                elif self.ops[before].role == "add" and (operands := self._sum(before, index)):
                    self.ends[index] = operands
            elif op.role == "add" and self.inference:
                users = [self.ops[user].role for user in self.users[index]]
                if users != ["relu"] and (operands := self._sum(index, index)):
                    self.ends[index] = operands
            elif op.role == "pool" and op.inputs[0] in self.activations and self.users[op.inputs[0]] == [index]:
                self.pools[index] = self.activations[op.inputs[0]]

    def _is_pair(self, norm: int) -> bool:
        """Whether this is a norm behind a convolution whose output nobody else sees."""
        if self.ops[norm].role != "norm":
            return False
        (conv,) = self.ops[norm].inputs
        return self.ops[conv].role == "conv" and self.users[conv] == [norm]

    def _sum(self, add: int, end: int) -> tuple[int, int] | None:
        """The norm that ends a branch, and the other operand; None if the sum is not of a branch and a shortcut."""
        first, second = self.ops[add].inputs
        norms = [each for each in (first, second) if self._is_pair(each) and self.users[each] == [add]]
        if not norms:
            return None
        # In place, the caller sees what becomes of an input, and a later node what becomes of a value.
        seen = self.ops[first].role == "input" or self.users[first] != [add]
        if self.ops[add].in_place and first not in norms and seen:
            return None
        branch = max(norms)
        if self._writes(self.ops[branch].inputs[0], end, but=add):
            return None
        return branch, first if branch == second else second

    def _writes(self, start: int, end: int, but: int = NONE) -> bool:
        """Whether an op between two others may write into memory that one of them reads."""
        fused = {but, *self.activations, *self.ends}
        return any(op.in_place and index not in fused for index, op in enumerate(self.ops[start:end], start))

    def _is_lazy(self, norm: int) -> bool:
        """Whether nobody needs the values of a norm in training: its affine is applied where they are read."""
        ends = len(self.users[norm]) == 1 and any(norm in operands for operands in self.ends.values())
        return ends or norm in self.activations.values()

    def _norm_of(self, conv: int) -> int:
        """The norm that comes with a convolution in training."""
        users = self.users[conv]
        return users[0] if len(users) == 1 and self._is_pair(users[0]) and self._is_lazy(users[0]) else NONE

    def _is_read_lazily(self, relu: int) -> bool:
        """Whether in training all who read an activation are convolutions, which apply its affine themselves."""
        if relu not in self.activations or {self.ops[user].role for user in self.users[relu]} != {"conv"}:
            return False
        return all(
            self._norm_of(user) != NONE or self.root.get_submodule(self.ops[user].name).bias is None
            for user in self.users[relu]
        )

    def gains(self) -> bool:
        """Whether something is fused that is not within one submodule that has a plan of its own."""
        groups: list[list[int]] = [[relu, norm] for relu, norm in self.activations.items()]
        groups += [[relu, *self.users[relu]] for relu in self.activations if self._is_read_lazily(relu)]
        groups += [[relu, *operands] for relu, operands in self.ends.items()]
        groups += [[pool, norm] for pool, norm in self.pools.items()]
        owners = [{self.ops[index].node.owner for index in group} for group in groups]
        return any(len(each) > 1 or each == {""} for each in owners)

    # --- steps ---

    def program(self) -> Program:
        steps = [step for index, op in enumerate(self.ops) if (step := self._step(index, op)) is not None]
        output = self.ops[-1].node.args[0]
        kept = set(Node("output", "", (output,)).refs)
        last = {slot: position for position, step in enumerate(steps) for slot in _reads(step)}
        free: list[list[int]] = [[] for _ in steps]
        for slot, position in last.items():
            if slot not in kept:
                free[position].append(slot)
        return Program(tuple(zip(steps, map(tuple, free), strict=True)), output)

    def writes(self, program: Program) -> bool:
        """Whether what a program calls writes into memory that it is given."""
        return any(isinstance(step, Call) and self.ops[step.out].in_place for step, _ in program.steps)

    def _step(self, index: int, op: _Op) -> Step | None:
        if op.role in ("input", "output"):
            return None
        if op.role == "conv":
            return self._convolution(index, op)
        if op.role == "norm":
            return self._norm(index, op)
        if op.role == "relu":
            return self._relu(index, op)
        if op.role == "add":
            if index in self.ends:
                return self._conv_affine(self.ends[index][0], self.ends[index][1], False, index)
            if any(self.ops[end].inputs == [index] for end in self.ends):
                return None
        if op.role == "pool" and index in self.pools:
            self._stands_for(op)
            norm = self.pools[index]
            return Pool(self.ops[norm].inputs[0], norm, index)
        return self._call(op.node, index)

    def _call(self, node: Node, out: int) -> Call:
        kind = original_class(self.root.get_submodule(node.target)) if node.kind == "module" else None
        return Call(node, out, kind, self.sees_layout(node))

    def _convolution(self, index: int, op: _Op) -> Step | None:
        norm = self._norm_of(index)
        if self.inference:
            if norm != NONE and norm in self.pools.values():
                return self._conv_stats(index, norm)
            users = self.users[index]
            return None if len(users) == 1 and self._is_pair(users[0]) else self._call(op.node, index)
        if any(norm == branch for branch, _ in self.ends.values()):
            return None
        step = self._conv_stats(index, norm)
        return self._call(op.node, index) if norm == step.prologue == NONE else step

    def _conv_stats(self, index: int, norm: int) -> ConvStats:
        op, x, prologue = self.ops[index], self.ops[index].inputs[0], NONE
        if not self.inference and self._is_read_lazily(x):
            prologue = self.activations[x]
            (x,) = self.ops[prologue].inputs
        if norm != NONE:
            self.pairs.append((op.name, self.ops[norm].name))
        elif prologue != NONE:
            self.convs.append(op.name)
        return ConvStats(op.name, "" if norm == NONE else self.ops[norm].name, x, prologue, index, norm)

    def _norm(self, index: int, op: _Op) -> Step | None:
        if not self.inference:
            lazy = self._is_pair(index) and self._is_lazy(index)
            return None if lazy else self._call(op.node, index + op.two_in_one)
        if not self._is_pair(index):
            return self._call(op.node, index + op.two_in_one)
        if index in self.activations.values() or any(index == branch for branch, _ in self.ends.values()):
            return None
        return self._conv_affine(index, NONE, False, index)

    def _relu(self, index: int, op: _Op) -> Step | None:
        if index in self.ends:
            self._stands_for(op)
            branch, shortcut = self.ends[index]
            if self.inference:
                return self._conv_affine(branch, shortcut, True, index)
            last = self._conv_stats(self.ops[branch].inputs[0], branch)
            residual, residual_affine = shortcut, NONE
            if self._is_pair(shortcut) and self._is_lazy(shortcut):
                (residual,), residual_affine = self.ops[shortcut].inputs, shortcut
            in_place = self._adds_in_place(index)
            return BlockEnd(last.conv, last.norm, last.x, last.prologue, residual, residual_affine, in_place, index)
        if index in self.activations:
            self._stands_for(op)
            norm = self.activations[index]
            if norm in self.pools.values():
                return None
            if self.inference:
                return self._conv_affine(norm, NONE, True, index)
            return None if self._is_read_lazily(index) else Activation(self.ops[norm].inputs[0], norm, index)
        return None if self.ops[op.inputs[0]].two_in_one else self._call(op.node, index)

    def _conv_affine(self, norm: int, residual: int, relu: bool, out: int) -> ConvAffine:
        conv = self.ops[self.ops[norm].inputs[0]]
        self.pairs.append((conv.name, self.ops[norm].name))
        in_place = residual != NONE and self._adds_in_place(out)
        return ConvAffine(self.pairs[-1], conv.inputs[0], residual, in_place, relu, out)

    def _adds_in_place(self, end: int) -> bool:
        """Whether the sum that ends a block is written into the branch's memory."""
        add = self.ops[end] if self.ops[end].role == "add" else self.ops[self.ops[end].inputs[0]]
        return add.in_place and add.inputs[0] == self.ends[end][0]

    def _stands_for(self, op: _Op) -> None:
        if op.name:
            self.roles.append((op.name, type(self.root.get_submodule(op.name))))


def _role_of(module: Any) -> str:
    kind = type(module)
    if is_plain_conv(module) and module.padding_mode == "zeros":
        geometry = (module.weight.shape, module.stride, module.padding, module.dilation, module.groups)
        return "" if why_not_conv_stats(*geometry) else "conv"
    if batch_norm.is_known(module):
        return "norm"
    if kind is nn.MaxPool2d:
        return "pool" if is_stem_pool(module) else ""
    if kind in _DROPOUTS or "drop" in kind.__name__.lower() or kind.__name__ == "StochasticDepth":
        return "dropout"
    return {nn.ReLU: "relu", nn.Identity: "identity"}.get(kind, "")


def _dropout(root: nn.Module, name: str) -> Shell | None:
    """What has to hold for a module, by its name a dropout, to pass its input on in evaluation; None if it does not."""
    module = root.get_submodule(name)
    if type(module) in _DROPOUTS:
        return Shell(Watched(name), type(module), type(module).forward, ())
    return passes_on(module, name)


def _sees_layout(root: nn.Module, node: Node) -> bool:
    """Whether a node that is called as it was recorded may ask for strides, or views memory by them."""
    if node.kind == "module":
        return _module_sees_layout(root.get_submodule(node.target), len(node.args))
    if node.kind == "method":
        return node.target in _OF_LAYOUT
    if node.kind != "function":
        return False
    home = getattr(node.target, "__module__", None) or "torch"  # methods of Tensor have none
    return home.partition(".")[0] not in _HOMES or getattr(node.target, "__name__", "") in _OF_LAYOUT


def _module_sees_layout(module: nn.Module, tensors: int) -> bool:
    if is_layer(module) or batch_norm.is_known(module):
        return False
    library = original_class(module).__module__.partition(".")[0]
    if _role_of(module) == "dropout" and library in ("resnext", "timm", "torchvision"):  # which draw, and multiply
        return False
    if plans := module.__dict__.get("_fused_plans"):
        programs = [program for made in plans.values() for program in (made.train, made.infer)]
        return any(isinstance(step, Call) and step.sees_layout for program in programs for step, _ in program.steps)

    def is_leaf(each: nn.Module) -> bool:
        return each is not module and (is_layer(each) or "_fused_plans" in each.__dict__)

    try:
        recording = record(module, tensors, is_leaf, lambda _: False)
    except RecordError:
        return True
    return any(_sees_layout(module, node) for node in recording.nodes)


def _gains(conv: Any) -> bool:
    return gains_in_channels_last(conv.weight.shape, conv.stride, conv.groups)


def is_stem_pool(pool: nn.MaxPool2d) -> bool:
    """Whether this is the max pooling of ResNet's stem: 3x3, stride 2, padding 1."""
    sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    usual = sizes in ((3, 2, 1, 1), ((3, 3), (2, 2), (1, 1), (1, 1)))
    return usual and not pool.ceil_mode and not pool.return_indices


def _writes(step: Step) -> tuple[int, ...]:
    return (step.out, step.affine) if isinstance(step, ConvStats) and step.norm else (step.out,)


def _reads_affines(step: Step) -> list[int]:
    names = ["affine"] if isinstance(step, Activation | Pool) else ["prologue", "residual_affine"]
    return [getattr(step, name, NONE) for name in names]


def _reads(step: Step) -> list[int]:
    if isinstance(step, Call):
        return step.node.refs
    names = ["x", "z", "prologue", "residual", "residual_affine"]
    if isinstance(step, (Activation, Pool)):
        names.append("affine")
    return [slot for name in names if (slot := getattr(step, name, NONE)) != NONE]
