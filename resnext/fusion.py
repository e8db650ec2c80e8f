"""Residual branches as chains of fused operators, and the reasons why a module runs its children one by one instead.

In training every convolution writes its raw output once, and the next one applies batch norm and ReLU as it reads
(`resnext.kernels.conv_stats`). In inference batch norm is folded into two vectors that the convolution applies to its
own output (`resnext.kernels.conv_affine`). Neither calls the child modules; so each must be exactly what it seems, and
nobody may be listening to its calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils.checkpoint import checkpoint

from resnext import batch_norm
from resnext.batch_norm import Affine, BatchNorm, Statistics
from resnext.kernels import affine_add_relu, affine_relu_max_pool, conv_affine, conv_stats, why_not_conv_stats
from resnext.layers import GroupedConv2d

_HOOKS = {
    "forward_pre_hooks": "forward pre-hook",
    "forward_hooks": "forward hook",
    "backward_pre_hooks": "backward pre-hook",
    "backward_hooks": "backward hook",
}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class ConvNorm(NamedTuple):
    """A convolution and the batch norm behind it, with their names in the block."""

    conv_name: str
    conv: nn.Conv2d
    bn_name: str
    bn: BatchNorm


# --- reasons ---


def why_not_now(x: Tensor | fx.Proxy | None) -> str | None:
    """What in the caller, or in the input ``x`` if there is one, wants the children to be called; or None."""
    if isinstance(x, fx.Proxy):
        return "symbolic tracing records the children"
    if torch.jit.is_tracing():
        return "torch.jit tracing records the children"
    if torch._C._are_functorch_transforms_active():
        return "the call is inside a torch.func transform (vmap, grad, jvp, ...)"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on"
    for kind, words in _HOOKS.items():
        if getattr(nn_module, f"_global_{kind}"):
            return f"a {words} is registered for all modules"
    if x is None:
        return None
    if x.dim() != 4 or 0 in x.shape:
        return f"the input has shape {tuple(x.shape)}, not (N, C, H, W) with something in it"
    if x.dtype not in _DTYPES:
        return f"the input is {x.dtype}, not float32, float16, bfloat16 or float64"
    if x.layout is not torch.strided or x.device.type not in ("cpu", "cuda"):
        return f"the input is {x.layout} on {x.device}, not strided on a CPU or a CUDA GPU"
    return None


def why_not_module(name: str, module: nn.Module, *types: type[nn.Module]) -> str | None:
    """Why ``module`` is not simply one of ``types`` that nobody listens to, or None."""
    if type(module) not in types:
        return f"{name} is {type(module).__name__}, not {types[0].__name__}"
    for kind, words in _HOOKS.items():
        if getattr(module, f"_{kind}"):
            return f"{name} has a {words}"
    if "forward" in module.__dict__:
        return f"{name} has a forward of its own"
    return None


def why_not_batch_norm(name: str, bn: nn.Module) -> str | None:
    """Why the kernels do not compute what ``bn`` computes, or None."""
    if reason := why_not_module(name, bn, nn.BatchNorm2d, nn.SyncBatchNorm):
        return reason
    if bn.eps <= 0:
        return f"{name}.eps is {bn.eps}, not positive"
    if (bn.running_mean is None) != (bn.running_var is None):
        return f"{name} has only one of running_mean and running_var"
    if bn.weight is None and bn.bias is not None:
        return f"{name} has a bias without a weight"
    return None


def why_not_max_pool(name: str, pool: nn.Module) -> str | None:
    """Why ``pool`` is not the max pooling of ResNet's stem, or None."""
    if reason := why_not_module(name, pool, nn.MaxPool2d):
        return reason
    sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    if sizes not in ((3, 2, 1, 1), ((3, 3), (2, 2), (1, 1), (1, 1))) or pool.ceil_mode or pool.return_indices:
        return f"{name} is {pool}, not a 3x3 pooling with stride 2 and padding 1"
    return None


