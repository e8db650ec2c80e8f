"""Runs a plan (`resnext.plan`) in the place of a module's forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnext import batch_norm, recorded
from resnext.batch_norm import BatchNorm, Statistics
from resnext.folding import Folded, folded, infers
from resnext.graph import Node, Ref, replaced
from resnext.kernels import (
    affine_add_relu,
    affine_gate,
    affine_mean,
    affine_relu_max_pool,
    conv_affine,
    conv_norm,
    conv_stats,
    excite,
    laid_out,
    prefers_channels_last,
)
from resnext.layers import child, held, original_class
from resnext.reasons import why_not_quiet
from resnext.steps import Activation, BlockEnd, Call, ConvAffine, ConvStats, Excite, Gate, Mean, Plan, Pool

Affine = tuple[Tensor, Tensor, Tensor]


def run(unit: nn.Module, plan: Plan, arguments: Sequence[Tensor], recompute: bool) -> Any:
    """Run ``plan``, for which `resnext.reasons.why_not` has nothing to say, in the place of the forward of ``unit``.

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
    inferring = infers(unit, plan, arguments)
    folds = folded(unit, plan.folds, arguments[0]) if inferring else {}
    program = plan.infer if inferring else plan.train
    updates: list[batch_norm.Update] = []
    segments = {} if inferring or recompute else plan.segments
    returned = Node("output", "", (program.output,)).refs if turned else ()  # copied: nobody else keeps these
    left = 0  # of a segment that has run
    for position, (step, free) in enumerate(program.steps):
        if (segment := segments.get(position)) is not None:
            out = recorded.run(unit, segment, values, keeps_result=segment.steps[-1].out not in returned)
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
                keeps_result=step.out not in returned,
            )
        elif isinstance(step, ConvAffine):
            values[step.out] = _conv_affine(
                child(unit, step.pair[0]), folds[step.pair], values[step.x], values[step.residual], step
            )
        elif isinstance(step, Activation):
            values[step.out] = _affine_add_relu(values[step.z], values[step.affine], None, None)
        elif isinstance(step, Pool):
            values[step.out] = _affine_relu_max_pool(values[step.z], values[step.affine])
        elif isinstance(step, Mean):
            values[step.out] = _mean(values[step.z], values[step.affine], step)
        elif isinstance(step, Excite):
            values[step.out] = _excite(child(unit, step.layer), folds.get((step.layer, "")), values[step.x], step)
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
    return replaced(program.output, lambda ref: in_nchw(values[ref.index]))


def works_in_channels_last(unit: nn.Module, plan: Plan, arguments: Sequence[Tensor]) -> bool:
    """Whether to turn what is given in NCHW to channels_last, and the results back: for the kernels that only it has.

    The caller must not notice: neither the results' layout changes, nor is there anything that writes to arguments.
    """
    if plan.in_channels_last < 2 or plan.writes:
        return False
    if not all(prefers_channels_last(argument) for argument in arguments):
        return False
    return _has_weights_in_nchw(unit, plan)


def _has_weights_in_nchw(unit: nn.Module, plan: Plan) -> bool:
    """Whether no weight is in channels_last: a convolution would return that whatever its input is in."""
    for name in plan.every_conv:
        weight = getattr(child(unit, name), "weight", None)  # a unit within may have other children by now
        if weight is not None and weight.dim() == 4 and weight.stride(3) != 1:
            return False
    inner = [child(unit, name) for name in plan.units]
    return all(
        _has_weights_in_nchw(each, made) for each in inner for made in getattr(each, "_fused_plans", {}).values()
    )


def in_nchw(value: Any) -> Any:
    """A tensor of images in NCHW; anything else as it is."""
    return laid_out(value, False) if isinstance(value, Tensor) and value.dim() == 4 else value


def _call(unit: nn.Module, step: Call, values: list[Any], turned: bool) -> Any:
    node = step.node
    module: Any = child(unit, node.target) if node.kind == "module" else None
    needs_nchw = turned and (step.sees_layout or _is_another(module, step))
    runs_plan = turned and not needs_nchw and not node.kwargs and _runs_plan(module)
    if turned and not runs_plan:
        needs_nchw = needs_nchw or _is_listened_to(module)

    def value(ref: Ref) -> Any:
        return in_nchw(values[ref.index]) if needs_nchw else values[ref.index]

    args, kwargs = replaced((node.args, node.kwargs), value)
    if runs_plan:
        return module.fused_forward(args, turned=True)
    if node.kind == "module":
        return module(*args, **kwargs)
    if node.kind == "function":
        return node.target(*args, **kwargs)
    if node.kind == "method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    owner, _, name = node.target.rpartition(".")
    return getattr(child(unit, owner) if owner else unit, name)


def _is_another(module: Any, step: Call) -> bool:
    """Whether a module has taken the place of the one that a step was recorded with."""
    return step.kind is not None and original_class(module) is not step.kind


def _runs_plan(module: Any) -> bool:
    """Whether to call a module is to call the forward that `fuse_` has given it."""
    if module is None or not hasattr(module, "_fused_plans") or why_not_quiet("", module):
        return False
    return module._compiled_call_impl is None


def _is_listened_to(module: nn.Module | None) -> bool:
    """Whether there is a hook on a module or in it."""
    if module is None:
        return False
    return why_not_quiet("", module) is not None or any(map(_is_listened_to, module._modules.values()))


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
    if residual is None:
        return gated
    sum_ = gated + _normalised(residual, residual_affine)
    return torch.relu(sum_.to(gated.dtype) if step.in_place else sum_)


def _activated(z: Tensor, affine: Affine | None, relu: bool) -> Tensor:
    value = _normalised(z, affine)
    return torch.relu(value) if relu else value


def _excite(layer: Any, folded: Folded | None, x: Tensor, step: Excite) -> Tensor:
    if folded is None:
        return excite(x, layer.weight, layer.bias, step.activation)
    y = conv_affine(x, *folded, None, step.activation == "relu")
    return torch.sigmoid(y) if step.activation == "sigmoid" else y


def _or_blank(x: Tensor) -> Tensor:
    """``x``, or one blank image for a batch of none: other processes may wait for this one's part in the statistics.

    It counts for nothing there, and the result is cut off again.
    """
    return x if x.shape[0] else x.new_zeros(1, *x.shape[1:]) + x.sum()


# --- inference ---


def _conv_affine(conv: nn.Conv2d, folded: Folded, x: Tensor, residual: Tensor | None, step: ConvAffine) -> Tensor:
    if residual is not None:
        height, width = ((size - 1) // stride + 1 for size, stride in zip(x.shape[2:], conv.stride, strict=True))
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if not _is_like(residual, (x.shape[0], conv.out_channels, height, width), dtype, step.in_place):
            sum_ = conv_affine(x, *folded, None, False, conv.stride, conv.groups) + residual
            return torch.relu(sum_) if step.relu else sum_
    return conv_affine(x, *folded, residual, step.relu, conv.stride, conv.groups)
