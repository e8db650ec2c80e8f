"""Optimizers and learning rate schedules, all PyTorch's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from resnext.cli.arguments import Options


def make_optimizer(options: Options, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Make the optimizer that the arguments ask for."""
    lr = options.lr or (0.05 if options.optimizer == "sgd" else 0.001)
    if options.optimizer == "sgd":
        return SGD(
            parameters, lr, momentum=options.momentum, weight_decay=options.weight_decay, nesterov=options.nesterov
        )
    return (Adam if options.optimizer == "adam" else AdamW)(parameters, lr, weight_decay=options.weight_decay)


class Schedule:
    """The learning rate of each epoch: warm-up, then one of PyTorch's schedules.

    Args:
        options: The arguments.
        optimizer: Whose rate it sets.
    """

    def __init__(self, options: Options, optimizer: Optimizer) -> None:
        self.optimizer, self.warmup_epochs = optimizer, options.warmup_epochs
        self.plateau: ReduceLROnPlateau | None = None
        if options.schedule == "plateau":  # which cannot be a part of SequentialLR
            gamma = options.gamma or 0.1
            self.plateau = ReduceLROnPlateau(optimizer, factor=gamma, patience=options.patience, min_lr=options.min_lr)
        warmup = options.warmup_epochs
        main = _after_warmup(options, optimizer)
        if warmup:
            growing = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
            main = SequentialLR(optimizer, [growing, main], [warmup])
        self.by_epoch = main

    @property
    def lr(self) -> float:
        """The rate now."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, epoch: int, test_loss: float) -> None:
        """Set the rate of the epoch after ``epoch``, counted from 1."""
        if self.plateau is None or epoch <= self.warmup_epochs:
            self.by_epoch.step()
        if self.plateau is not None and epoch > self.warmup_epochs:
            self.plateau.step(test_loss)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"by_epoch": self.by_epoch.state_dict(), "plateau": self.plateau and self.plateau.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a schedule of the same arguments was."""
        self.by_epoch.load_state_dict(state["by_epoch"])
        if self.plateau:
            self.plateau.load_state_dict(state["plateau"])


def _after_warmup(options: Options, optimizer: Optimizer) -> LRScheduler:
    if options.schedule == "step":
        return StepLR(optimizer, options.step_size, options.gamma or 0.1)
    if options.schedule == "lambda":
        gamma, size = options.gamma or 0.97, options.step_size
        return LambdaLR(optimizer, lambda epoch: gamma ** (epoch // size))
    if options.schedule == "cosine":
        return CosineAnnealingLR(optimizer, max(1, options.epochs - options.warmup_epochs), options.min_lr)
    return ConstantLR(optimizer, factor=1.0, total_iters=0)
