"""`fuse_` and `unfuse_`: give anyone's model the fused computation, in place, and take it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn


class Fused(NamedTuple):
    """A converted module: its name in the model, "block", "chain" or "convolution", and the name of its class."""

    name: str
    kind: str
    type: str


class Skipped(NamedTuple):
    """A module that could not be converted, and why."""

    name: str
    type: str
    reason: str


class FuseReport(NamedTuple):
    """What `fuse_` did."""

    fused: list[Fused]
    skipped: list[Skipped]


def fuse_(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> FuseReport:
    """Make ``model`` run fused, in place."""
    return FuseReport([], [])


def unfuse_(model: nn.Module) -> nn.Module:
    """Undo `fuse_`, in place."""
    return model


def why_not_fused(model: nn.Module) -> dict[str, str]:
    """Why converted modules would run their children one by one, by name."""
    return {}
