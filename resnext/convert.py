"""`fuse_` and `unfuse_`: give anyone's model the fused computation, in place, and take it back.

A converted module stays the same object, with the same children, parameters, buffers and hooks. What changes is its
class: one derived from its own, of the same name, whose ``forward`` runs a plan (`resnext.plan`) and falls back on the
original ``forward`` whenever the plan does not hold. What is fused is found in a record of ``forward``, not by the
names of classes, so it does not matter whose model it is.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from resnext import batch_norm, folding, fusion, reasons
from resnext.graph import RecordError, record, tensor_arguments
from resnext.kernels import grouped_conv2d, use_backend
from resnext.layers import GroupedConv2d, is_layer, original_class
from resnext.plan import plan
from resnext.roles import pools_its_input
from resnext.steps import Plan, plan_of


class Fused(NamedTuple):
    """A converted module.

    Attributes:
        name: Its name in the model; "" for the model itself.
        kind: "block" (with a residual sum), "chain" (convolutions, batch norms and ReLUs) or "convolution".
        type: The name of its class.
    """

    name: str
    kind: str
    type: str


class Skipped(NamedTuple):
    """A module that could not be converted, though it holds what `fuse_` is for.

    Attributes:
        name: Its name in the model; "" for the model itself.
        type: The name of its class.
        reason: Why.
    """

    name: str
    type: str
    reason: str


class FuseReport(NamedTuple):
    """What `fuse_` did; prints as a table.

    Attributes:
        fused: The converted modules, those of earlier calls included, outer ones first.
        skipped: What could not be converted: modules with convolutions and norms of their own, and grouped 3x3
            convolutions.
    """

    fused: list[Fused]
    skipped: list[Skipped]

    def __str__(self) -> str:
        counts = Counter(each.kind for each in self.fused)
        summary = ", ".join(f"{counts[kind]} {kind}{'s' * (counts[kind] != 1)}" for kind in _KINDS)
        rows = [(name or "(model)", cls, kind, "") for name, kind, cls in self.fused]
        rows += [(name or "(model)", cls, "-", reason) for name, cls, reason in self.skipped]
        lines = [f"fused: {summary}; left as they are: {len(self.skipped)}"]
        if rows:
            rows.insert(0, ("module", "type", "fused as", "why not"))
            widths = [max(len(row[column]) for row in rows) for column in range(3)]
            lines += ["  ".join((*map(str.ljust, row, widths), row[3])).rstrip() for row in rows]
        return "\n".join(lines)


_KINDS = ("block", "chain", "convolution")


class Converted:
    """What the classes that `fuse_` derives have in common, beside the class they derive from."""

    _fused_from: type[nn.Module]
    _fused_backend = "auto"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Copies and pickles look classes up by name, where the original one is.
        made_by, arguments, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(max(protocol, 2)))
        if made_by is copyreg.__newobj__:  # type: ignore[attr-defined]
            return _unpickled, (self._fused_from, *arguments[1:]), *rest
        of_class = self._fused_from if made_by is type(self) else made_by
        return _made_anew, (of_class, arguments), *rest


class Plans(dict[int, Plan]):
    """The plans of a module, by number of arguments. Copies of the module share them; pickles have none."""

    def __deepcopy__(self, _: Any) -> Plans:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()


class FusedModule(Converted):
    """A module with a plan."""

    _fused_plans = Plans()

    def fused_forward(self: Any, args: tuple[Any, ...], turned: bool) -> Any:
        """Run the plan; where it does not hold the original forward, in NCHW if that is what was ``turned``."""
        made = self._fused_plans.get(len(args))
        if made is None or not all(isinstance(each, Tensor) for each in args) or reasons.why_not(self, made, args[0]):
            return self._fused_from.forward(self, *(map(fusion.in_nchw, args) if turned else args))
        recompute = made.recomputes and getattr(self, "recompute", False) is True
        with forced(self._fused_backend):
            return fusion.run(self, made, args, recompute)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        # Attributes that were read may have been copied too; unpickled modules have no plans.
        if _why_not(self) is not None:
            self._fused_plans, _ = _plans(cast(nn.Module, self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Switch between training and evaluation; what evaluation has folded is folded anew."""
        folding.forget(self)  # type: ignore[arg-type]
        return super().train(*args, **kwargs)  # type: ignore[misc]


