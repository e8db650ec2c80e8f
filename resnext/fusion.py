"""Runs a plan (`resnext.plan`) in the place of a module's forward, and says when it must not.

A plan does not call the modules that it stands for. So each must still be what it was when the plan was made, and
nobody may be listening to its calls; otherwise the module's own forward runs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from resnext import batch_norm, recorded
from resnext.batch_norm import BatchNorm, Statistics
from resnext.graph import Ref, Shell, Watched, changed_attribute, replaced
from resnext.kernels import (
    affine_add_relu,
    affine_gate,
    affine_mean,
    affine_relu_max_pool,
    conv_affine,
    conv_norm,
    conv_stats,
    excite,
    keep_packed,
    laid_out,
    prefers_channels_last,
    why_not_conv_stats,
)
from resnext.layers import child, held, is_plain_conv, original_class
from resnext.plan import excites, is_stem_pool, pools_to_one
from resnext.steps import Activation, BlockEnd, Call, ConvAffine, ConvStats, Excite, Gate, Mean, Plan, Pool

Affine = tuple[Tensor, Tensor, Tensor]

_HOOKS = {
    "forward_pre_hooks": "forward pre-hook",
    "forward_hooks": "forward hook",
    "backward_pre_hooks": "backward pre-hook",
    "backward_hooks": "backward hook",
}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Kernel size, stride, padding and dilation of what blocks are made of, so that most calls need no closer look.
_USUAL_GEOMETRY = frozenset(
    ((kernel, kernel), stride, (padding, padding), (1, 1))
    for kernel, padding in ((1, 0), (3, 1))
    for stride in ((1, 1), (2, 2))
)


# --- reasons ---


def why_not(unit: nn.Module, plan: Plan, x: Tensor | None) -> str | None:
    """Why a call of ``unit`` must not run its plan, or None.

    Args:
        unit: A module with a plan.
        plan: The plan.
        x: The first argument of that call, or what stands for it in symbolic tracing; None: judge by what is known
            without it.
    """
    if reason := _why_not_now(x):
        return reason
    for shell in plan.shells:
        if reason := _why_not_shell(shell, child(unit, shell.name) if shell.name else unit):
            return reason
    for watched in plan.watched:
        if reason := _why_not_watched(watched, child(unit, watched.name), watched.name):
            return reason
    for one, other in plan.aliases:
        if child(unit, one) is not child(unit, other):
            return f"{one} and {other} are not the same module any more"
    for name, kind in plan.roles:
        if reason := _why_not_role(name, child(unit, name), kind):
            return reason
    for conv, bn in plan.pairs:
        if reason := _why_not_conv(conv, child(unit, conv), x) or _why_not_norm(
            bn, child(unit, bn), conv, child(unit, conv), x
        ):
            return reason
    for conv in (*plan.convs, *plan.excites):
        if reason := _why_not_conv(conv, child(unit, conv), x):
            return reason
    for name in plan.excites:
        if not excites(child(unit, name)):
            return f"{name} is {child(unit, name)}, not a dense 1x1 convolution without stride"
    for name, flag in plan.flags:
        if (module := child(unit, name)) is not None and module.__dict__.get("inplace") != flag:
            return f"{name}.inplace is not what it was when it was converted"
    return None if x is None else _why_not_channels(unit, plan, x.shape[1])


def _why_not_channels(unit: nn.Module, plan: Plan, channels: int) -> str | None:
    """Why the convolutions that are given an input of so many channels do not take it, or None."""
    for name in plan.entries:
        conv = child(unit, name)
        if channels != (taken := held(conv, "weight").shape[1] * conv.groups):
            return f"the input has {channels} channels, and {name} takes {taken}"
    return None


def _why_not_now(x: Tensor | None) -> str | None:
    """What in the caller, or in the input ``x`` if there is one, wants the children to be called; or None."""
    if isinstance(x, fx.Proxy):
        return "symbolic tracing records the children"
    if torch.jit.is_tracing():
        return "torch.jit tracing records the children"
    if torch._C._are_functorch_transforms_active():
        return "the call is inside a torch.func transform (vmap, grad, jvp, ...)"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on"
    if nn_module._has_any_global_hook():
        return "a hook is registered for all modules"
    if x is None:
        return None
    if x.dim() != 4 or 0 in x.shape[1:]:
        return f"the input has shape {tuple(x.shape)}, not (N, C, H, W) with C, H and W at least 1"
    if x.dtype not in _DTYPES:
        return f"the input is {x.dtype}, not float32, float16, bfloat16 or float64"
    if x.layout is not torch.strided or x.device.type not in ("cpu", "cuda"):
        return f"the input is {x.layout} on {x.device}, not strided on a CPU or a CUDA GPU"
    return None


def why_not_quiet(name: str, module: nn.Module) -> str | None:
    """Who listens to the calls of ``module``, or None."""
    # One expression, as it stands in torch.nn.Module's own call: this is asked for every child in every call.
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        kinds = [words for kind, words in _HOOKS.items() if getattr(module, f"_{kind}")]
        return f"{name} has a {kinds[0]}"
    if "forward" in module.__dict__:
        return f"{name} has a forward of its own"
    return None


def _why_not_role(name: str, module: nn.Module | None, kind: type[nn.Module]) -> str | None:
    if type(module) is not kind:
        return f"{name} is {type(module).__name__}, not {kind.__name__}"
    if isinstance(module, nn.MaxPool2d) and not is_stem_pool(module):
        return f"{name} is {module}, not a 3x3 pooling with stride 2 and padding 1"
    if isinstance(module, nn.AdaptiveAvgPool2d) and not pools_to_one(module):
        return f"{name} is {module}, not a pooling to one pixel"
    return why_not_quiet(name, module)  # type: ignore[arg-type]


def _why_not_conv(name: str, conv: nn.Conv2d, x: Tensor | None) -> str | None:
    """Why the kernels do not compute what a convolution computes, or None."""
    if conv is None or not is_plain_conv(conv):
        return f"{name} is {type(conv).__name__}, not Conv2d"
    if reason := why_not_quiet(name, conv):
        return reason
    if "_conv_forward" in conv.__dict__:
        return f"{name} has a _conv_forward of its own"
    if conv.padding_mode != "zeros":
        return f"{name}.padding_mode is {conv.padding_mode}, not zeros"
    weight = held(conv, "weight")
    geometry = (conv.stride, conv.padding, conv.dilation)
    if any(type(each) is list for each in geometry) or (weight.shape[2:], *geometry) not in _USUAL_GEOMETRY:
        reason = why_not_conv_stats(weight.shape, conv.stride, conv.padding, conv.dilation, conv.groups)
        if reason is not None:
            return f"{name}: {reason}"
    if x is None:
        return None
    if weight.device != x.device:
        return f"the input is on {x.device}, and {name} on {weight.device}"
    cast = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (weight.dtype, x.dtype)
    if weight.dtype != x.dtype and not cast:
        return f"the input is {x.dtype}, and {name} {weight.dtype}"
    return None


def _why_not_norm(name: str, bn: BatchNorm, conv_name: str, conv: nn.Conv2d, x: Tensor | None) -> str | None:
    """Why the kernels do not compute what ``bn`` computes behind ``conv``, or None."""
    if bn is None or not batch_norm.is_known(bn):
        return f"{name} is {type(bn).__name__}, not BatchNorm2d"
    if reason := why_not_quiet(name, bn):
        return reason
    if bn.eps <= 0:
        return f"{name}.eps is {bn.eps}, not positive"
    running_mean, weight = held(bn, "running_mean"), held(bn, "weight")
    if (running_mean is None) != (held(bn, "running_var") is None):
        return f"{name} has only one of running_mean and running_var"
    if weight is None and held(bn, "bias") is not None:
        return f"{name} has a bias without a weight"
    for vector in (weight, running_mean):
        if vector is not None and len(vector) != conv.out_channels:
            return f"{name} is for {len(vector)} channels, and {conv_name} has {conv.out_channels}"
    if x is not None and x.shape[0] == 0 and batch_norm.uses_batch_statistics(bn) and not batch_norm.is_shared(bn):
        return "the input has no images"
    return None


def _why_not_shell(shell: Shell, module: nn.Module | None) -> str | None:
    """Why the forward of ``module`` may compute something else than was recorded, or None."""
    name = shell.name or "the module"
    if module is None or (shell.name and original_class(module) is not shell.type):
        return f"{name} is {type(module).__name__}, not {shell.type.__name__}"
    if shell.name and (reason := why_not_quiet(name, module)):
        return reason
    if len(module._modules) != len(shell.children):
        return f"{name} has {len(module._modules)} children, not {len(shell.children)} as when it was converted"
    for child_name, is_none in shell.children:
        if (module._modules.get(child_name) is None) != is_none:
            return f"{name} has another child {child_name} than when it was converted"
    if reason := _why_not_watched(shell.watched, module, name):
        return reason
    if shell.type.forward is not shell.forward:
        return f"{shell.type.__name__}.forward is not what it was when {name} was converted"
    return None


def _why_not_watched(watched: Watched, module: nn.Module | None, name: str) -> str | None:
    """Why attributes of ``module`` that were read are not what was recorded, or None."""
    if module is None:
        return f"there is no {name} any more"
    if attribute := changed_attribute(module, watched):
        return f"{attribute} of {name} is not what it was when it was converted"
    return None


# --- running a plan ---


def run(unit: nn.Module, plan: Plan, arguments: Sequence[Tensor], recompute: bool) -> Any:
    """Run ``plan``, for which `why_not` has nothing to say, in the place of the forward of ``unit``.

    Differentiable; saves the arguments, the raw output of each convolution, what the steps return, and vectors. Batch
    norms are folded into the convolutions if all are in evaluation and nothing needs a gradient.

    Args:
        unit: The module.
        plan: Its plan.
        arguments: What it is called with.
        recompute: Whether backward computes the last convolution of a block again instead of keeping its output.
    """
    if turned := works_in_channels_last(unit, plan, arguments):
        arguments = [laid_out(argument, True) for argument in arguments]
    values: list[Any] = [*arguments, *[None] * (plan.slots - len(arguments) + 1)]  # the last one is the slot NONE
    infers = _infers(unit, plan, arguments)
    folded = _folded(unit, plan.folds, arguments[0]) if infers else {}
    program = plan.infer if infers else plan.train
    updates: list[batch_norm.Update] = []
    segments = {} if infers or recompute else plan.segments
    left = 0  # of a segment that has run
    for position, (step, free) in enumerate(program.steps):
        if (segment := segments.get(position)) is not None:
            out = recorded.run(unit, segment, values, keeps_result=not turned)
            if out is not None:
                left, values[segment.steps[-1].out] = len(segment.steps), out
        if left:
            left -= 1
            for slot in free:
                values[slot] = None
            continue
        if updates and not isinstance(step, ConvStats | BlockEnd):
            _update(updates)
        if isinstance(step, ConvStats):
            conv, bn = child(unit, step.conv), child(unit, step.norm) if step.norm else None
            z, affine, statistics = _conv_norm(values[step.x], values[step.prologue], conv, bn)
            if bn is not None:
                values[step.affine] = affine
                updates.append((bn, statistics))
            values[step.out] = z
        elif isinstance(step, BlockEnd):
            values[step.out] = _block_end(
                child(unit, step.conv),
                child(unit, step.norm),
                (values[step.x], values[step.prologue], values[step.residual], values[step.residual_affine]),
                updates,
                step.in_place,
                recompute,
                keeps_result=not turned,
            )
        elif isinstance(step, ConvAffine):
            values[step.out] = _conv_affine(
                child(unit, step.pair[0]), folded[step.pair], values[step.x], values[step.residual], step
            )
        elif isinstance(step, Activation):
            values[step.out] = _affine_add_relu(values[step.z], values[step.affine], None, None)
        elif isinstance(step, Pool):
            values[step.out] = _affine_relu_max_pool(values[step.z], values[step.affine])
        elif isinstance(step, Mean):
            values[step.out] = _mean(values[step.z], values[step.affine], step)
        elif isinstance(step, Excite):
            values[step.out] = _excite(child(unit, step.conv), folded.get((step.conv, "")), values[step.x], step)
        elif isinstance(step, Gate):
            operands = values[step.gate], values[step.residual], values[step.residual_affine]
            values[step.out] = _gate(values[step.z], values[step.affine], *operands, step)
        else:
            values[step.out] = _call(unit, step, values, turned)
        for slot in free:
            values[slot] = None
    _update(updates)
    if not turned:
        return replaced(program.output, lambda ref: values[ref.index])
    return replaced(program.output, lambda ref: _in_nchw(values[ref.index]))


def works_in_channels_last(unit: nn.Module, plan: Plan, arguments: Sequence[Tensor]) -> bool:
    """Whether to turn what is given in NCHW to channels_last, and the results back: for the kernels that only it has.

    The caller must not notice: neither the results' layout changes, nor is there anything that writes to arguments.
    """
    if plan.in_channels_last < 2 or plan.writes:
        return False
    if not all(prefers_channels_last(argument) for argument in arguments):
        return False
    # A convolution with a weight in channels_last returns channels_last.
    return all(child(unit, conv).weight.stride(3) == 1 for conv in plan.every_conv)


def _in_nchw(value: Any) -> Any:
    return laid_out(value, False) if isinstance(value, Tensor) and value.dim() == 4 else value


def _call(unit: nn.Module, step: Call, values: list[Any], turned: bool) -> Any:
    node = step.node
    in_nchw = turned and (step.sees_layout or _is_another(unit, step))

    def value(ref: Ref) -> Any:
        return _in_nchw(values[ref.index]) if in_nchw else values[ref.index]

    args, kwargs = replaced((node.args, node.kwargs), value)
    if node.kind == "module":
        return child(unit, node.target)(*args, **kwargs)
    if node.kind == "function":
        return node.target(*args, **kwargs)
    if node.kind == "method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    module, _, name = node.target.rpartition(".")
    return getattr(child(unit, module) if module else unit, name)


def _is_another(unit: nn.Module, step: Call) -> bool:
    """Whether another module has taken the place of the one that a step was recorded with."""
    return step.kind is not None and original_class(child(unit, step.node.target)) is not step.kind


# --- training, and evaluation with gradients ---


def _update(updates: list[batch_norm.Update]) -> None:
    batch_norm.update_running_statistics(updates)
    updates.clear()


def _block_end(
    conv: nn.Conv2d,
    bn: BatchNorm,
    operands: tuple[Any, ...],
    updates: list[batch_norm.Update],
    in_place: bool,
    recompute: bool,
    keeps_result: bool,
) -> Tensor:
    """Also update running statistics, ``updates`` and those of ``bn``.

    ``keeps_result``: False if the next block will not keep this very tensor as its input.
    """

    def add(z: Tensor, affine: Any, residual: Tensor, residual_affine: Affine | None) -> Tensor:
        if not _is_like(residual, z.shape, z.dtype, in_place):
            return torch.relu(_normalised(z, affine) + _normalised(residual, residual_affine))
        return _affine_add_relu(z, affine, residual, residual_affine, keeps_result)

    def end(x: Tensor, prologue: Affine | None, *shortcut: Any) -> tuple[Tensor, Statistics | None]:
        z, affine, statistics = _conv_norm(x, prologue, conv, bn)
        return add(z, affine, *shortcut), statistics

    if recompute and torch.is_grad_enabled():
        _update(updates)
        out, statistics = checkpoint(end, *operands, use_reentrant=False, preserve_rng_state=False)
        _update([(bn, statistics)])  # not in `end`, which runs twice
        return out
    x, prologue, *shortcut = operands
    z, affine, statistics = _conv_norm(x, prologue, conv, bn)
    # Before the sum: checkpointing around the block stops its second run where backward has all that it needs.
    updates.append((bn, statistics))
    _update(updates)
    return add(z, affine, *shortcut)


def _conv_norm(
    x: Tensor, prologue: Affine | None, conv: nn.Conv2d, bn: BatchNorm | None
) -> tuple[Tensor, Affine | None, Statistics | None]:
    """The raw output, and its batch norm as an affine; with the statistics if they are the batch's."""
    images = x.shape[0]
    weight, bias, geometry = held(conv, "weight"), held(conv, "bias"), (conv.stride, conv.groups)
    of_batch = bn is not None and batch_norm.uses_batch_statistics(bn)
    if bn is not None and of_batch and bias is None and not batch_norm.is_shared(bn):
        z, mean, var, affine = conv_norm(x, weight, held(bn, "weight"), held(bn, "bias"), bn.eps, prologue, *geometry)
        return z, affine, batch_norm.batch_statistics(bn, mean, var, z.shape)  # type: ignore[return-value]
    z, mean, var = conv_stats(_or_blank(x), weight, prologue, *geometry, stats=of_batch)  # type: ignore[assignment]
    z = z if images else z[:0]
    if bn is None:
        return z, None, None
    statistics = None
    if mean is not None and var is not None:
        statistics = batch_norm.batch_statistics(bn, mean, var, (images, *z.shape[1:]))
    center, scale, shift = batch_norm.affine(bn, statistics, z.dtype)
    if bias is not None:
        if statistics is None:
            shift = shift + scale * bias
        else:  # which takes it away again, so that it has an influence on the running mean alone
            shift = shift + 0 * bias
            statistics = statistics._replace(mean=statistics.mean + bias.to(statistics.mean.dtype))
    return z, (center, scale, shift), statistics


