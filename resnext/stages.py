"""Gradient checkpointing of a stage: backward keeps each block's input only, and runs the block again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

# Symbolic tracing refuses it, rather than recording what it calls and losing the saving of memory.
fx.wrap("checkpoint")


class CheckpointedStage(nn.Sequential):
    """A stage whose blocks run again in backward; running statistics follow each batch once, as without."""

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks in order."""
        for block in self:
            if not torch.is_grad_enabled():
                x = block(x)
            elif torch.compiler.is_compiling():  # a compiler takes no contexts, and updates statistics once by itself
                x = checkpoint(block, x, use_reentrant=False)
            else:
                contexts = functools.partial(_contexts, block)
                x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return x


def checkpoint_stages(stages: Iterable[nn.Sequential], enable: bool) -> None:
    """Make every stage a `CheckpointedStage`, or plain again."""
    for stage in stages:
        # By class and not by a flag: names and parameters stay what they are, and so does the model's forward.
        stage.__class__ = CheckpointedStage if enable else nn.Sequential


def _contexts(block: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """For `checkpoint`: the contexts of the first run, and of the one in backward."""
    return contextlib.nullcontext(), _on_copies_of_buffers(block)


@contextlib.contextmanager
def _on_copies_of_buffers(block: nn.Module) -> Iterator[None]:
    kept = [(module, module._buffers) for module in block.modules() if module._buffers]
    for module, buffers in kept:
        module._buffers = {name: None if value is None else value.clone() for name, value in buffers.items()}
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers = buffers