def why_not_conv_norm(pair: ConvNorm, x: Tensor | None) -> str | None:
    """Why the kernels do not compute what a convolution and its batch norm compute, or None."""
    name, conv, bn_name, bn = pair
    if reason := why_not_module(name, conv, nn.Conv2d, GroupedConv2d) or why_not_batch_norm(bn_name, bn):
        return reason
    if conv.padding_mode != "zeros":
        return f"{name}.padding_mode is {conv.padding_mode}, not zeros"
    if reason := why_not_conv_stats(conv.weight.shape, conv.stride, conv.padding, conv.dilation, conv.groups):
        return f"{name}: {reason}"
    if bn.num_features != conv.out_channels:
        return f"{bn_name} is for {bn.num_features} channels, and {name} has {conv.out_channels}"
    if conv.bias is not None and batch_norm.uses_batch_statistics(bn):
        return f"{name} has a bias"
    if x is None:
        return None
    if conv.weight.device != x.device:
        return f"the input is on {x.device}, and {name} on {conv.weight.device}"
    if conv.weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"the input is {x.dtype}, and {name} {conv.weight.dtype}"
    return None


# --- training, and evaluation with gradients ---


def train(x: Tensor, branch: Sequence[ConvNorm], shortcut: ConvNorm | None, recompute: bool) -> Tensor:
    """Run a residual block, differentiably; each batch norm in whichever mode its module is.

    Saves for backward: ``x``, the raw output of each convolution, the result and vectors.

    Args:
        x: (N, C, H, W).
        branch: The convolutions of the residual branch; ReLU stands between them.
        shortcut: The convolution of the shortcut; None: the input itself.
        recompute: Whether backward computes the last convolution's output again instead of keeping it.
    """
    z, affine = x, None
    for pair in branch[:-1]:
        z, affine, statistics = _conv_norm(z, affine, pair)
        batch_norm.update_running_statistics(pair.bn, statistics)
    residual, residual_affine = x, None
    if shortcut is not None:
        residual, residual_affine, statistics = _conv_norm(x, None, shortcut)
        batch_norm.update_running_statistics(shortcut.bn, statistics)

    def end(
        z: Tensor, affine: Affine | None, residual: Tensor, residual_affine: Affine | None
    ) -> tuple[Tensor, Statistics | None]:
        z, affine, statistics = _conv_norm(z, affine, branch[-1])
        return affine_add_relu(z, affine, residual, residual_affine), statistics

    arguments = (z, affine, residual, residual_affine)
    if recompute and torch.is_grad_enabled():
        out, statistics = checkpoint(end, *arguments, use_reentrant=False, preserve_rng_state=False)
    else:
        out, statistics = end(*arguments)
    # Not in `end`, which may run twice.
    batch_norm.update_running_statistics(branch[-1].bn, statistics)
    return out


def _conv_norm(x: Tensor, affine: Affine | None, pair: ConvNorm) -> tuple[Tensor, Affine, Statistics | None]:
    """The raw output, and its batch norm as an affine; with the statistics if they are the batch's."""
    conv, bn = pair.conv, pair.bn
    of_batch = batch_norm.uses_batch_statistics(bn)
    z, mean, var = conv_stats(x, conv.weight, affine, conv.stride, conv.groups, stats=of_batch)
    statistics = batch_norm.batch_statistics(bn, mean, var, z.shape) if of_batch else None
    center, scale, shift = batch_norm.affine(bn, statistics, z.dtype)
    if conv.bias is not None:  # only before running statistics
        shift = shift + scale * conv.bias
    return z, (center, scale, shift), statistics


def stem(x: Tensor, pair: ConvNorm) -> Tensor:
    """Convolution, batch norm, ReLU and 3x3 max pooling with stride 2; differentiable, saves only the raw output."""
    z, affine, statistics = _conv_norm(x, None, pair)
    batch_norm.update_running_statistics(pair.bn, statistics)
    return affine_relu_max_pool(z, affine)


