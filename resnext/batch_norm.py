"""What a batch norm's statistics are, and what becomes of them, around kernels that only know vectors.

The norms (`torch.nn.BatchNorm2d`, `torch.nn.SyncBatchNorm`, and those of torchvision and timm that compute the same)
stay plain children of the blocks, holding parameters and buffers.
The fused operators compute with a batch norm's *affine*, scale * (v - center) + shift; which statistics it is made
from, and how the running ones follow, is decided here as the modules' own ``forward`` decides it.

Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
Shift" (arXiv:1502.03167); statistics over several processes merge as in Chan, Golub and LeVeque, "Updating Formulae and
a Pairwise Algorithm for Computing Sample Variances" (1979), equation 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnext.kernels import Running, bn_affine
from resnext.layers import held

BatchNorm = Any
"""A module for which `is_known` is true."""

_PLAIN = (nn.BatchNorm2d, nn.SyncBatchNorm)
# By name, so that their libraries need not be there. With statistics and parameters that are constants:
_FROZEN = ("torchvision.ops.misc.FrozenBatchNorm2d", "timm.layers.norm_act.FrozenBatchNormAct2d")
# With an activation behind the norm, in one module:
_WITH_ACTIVATION = (
    "timm.layers.norm_act.BatchNormAct2d",
    "timm.layers.norm_act.SyncBatchNormAct",
    "timm.layers.norm_act.FrozenBatchNormAct2d",
)


def _is_one_of(module: nn.Module, names: tuple[str, ...]) -> bool:
    cls = type(module)
    return cls not in _PLAIN and f"{cls.__module__}.{cls.__qualname__}" in names


def is_known(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm over (N, C, H, W), followed by a ReLU (`has_relu`) or by nothing."""
    if type(module) in _PLAIN:
        return True
    if _is_one_of(module, _WITH_ACTIVATION):
        return type(module.drop) is nn.Identity and type(module.act) in (nn.Identity, nn.ReLU)
    return _is_one_of(module, _FROZEN)


def has_relu(bn: BatchNorm) -> bool:
    """Whether the module of a known batch norm applies ReLU too."""
    return _is_one_of(bn, _WITH_ACTIVATION) and type(bn.act) is nn.ReLU


class Statistics(NamedTuple):
    """Mean and biased variance of each channel, (C,), and of how many values they are.

    ``number`` is a tensor of no dimensions where the ranks of a process group share their statistics.
    """

    mean: Tensor
    var: Tensor
    number: int | Tensor


def uses_batch_statistics(bn: BatchNorm) -> bool:
    """Whether ``bn`` normalises with the batch's statistics (in training, or without running ones) or the running."""
    if bn.training and not _is_one_of(bn, _FROZEN):
        return True
    return held(bn, "running_mean") is None and held(bn, "running_var") is None


def is_shared(bn: BatchNorm) -> bool:
    """Whether ``bn`` shares its statistics with other processes, all of which then compute them together."""
    return _process_group(bn) is not None


def batch_statistics(bn: BatchNorm, mean: Tensor, var: Tensor, shape: Sequence[int]) -> Statistics:
    """The statistics that ``bn`` normalises a batch with, from those of this process.

    Args:
        bn: The module. A ``torch.nn.SyncBatchNorm`` in training shares its statistics with the other ranks of its
            process group, all of which must call this; differentiable, with one ``all_reduce`` each way.
        mean: Mean of each channel, (C,).
        var: Biased variance of each channel, (C,).
        shape: (N, C, H, W) of what they are the statistics of.

    Raises:
        ValueError: There is one value per channel, as ``torch.nn.BatchNorm2d`` raises.
    """
    number = shape[0] * shape[2] * shape[3]
    if (group := _process_group(bn)) is not None:
        return Statistics(*_MergeRanks.apply(mean, var, number, group))
    if number == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")
    return Statistics(mean, var, number)


