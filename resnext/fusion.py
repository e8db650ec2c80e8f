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
from resnext.batch_norm import BatchNorm, Statistics
from resnext.kernels import affine_add_relu, affine_relu_max_pool, conv_affine, conv_stats, why_not_conv_stats
from resnext.layers import GroupedConv2d

Affine = tuple[Tensor, Tensor, Tensor]

_HOOKS = {
    "forward_pre_hooks": "forward pre-hook",
    "forward_hooks": "forward hook",
    "backward_pre_hooks": "backward pre-hook",
    "backward_hooks": "backward hook",
}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Kernel size, stride, padding and dilation of what the blocks are made of, so that most calls need no closer look.
_USUAL_GEOMETRY = frozenset(
    ((kernel, kernel), stride, (padding, padding), (1, 1))
    for kernel, padding in ((1, 0), (3, 1))
    for stride in ((1, 1), (2, 2))
)


class ConvNorm(NamedTuple):
    """A convolution and the batch norm behind it, with their names in the block.

    What the types promise holds where `why_not_conv_norm` has nothing to say.
    """

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


def why_not_module(name: str, module: nn.Module, *types: type[nn.Module]) -> str | None:
    """Why ``module`` is not simply one of ``types`` that nobody listens to, or None."""
    if type(module) not in types:
        return f"{name} is {type(module).__name__}, not {types[0].__name__}"
    # One expression, as it stands in torch.nn.Module's own call: this is asked for every child in every call.
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        kinds = [words for kind, words in _HOOKS.items() if getattr(module, f"_{kind}")]
        return f"{name} has a {kinds[0]}"
    if "forward" in module.__dict__:
        return f"{name} has a forward of its own"
    return None


def why_not_batch_norm(name: str, bn: BatchNorm) -> str | None:
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


def why_not_max_pool(name: str, pool: nn.MaxPool2d) -> str | None:
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
    weight = conv.weight
    if (weight.shape[2:], conv.stride, conv.padding, conv.dilation) not in _USUAL_GEOMETRY:
        reason = why_not_conv_stats(weight.shape, conv.stride, conv.padding, conv.dilation, conv.groups)
        if reason is not None:
            return f"{name}: {reason}"
    if bn.num_features != conv.out_channels:
        return f"{bn_name} is for {bn.num_features} channels, and {name} has {conv.out_channels}"
    if conv.bias is not None and batch_norm.uses_batch_statistics(bn):
        return f"{name} has a bias"
    if x is None:
        return None
    if x.shape[0] == 0 and batch_norm.uses_batch_statistics(bn) and not batch_norm.is_shared(bn):
        return "the input has no images"
    if weight.device != x.device:
        return f"the input is on {x.device}, and {name} on {weight.device}"
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"the input is {x.dtype}, and {name} {weight.dtype}"
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
    images = x.shape[0]
    x = _or_blank(x)
    z, affine = x, None
    for pair in branch[:-1]:
        z, affine, statistics = _conv_norm(z, affine, pair, images)
        batch_norm.update_running_statistics(pair.bn, statistics)
    residual, residual_affine = x, None
    if shortcut is not None:
        residual, residual_affine, statistics = _conv_norm(x, None, shortcut, images)
        batch_norm.update_running_statistics(shortcut.bn, statistics)

    def end(
        z: Tensor, affine: Affine | None, residual: Tensor, residual_affine: Affine | None
    ) -> tuple[Tensor, Statistics | None]:
        z, affine, statistics = _conv_norm(z, affine, branch[-1], images)
        return affine_add_relu(z, affine, residual, residual_affine), statistics

    arguments = (z, affine, residual, residual_affine)
    if recompute and torch.is_grad_enabled():
        out, statistics = checkpoint(end, *arguments, use_reentrant=False, preserve_rng_state=False)
    else:
        out, statistics = end(*arguments)
    # Not in `end`, which may run twice.
    batch_norm.update_running_statistics(branch[-1].bn, statistics)
    return out[:images] if images == 0 else out


