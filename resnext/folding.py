"""Inference: when batch norms can be folded into their convolutions, and what is kept of that between calls."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from resnext import batch_norm
from resnext.graph import Shell
from resnext.kernels import keep_packed
from resnext.layers import child, held
from resnext.reasons import why_not_shell
from resnext.steps import Plan


class Folded(NamedTuple):
    """A convolution with batch norm folded in: scale * conv(x, weight) + shift, or without scale if that is None."""

    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None


class _Kept(NamedTuple):
    """What `folded` keeps of a module."""

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


def infers(unit: nn.Module, plan: Plan, arguments: Sequence[Tensor]) -> bool:
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
    return module is not None and not module.training and why_not_shell(shell, module) is None


def forget(unit: nn.Module) -> None:
    """Drop what inference keeps of ``unit``; the next call makes it again."""
    _KEPT.pop(unit, None)


def folded(unit: nn.Module, pairs: Sequence[tuple[str, str]], x: Tensor) -> dict[tuple[str, str], Folded]:
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
        weight = weight if weight.dim() == 4 else weight[:, :, None, None]
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