class _Conv2dCalls(TorchFunctionMode):
    """Sends calls of ``F.conv2d`` to `grouped_conv2d`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_conv2d if func is torch.conv2d else func)(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    return grouped_conv2d(input, weight, bias, stride, padding, dilation, groups)


def fuse_(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> FuseReport:
    """Make ``model`` run on this library's kernels, in place: its residual blocks, conv-BN-ReLU chains, grouped convs.

    Any model: torchvision's, timm's, your own. Outputs, gradients and running statistics stay the same up to rounding;
    parameters, buffers, ``state_dict``, module names, hooks and ``isinstance`` stay the same altogether, so optimizers,
    checkpoints and wrappers made before remain valid. A module falls back on its original forward whenever something
    needs its children to be called (hooks, pruning, replaced children, tracing); `why_not_fused` tells. May be called
    again, after changes to the model for instance.

    Args:
        model: The model, or a part of one. Modes, gradients' flags and values are left as they are.
        filter_fn: Called with each module and its name in the model; whether to convert it. None: all. Of modules that
            it rejects the report says nothing.
        backend: What computes the converted modules' forward, as for `resnext.use_backend`; not inside
            ``torch.compile``, where the choice is automatic.
        strict: Raise if there is anything that ought to be converted and cannot be, and leave the model as it was.

    Returns:
        What was converted, and what was not and why. Print it.

    Raises:
        TypeError: ``model`` is no module, or is in TorchScript; ``filter_fn`` cannot be called.
        ValueError: There is no such backend; or, with ``strict``, something could not be converted.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"fuse_: expected a torch.nn.Module that is not in TorchScript, got {type(model).__name__}; give a model, "
            "and convert it before torch.jit.trace or torch.jit.script"
        )
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"fuse_: expected filter_fn to be called with a module and its name, got {filter_fn!r}; give a function, "
            "such as lambda module, name: name.startswith('layer1')"
        )
    with use_backend(backend):  # which knows the names
        pass
    before = [(module, type(module), module.__dict__.copy()) for module in model.modules()]
    report = FuseReport([], [])
    names = {module: name for name, module in model.named_modules()}
    try:
        for module in reversed(names):  # children first
            name = names[module]
            if filter_fn is None or filter_fn(module, name):
                _fuse_module(module, name, report)
                if isinstance(module, Converted):
                    module._fused_backend = backend
        report.fused.reverse()
        inside = _parts_of_plans(model)
        report.skipped[:] = [each for each in reversed(report.skipped) if each.name not in inside]
        if strict and report.skipped:
            raise ValueError(
                f"fuse_: expected nothing to be left as it is, got\n{report}\nuse filter_fn or strict=False"
            )
    except BaseException:
        for module, cls, attributes in before:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
        raise
    return report


def unfuse_(model: nn.Module) -> nn.Module:
    """Undo `fuse_`: give every module of ``model`` its original class back, in place.

    For what needs plain PyTorch, such as ``torch.jit.script``, quantization or exporting to ONNX. Our own models become
    plain too (their code is not TorchScript's, which takes them traced).

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.
    """
    _check_module("unfuse_", model)
    for module in model.modules():
        _restore(module)
    return model


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected a torch.nn.Module, got {type(model).__name__}; give a model")


def _restore(module: nn.Module) -> None:
    if "_fused_from" in type(module).__dict__:
        folding.forget(module)
        module.__class__ = original_class(module)
        for attribute in ("_fused_plans", "_fused_backend"):
            module.__dict__.pop(attribute, None)


def why_not_fused(model: nn.Module, x: Tensor | None = None) -> dict[str, str]:
    """Say which of a converted model's blocks and chains would run their original forward if called now, and why.

    Args:
        model: The model, or one block.
        x: What ``model`` itself would be called with; None: judge by what is known without it.

    Returns:
        The reasons by the modules' names ("" for ``model`` itself); empty if all would run fused.

    Raises:
        TypeError: ``model`` is no module.
    """
    _check_module("why_not_fused", model)
    reasons = {}
    for name, module in model.named_modules():
        if isinstance(module, FusedModule) and (reason := _why_not(module, x if module is model else None)):
            reasons[name] = reason
    return reasons


