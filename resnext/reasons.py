"""Whether a plan still holds: `why_not`.

A plan does not call the modules that it stands for. So each must still be what it was when the plan was made, and
nobody may be listening to its calls; otherwise the module's own forward runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from resnext import batch_norm
from resnext.batch_norm import BatchNorm
from resnext.graph import Shell, Watched, changed_attribute
from resnext.kernels import why_not_conv_stats
from resnext.layers import child, held, is_plain_conv, original_class
from resnext.roles import excites, flattens_images, is_stem_pool, pools_to_one
from resnext.steps import Plan

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
        if reason := why_not_shell(shell, child(unit, shell.name) if shell.name else unit):
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
    for conv in plan.convs:
        if reason := _why_not_conv(conv, child(unit, conv), x):
            return reason
    for name in plan.excites:
        if reason := _why_not_excite(name, child(unit, name), x):
            return reason
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
    if isinstance(module, nn.Flatten) and not flattens_images(module):
        return f"{name} is {module}, not from the channels to the end"
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
    return None if x is None else _why_not_weight(name, weight, x)


def _why_not_weight(name: str, weight: Tensor, x: Tensor) -> str | None:
    if weight.device != x.device:
        return f"the input is on {x.device}, and {name} on {weight.device}"
    cast = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (weight.dtype, x.dtype)
    if weight.dtype != x.dtype and not cast:
        return f"the input is {x.dtype}, and {name} {weight.dtype}"
    return None


def _why_not_excite(name: str, layer: nn.Module | None, x: Tensor | None) -> str | None:
    """Why a layer of an excitation is no matrix product, or None."""
    if type(layer) is nn.Linear:
        reason = why_not_quiet(name, layer)
        return reason if reason or x is None else _why_not_weight(name, held(layer, "weight"), x)
    if reason := _why_not_conv(name, layer, x):  # type: ignore[arg-type]
        return reason
    return None if excites(layer) else f"{name} is {layer}, not a dense 1x1 convolution without stride"


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


def why_not_shell(shell: Shell, module: nn.Module | None) -> str | None:
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
