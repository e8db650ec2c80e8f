"""Which entry of a checkpoint belongs to which parameter of a model, when their names differ.

The names of either side are translated to torchvision's and compared there, so that any layout known here loads into
any other. What a layout calls things is data: `LAYOUTS`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """How one family of models names its parameters.

    Attributes:
        name: The family, for reports.
        marker: A regular expression that only names of this family match, or names that need its rules.
        rules: Regular expressions and what replaces their match, applied in order to every name if any matches the
            marker.
    """

    name: str
    marker: str
    rules: tuple[tuple[str, str], ...]


# Models that call their stages conv2 to conv5 (or conv2_x to conv5_x), after the table in the ResNet paper, have their
# stem's convolution and norm in one Sequential, conv1.
_PAPER_STAGES = (
    (r"^conv1\.0\.", "conv1."),
    (r"^conv1\.1\.", "bn1."),
    *((rf"^conv{number + 1}(?:_x)?\.(?=\d+\.)", f"layer{number}.") for number in (1, 2, 3, 4)),
)
# torch.nn.Sequential(*model.children()), whole or as the attribute `features`: children without parameters count too.
# Whether the stem has a max pool makes the difference of one in the stages' numbers.
_STEM_CHILDREN = ((r"^(?:features\.)?0\.", "conv1."), (r"^(?:features\.)?1\.", "bn1."))
_HEAD_CHILD = (r"^(?:features\.)?(?:[6-9]|1\d)\.(?=weight$|bias$)", "fc.")

LAYOUTS = (
    Layout(
        "nn.Sequential of a model without max pool",
        r"^(?:features\.)?3\.\d+\.",
        (
            *_STEM_CHILDREN,
            *((rf"^(?:features\.)?{number + 2}\.(?=\d+\.)", f"layer{number}.") for number in (1, 2, 3, 4)),
            _HEAD_CHILD,
        ),
    ),
    Layout(
        "nn.Sequential of a model",
        r"^(?:features\.)?4\.\d+\.",
        (
            *_STEM_CHILDREN,
            *((rf"^(?:features\.)?{number + 3}\.(?=\d+\.)", f"layer{number}.") for number in (1, 2, 3, 4)),
            _HEAD_CHILD,
        ),
    ),
    Layout(
        "ResNeXt.pytorch (conv_reduce, conv_conv, conv_expand)",
        r"\.conv_reduce\.",
        (
            (r"^conv_1_3x3\.", "conv1."),
            (r"^bn_1\.", "bn1."),
            (r"^stage_(\d+)\.(?:stage_\d+_bottleneck_)?(\d+)\.", r"layer\1.\2."),
            (r"\.conv_reduce\.", ".conv1."),
            (r"\.bn_reduce\.", ".bn1."),
            (r"\.conv_conv\.", ".conv2."),
            (r"(\.\d+)\.bn\.", r"\1.bn2."),
            (r"\.conv_expand\.", ".conv3."),
            (r"\.bn_expand\.", ".bn3."),
            (r"\.shortcut\.shortcut_conv\.", ".downsample.0."),
            (r"\.shortcut\.shortcut_bn\.", ".downsample.1."),
        ),
    ),
    Layout(
        "pytorch-cifar100 (residual_function, split_transforms)",
        r"\.(?:residual_function|split_transforms)\.",
        (
            *_PAPER_STAGES,
            (r"\.(?:residual_function|split_transforms)\.0\.", ".conv1."),
            (r"\.(?:residual_function|split_transforms)\.1\.", ".bn1."),
            (r"\.(?:residual_function|split_transforms)\.3\.", ".conv2."),
            (r"\.(?:residual_function|split_transforms)\.4\.", ".bn2."),
            (r"\.(?:residual_function|split_transforms)\.6\.", ".conv3."),
            (r"\.(?:residual_function|split_transforms)\.7\.", ".bn3."),
        ),
    ),
    Layout(
        "convolution and norm in one Sequential (conv1.0, conv1.1)",
        r"^\w+\.\d+\.conv1\.0\.",
        (
            *_PAPER_STAGES,
            (r"(\.\d+)\.conv([123])\.0\.", r"\1.conv\2."),
            (r"(\.\d+)\.conv([123])\.1\.", r"\1.bn\2."),
            (r"(\.\d+)\.conv4\.(?=[01]\.)", r"\1.downsample."),
        ),
    ),
    Layout(
        "mmpretrain, deep stem",
        r"^stem\.\d\.",
        ((r"^stem\.([01346])\.", r"conv1.\1."), (r"^stem\.7\.", "bn1.")),
    ),
    Layout(
        "numbered batch norms (batch_norm1)",
        r"(?:^|\.)batch_?norm\d\.",
        ((r"(^|\.)batch_?norm(\d)\.", r"\1bn\2."),),
    ),
    Layout(
        "shortcut instead of downsample",
        r"\.(?:shortcut|identity_downsample|i_downsample)\.",
        ((r"\.(?:shortcut|identity_downsample|i_downsample)\.", ".downsample."),),
    ),
    Layout(
        "classifier not named fc",
        r"^(?:linear|classifier|last_linear|head|head\.fc|fc\.\d)\.(?:weight|bias)$",
        ((r"^(?:linear|classifier|last_linear|head|head\.fc|fc\.\d)\.(?=weight$|bias$)", "fc."),),
    ),
)

# What wrappers put into names, anywhere: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_DOWNSAMPLE_CHILD = re.compile(r"^(.*\.downsample)\.(\d+)(?=\.)")


def without_wrappers(name: str) -> str:
    """A parameter's name as it is in the model inside wrappers that keep the structure."""
    return _WRAPPERS.sub("", name)