def _why_not(unit: FusedModule, x: Tensor | None = None) -> str | None:
    if (made := plan_of(unit)) is None:  # type: ignore[arg-type]
        return "it was made out of a converted module and not converted itself; call fuse_ again"
    return reasons.why_not(unit, made, x)  # type: ignore[arg-type]


def _fuse_module(module: Any, name: str, report: FuseReport) -> None:
    original = original_class(module)
    cls = original.__name__
    if isinstance(module, nn.Conv2d):
        reason = _why_not_grouped(module)
        if reason is None and not isinstance(module, (Converted, GroupedConv2d)):
            reason = _set_class(module, _convolution_class)
        if reason is None:
            report.fused.append(Fused(name, "convolution", cls))
        elif reason:
            report.skipped.append(Skipped(name, cls, reason))
        return
    if _is_layer(module) or (not _looks_like_block(module) and 0 in _parts(module)):
        return
    kept = isinstance(module, FusedModule) and _why_not(module) is None
    plans, reason = (module._fused_plans, "") if kept else _plans(module)
    if plans and not isinstance(module, FusedModule):
        reason = _set_class(module, _fused_class) or ""
    if plans and not reason:
        module._fused_plans = plans
        report.fused.append(Fused(name, next(iter(plans.values())).kind, cls))
        return
    if isinstance(module, FusedModule):
        _restore(cast(nn.Module, module))
    if reason:
        report.skipped.append(Skipped(name, cls, reason))


def _parts_of_plans(model: nn.Module) -> set[str]:
    """The names of the modules whose forwards the plans of others replace."""
    units = [(name, module) for name, module in model.named_modules() if isinstance(module, FusedModule)]
    plans = [(name, plan) for name, unit in units for plan in unit._fused_plans.values()]
    return {f"{name}.{shell.name}".lstrip(".") for name, plan in plans for shell in plan.shells if shell.name}


