"""Running the command line in tests: in this process or another, on small data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from resnext import read_checkpoint
from resnext.cli import main

ROOT = Path(__file__).resolve().parent.parent
# A second for each epoch.
MODEL, SIZE = "resnext29_32x4d_cifar", 8
SMALL = ["--model", MODEL, "--image-size", str(SIZE), "--limit", "40", "--batch-size", "16", "--no-progress"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    """Run a command here."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:  # from argparse
        code = int(error.code or 0)
    return Result(code, *capsys.readouterr())


def succeed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command here that must succeed; its output."""
    result = run(capsys, *arguments)
    assert result.code == 0, result.err
    return result.out


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command here that must end with code 2 and one line on standard error; the line without its beginning."""
    result = run(capsys, *arguments)
    assert result.code == 2, result
    (line,) = result.err.splitlines()
    prefix = f"resnext {arguments[0]}: "
    assert line.startswith(prefix)
    return line.removeprefix(prefix)


def start(*arguments: object, torchrun: int = 0, **options: Any) -> subprocess.Popen[str]:
    """Start ``resnext`` in a process of its own, or in several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"] if torchrun else []
    command = [sys.executable, *launcher, "-m", "tests.cli", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **{**pipes, **options})


def wait_for_line(process: subprocess.Popen[str], start: str) -> str:
    """Read standard output up to a line that starts so."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return line
    raise AssertionError(f"ended without a line {start!r}: {process.communicate()[1]}")


def state(folder: Path) -> dict[str, Any]:
    """A run's last checkpoint, without what differs between equal runs: times, paths, what may change on the way."""
    checkpoint = read_checkpoint(folder / "last.pth")
    del checkpoint["arguments"]
    for record in [*checkpoint["history"], checkpoint["best"] or {}]:
        record.pop("images_per_second", None)
    return checkpoint


def write_images(folder: Path, counts: dict[str, int], size: int = 20) -> Path:
    """A folder of random images: how many of each class."""
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def truncate(path: Path) -> Path:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path
