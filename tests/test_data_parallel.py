"""Converted models on several processes: wrapped in DDP, sharded by FSDP, before or after their conversion."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from resnext import fuse_, why_not_fused

from . import conftest  # noqa: F401  # the spawned processes import torchvision too
from .block_cases import Results
from .converted import assert_same, images, pair

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
RANKS = 2


def wrapped(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    """Every block on its own, and the rest."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        fully_shard(stage[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def converted(model: nn.Module) -> nn.Module:
    fuse_(model)
    assert why_not_fused(model) == {}
    return model


WAYS = {
    "DDP": lambda model: wrapped(converted(model)),
    "DDP, then fused": lambda model: converted(wrapped(model)),
    "FSDP": lambda model: sharded(converted(model)),
    "FSDP, then fused": lambda model: converted(sharded(model)),
}
PLAIN = {"DDP": wrapped, "FSDP": sharded}


def steps(model: nn.Module, rank: int) -> Results:
    """Two training steps, and evaluation, of this process's share of the images."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = images(batch=2 * RANKS)[2 * rank : 2 * rank + 2].requires_grad_()
    results = {}
    for step in range(2):
        optimizer.zero_grad()
        out = model(x + step)
        out.square().sum().backward()
        optimizer.step()
        results[f"out {step}"] = out.detach()
    with torch.no_grad():
        results["inference"] = model.eval()(x)
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        results[name.removeprefix("module.")] = whole.clone()
    return results | {"dx": x.grad}


def on_one_rank(rank: int, folder: str) -> None:
    """What each process does; it leaves its results in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    _, plain = pair()
    results = {name: steps(prepare(copy.deepcopy(plain)), rank) for name, prepare in PLAIN.items()}
    for name, prepare in WAYS.items():
        model = prepare(copy.deepcopy(plain))
        assert isinstance(model, (DistributedDataParallel, FSDPModule))
        assert_same(steps(model, rank), results[name.partition(",")[0]])
        reasons = why_not_fused(model)
        assert reasons == {}, reasons
        Path(folder, f"{name}, {rank}").touch()
    dist.barrier()
    dist.destroy_process_group()


def test_equals_the_plain_model(tmp_path):
    mp.spawn(on_one_rank, args=(str(tmp_path),), nprocs=RANKS)
    done = {path.name for path in tmp_path.iterdir()} - {"rendezvous"}
    assert done == {f"{name}, {rank}" for name in WAYS for rank in range(RANKS)}
