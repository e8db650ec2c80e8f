"""What every test runs under."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes: a thread each, also in the processes that they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-configs",
        action="store_true",
        help="compile every Triton launch setting ahead of time, not just the representative ones (slow)",
    )

    parser.addoption(
        "--shard",
        metavar="K/N",
        help="run only the K-th of N parts, K from 0, for N processes side by side; a problem's tests stay together",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Files with a long test first, so that no process is left with one at the end.
    long = {item.path for item in items if item.name == "test_in_the_interpreter"}
    items.sort(key=lambda item: item.path not in long)
    if (shard := config.getoption("--shard")) is None:
        return
    part, parts = map(int, shard.split("/"))

    def problem(item: pytest.Item) -> str:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        return getattr(case, "id", item.nodeid)

    items[:] = [item for item in items if zlib.crc32(problem(item).encode()) % parts == part]


def _let_torchvision_import() -> None:
    """Define the operators whose absence stops torchvision's CUDA build from importing beside a CPU build of torch."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


_kept: list[torch.library.Library] = []
_let_torchvision_import()

# A `with torch.device(...)` block knows the allocating functions by identity, as they are at its first use in the
# process: that use is here, so that it finds PyTorch's own torch.empty and not the one below.
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and the extension allocate with NaN: an element that a kernel forgets to write shows."""
    from resnext.kernels import extension

    if extension.load() is None:
        extension._C.poison_results(True)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.is_floating_point() and tensor.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def unknown_calls() -> None:
    """No call is known from another test: tests replace what serves them."""
    from resnext.kernels import calls

    calls.forget()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device("cuda")


@pytest.fixture
def built() -> None:
    """The compiled extension."""
    from resnext.kernels import extension

    if reason := extension.load():
        pytest.skip(reason)


@pytest.fixture(params=["amx_bf16", "avx512_bf16", "avx512", "avx2", "portable"])
def capability(built: None, request: pytest.FixtureRequest) -> Iterator[str]:
    """Force one instruction set of the extension for the length of a test."""
    from resnext.kernels import dispatch, extension

    try:
        extension.force_cpu_capability(request.param)
    except RuntimeError:
        pytest.skip(f"this machine lacks {request.param}")
    remembered = (dispatch._fused_launchers, dispatch._affine_launchers)
    for choices in remembered:
        choices.cache_clear()
    yield request.param
    extension.force_cpu_capability("")
    for choices in remembered:
        choices.cache_clear()


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(restore_threads: None) -> None:
    """For small tensors, which other threads only slow down."""
    torch.set_num_threads(1)