def _is_like(residual: Tensor, shape: tuple[int, ...], dtype: torch.dtype, in_place: bool) -> bool:
    """Whether a sum with ``residual`` has the shape and dtype of the other operand."""
    if residual.dtype != dtype and not in_place:
        return False
    return residual.shape == shape or torch.broadcast_shapes(residual.shape, shape) == shape


def _normalised(z: Tensor, affine: Affine | None) -> Tensor:
    if affine is None:
        return z
    center, scale, shift = (vector[:, None, None] for vector in affine)
    return (scale * (z.to(scale.dtype) - center) + shift).to(z.dtype)


def _affine_add_relu(
    z: Tensor, affine: Any, residual: Tensor | None, residual_affine: Affine | None, keeps_result: bool = True
) -> Tensor:
    if z.shape[0]:
        return affine_add_relu(z, affine, residual, residual_affine, keeps_result)
    return affine_add_relu(_or_blank(z), affine, None if residual is None else _or_blank(residual), residual_affine)[:0]


def _affine_relu_max_pool(z: Tensor, affine: Any) -> Tensor:
    return affine_relu_max_pool(z, affine) if z.shape[0] else affine_relu_max_pool(_or_blank(z), affine)[:0]


def _mean(z: Tensor, affine: Affine | None, step: Mean) -> Tensor:
    if z.shape[0]:
        mean = affine_mean(z, affine, step.relu).to(z.dtype)
        return mean if step.keeps_dims else mean.flatten(1)
    return _activated(z, affine, step.relu).mean((2, 3), keepdim=step.keeps_dims)


