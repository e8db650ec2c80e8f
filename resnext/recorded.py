"""Runs the head of a plan in training as one node of autograd's graph, where a plan and a call allow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resnext import batch_norm
from resnext.batch_norm import BatchNorm
from resnext.kernels import AddRelu, BlockStep, ConvNorm, MaxPool, run_block
from resnext.layers import child, held
from resnext.plan import NONE, Activation, BlockEnd, ConvStats, Plan, Pool


def run(unit: nn.Module, plan: Plan, values: Sequence[Any], keeps_result: bool) -> Tensor | None:
    """Run the head of ``plan.train`` with statistics of the batch, and update running ones.

    Args:
        unit: A module with the plan, for which `resnext.fusion.why_not` has nothing to say.
        plan: The plan.
        values: What the module is called with, in its slots, and None elsewhere.
        keeps_result: As of `resnext.kernels.affine_add_relu`.

    Returns:
        The result of the last of those steps; None, with nothing having happened, if there are none, or the call wants
        more than they do: then they are to be run one by one.
    """
    if not plan.head or not torch.is_grad_enabled():
        return None
    steps = [step for step, _ in plan.train.steps[: plan.head]]
    arguments = _of_one_dtype(values, steps)
    if arguments is None:
        return None
    assembled = _Assembled(arguments)
    for step in steps:
        if not assembled.add(unit, step, keeps_result):
            return None
    return run_block(assembled.steps, assembled.values, steps[-1].out, assembled.update)


def _of_one_dtype(values: Sequence[Any], steps: Sequence[Any]) -> Sequence[Any] | None:
    """The values in the dtype that all activations will have; None if there is none, or if there are no images."""
    x = values[0]
    dtype, device_type = x.dtype, x.device.type
    if x.shape[0] == 0:
        return None
    if torch.is_autocast_enabled(device_type):
        if dtype == torch.float64:  # which autocast leaves alone
            return None
        dtype = torch.get_autocast_dtype(device_type)
    if all(value is None or value.dtype == dtype for value in values):
        return values
    if any(isinstance(step, BlockEnd) for step in steps) or any(value is not None for value in values[1:]):
        return None  # sums of two dtypes have the wider one
    return [None if value is None else value.to(dtype) for value in values]


class _Assembled:
    """Steps for `run_block`, and the values that they start from."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.steps: list[BlockStep] = []
        self.values = [*values]
        self._shapes: list[Any] = [None if value is None else value.shape for value in values]
        self._norms: list[tuple[BatchNorm, ConvNorm]] = []

    def add(self, unit: nn.Module, step: Any, keeps_result: bool) -> bool:
        """Take a step of a plan; False if that is not for `run_block`."""
        shapes = self._shapes
        if isinstance(step, ConvStats):
            return self._add_conv(unit, step, step.out, step.affine)
        if isinstance(step, Pool):
            self.steps.append(MaxPool(step.z, step.affine, step.out))
            return True
        if isinstance(step, Activation):
            self.steps.append(AddRelu(step.z, step.affine, None, None, True, step.out))
            shapes[step.out] = shapes[step.z]
            return True
        z, norm = self._place(None), self._place(None)
        if not self._add_conv(unit, step, z, norm) or shapes[step.residual] != shapes[z]:
            return False
        self.steps.append(AddRelu(z, norm, step.residual, _or_none(step.residual_affine), keeps_result, step.out))
        shapes[step.out] = shapes[z]
        return True

    def _add_conv(self, unit: nn.Module, step: ConvStats | BlockEnd, z: int, norm: int) -> bool:
        conv, bn = child(unit, step.conv), child(unit, step.norm)
        if type(conv.stride) is not tuple or len(conv.stride) != 2:
            return False
        parameters = held(conv, "weight"), held(bn, "weight"), held(bn, "bias")
        if held(conv, "bias") is not None or not all(each is None or each.requires_grad for each in parameters):
            return False
        if not batch_norm.uses_batch_statistics(bn) or batch_norm.is_shared(bn):
            return False
        images, _, height, width = self._shapes[step.x]
        size = tuple(-(-each // stride) for each, stride in zip((height, width), conv.stride, strict=True))
        if images * size[0] * size[1] == 1:
            return False
        self._shapes[z] = (images, conv.out_channels, *size)
        weight, gamma, beta = (None if each is None else self._place(each) for each in parameters)
        prologue, geometry = _or_none(step.prologue), (conv.stride, conv.groups)
        running = batch_norm.running(bn, self.values[0].device)
        made = ConvNorm(step.x, prologue, weight, gamma, beta, bn.eps, running, *geometry, z, norm)  # type: ignore[arg-type]
        self.steps.append(made)
        self._norms.append((bn, made))
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
