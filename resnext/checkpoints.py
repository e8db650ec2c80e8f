"""Load a checkpoint into a model, whatever its layout: wrappers, prefixes, names, classes, input channels."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from math import ceil
from typing import Any, NamedTuple

from torch import Tensor, nn

from resnext.checkpoint_files import read_checkpoint
from resnext.checkpoint_keys import match

# Where training scripts put weights among the other things they save, averaged ones first.
_EMA_ENTRIES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "shadow")
_ENTRIES = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params")

# Counters: of batch norms, which old checkpoints lack and frozen ones never count, and of weight averaging.
_COUNTERS = re.compile(r"(?:^|\.)(?:num_batches_tracked|n_averaged)$")


class LoadReport(NamedTuple):
    """What `load_checkpoint` did; prints as text.

    Attributes:
        loaded_keys: The model's keys that were loaded.
        missing_keys: The model's keys that the checkpoint lacks, but for batch norms' counters.
        unexpected_keys: The checkpoint's keys that the model has no place for.
        mismatched_keys: The model's keys whose tensor has another shape in the checkpoint, and both shapes.
        skipped_keys: The model's keys of the classifier, not loaded because the number of classes differs.
        notes: What was done beyond copying, in words: prefixes, names, the stem's channels, the classifier.
    """

    loaded_keys: list[str]
    missing_keys: list[str]
    unexpected_keys: list[str]
    mismatched_keys: dict[str, str]
    skipped_keys: list[str]
    notes: list[str]

    @property
    def differences(self) -> str:
        """What is missing, unexpected or of another shape, at most some dozens of lines; empty if nothing is."""
        lines = []
        for what, keys in (
            ("missing in the checkpoint", self.missing_keys),
            ("unknown to the model", self.unexpected_keys),
        ):
            if keys:
                lines += [f"{len(keys)} {what}:", *_grouped(keys)]
        if self.mismatched_keys:
            lines += [f"{len(self.mismatched_keys)} of another shape:"]
            lines += _at_most(12, [f"  {key}: {shapes}" for key, shapes in self.mismatched_keys.items()])
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded_keys)} tensors", *self.notes, self.differences]
        return "\n".join(line for line in lines if line)


def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strict: bool = True,
    use_ema: bool = True,
) -> LoadReport:
    """Load weights from a file or a mapping into a model, whatever their keys are called.

    Weights are found inside what training scripts save: under ``state_dict_ema``, ``model_ema``, ``ema_state_dict``,
    ``ema``, ``shadow`` (unless ``use_ema`` is False), else ``state_dict``, ``model_state_dict``, ``model``, ``net``,
    ``network``, ``module``, ``weights``, ``params``, in this order. Prefixes go (``module.``, ``_orig_mod.``,
    ``backbone.``, ...), and names are translated between the layouts of torchvision, timm, mmpretrain and common
    implementations, in either direction (`resnext.checkpoint_keys.LAYOUTS`).

    Tensors are copied into the model's parameters and buffers, which keep their dtype, device and layout. The
    classifier is skipped, with a warning, if it has another number of classes. The first convolution of a model with
    other than three input channels gets the checkpoint's three-channel weight summed (one channel) or repeated and
    scaled (timm's rule), with a warning. Batch norms' counters may be missing.

    Args:
        model: Any module, fused or not.
        source: A file for `read_checkpoint`, or what it returns, or a ``state_dict``.
        strict: Whether anything else that is missing, unexpected or of another shape is an error; if not, what fits is
            loaded and the report lists the rest.
        use_ema: Whether averaged weights are preferred.

    Returns:
        See `LoadReport`.

    Raises:
        RuntimeError: ``strict``, and checkpoint and model differ; the message lists how. The model is unchanged.
        ValueError: There are no weights in ``source``.
        FileNotFoundError, ImportError, ValueError: From `read_checkpoint`.
    """
    checkpoint = source if isinstance(source, Mapping) else read_checkpoint(source)
    where = "the mapping" if isinstance(source, Mapping) else str(source)
    tensors, notes = _weights(checkpoint, use_ema, where)
    own = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    found = match(own, tensors)
    notes += found.notes
    warned: list[str] = []

    chosen, mismatched, skipped = {}, {}, []
    for key, entry in found.entries.items():
        value, wanted = tensors[entry], own[key]
        name = found.model_names[key]
        if value.shape == wanted.shape:
            chosen[key] = value
        elif name.startswith("fc.") and value.shape[1:] == wanted.shape[1:]:
            skipped.append(key)
            if name == "fc.weight":
                warned.append(f"skipped the classifier: it has {len(wanted)} classes, the checkpoint {len(value)}")
        elif name in ("conv1.weight", "conv1.0.weight") and _differ_in_channels(value, wanted):
            chosen[key] = _adapt_input_channels(value, wanted.shape[1])
            warned.append(f"adapted {key} from 3 input channels to {wanted.shape[1]}")
        else:
            mismatched[key] = f"{tuple(wanted.shape)}, in the checkpoint {tuple(value.shape)}"

    missing = [key for key in own if key not in found.entries and not _COUNTERS.search(key)]
    left = set(tensors) - set(found.entries.values())
    head = {key for key in left if found.checkpoint_names[key].startswith("fc.")}
    if head and not any(name.startswith("fc.") for name in found.model_names.values()):
        left -= head
        warned.append("skipped the checkpoint's classifier: the model has none")
    unexpected = [key for key in tensors if key in left and not _COUNTERS.search(key)]

    report = LoadReport(list(chosen), missing, unexpected, mismatched, skipped, notes + warned)
    if (own and not chosen) or (strict and report.differences):
        advice = ", or pass strict=False to load what fits" if chosen else ": no entry fits"
        raise RuntimeError(
            f"load_checkpoint: expected the weights of this {type(model).__name__}, got others in {where}; "
            f"build the model that they were made from{advice}\n{report.differences}"
        )
    for warning in warned:
        warnings.warn(f"load_checkpoint: {warning}", stacklevel=2)
    model.load_state_dict(chosen, strict=False)
    return report


def _weights(checkpoint: Any, use_ema: bool, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a ``state_dict`` that may be wrapped in other mappings, and notes on what was chosen."""
    notes = []
    while True:
        if isinstance(checkpoint, nn.Module):
            checkpoint = checkpoint.state_dict()
        if not isinstance(checkpoint, Mapping):
            raise ValueError(
                f"load_checkpoint: expected a state_dict or a mapping that holds one, got {type(checkpoint).__name__} "
                f"in {where}; pass the state_dict itself"
            )
        for name in (*_EMA_ENTRIES, *_ENTRIES) if use_ema else _ENTRIES:
            if _holds_tensors(checkpoint.get(name)):
                notes.append(f"used the entry {name!r}")
                checkpoint = checkpoint[name]
                break
        else:
            break
    tensors = {key: value for key, value in checkpoint.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"load_checkpoint: expected tensors, got {', '.join(map(str, checkpoint)) or 'nothing'} in {where}; "
            "pass the mapping that holds the weights"
        )
    return tensors, notes


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(isinstance(each, Tensor) or _holds_tensors(each) for each in value.values())
    return isinstance(value, nn.Module)


def _differ_in_channels(weight: Tensor, wanted: Tensor) -> bool:
    """Whether a convolution's weight has three input channels and otherwise the shape wanted."""
    return weight.dim() == 4 and weight.shape[1] == 3 and weight[:, 0].shape == wanted[:, 0].shape


def _adapt_input_channels(weight: Tensor, channels: int) -> Tensor:
    """A stem's weight for other than three channels: their sum, or a repetition of the same total weight."""
    weight = weight.float()
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight.repeat(1, ceil(channels / 3), 1, 1)[:, :channels] * (3 / channels)


def _grouped(keys: list[str]) -> list[str]:
    """A line for each module with the names of its tensors; for each child of the model if those are many."""
    modules: dict[str, list[str]] = {}
    for key in keys:
        module, _, name = key.rpartition(".")
        modules.setdefault(module, []).append(name)
    if len(modules) <= 12:
        return [f"  {module + '.' if module else ''}{', '.join(names)}" for module, names in modules.items()]
    count = Counter(key.partition(".")[0] for key in keys)
    example = {key.partition(".")[0]: key for key in reversed(keys)}
    return _at_most(12, [f"  {child}: {number} ({example[child]}, ...)" for child, number in count.items()])


def _at_most(number: int, lines: list[str]) -> list[str]:
    return lines if len(lines) <= number else [*lines[: number - 1], f"  ... and {len(lines) - number + 1} more"]