def _gate(
    z: Tensor, affine: Affine | None, gate: Any, residual: Tensor | None, residual_affine: Affine | None, step: Gate
) -> Tensor:
    fits = isinstance(gate, Tensor) and gate.dtype == z.dtype and z.shape[0] > 0
    if fits and gate.shape == z.shape and gate.stride()[2:] == (0, 0):  # expanded
        gate = gate[:, :, :1, :1]
    fits = fits and gate.shape == (*z.shape[:2], 1, 1)
    if fits and (residual is None or _is_like(residual, z.shape, z.dtype, step.in_place)):
        return affine_gate(z, gate, affine, step.relu, residual, residual_affine)
    gated = _activated(z, affine, step.relu) * gate
    return gated if residual is None else torch.relu(gated + _normalised(residual, residual_affine))


def _activated(z: Tensor, affine: Affine | None, relu: bool) -> Tensor:
    value = _normalised(z, affine)
    return torch.relu(value) if relu else value


def _excite(conv: nn.Conv2d, folded: Folded | None, x: Tensor, step: Excite) -> Tensor:
    if folded is None:
        return excite(x, conv.weight, conv.bias, step.activation)
    y = conv_affine(x, *folded, None, step.activation == "relu")
    return torch.sigmoid(y) if step.activation == "sigmoid" else y


