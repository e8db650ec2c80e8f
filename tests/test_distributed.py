"""Several processes equal one on the joined batch: synchronised batch norm in fused blocks, and DDP around them."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import conftest  # noqa: F401  # the spawned processes import torchvision too
from .block_cases import IDENTITY, PROJECTION, UNIT_ROUNDOFF_RATIO, Results, buffers, reason_of, relative_errors

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
RANKS = 2


def cumulative(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, momentum=None)


def shares(images: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    return list(images.split(sizes))


def step(block: nn.Module, x: Tensor, grad: Tensor) -> Results:
    x = x.clone().requires_grad_()
    block.zero_grad()
    out = block(x)
    out.backward(grad)
    return {"out": out.detach(), "dx": x.grad, **{f"d {name}": p.grad.clone() for name, p in block.named_parameters()}}


SPLITS = {"even": (2, 2), "uneven": (3, 1), "one rank without images": (4, 0)}
CASES = {"identity": IDENTITY, "projection": PROJECTION}


def gradient(block: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        shape = copy.deepcopy(block).eval()(x).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(x.dtype)


def on_one_rank(rank: int, folder: str) -> None:
    """What each process does; it leaves its results in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    results: dict[str, Results] = {}
    for case_name, case in CASES.items():
        block = nn.SyncBatchNorm.convert_sync_batchnorm(case.pair(cumulative)[0]).double()
        assert reason_of(block) is None
        x = case.images(4).double()
        grad = gradient(block, x)
        for split_name, split in SPLITS.items():
            for recompute in (False, True):
                other = copy.deepcopy(block)
                other.recompute = recompute
                for _ in range(2):
                    got = step(other, shares(x, split)[rank], shares(grad, split)[rank])
                results[f"{case_name}, {split_name}, {recompute}"] = {**got, **buffers(other)}
        other = copy.deepcopy(block)
        other.compile(fullgraph=True, backend="aot_eager")
        for _ in range(2):
            got = step(other, shares(x, (3, 1))[rank], shares(grad, (3, 1))[rank])
        results[f"{case_name}, compiled"] = {**got, **buffers(other)}

        # DDP does not take synchronised batch norms on CPUs; these become so inside it.
        wrapped = DistributedDataParallel(case.pair(cumulative)[0].double())
        nn.SyncBatchNorm.convert_sync_batchnorm(wrapped)
        for _ in range(2):
            got = step(wrapped, shares(x, (2, 2))[rank], shares(grad, (2, 2))[rank])
        results[f"{case_name}, DDP"] = {
            **{name.replace("module.", ""): value for name, value in got.items()},
            **buffers(wrapped.module),
        }
        if rank == 0:  # without the other
            with torch.no_grad():
                block.eval()(x)
            alone = dist.new_group([0], use_local_synchronization=True)
            for module in block.modules():
                if isinstance(module, nn.SyncBatchNorm):
                    module.process_group = alone
            results[f"{case_name}, alone"] = {**step(block.train(), x, grad), **buffers(block)}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Results]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(on_one_rank, args=(str(folder),), nprocs=RANKS)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(RANKS)]


def assert_equal_one_process(name: str, got: Results, steps: int = 2) -> None:
    case = CASES[name.partition(",")[0]]
    plain = case.pair(cumulative)[1]
    results = {}
    for dtype in (torch.float64, torch.float32):
        block = copy.deepcopy(plain).to(dtype)
        x = case.images(4).to(dtype)
        grad = gradient(block, x)
        for _ in range(steps):
            result = step(block, x, grad)
        results[dtype] = {**result, **buffers(block)}
    exact = results[torch.float64]
    # As in block_cases: the error of PyTorch's block in float32 is the measure. One more merges the ranks.
    allowed = 4 * UNIT_ROUNDOFF_RATIO * max(relative_errors(results[torch.float32], exact).values())
    wrong = {name: error for name, error in relative_errors(got, exact).items() if not error <= allowed}
    assert not wrong, f"allowed {allowed:.3g}"


def joined(ranks: list[dict[str, Results]], name: str) -> Results:
    """Images joined, gradients of parameters summed; the buffers must be the same everywhere."""
    first, second = (results[name] for results in ranks)
    result = {}
    for key, value in first.items():
        if key in ("out", "dx"):
            result[key] = torch.cat([value, second[key]])
        elif key.startswith("d "):
            result[key] = value + second[key]
        else:
            assert torch.equal(value, second[key]), key
            result[key] = value
    return result


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", CASES)
def test_synchronised_batch_norm(ranks, case, split, recompute):
    name = f"{case}, {split}, {recompute}"
    assert_equal_one_process(name, joined(ranks, name))


@pytest.mark.parametrize("case", CASES)
def test_compiled(ranks, case):
    name = f"{case}, compiled"
    assert_equal_one_process(name, joined(ranks, name))


@pytest.mark.parametrize("case", CASES)
def test_ddp(ranks, case):
    """Which averages the gradients of the parameters over the ranks, and they stay the same on both."""
    name = f"{case}, DDP"
    assert_equal_one_process(name, joined(ranks, name))
    for key, value in ranks[0][name].items():
        if key not in ("out", "dx"):
            assert torch.equal(value, ranks[1][name][key]), key


@pytest.mark.parametrize("case", CASES)
def test_group_of_one(ranks, case):
    assert_equal_one_process(f"{case}, alone", ranks[0][f"{case}, alone"], steps=1)