# --- inference ---


class Folded(NamedTuple):
    """A convolution with batch norm folded in: scale * conv(x, weight) + shift, or without scale if that is None."""

    weight: Tensor
    scale: Tensor | None
    shift: Tensor


class _Kept(NamedTuple):
    """What `_folded` keeps of a module."""

    state: list[tuple[int, int]]
    folded: list[Folded]
    aliases: list[Tensor]


# Beside the modules and not in them: state_dict, pickle and copies know nothing of it.
_KEPT: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def infers(x: Tensor, branch: Sequence[ConvNorm], shortcut: ConvNorm | None) -> bool:
    """Whether `infer` will do: no batch statistics, and nothing for a backward pass.

    An exported program is for inference; should it be trained after all, gradients are right, only slower.
    """
    pairs = [*branch, shortcut] if shortcut is not None else branch
    if any(batch_norm.uses_batch_statistics(pair.bn) for pair in pairs):
        return False
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return True
    return not x.requires_grad and not any(tensor.requires_grad for tensor in _tensors(pairs))


def infer(block: nn.Module, x: Tensor, branch: Sequence[ConvNorm], shortcut: ConvNorm | None) -> Tensor:
    """Run a residual block with batch norms folded into the convolutions; arguments as for `train`."""
    pairs = [*branch, shortcut] if shortcut is not None else branch
    folded = _folded(block, pairs, x)
    residual = x
    if shortcut is not None:
        residual = conv_affine(x, *folded[-1], None, False, shortcut.conv.stride, shortcut.conv.groups)
    last = len(branch) - 1
    for index, (pair, vectors) in enumerate(zip(branch, folded, strict=False)):
        x = conv_affine(x, *vectors, residual if index == last else None, True, pair.conv.stride, pair.conv.groups)
    return x


def forget(block: nn.Module) -> None:
    """Drop what `infer` keeps of ``block``; the next call makes it again."""
    _KEPT.pop(block, None)


def _folded(block: nn.Module, pairs: Sequence[ConvNorm], x: Tensor) -> list[Folded]:
    """The folded vectors, kept until a parameter or buffer changes.

    What writes through ``Tensor.data`` leaves no trace; `forget` is for that.
    """
    tensors = _tensors(pairs)
    # A compiler computes the vectors in its graph. So must a CUDA graph, to follow the parameters when replayed.
    passing = (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or any(tensor.is_inference() for tensor in tensors)
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )
    if passing:
        return [_fold(pair, x.dtype) for pair in pairs]
    state = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
    kept = _KEPT.get(block)
    if kept is None or kept.state != state:
        # Tensors made in inference mode could not be used outside it.
        with torch.inference_mode(False), torch.no_grad():
            folded = [_scaled(_fold(pair, x.dtype)) for pair in pairs]
            # The aliases hold the memory, so that no other tensor gets the same address.
            kept = _KEPT[block] = _Kept(state, folded, [tensor.detach() for tensor in tensors])
    return kept.folded


def _fold(pair: ConvNorm, dtype: torch.dtype) -> Folded:
    center, scale, shift = batch_norm.affine(pair.bn, None, dtype)
    mean = center if pair.conv.bias is None else center - pair.conv.bias
    return Folded(pair.conv.weight, scale, shift - scale * mean)


def _scaled(folded: Folded) -> Folded:
    """Move the scale into the weight where that rounds as finely, and a library's convolution adds only a shift."""
    weight, scale, shift = folded
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.shape[2:] != (1, 1):
        return folded
    return Folded(weight * scale[:, None, None, None], None, shift)


def _tensors(pairs: Sequence[ConvNorm]) -> list[Tensor]:
    return [
        tensor
        for _, conv, _, bn in pairs
        for tensor in (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
        if tensor is not None
    ]