def stem(x: Tensor, pair: ConvNorm) -> Tensor:
    """Convolution, batch norm, ReLU and 3x3 max pooling with stride 2; differentiable, saves only the raw output."""
    images = x.shape[0]
    z, affine, statistics = _conv_norm(_or_blank(x), None, pair, images)
    batch_norm.update_running_statistics(pair.bn, statistics)
    out = affine_relu_max_pool(z, affine)
    return out[:images] if images == 0 else out


def _or_blank(x: Tensor) -> Tensor:
    """``x``, or one blank image for a batch of none: other processes may wait for this one's part in the statistics.

    It counts for nothing there, and the result is cut off again.
    """
    return x if x.shape[0] else x.new_zeros(1, *x.shape[1:]) + x.sum()


def _conv_norm(
    x: Tensor, affine: Affine | None, pair: ConvNorm, images: int
) -> tuple[Tensor, Affine, Statistics | None]:
    """The raw output, and its batch norm as an affine; with the statistics if they are the batch's."""
    conv, bn = pair.conv, pair.bn
    of_batch = batch_norm.uses_batch_statistics(bn)
    z, mean, var = conv_stats(x, conv.weight, affine, conv.stride, conv.groups, stats=of_batch)
    statistics = None
    if mean is not None and var is not None:
        statistics = batch_norm.batch_statistics(bn, mean, var, (images, *z.shape[1:]))
    center, scale, shift = batch_norm.affine(bn, statistics, z.dtype)
    if conv.bias is not None:  # only before running statistics
        shift = shift + scale * conv.bias
    return z, (center, scale, shift), statistics


# --- inference ---


class Folded(NamedTuple):
    """A convolution with batch norm folded in: scale * conv(x, weight) + shift, or without scale if that is None."""

    weight: Tensor
    scale: Tensor | None
    shift: Tensor


class _Kept(NamedTuple):
    """What `_folded` keeps of a module."""

    state: list[float]
    folded: list[Folded]
    aliases: list[Tensor]


# Beside the modules and not in them: state_dict, pickle and copies know nothing of it.
_KEPT: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def infers(x: Tensor, branch: Sequence[ConvNorm], shortcut: ConvNorm | None) -> bool:
    """Whether `infer` will do: images, no batch statistics, and nothing for a backward pass."""
    pairs = [*branch, shortcut] if shortcut is not None else branch
    if x.shape[0] == 0 or any(batch_norm.uses_batch_statistics(pair.bn) for pair in pairs):
        return False
    if not torch.is_grad_enabled():
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
    state = [pair.bn.eps for pair in pairs]
    for tensor in tensors:
        state += (tensor.data_ptr(), tensor._version)
    if x.is_cuda:  # another stream could come before the vectors are there
        state.append(torch.cuda.current_stream(x.device).cuda_stream)
    kept = _KEPT.get(block)
    if kept is None or kept.state != state:
        # Tensors made in inference mode could not be used outside it.
        with torch.inference_mode(False), torch.no_grad():
            folded = [_fold(pair, x.dtype, into_weight=True) for pair in pairs]
            # The aliases hold the memory, so that no other tensor gets the same address.
            kept = _KEPT[block] = _Kept(state, folded, [tensor.detach() for tensor in tensors])
    return kept.folded


def _fold(pair: ConvNorm, dtype: torch.dtype, into_weight: bool = False) -> Folded:
    """Fold; ``into_weight``: the scale too, where a library's convolution adds a shift but does not scale.

    In float32 that rounds no more coarsely than the sums do.
    """
    weight, bias = pair.conv.weight, pair.conv.bias
    mean, scale, shift = batch_norm.affine(pair.bn, None, dtype)
    shift = shift - scale * (mean if bias is None else mean - bias)
    dense = pair.conv.groups == 1
    if into_weight and dense and weight.device.type == "cpu" and weight.dtype == torch.float32:
        return Folded(weight * scale[:, None, None, None], None, shift)
    return Folded(weight, scale, shift)


def _tensors(pairs: Sequence[ConvNorm]) -> list[Tensor]:
    return [
        tensor
        for _, conv, _, bn in pairs
        for tensor in (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
        if tensor is not None
    ]