class Match(NamedTuple):
    """What `match` found.

    Attributes:
        entries: The checkpoint's key for each key of the model that has one.
        model_names: torchvision's name for each key of the model.
        checkpoint_names: Likewise for the checkpoint.
        notes: What had to be translated, in words.
    """

    entries: dict[str, str]
    model_names: dict[str, str]
    checkpoint_names: dict[str, str]
    notes: list[str]


def match(model: Mapping[str, Tensor], checkpoint: Mapping[str, Tensor]) -> Match:
    """Find the checkpoint's entry for every tensor of a model.

    On either side, up to four prefixes go if that makes more entries fit: ``module.``, ``backbone.``, or whatever else
    stands before most names.

    Args:
        model: The model's ``state_dict``.
        checkpoint: The checkpoint's.

    Returns:
        See `Match`; shapes may still differ.
    """
    best, most = Match({}, {}, {}, []), -1
    readings = _readings(checkpoint)
    for ours in _readings(model):
        key_of = {name: key for key, name in ours.names.items()}
        for theirs in readings:
            entries = {key_of[name]: key for key, name in theirs.names.items() if name in key_of}
            fitting = sum(model[key].shape == checkpoint[entry].shape for key, entry in entries.items())
            if fitting > most:
                best, most = Match(entries, ours.names, theirs.names, theirs.notes), fitting
        if most == len(model):
            break
    return best


class _Reading(NamedTuple):
    names: dict[str, str]
    notes: list[str]


def _readings(keys: Iterable[str]) -> list[_Reading]:
    """The keys as torchvision would name them if they had no prefix, one, two, three, four."""
    names = {key: without_wrappers(key) for key in keys}
    readings, prefix = [], ""
    for _ in range(5):
        canonical, layouts = canonical_names(names)
        notes = [f"removed the prefix {prefix!r}"] if prefix else []
        readings.append(_Reading(canonical, notes + [f"translated names: {layout}" for layout in layouts]))
        children = Counter(name.partition(".")[0] + "." for name in names.values() if "." in name)
        first, count = children.most_common(1)[0] if children else ("", 0)
        if count <= len(names) / 2 or re.match(r"layer\d+\.", first):
            break
        prefix += first
        names = _distinct(names, {key: name.removeprefix(first) for key, name in names.items()})
    return readings


def canonical_names(names: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Translate names to torchvision's.

    Args:
        names: The name, without prefixes, for each key.

    Returns:
        The translated name for each key, distinct ones, and the names of the layouts that were recognised.
    """
    new = dict(names)
    layouts = []
    for layout in LAYOUTS:
        if re.search(layout.marker, "\n".join(new.values()), re.MULTILINE):
            layouts.append(layout.name)
            for pattern, template in layout.rules:
                new = {key: re.sub(pattern, template, name, count=1) for key, name in new.items()}
    return _distinct(names, _renumber_downsample(new)), layouts


def _renumber_downsample(names: dict[str, str]) -> dict[str, str]:
    """Number a shortcut's convolution 0 and its norm 1: ResNet-D has a pool before them, at least in some blocks."""
    children: dict[str, set[int]] = {}
    for name in names.values():
        if found := _DOWNSAMPLE_CHILD.match(name):
            children.setdefault(found[1], set()).add(int(found[2]))

    def rank(found: re.Match[str]) -> str:
        return f"{found[1]}.{sorted(children[found[1]]).index(int(found[2]))}"

    return {key: _DOWNSAMPLE_CHILD.sub(rank, name) for key, name in names.items()}


def _distinct(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """The new names, but the old one where several keys got the same."""
    count = Counter(new.values())
    return {key: name if count[name] == 1 else old[key] for key, name in new.items()}
