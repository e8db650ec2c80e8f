"""Runs a segment of a plan in training as one node of autograd's graph, where the call allows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resnext import batch_norm, kernels
from resnext.batch_norm import BatchNorm
from resnext.kernels import AddRelu, BlockStep, Conv, ConvNorm, MaxPool, run_block
from resnext.layers import child, held
from resnext.steps import NONE, Activation, BlockEnd, ConvStats, Excite, Gate, Mean, Pool, Segment


def run(unit: nn.Module, segment: Segment, values: Sequence[Any], keeps_result: bool) -> Tensor | None:
    """Run a segment with statistics of the batch, and update running ones.

    Args:
        unit: A module with a plan, for which `resnext.reasons.why_not` has nothing to say.
        segment: Of that plan.
        values: Of the plan's slots; those that the segment reads are there.
        keeps_result: As of `resnext.kernels.affine_add_relu`, for sums.

    Returns:
        The result of its last step; None, with nothing having happened, if the call wants more than that: then its
        steps are to be run one by one.
    """
    if not torch.is_grad_enabled():
        return None
    given = _of_one_dtype([values[slot] for slot in segment.reads], segment)
    if given is None:
        return None
    assembled = _Assembled(len(values), segment.reads, given)
    for step in segment.steps:
        if not assembled.add(unit, step, keeps_result):
            return None
    return run_block(assembled.steps, assembled.values, segment.steps[-1].out, assembled.update)


def _of_one_dtype(given: Sequence[Any], segment: Segment) -> Sequence[Tensor] | None:
    """What a segment is given, in the dtype of all its activations; None if there is none, or there are no images."""
    if not all(isinstance(each, Tensor) and each.dim() == 4 for each in given):
        return None
    x = given[0]
    dtype, device_type = x.dtype, x.device.type
    if x.shape[0] == 0:
        return None
    if torch.is_autocast_enabled(device_type):
        if dtype == torch.float64:  # which autocast leaves alone
            return None
        dtype = torch.get_autocast_dtype(device_type)
    if all(each.dtype == dtype for each in given):
        return given
    if len(given) > 1 or any(getattr(step, "residual", NONE) != NONE for step in segment.steps):
        return None  # sums of two dtypes have the wider one
    return [x.to(dtype)]


class _Assembled:
    """Steps for `run_block`, and the values that they start from."""

    def __init__(self, slots: int, reads: Sequence[int], given: Sequence[Tensor]) -> None:
        self.steps: list[BlockStep] = []
        self.values: list[Any] = [None] * slots
        self._shapes: list[Any] = [None] * slots
        for slot, value in zip(reads, given, strict=True):
            self.values[slot], self._shapes[slot] = value, value.shape
        self._like = given[0]
        self._casts = torch.is_autocast_enabled(self._like.device.type)
        self._norms: list[tuple[BatchNorm, ConvNorm]] = []

    def add(self, unit: nn.Module, step: Any, keeps_result: bool) -> bool:
        """Take a step of a plan; False if that is not for `run_block`."""
        shapes = self._shapes
        if isinstance(step, ConvStats):
            return self._add_conv(unit, step, step.out, step.affine if step.norm else None)
        if isinstance(step, Pool):
            self.steps.append(MaxPool(step.z, step.affine, step.out))
            images, channels, height, width = shapes[step.z]
            shapes[step.out] = (images, channels, (height + 1) // 2, (width + 1) // 2)
            return True
        if isinstance(step, Activation):
            self.steps.append(AddRelu(step.z, step.affine, None, None, True, step.out))
            shapes[step.out] = shapes[step.z]
            return True
        if isinstance(step, Mean):
            if not step.keeps_dims:
                return False
            self.steps.append(kernels.Mean(step.z, step.affine, step.relu, step.out))
            shapes[step.out] = (*shapes[step.z][:2], 1, 1)
            return True
        if isinstance(step, Excite):
            return self._add_excite(unit, step)
        if isinstance(step, Gate):
            residual, residual_affine = _or_none(step.residual), _or_none(step.residual_affine)
            if shapes[step.gate] != (*shapes[step.z][:2], 1, 1):
                return False
            if residual is not None and shapes[residual] != shapes[step.z]:
                return False
            operands = step.z, step.affine, step.relu, step.gate, residual, residual_affine
            self.steps.append(kernels.Gate(*operands, step.out))
            shapes[step.out] = shapes[step.z]
            return True
        z, norm = self._place(None), self._place(None)
        if not self._add_conv(unit, step, z, norm) or shapes[step.residual] != shapes[z]:
            return False
        self.steps.append(AddRelu(z, norm, step.residual, _or_none(step.residual_affine), keeps_result, step.out))
        shapes[step.out] = shapes[z]
        return True

    def _add_conv(self, unit: nn.Module, step: ConvStats | BlockEnd, z: int, norm: int | None) -> bool:
        conv = child(unit, step.conv)
        weight, stride = held(conv, "weight"), conv.stride
        if held(conv, "bias") is not None or type(stride) is not tuple or len(stride) != 2:
            return False
        if not weight.requires_grad or weight.device != self._like.device:
            return False
        if not self._casts and weight.dtype != self._like.dtype:
            return False
        images, _, height, width = self._shapes[step.x]
        size = (height - 1) // stride[0] + 1, (width - 1) // stride[1] + 1
        self._shapes[z] = (images, conv.out_channels, *size)
        prologue, geometry = _or_none(step.prologue), (stride, conv.groups)
        if norm is None:
            self.steps.append(Conv(step.x, prologue, self._place(weight), *geometry, z))
            return True
        bn = child(unit, step.norm)
        parameters = held(bn, "weight"), held(bn, "bias")
        if not all(each is None or each.requires_grad for each in parameters) or images * size[0] * size[1] == 1:
            return False
        if not batch_norm.uses_batch_statistics(bn) or batch_norm.is_shared(bn):
            return False
        gamma, beta = (None if each is None else self._place(each) for each in parameters)
        running = batch_norm.running(bn, self._like.device)
        made = ConvNorm(step.x, prologue, self._place(weight), gamma, beta, bn.eps, running, *geometry, z, norm)
        self.steps.append(made)
        self._norms.append((bn, made))
        return True

    def _add_excite(self, unit: nn.Module, step: Excite) -> bool:
        layer = child(unit, step.layer)
        weight, bias = held(layer, "weight"), held(layer, "bias")
        if not all(each is None or each.requires_grad for each in (weight, bias)):
            return False
        place = None if bias is None else self._place(bias)
        self.steps.append(kernels.Excite(step.x, self._place(weight), place, step.activation, step.out))
        self._shapes[step.out] = (self._shapes[step.x][0], weight.shape[0], 1, 1)
        return True

    def _place(self, value: Tensor | None) -> int:
        self.values.append(value)
        self._shapes.append(None)
        return len(self.values) - 1

    def update(self, values: Sequence[Any]) -> None:
        """Update those running statistics that the steps have not."""
        updates, written = [], list[Tensor]()
        for bn, step in self._norms:
            norm = values[step.norm]
            if step.running is not None and norm.updated:
                written += step.running[:3]
                continue
            updates.append((bn, batch_norm.batch_statistics(bn, norm.center, norm.var, values[step.z].shape)))
        if written:
            torch.autograd.graph.increment_version(written)
        if updates:
            batch_norm.update_running_statistics(updates)


def _or_none(slot: int) -> int | None:
    return None if slot == NONE else slot
