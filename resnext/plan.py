"""From what a module computes (`resnext.graph`) to steps of fused operators: one list for training, one for inference.

Training: a batch norm behind a convolution stays three vectors (`resnext.kernels.conv_stats`), which the next
convolution applies as it reads, together with the ReLU between them, or the end of the block, the stem's pooling, a
channel attention. Inference: batch norm, residual sum and ReLU are applied by the convolution
(`resnext.kernels.conv_affine`). Whatever is neither is called as it was recorded: blur pooling, stochastic depth, other
attentions, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from resnext import batch_norm, roles
from resnext.graph import Node, Recording, Ref, Shell, replaced
from resnext.kernels import gains_in_channels_last
from resnext.layers import original_class
from resnext.steps import (
    NONE,
    Activation,
    BlockEnd,
    Call,
    ConvAffine,
    ConvStats,
    Excite,
    Gate,
    Mean,
    Plan,
    Pool,
    Program,
    Segment,
    Step,
    every_conv,
    plan_of,
    reads,
    reads_affines,
    writes,
)


def plan(root: nn.Module, recording: Recording) -> Plan | None:
    """Plan what was recorded of ``root``; None if nothing in it would be fused that is not fused in a submodule."""
    seen: dict[tuple[str, Any, int], bool] = {}

    def sees_layout(node: Node) -> bool:
        key = node.kind, node.target, len(node.args)
        return seen[key] if key in seen else seen.setdefault(key, roles.sees_layout(root, node))

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
    units = {name: made for name in sorted(called) if (made := plan_of(root.get_submodule(name))) is not None}
    own = sum(_gains(root.get_submodule(conv)) for conv in every_conv(pairs, train.convs))
    within = sum(made.in_channels_last for made in units.values())
    ends = any(isinstance(step, BlockEnd) or (isinstance(step, Gate) and step.residual != NONE) for step in steps)
    return Plan(
        kind="block" if ends else "chain",
        slots=len(train.ops),
        train=train_program,
        infer=infer_program,
        pairs=pairs,
        folds=tuple(dict.fromkeys(pair for step, _ in infer_program.steps if (pair := _fold(step)) is not None)),
        excites=tuple(dict.fromkeys((*train.excited(), *infer.excited()))),
        convs=tuple(train.convs),
        entries=tuple(op.name for op in train.ops if op.role == "conv" and op.inputs == [0]),
        roles=tuple(dict.fromkeys((*train.roles, *infer.roles))),
        dropouts=tuple(infer.dropouts),
        shells=recording.shells,
        watched=recording.watched,
        aliases=recording.aliases,
        in_channels_last=0 if any(map(roles.adds_dimensions, recording.nodes)) else own + within,
        units=tuple(units),
        writes=train.writes(train_program) or infer.writes(infer_program),
        flags=tuple((name, root.get_submodule(name).__dict__.get("inplace")) for name in sorted(called)),
        segments=_segments(train_program),
    )


def _fold(step: Step) -> tuple[str, str] | None:
    """The convolution of a step for inference, and the norm that is folded into it; "" for none."""
    if isinstance(step, ConvAffine):
        return step.pair
    return (step.layer, "") if isinstance(step, Excite) else None


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
    affines, made, given = {NONE}, set[int](), list[int]()
    for end, step in enumerate(steps[start:], start + 1):
        if isinstance(step, Call | ConvAffine) or not affines.issuperset(reads_affines(step)):
            break
        given += [slot for slot in reads(step) if slot not in made]
        if isinstance(step, ConvStats) and step.norm:
            affines.add(step.affine)
        elif not made & needed.union(*map(reads, steps[end:])) and (end - start > 1 or isinstance(step, BlockEnd)):
            return Segment(tuple(steps[start:end]), tuple(dict.fromkeys(given)))
        made.update(writes(step))
    return None


@dataclass(frozen=True)
class _Attention:
    """A product of an activation and a gate: all by number of the op.

    ``source``: the ReLU, or the norm without one, whose values these are; ``norm``: that norm.
    """

    source: int
    norm: int
    gate: int
    means: tuple[int, ...]


@dataclass(frozen=True)
class _Layer:
    """Of an excitation: the op of its convolution or linear module, its activation, the op that ends it."""

    product: int
    activation: str
    out: int


@dataclass
class _Op:
    """A node and what it is to us (`roles.role`).

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

    @property
    def written(self) -> list[int]:
        """What an op in place writes to."""
        return [self.node.kwargs["out"].index] if isinstance(self.node.kwargs.get("out"), Ref) else self.inputs[:1]


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
        # residual sum (a relu, or the sum itself), the norm or attention that ends the branch and the shortcut; of a
        # product, the attention that it is; of what ends a layer of an excitation, that layer and what it is given.
        self.activations: dict[int, int] = {}
        self.pools: dict[int, int] = {}
        self.ends: dict[int, tuple[int, int]] = {}
        self.attentions: dict[int, _Attention] = {}
        self.excites: dict[int, tuple[_Layer, int]] = {}
        self.skipped: set[int] = set()
        self._match()

    # --- what the nodes are ---

    def _read(self, recording: Recording) -> None:
        value: list[int] = []  # of each node: the op that has it
        for node in recording.nodes:
            args, kwargs = replaced((node.args, node.kwargs), lambda ref: Ref(value[ref.index]))
            node = replace(node, args=args, kwargs=kwargs)
            role, in_place = roles.role(self.root, node)
            if role == "identity":
                self.roles.append((node.target, nn.Identity))
                value.append(node.refs[0])
                continue
            if (
                role == "dropout"
                and self.inference
                and (shell := roles.passing_dropout(self.root, node.target)) is not None
            ):
                self.dropouts.append(shell)
                value.append(node.refs[0])
                continue
            two_in_one = role == "norm" and batch_norm.has_relu(self.root.get_submodule(node.target))
            self.ops.append(_Op(node, role, in_place, two_in_one))
            if two_in_one:
                relu = Node("module", f"{node.target}.act", (Ref(len(self.ops) - 1),), owner=node.owner)
                self.ops.append(_Op(relu, "relu"))
            value.append(len(self.ops) - 1)

    # --- which of them go together ---

    def _match(self) -> None:
        for index, op in enumerate(self.ops):
            if op.role == "product" and (attention := self._attention(index)) is not None:
                self.attentions[index] = self._excitation(attention)
            elif op.role == "relu":
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
        ends = [each for each in (first, second) if self.users[each] == [add]]
        norms = [each for each in ends if self._is_pair(each)]
        # What ends in an attention is the branch; a sum without ReLU is not fused with it.
        attended = [each for each in ends if each in self.attentions and self.ops[end].role == "relu"]
        if not attended and not norms:
            return None
        # In place, the caller sees what becomes of an input, and a later node what becomes of a value.
        seen = not self._is_fresh(first) or self.users[first] != [add]
        if self.ops[add].in_place and first not in norms + attended and seen:
            return None
        branch = max(attended or norms)
        if attended:
            if self.ops[add].in_place and first != branch:  # the sum has the shortcut's dtype, whatever a gate's is
                return None
            attention = self.attentions[branch]
            # What the gate was made of is fresh, until it is there; it is read at the end.
            if self._writes(self.ops[attention.norm].inputs[0], branch, but=add, fresh=attention.means):
                return None
        if self._writes(branch if attended else self.ops[branch].inputs[0], end, but=add):
            return None
        return branch, first if branch == second else second

    def _is_fresh(self, value: int) -> bool:
        """Whether an op is known to return memory of its own, and not what it is given or a view of that."""
        op = self.ops[value]
        return not op.in_place and (op.role in roles.FRESH or op.node.target in roles.ARITHMETIC)

    def _writes(self, start: int, end: int, but: int = NONE, fresh: Sequence[int] = ()) -> bool:
        """Whether an op between two others may write into memory that one of them reads.

        ``fresh``: ops that make memory of their own, which nothing made of it shares with what was there before.
        """
        fused = {but, *self.activations, *self.ends, *self.attentions}
        own = self._made_of(fresh)
        return any(
            op.in_place and index not in fused and not own.issuperset(op.written or [index])
            for index, op in enumerate(self.ops[start:end], start)
        )

    def _made_of(self, fresh: Sequence[int]) -> set[int]:
        """Ops, and all that is made of nothing but them."""
        found = {*fresh}
        for index, op in enumerate(self.ops):
            if op.inputs and found.issuperset(op.inputs):
                found.add(index)
        return found

    def _attention(self, product: int) -> _Attention | None:
        """What a product is of, if that is an activation, which nobody else needs, and a gate made of its means."""
        first, second = self.ops[product].inputs
        for source, gate in ((first, second), (second, first)):
            norm = self.activations.get(source, source)
            if not self._is_pair(norm) or (norm == source and self.ops[source].role != "norm"):
                continue
            means = tuple(user for user in self.users[source] if self.ops[user].role == "mean")
            others = {*self.users[source]} - {product, *means}
            if not all(roles.asks_for_shape(self.ops[user].node, source) for user in others):
                continue
            if not means or max(means) >= product or not self._is_made_of(gate, means):
                continue
            if not self._writes(self.ops[norm].inputs[0], product, fresh=(*means, *others)):
                return _Attention(source, norm, gate, means)
        return None

    def _is_made_of(self, value: int, others: Sequence[int]) -> bool:
        """Whether one of the others goes into a value, or is it."""
        found = {value}
        for index in range(value, min(others), -1):
            if index in found:
                found.update(self.ops[index].inputs)
        return not found.isdisjoint(others)

    def _excitation(self, attention: _Attention) -> _Attention:
        """Find the layers that make the gate of the only mean: products, ReLU and sigmoid, with reshapes between.

        Returns the attention, whose gate is what the last of them makes then.
        """
        if len(attention.means) > 1:
            return attention
        found: list[_Layer] = []
        skipped: list[int] = []
        index, rank, activation, last = attention.gate, 4, "", NONE
        while index not in attention.means:
            op = self.ops[index]
            if len(self.users[index]) != 1:
                return attention
            if op.role in ("relu", "sigmoid") and not activation:
                activation, last = op.role, index
            elif op.role in ("conv", "linear"):
                taken = 4 if op.role == "conv" else 2
                if rank not in (taken, roles.ANY_RANK) or not roles.excites(self.root.get_submodule(op.name)):
                    return attention
                found.append(_Layer(index, activation, last if activation else index))
                rank, activation = taken, ""
            elif roles.expands_to(op.node, attention.source):
                skipped.append(index)
            elif (before := self._reshaped_rank(op, rank, attention)) is not None:
                skipped.append(index)
                rank = before
            else:
                return attention
            index = op.inputs[0]
        of_mean = 4 if roles.keeps_dims(self.ops[index].node) else 2
        if activation or not found or rank not in (of_mean, roles.ANY_RANK):
            return attention
        if any(self._writes(layer.product, layer.out) for layer in found):  # which it is given
            return attention
        self.skipped.update(skipped)
        for layer, before in zip(found, [*(each.out for each in found[1:]), index], strict=True):
            self.excites[layer.out] = layer, before
        return replace(attention, gate=found[0].out)

    def _reshaped_rank(self, op: _Op, rank: int, attention: _Attention) -> int | None:
        if op.role == "flatten":
            return roles.ANY_RANK if rank == 2 else None
        values = self._made_of(attention.means) | {attention.source}

        def is_batch(size: Any) -> bool:
            return isinstance(size, Ref) and roles.is_batch_size(self.ops[size.index].node, self._node_at, values)

        return roles.reshaped_rank(op.node, rank, is_batch)

    def _node_at(self, index: int) -> Node:
        return self.ops[index].node

    def _is_lazy(self, norm: int) -> bool:
        """Whether nobody needs the values of a norm in training: its affine is applied where they are read."""
        ends = len(self.users[norm]) == 1 and any(norm in operands for operands in self.ends.values())
        attended = any(norm == attention.norm for attention in self.attentions.values())
        return ends or attended or norm in self.activations.values()

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
        groups += [[product, each.norm, *each.means] for product, each in self.attentions.items()]
        owners = [{self.ops[index].node.owner for index in group} for group in groups]
        return any(len(each) > 1 or each == {""} for each in owners)

    # --- steps ---

    def program(self) -> Program:
        steps = [step for index, op in enumerate(self.ops) if (step := self._step(index, op)) is not None]
        output = self.ops[-1].node.args[0]
        kept = set(Node("output", "", (output,)).refs)
        steps = self._without_unread_shapes(steps, kept)
        last = {slot: position for position, step in enumerate(steps) for slot in reads(step)}
        free: list[list[int]] = [[] for _ in steps]
        for slot, position in last.items():
            if slot not in kept:
                free[position].append(slot)
        return Program(tuple(zip(steps, map(tuple, free), strict=True)), output)

    def _without_unread_shapes(self, steps: list[Step], kept: set[int]) -> list[Step]:
        """The steps but for those that find sizes for reshapes that were skipped."""
        wanted, needed = list[Step](), {*kept}
        for step in reversed(steps):
            if self.skipped and isinstance(step, Call) and step.out not in needed and roles.is_of_shape(step.node):
                continue
            wanted.append(step)
            needed.update(reads(step))
        return wanted[::-1]

    def excited(self) -> list[str]:
        """Names of the layers of excitations."""
        return [self.ops[layer.product].name for layer, _ in self.excites.values()]

    def writes(self, program: Program) -> bool:
        """Whether what a program calls writes into memory that it is given."""
        own = self._made_of([mean for each in self.attentions.values() for mean in each.means])
        return any(
            isinstance(step, Call) and self.ops[step.out].in_place and not own.issuperset(self.ops[step.out].written)
            for step, _ in program.steps
        )

    def _step(self, index: int, op: _Op) -> Step | None:
        if op.role in ("input", "output"):
            return None
        if index in self.excites:
            return self._excite(index)
        if index in self.skipped:
            self._stands_for(op)
            return None
        if any(layer.product == index for layer, _ in self.excites.values()):
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
        if op.role == "mean" and (attention := self._attention_at(index)) is not None:
            self._stands_for(op)
            excites = any(x == index for _, x in self.excites.values())
            return Mean(*self._attended(attention), excites or roles.keeps_dims(op.node), index)
        if index in self.attentions:
            if any(branch == index for branch, _ in self.ends.values()):
                return None
            return Gate(*self._attended(self.attentions[index]), self.attentions[index].gate, NONE, NONE, False, index)
        return self._call(op.node, index)

    def _attention_at(self, mean: int) -> _Attention | None:
        return next((each for each in self.attentions.values() if mean in each.means), None)

    def _attended(self, attention: _Attention) -> tuple[int, int, bool]:
        """What `Mean` and `Gate` read: a raw output and its affine, and whether ReLU comes behind."""
        if self.inference:
            return attention.source, NONE, False
        return self.ops[attention.norm].inputs[0], attention.norm, attention.source != attention.norm

    def _excite(self, index: int) -> Excite:
        layer, x = self.excites[index]
        if layer.product != index:
            self._stands_for(self.ops[index])
        return Excite(self.ops[layer.product].name, x, layer.activation, index)

    def _call(self, node: Node, out: int) -> Call:
        if not self.inference:  # where activations that an attention attends to are not there, but their raw outputs
            raw = {each.source: self.ops[each.norm].inputs[0] for each in self.attentions.values()}
            args, kwargs = replaced((node.args, node.kwargs), lambda ref: Ref(raw.get(ref.index, ref.index)))
            node = replace(node, args=args, kwargs=kwargs)
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
            residual, residual_affine = shortcut, NONE
            if not self.inference and self._is_pair(shortcut) and self._is_lazy(shortcut):
                (residual,), residual_affine = self.ops[shortcut].inputs, shortcut
            in_place = self._adds_in_place(index)
            if branch in self.attentions:
                attention = self.attentions[branch]
                operands = attention.gate, residual, residual_affine
                return Gate(*self._attended(attention), *operands, in_place, index)
            if self.inference:
                return self._conv_affine(branch, shortcut, True, index)
            last = self._conv_stats(self.ops[branch].inputs[0], branch)
            return BlockEnd(last.conv, last.norm, last.x, last.prologue, residual, residual_affine, in_place, index)
        if index in self.activations:
            self._stands_for(op)
            norm = self.activations[index]
            if norm in self.pools.values():
                return None
            if self.inference:
                return self._conv_affine(norm, NONE, True, index)
            if self._is_read_lazily(index) or any(index == each.source for each in self.attentions.values()):
                return None
            return Activation(self.ops[norm].inputs[0], norm, index)
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


def _gains(conv: Any) -> bool:
    return gains_in_channels_last(conv.weight.shape, conv.stride, conv.groups)
