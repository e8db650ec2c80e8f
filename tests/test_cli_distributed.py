"""``torchrun -m resnext train``: two processes do what one does, and end when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from resnext import read_checkpoint

from .commands import SMALL, start, succeed, wait_for_line

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
# 40 images in batches of 14, 13 and 13: shares of 7 and 6 images. In float32 rounding would grow from step to step.
ARGUMENTS = ["--double", "--epochs", "2", "--optimizer", "sgd", "--lr", "0.01", "--accumulate", "2", *SMALL]


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def finish(process: subprocess.Popen[str], timeout: float = 90) -> tuple[str, str]:
    try:
        return process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def workers(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids of what torchrun started, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [entry.removeprefix(b"RANK=") for entry in environment if entry.startswith(b"RANK=")]
        found |= {int(rank): int(child) for rank in ranks}
    return found


def test_losses_equal_those_of_one_process(tmp_path):
    """With synchronised batch norm, the batches of one process shared by two; and only one of them writes."""
    for name, count in (("one", 0), ("two", 2)):
        process = start("train", "--out", tmp_path / name, *ARGUMENTS, torchrun=count)
        out, err = finish(process)
        assert process.returncode == 0, err
        assert [line[:8] for line in out.splitlines()] == ["Epoch: 1", "Epoch: 2", "Best: ep"]
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    for alone, shared in zip(one, two, strict=True):
        assert {**shared, "images_per_second": 0} == pytest.approx({**alone, "images_per_second": 0}, rel=1e-6)
    assert one[1]["train_loss"] != pytest.approx(one[0]["train_loss"], rel=1e-2)  # what is learned is far larger
    weights, others = (read_checkpoint(tmp_path / name / "last.pth")["model"] for name in ("one", "two"))
    torch.testing.assert_close(others, weights, rtol=1e-9, atol=1e-9)


def test_a_process_that_dies_ends_the_run(capsys, tmp_path):
    """With an error, soon; and one process can go on."""
    process = start("train", "--out", tmp_path, "--schedule", "constant", "--epochs", "1000", *SMALL, torchrun=2)
    wait_for_line(process, "Epoch: 1")
    ranks = workers(process)
    assert set(ranks) == {0, 1}
    os.kill(ranks[1], signal.SIGKILL)
    _, err = finish(process, timeout=60)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL) received" in err or "exitcode  : -9" in err
    with pytest.raises(ProcessLookupError):
        os.kill(ranks[0], 0)

    last = read_checkpoint(tmp_path / "last.pth")["epoch"]
    out = succeed(capsys, "train", "--resume", tmp_path / "last.pth", "--epochs", last + 1)
    assert out.startswith(f"Epoch:{last + 1:2d}, ")


def test_an_error_of_the_first_process_ends_all(tmp_path):
    process = start("train", "--data", tmp_path / "nowhere", "--out", tmp_path / "out", *SMALL, torchrun=2)
    out, err = finish(process)
    assert process.returncode != 0
    assert out == ""
    assert "resnext train: expected --data to be digits, synthetic, cifar10 or a folder of images" in err
    assert not (tmp_path / "out").exists()