def _or_blank(x: Tensor) -> Tensor:
    """``x``, or one blank image for a batch of none: other processes may wait for this one's part in the statistics.

    It counts for nothing there, and the result is cut off again.
    """
    return x if x.shape[0] else x.new_zeros(1, *x.shape[1:]) + x.sum()


# --- inference ---


class Folded(NamedTuple):
    """A convolution with batch norm folded in: scale * conv(x, weight) + shift, or without scale if that is None."""

    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None


class _Kept(NamedTuple):
    """What `_folded` keeps of a module."""

    state: list[float]  # what it was made from: numbers, addresses, versions
    folded: dict[tuple[str, str], Folded]
    aliases: list[Tensor]


# Beside the modules and not in them: state_dict, pickle and copies know nothing of it.
_KEPT: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


@functools.cache
def _watch_optimizers() -> None:
    """Drop all that is kept when an optimizer has taken a step that leaves no trace in the parameters' versions."""

    def forget_all(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if any(group.get("fused") for group in optimizer.param_groups):
            _KEPT.clear()

    forget_all._dynamo_marked_constant = True  # type: ignore[attr-defined]  # compiled steps leave one
    register_optimizer_step_post_hook(forget_all)


def _conv_affine(conv: nn.Conv2d, folded: Folded, x: Tensor, residual: Tensor | None, step: ConvAffine) -> Tensor:
    if residual is not None:
        height, width = ((size - 1) // stride + 1 for size, stride in zip(x.shape[2:], conv.stride, strict=True))
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if not _is_like(residual, (x.shape[0], conv.out_channels, height, width), dtype, step.in_place):
            sum_ = conv_affine(x, *folded, None, False, conv.stride, conv.groups) + residual
            return torch.relu(sum_) if step.relu else sum_
    return conv_affine(x, *folded, residual, step.relu, conv.stride, conv.groups)


def _infers(unit: nn.Module, plan: Plan, arguments: Sequence[Tensor]) -> bool:
    """Whether batch norms can be folded: images, no batch statistics, and nothing for a backward pass."""
    if arguments[0].shape[0] == 0:
        return False
    if not all(_passes_on(shell, child(unit, shell.name)) for shell in plan.dropouts):
        return False
    if any(batch_norm.uses_batch_statistics(child(unit, bn)) for _, bn in plan.pairs):
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(tensor.requires_grad for tensor in (*arguments, *_tensors(unit, (*plan.pairs, *plan.folds))))


def _passes_on(shell: Shell, module: nn.Module | None) -> bool:
    """Whether a module that inference leaves out still returns what it is called with."""
    return module is not None and not module.training and _why_not_shell(shell, module) is None


def forget(unit: nn.Module) -> None:
    """Drop what inference keeps of ``unit``; the next call makes it again."""
    _KEPT.pop(unit, None)


def _folded(unit: nn.Module, pairs: Sequence[tuple[str, str]], x: Tensor) -> dict[tuple[str, str], Folded]:
    """The folded vectors of each pair, kept until a parameter or buffer changes.

    What writes through ``Tensor.data`` leaves no trace; `forget` is for that.
    """
    tensors = _tensors(unit, pairs)
    # A compiler computes the vectors in its graph. So must a CUDA graph, to follow the parameters when replayed.
    passing = (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or any(tensor.is_inference() for tensor in tensors)
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )
    if passing:
        return {pair: _fold(unit, pair, x, keeps=False) for pair in pairs}
    state = [child(unit, bn).eps for _, bn in pairs if bn]
    state += (x.is_contiguous(memory_format=torch.channels_last), torch.is_autocast_enabled(x.device.type))
    for tensor in tensors:
        state += (tensor.data_ptr(), tensor._version)
    if x.is_cuda:  # another stream could come before the vectors are there
        state.append(torch.cuda.current_stream(x.device).cuda_stream)
    kept = _KEPT.get(unit)
    if kept is None or kept.state != state:
        _watch_optimizers()
        # Tensors made in inference mode could not be used outside it.
        with torch.inference_mode(False), torch.no_grad():
            # What other processes may change leaves no trace in this one.
            keeps = x.is_cuda or not any(tensor.is_shared() for tensor in tensors)
            folded = {pair: _fold(unit, pair, x, keeps) for pair in pairs}
            if not keeps:
                return folded
            # The aliases hold the memory, so that no other tensor gets the same address.
            kept = _KEPT[unit] = _Kept(state, folded, [tensor.detach() for tensor in tensors])
    return kept.folded


def _fold(unit: nn.Module, pair: tuple[str, str], x: Tensor, keeps: bool) -> Folded:
    """Fold for inputs like ``x``; ``keeps``: for many calls, so that weights are worth some work.

    A convolution without a norm, whose name is "" then, is folded with its bias alone.

    The scale goes into the weight where a library's convolution adds a shift but does not scale. In float32 that rounds
    no more coarsely than the sums do.
    """
    conv = child(unit, pair[0])
    weight, bias = conv.weight, conv.bias
    if not pair[1]:
        if keeps and weight.device.type == "cpu":
            weight = weight.detach()
            keep_packed(weight, x)
        return Folded(weight, None, None if bias is None else bias.to(torch.promote_types(bias.dtype, torch.float32)))
    bn = child(unit, pair[1])
    mean, scale, shift = batch_norm.affine(bn, None, x.dtype)
    shift = shift - scale * (mean if bias is None else mean - bias)
    if keeps and weight.device.type == "cpu":
        own = weight.detach()  # whose packed copy lives as long as what is folded
        by_library = conv.groups == 1 and conv.kernel_size != (1, 1) and weight.dtype == torch.float32
        if not by_library and keep_packed(own, x, conv.stride, conv.groups):
            return Folded(own, scale, shift)
        if weight.dtype == torch.float32:
            scaled = weight * scale[:, None, None, None]
            keep_packed(scaled, x, conv.stride, conv.groups)
            return Folded(scaled, None, shift)
    return Folded(weight, scale, shift)


def _tensors(unit: nn.Module, pairs: Sequence[tuple[str, str]]) -> list[Tensor]:
    tensors = []
    for conv_name, bn_name in pairs:
        conv = child(unit, conv_name)
        tensors += [held(conv, name) for name in ("weight", "bias")]
        if not bn_name:
            continue
        bn = child(unit, bn_name)
        tensors += [held(bn, name) for name in ("weight", "bias", "running_mean", "running_var")]
    return [tensor for tensor in tensors if tensor is not None]
