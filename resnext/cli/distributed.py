"""The processes of a run: one, or those that ``torchrun`` started, and the device of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resnext import why_not_fused
from resnext.cli.errors import CommandError, one_line

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        device: Where it computes.
        rank: Its number, from 0.
        count: How many there are.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def from_first(self, make: Callable[[], Result]) -> Result:
        """Let the first process make something that all get; its errors are raised in all."""
        if self.count == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = make()
            except (CommandError, OSError) as error:
                outcome[1] = one_line(error)
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise CommandError(outcome[1])
        return outcome[0]

    def share(self, model: nn.Module) -> None:
        """Give every process the first one's parameters and buffers."""
        if self.count > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)

    def parallel(self, model: nn.Module, sync_bn: bool, plain: bool) -> nn.Module:
        """Wrap the model so that backward averages gradients over the processes.

        Args:
            model: The model.
            sync_bn: Whether its batch norms become synchronised ones, in place.
            plain: Whether it is one without fused blocks.

        Raises:
            CommandError: The batch norms cannot be synchronised here.
        """
        if self.count == 1:
            return model
        on_gpu = self.device.type == "cuda"
        unfused = "the model" if plain else ", ".join(name or "the stem" for name in why_not_fused(model))
        if sync_bn and unfused and not on_gpu:  # PyTorch's own synchronised batch norm needs GPUs
            raise CommandError(
                f"expected fused blocks for synchronised batch norm on CPUs, got {unfused} not fused; "
                "pass --no-sync-bn, or leave out --plain"
            )
        wrapped = DistributedDataParallel(model, device_ids=[self.device.index] if on_gpu else None)
        if sync_bn:  # after wrapping: DDP refuses synchronised batch norms on CPUs, fused blocks do not
            nn.SyncBatchNorm.convert_sync_batchnorm(wrapped)
        return wrapped


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started, if it did.

    Args:
        device: ``"auto"``, or the name of a device; of several processes on GPUs each takes its own.

    Raises:
        CommandError: There is no such device, or fewer GPUs than processes.
    """
    launched = dist.is_available() and dist.is_torchelastic_launched()
    local = dist.get_node_local_rank(fallback_rank=0) if launched else None
    chosen = pick_device(device, local)
    if not launched:
        yield Processes(chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    yield Processes(chosen, dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error, when it could wait for processes that are gone


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device of that name; of several processes each has its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise CommandError(f"expected the device cpu or cuda, got {name}; choose one of them")
    if device.type == "cuda":
        index = local_rank if local_rank is not None else device.index or 0
        if index >= torch.cuda.device_count():
            raise CommandError(
                f"expected a GPU number {index}, got {torch.cuda.device_count()} GPUs; "
                "pass --device cpu, or start fewer processes"
            )
        device = torch.device("cuda", index)
    return device
