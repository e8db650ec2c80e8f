"""What the nodes of a recording (`resnext.graph`) are to the planner: convolutions, norms, sums, means and so on."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Container
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from resnext import batch_norm
from resnext.graph import Node, RecordError, Ref, Shell, Watched, passes_on, record
from resnext.kernels import why_not_conv_stats
from resnext.layers import is_layer, is_plain_conv, original_class
from resnext.steps import Call

_RELUS = {F.relu: False, torch.relu: False, F.relu_: True, torch.relu_: True, "relu": False, "relu_": True}
_SUMS = {operator.add: False, operator.iadd: True, torch.add: False, "add": False, "add_": True}
_PRODUCTS = (operator.mul, torch.mul, "mul")
_MEANS = (torch.mean, "mean")
_SIGMOIDS = (torch.sigmoid, F.sigmoid, "sigmoid", torch.sigmoid_, "sigmoid_")
# What returns memory of its own, if it is not in place: roles, and functions without one.
FRESH = ("conv", "norm", "relu", "add", "pool", "mean", "product", "sigmoid", "linear")
ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, torch.add, torch.sub, torch.mul)
_IN_PLACE = (operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.setitem)
# Modules that pass their input on in evaluation.
_DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)

ANY_RANK = 0  # of `reshaped_rank`: whatever it is

# What asks for strides or depends on them, by the names of methods and functions; where other functions are harmless.
_OF_LAYOUT = frozenset(
    ("view", "view_as", "as_strided", "as_strided_", "stride", "is_contiguous", "dim_order", "data_ptr", "storage")
    + ("untyped_storage", "storage_offset", "resize_", "resize_as_", "set_")
)
_HOMES = frozenset(("torch", "_operator", "math", "builtins", "resnext"))


def role(root: nn.Module, node: Node) -> tuple[str, bool]:
    """What a node of a recording of ``root`` is, and whether it writes into memory that it is given.

    "input", "output", "conv", "norm", "relu", "add", "pool" (the stem's), "dropout", "identity"; of an attention "mean"
    (over an image's pixels), "product", "sigmoid", "linear", "flatten"; "" for the rest.
    """
    if node.kind in ("input", "output"):
        return node.kind, False
    if node.kind == "module":
        module = root.get_submodule(node.target)
        in_place = bool(getattr(module, "inplace", False))
        alone = len(node.args) == 1 and isinstance(node.args[0], Ref) and not node.kwargs
        return (_role_of(module) if alone else ""), in_place
    refs = node.refs
    if "out" in node.kwargs:
        return "", True
    two = node.args == tuple(map(Ref, refs)) and len(refs) == 2 and refs[0] != refs[1] and not node.kwargs
    if node.target in _SUMS:
        return ("add" if two else ""), _SUMS[node.target]
    if node.target in _PRODUCTS:
        return ("product" if two else ""), False
    if len(refs) == 1 and node.args[:1] == (Ref(refs[0]),):
        if _is_mean(node):
            return "mean", False
        if node.target in _SIGMOIDS and len(node.args) == 1 and not node.kwargs:
            return "sigmoid", str(getattr(node.target, "__name__", node.target)).endswith("_")
    if node.target in _RELUS:
        flags = (*node.args[1:], *node.kwargs.values())
        return ("relu" if len(refs) == 1 and len(flags) < 2 else ""), _RELUS[node.target] or True in flags
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") or node.target in _IN_PLACE
    return "", in_place or bool(node.kwargs.get("inplace"))


def _role_of(module: Any) -> str:
    kind = type(module)
    if is_plain_conv(module) and module.padding_mode == "zeros":
        geometry = (module.weight.shape, module.stride, module.padding, module.dilation, module.groups)
        return "" if why_not_conv_stats(*geometry) else "conv"
    if batch_norm.is_known(module):
        return "norm"
    if kind is nn.MaxPool2d:
        return "pool" if is_stem_pool(module) else ""
    if kind is nn.AdaptiveAvgPool2d and pools_to_one(module):
        return "mean"
    if kind in _DROPOUTS or "drop" in kind.__name__.lower() or kind.__name__ == "StochasticDepth":
        return "dropout"
    simple = {nn.ReLU: "relu", nn.Identity: "identity", nn.Sigmoid: "sigmoid", nn.Linear: "linear"}
    return simple.get(kind, "flatten" if kind is nn.Flatten and flattens_images(module) else "")


def _is_mean(node: Node) -> bool:
    """Whether a function or method of a tensor (N, C, H, W) is the mean over H and W."""
    if node.target is F.adaptive_avg_pool2d:
        sizes = (*node.args[1:], *node.kwargs.values())
        return len(sizes) == 1 and sizes[0] in (1, (1, 1), [1, 1])
    if node.target not in _MEANS:
        return False
    arguments = _mean_arguments(node)
    if not {*arguments} <= {"dim", "keepdim"}:
        return False
    dim, keeps = arguments.get("dim"), arguments.get("keepdim", False)
    return isinstance(dim, (tuple, list)) and {*dim} in ({2, 3}, {-1, -2}) and len(dim) == 2 and type(keeps) is bool


def keeps_dims(mean: Node) -> bool:
    """Whether a mean's result is (N, C, 1, 1) and not (N, C)."""
    return mean.target not in _MEANS or bool(_mean_arguments(mean).get("keepdim", False))


def is_batch_size(node: Node, node_at: Callable[[int], Node], values: Container[int]) -> bool:
    """Whether a node is the first size of one of some values."""
    if node.kind == "method" and node.target == "size" and node.args[1:] == (0,):
        return node.refs[0] in values
    if node.target is not operator.getitem or node.args[1:] != (0,):
        return False
    shape = node_at(node.refs[0])
    is_shape = shape.target == "size" and len(shape.args) == 1
    is_shape = is_shape or (shape.target is builtins.getattr and shape.args[1:] == ("shape",))
    return is_shape and shape.refs[0] in values


def is_of_shape(node: Node) -> bool:
    """Whether a node does nothing but find sizes, or take one of several values."""
    return node.target in ("size", builtins.getattr, operator.getitem)


def reshaped_rank(node: Node, rank: int, is_batch: Callable[[Any], bool]) -> int | None:
    """The rank of what a node reshapes to one of ``rank``, where both are (N, C) with or without ones behind it.

    ``is_batch``: whether an argument stands for N. None for all other nodes, and where the arguments may be others.
    """
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else node.args[1:]
    if node.kwargs or node.kind not in ("function", "method"):
        return None
    if name in ("view", "reshape") and len(sizes) > 1 and is_batch(sizes[0]):
        ones = tuple(sizes[2:])
        return ANY_RANK if len(sizes) == rank and ones == (1,) * len(ones) else None
    if name == "flatten" and tuple(sizes) == (1,):
        return ANY_RANK if rank == 2 else None
    if name == "unsqueeze" and len(sizes) == 1 and sizes[0] in (-1, rank - 1):
        return rank - 1 if rank > 2 else None
    if name == "squeeze" and len(sizes) == 1 and sizes[0] in (-1, rank):
        return rank + 1 if rank < 4 else None
    if node.target is operator.getitem and sizes == (slice(None), slice(None), None, None):
        return 2 if rank == 4 else None
    return None


def expands_to(node: Node, value: int) -> bool:
    """Whether a node gives another value the shape of a value."""
    return node.kind == "method" and node.target == "expand_as" and node.refs[1:] == [value] and node.refs[0] != value


def asks_for_shape(node: Node, value: int) -> bool:
    """Whether a node wants to know nothing but the shape of a value that is among its arguments."""
    if expands_to(node, value):
        return True
    if node.kind == "method":
        return node.target in ("size", "dim") and node.refs == [value]
    return node.target is builtins.getattr and node.args[1:] == ("shape",)


def _mean_arguments(node: Node) -> dict[str, Any]:
    """The arguments of a mean but for the tensor, by name."""
    return dict(zip(("dim", "keepdim", "dtype"), node.args[1:], strict=False)) | dict(node.kwargs)


def pools_its_input(module: nn.Module) -> bool:
    """Whether a module's forward takes the mean over the pixels of its only input, as an attention does."""
    try:
        recording = record(module, 1, is_layer, lambda _: False)
    except RecordError:
        return False

    def takes_mean(node: Node) -> bool:
        if node.refs != [0]:
            return False
        return _role_of(module.get_submodule(node.target)) == "mean" if node.kind == "module" else _is_mean(node)

    return any(map(takes_mean, recording.nodes))


def passing_dropout(root: nn.Module, name: str) -> Shell | None:
    """What has to hold for a module, by its name a dropout, to pass its input on in evaluation; None if it does not."""
    module = root.get_submodule(name)
    if type(module) in _DROPOUTS:
        return Shell(Watched(name), type(module), type(module).forward, ())
    return passes_on(module, name)


def sees_layout(root: nn.Module, node: Node) -> bool:
    """Whether a node that is called as it was recorded may ask for strides, or views memory by them."""
    if node.kind == "module":
        return _module_sees_layout(root.get_submodule(node.target), len(node.args))
    if node.kind == "method":
        return node.target in _OF_LAYOUT
    if node.kind != "function":
        return False
    home = getattr(node.target, "__module__", None) or "torch"  # methods of Tensor have none
    return home.partition(".")[0] not in _HOMES or getattr(node.target, "__name__", "") in _OF_LAYOUT


def adds_dimensions(node: Node) -> bool:
    """Whether a node makes more than four dimensions of images: PyTorch computes with these slowly in channels_last."""
    if getattr(node.target, "__name__", node.target) in ("stack", "unflatten"):
        return True
    sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    return node.target in ("view", "reshape") and len(sizes) > 4


def _module_sees_layout(module: nn.Module, tensors: int) -> bool:
    if is_layer(module) or batch_norm.is_known(module):
        return False
    library = original_class(module).__module__.partition(".")[0]
    if _role_of(module) == "dropout" and library in ("resnext", "timm", "torchvision"):  # which draw, and multiply
        return False
    if plans := module.__dict__.get("_fused_plans"):
        programs = [program for made in plans.values() for program in (made.train, made.infer)]
        return any(isinstance(step, Call) and step.sees_layout for program in programs for step, _ in program.steps)

    def is_leaf(each: nn.Module) -> bool:
        return each is not module and (is_layer(each) or "_fused_plans" in each.__dict__)

    try:
        recording = record(module, tensors, is_leaf, lambda _: False)
    except RecordError:
        return True
    return any(sees_layout(module, node) for node in recording.nodes)


def excites(layer: Any) -> bool:
    """Whether a module can be a layer of an excitation: linear, or a convolution that is so of a single pixel."""
    if original_class(layer) is nn.Linear:
        return True
    return tuple(layer.weight.shape[2:]) == (1, 1) and layer.groups == 1 and layer.stride in (1, (1, 1))


def pools_to_one(pool: nn.AdaptiveAvgPool2d) -> bool:
    """Whether a pooling leaves one pixel, the mean."""
    return pool.output_size in (1, (1, 1), [1, 1])


def flattens_images(module: nn.Flatten) -> bool:
    """Whether all but the images becomes one dimension."""
    return (module.start_dim, module.end_dim) == (1, -1)


def is_stem_pool(pool: nn.MaxPool2d) -> bool:
    """Whether this is the max pooling of ResNet's stem: 3x3, stride 2, padding 1."""
    sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    usual = sizes in ((3, 2, 1, 1), ((3, 3), (2, 2), (1, 1), (1, 1)))
    return usual and not pool.ceil_mode and not pool.return_indices
