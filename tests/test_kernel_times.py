"""benchmarks/kernel_times.py without a GPU: what it makes of a trace, and of launches that it watches."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import kernel_times
from profiling import unnoticed

from resnext.blocks import BasicBlock
from resnext.kernels.launch import Launch


def event(name, start, microseconds, kind="kernel"):
    return {"name": name, "ts": start, "dur": microseconds, "cat": kind, "args": {"registers per thread": 42}}


def launch(name, size):
    operands = {"shapes": {"x_ptr": [size]}, "bytes": size, "constants": {}}
    return {"name": name, **operands, "options": {"num_warps": 4}, "programs": 1}


def test_launches_are_found_in_the_trace():
    """By their order; what others run in between, and what is no kernel, is told from them."""
    events = [
        event("ours", 30, 5.0),
        event("cudnn", 20, 7.0),
        event("ours", 10, 3.0),
        event("Memset", 5, 1.0, "gpu_memset"),
        event("aten::add", 1, 99.0, "cpu_op"),
    ]
    rows = kernel_times.matched(events, [launch("ours", 1000), launch("ours", 2000)])
    assert [(row["name"], row["microseconds"], row.get("bytes")) for row in rows] == [
        ("Memset", 1.0, None),
        ("ours", 3.0, 1000),
        ("cudnn", 7.0, None),
        ("ours", 5.0, 2000),
    ]
    assert rows[1]["registers"] == 42
    assert kernel_times.by_name(rows)[0] == ("ours", 2, 8.0, 3000)


def test_another_order_than_the_launches_is_an_error():
    events = [event("first", 1, 1.0), event("second", 2, 1.0)]
    with pytest.raises(RuntimeError, match="expected second to run next, the profiler saw first"):
        kernel_times.matched(events, [launch("second", 1), launch("first", 1)])


def test_what_is_to_gain():
    """Time beyond that of the bytes, equal launches together, the most first."""
    rows = [launch("a", 1000) | {"microseconds": 3.0, "registers": 1} for _ in range(2)]
    rows += [launch("b", 4000) | {"microseconds": 9.0, "registers": 1}, {"name": "cudnn", "microseconds": 50.0}]
    found = kernel_times.by_gain(rows, bytes_per_second=1e9)
    assert [(gain, count, time, floor) for gain, count, time, floor, _ in found] == [
        (5.0, 1, 9.0, 4.0),
        (4.0, 2, 3.0, 1.0),
    ]


def test_equal_kernels_are_one_row():
    rows = [
        {"name": "a", "microseconds": 1.0},
        {"name": "b", "microseconds": 5.0, "bytes": 7},
        {"name": "a", "microseconds": 3.5},
    ]
    assert kernel_times.merged(rows) == [
        {"name": "b", "bytes": 7, "count": 1, "microseconds": 5.0},
        {"name": "a", "count": 2, "microseconds": 4.5},
    ]


def test_launches_are_watched():
    """Each tensor's bytes once, whatever names it has; afterwards nothing is watched."""

    class Kernel:
        __name__ = "kernel"

        def __getitem__(self, grid):
            return lambda **_: None

    x, y = torch.zeros(4, 8), torch.zeros(2, dtype=torch.bfloat16)
    launched = Launch(Kernel(), 7, {}, {"BLOCK": 16, "NONE": None}, {"num_warps": 4})
    seen: list = []
    with kernel_times.recorded(seen):
        launched(x_ptr=x, again_ptr=x, y_ptr=y, none_ptr=None)
    launched(x_ptr=x)
    (record,) = seen
    assert (record["name"], record["bytes"], record["programs"]) == ("kernel", 4 * 8 * 4 + 2 * 2, 7)
    assert record["shapes"] == {"x_ptr": [4, 8], "again_ptr": [4, 8], "y_ptr": [2]}
    assert record["constants"] == {"BLOCK": 16}


def test_a_profiler_that_calls_do_not_notice():
    """A block in training is one node, as without it."""
    block = BasicBlock(8, 8)
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    with unnoticed(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert type(block(x).grad_fn).__name__ == "_BlockBackward"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert type(block(x).grad_fn).__name__ != "_BlockBackward"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    with pytest.raises(SystemExit) as stopped:
        kernel_times.main([])
    assert stopped.value.code == 2
    assert "kernels are timed on a CUDA GPU only" in capsys.readouterr().err


def test_on_a_gpu(cuda, tmp_path, capsys):
    path = tmp_path / "out.json"
    assert kernel_times.main(["--batch", "2", "--size", "64", "--json", str(path)]) == 0
    assert "us to gain" in capsys.readouterr().out
    assert path.exists()