def affine(bn: BatchNorm, statistics: Statistics | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The center, scale and shift that ``bn`` is with these statistics; None: its running ones, which are constants.

    Differentiable in the statistics and in ``bn``'s parameters. The vectors are float32, or float64 for activations
    of that ``dtype``.
    """
    if statistics is None:
        vectors = torch.float64 if dtype == torch.float64 else torch.float32
        mean, var = bn.running_mean.to(vectors), bn.running_var.to(vectors)
    else:
        mean, var, _ = statistics
    return bn_affine(mean, var, held(bn, "weight"), held(bn, "bias"), bn.eps)  # type: ignore[return-value]  # this center is not None


def running(bn: BatchNorm, device: torch.device) -> Running | None:
    """What a step of training on ``device`` does to the buffers of ``bn``, if it is nothing unusual; else None."""
    if not (bn.training and bn.track_running_stats) or type(bn.momentum) is not float:
        return None
    mean, var, batches = (held(bn, name) for name in ("running_mean", "running_var", "num_batches_tracked"))
    if mean is None or var is None or batches is None or mean is var:
        return None
    vectors = mean.dtype == var.dtype == torch.float32 and mean.is_contiguous() and var.is_contiguous()
    if not vectors or batches.dtype != torch.int64 or not mean.device == var.device == batches.device == device:
        return None
    return Running(mean, var, batches, bn.momentum)


Update = tuple[BatchNorm, Statistics | None]
"""A batch norm, and the statistics of the batch that it was given; None where it used its running ones."""


def update_running_statistics(updates: Sequence[Update]) -> None:
    """Do what a training step does to the buffers of batch norms; nothing outside training or for running statistics.

    The running variance is the unbiased one. A ``momentum`` of None means the cumulative average of all steps, and
    its factor stays on the device.
    """
    due = [(bn, of) for bn, of in updates if of is not None and bn.training and bn.track_running_stats]
    if not due:
        return
    if torch.compiler.is_compiling():
        # Saved graphs cannot have regions without gradients, nor numbers that are quotients of sizes.
        for bn, (mean, var, number) in due:
            _update(bn, Statistics(mean.detach(), var.detach(), number))
        return
    with torch.no_grad():
        if not _update_together(due):
            for bn, statistics in due:
                _update(bn, statistics)


def _update_together(updates: Sequence[tuple[BatchNorm, Statistics]]) -> bool:
    """Update all buffers by four operators instead of five for each batch norm; False where something is unusual."""
    counters: list[Tensor] = []
    buffers: list[Tensor] = []
    kept: list[float] = []
    values: list[Tensor] = []
    factors: list[float] = []
    for bn, (mean, var, number) in updates:
        if type(bn.momentum) is not float or type(number) is not int:
            return False
        counters.append(held(bn, "num_batches_tracked"))
        buffers += (held(bn, "running_mean"), held(bn, "running_var"))
        kept += (1 - bn.momentum, 1 - bn.momentum)
        values += (mean, var)
        factors += (bn.momentum, bn.momentum * (number / (number - 1)))
    held_by_one = {id(each) for each in (*counters, *buffers) if each is not None}
    if len(held_by_one) < 3 * len(updates):
        return False
    if any(buffer.dtype != value.dtype for buffer, value in zip(buffers, values, strict=True)):
        return False
    torch._foreach_add_(counters, 1)
    torch._foreach_mul_(buffers, kept)
    torch._foreach_add_(buffers, torch._foreach_mul(values, factors))  # type: ignore[arg-type]
    return True


def _update(bn: BatchNorm, statistics: Statistics) -> None:
    mean, var, number = statistics
    factor: float | Tensor = 0.0 if bn.momentum is None else bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            factor = 1.0 / bn.num_batches_tracked.to(mean.dtype)
    if bn.running_mean is None or bn.running_var is None:
        return
    for buffer, value in ((bn.running_mean, mean), (bn.running_var, var * number / (number - 1))):
        running = buffer.to(mean.dtype)
        running.mul_(1 - factor)
        running.add_(value * factor)
        if running is not buffer:
            buffer.copy_(running)


def _process_group(bn: BatchNorm) -> Any:
    """The group whose ranks share ``bn``'s statistics, or None: one process has the whole batch."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training or not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


class _MergeRanks(torch.autograd.Function):
    """Mean, biased variance and number of values of the union of all ranks' batches, which may differ in size."""

    @staticmethod
    def forward(ctx, mean: Tensor, var: Tensor, number: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
        # Every rank fills its own row of zeros, so one sum is a gather, which every backend has.
        channels = mean.numel()
        rows = mean.new_zeros(dist.get_world_size(group), 2 * channels + 1)
        rows[dist.get_rank(group)] = torch.cat((mean, var, mean.new_full((1,), number)))
        dist.all_reduce(rows, group=group)
        means, variances, numbers = rows.split((channels, channels, 1), dim=1)
        total = numbers.sum()
        shares = numbers / total
        # Relative to the first rank's mean: equal means merge without rounding, large ones lose no digits.
        merged_mean = means[0] + (shares * (means - means[0])).sum(0)
        merged_var = (shares * (variances + (means - merged_mean).square())).sum(0)
        ctx.group = group
        ctx.save_for_backward(mean - merged_mean, number / total)
        ctx.mark_non_differentiable(total)
        return merged_mean, merged_var, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dmean: Tensor, dvar: Tensor, _) -> tuple[Tensor, Tensor, None, None]:
        offset, share = ctx.saved_tensors
        # Every rank's loss depends on every rank's batch.
        gradients = torch.stack((dmean, dvar))
        dist.all_reduce(gradients, group=ctx.group)
        dmean, dvar = gradients
        return share * (dmean + 2 * dvar * offset), share * dvar, None, None