def _why_not_grouped(conv: nn.Conv2d) -> str | None:
    """Why a convolution should stay as it is: a reason, "" if it is nothing that `fuse_` is for, or None."""
    if conv.groups == 1 or tuple(conv.kernel_size) != (3, 3):
        return ""
    if isinstance(conv, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy: give it an input first"
    if hasattr(conv, "parametrizations"):
        return "it is parametrized: call fuse_ before parametrizing"
    if type(conv).__module__.startswith("torch.ao."):
        return "it is quantized"
    if tuple(conv.dilation) != (1, 1):
        return f"dilation is {conv.dilation}, not 1"
    if any(stride not in (1, 2) for stride in conv.stride):
        return f"stride is {conv.stride}, neither 1 nor 2"
    if conv.padding_mode != "zeros":
        return f"padding_mode is {conv.padding_mode}, not zeros"
    return None


def _plans(module: nn.Module) -> tuple[Plans, str]:
    """The plans of a module; or why there is none, if one might be expected."""
    plans = Plans()
    reason = "it has a forward of its own" if "forward" in module.__dict__ else ""
    attentions = _attentions(module)
    for tensors in () if reason else tensor_arguments(module):
        if attentions and (made := _attended_plan(module, tensors, attentions)) is not None:
            plans[tensors] = made
            continue
        try:
            made = plan(module, record(module, tensors, _is_leaf, _is_chain))
        except RecordError as error:
            reason = reason or str(error)
        else:
            if made is not None:
                plans[tensors] = made
    return plans, "" if plans or not _looks_like_block(module) else reason or _why_nothing_to_fuse(module)


def _attentions(module: nn.Module) -> set[nn.Module]:
    """Modules that `_is_leaf` takes for one step, which pool what they are given: they, and what is in them."""
    found: set[nn.Module] = set()
    for each in module.children():
        if not _is_leaf(each):
            found |= _attentions(each)
        elif not isinstance(each, FusedModule) and not _is_layer(each):
            quiet = not any(reasons.why_not_quiet("it", part) for part in each.modules())
            if quiet and pools_its_input(each):
                found.update(each.modules())
    return found


def _attended_plan(module: nn.Module, tensors: int, attentions: set[nn.Module]) -> Plan | None:
    """A plan with what is in attentions as steps of its own, if that fuses one; else None."""

    def is_leaf(each: nn.Module) -> bool:
        return _is_layer(each) if each in attentions else _is_leaf(each)

    try:
        made = plan(module, record(module, tensors, is_leaf, _is_chain))
    except RecordError:
        return None
    return made if made is not None and made.attends else None


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module is one step of what its parent computes, rather than steps of their own."""
    if isinstance(module, FusedModule) and any(plan.kind == "block" for plan in module._fused_plans.values()):
        return True
    if reasons.why_not_quiet("it", module) or _is_layer(module):
        return True
    convolutions, norms = _parts(module)
    # One convolution may be somebody's own wrapper of it, with the norm outside.
    return not norms and convolutions != 1


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is a layer rather than made of layers."""
    if isinstance(module, (nn.Conv2d, _BatchNorm)) or batch_norm.is_known(module):
        return True
    return is_layer(module)


def _parts(module: nn.Module) -> tuple[int, int]:
    """How many convolutions and how many batch norms there are in a module."""
    modules = list(module.modules())
    return sum(isinstance(each, nn.Conv2d) for each in modules), sum(map(batch_norm.is_known, modules))


def _is_chain(module: nn.Module) -> bool:
    return isinstance(module, FusedModule)


def _looks_like_block(module: nn.Module) -> bool:
    """Whether a convolution and a norm are among a module's own children."""
    children = list(module.children())
    return any(isinstance(each, nn.Conv2d) for each in children) and any(map(_is_norm, children))


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__module__.rpartition(".")[2]


def _why_nothing_to_fuse(module: nn.Module) -> str:
    others = {type(each).__name__: each for each in module.modules() if "activation" in type(each).__module__}
    others.pop("ReLU", None)
    if others:
        return f"its activation is {', '.join(sorted(others))}, not ReLU"
    norms = sorted({type(each).__name__ for each in module.children() if _is_norm(each)})
    if not any(map(batch_norm.is_known, module.modules())):
        return f"its norm is {', '.join(norms)}, not BatchNorm2d"
    return "no ReLU follows a batch norm that follows a convolution"


# --- classes ---


def _set_class(module: Any, derived: Callable[[Any], type[nn.Module]]) -> str | None:
    """Give a module the class derived from its own; returns why it cannot have one, or None."""
    try:
        module.__class__ = derived(type(module))
    except TypeError as error:  # of a metaclass, __init_subclass__ or __slots__
        return f"its class has none derived from it ({error})"
    return None


@functools.cache
def _fused_class(original: Any) -> type[nn.Module]:
    @functools.wraps(original.forward)  # which keeps the signature, for those who trace or inspect it
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original.forward(self, *args, **kwargs) if kwargs else self.fused_forward(args, turned=False)

    return _derived(original, FusedModule, forward)


@functools.cache
def _convolution_class(original: Any) -> type[nn.Module]:
    base = GroupedConv2d if original is nn.Conv2d else original

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with forced(self._fused_backend):
            if original is nn.Conv2d:
                return base.forward(self, *args, **kwargs)
            with _Conv2dCalls():
                return base.forward(self, *args, **kwargs)

    return _derived(original, Converted, forward, base)


def _derived(
    original: type[nn.Module], mixin: type, forward: Callable[..., Any], base: type[nn.Module] | None = None
) -> type[nn.Module]:
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, (mixin, base or original), {**names, "_fused_from": original, "forward": forward})


def _unpickled(original: type[nn.Module], *arguments: Any) -> nn.Module:
    """An empty module of the class derived from ``original``; what pickles and copies start from."""
    derived: Any = _convolution_class if issubclass(original, nn.Conv2d) else _fused_class
    cls = derived(original)
    return cls.__new__(cls, *arguments)


def _made_anew(original: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What a class with a ``__reduce__`` of its own makes of its arguments, converted."""
    module = original(*arguments)
    fuse_(module)
    return module


def forced(backend: str) -> contextlib.AbstractContextManager[None]:
    """The context in which a converted module computes that has this backend; none inside a compiler."""
    return contextlib.nullcontext() if backend == "auto" or torch.compiler.is_compiling() else use_backend(backend)
