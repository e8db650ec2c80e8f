"""README.md and the pages of results say what is true: tables are the committed results', names and links exist."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import resnext
from resnext.cli.arguments import parse
from resnext.cli.logs import line

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "benchmarks/RESULTS.md").read_text()


def test_tables_are_those_of_the_committed_results():
    result = subprocess.run(
        [sys.executable, "benchmarks/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_tables_show_each_ratio_of_the_results():
    """Of every file of these programs, below a link to it, each row once."""
    summary, _, _ = README.partition("### What is not faster")
    keys_of = {"grouped_conv": ["layer"], "model": ["model", "mode", "batch"], "memory": ["model", "batch"]}
    for program, names in keys_of.items():
        page, folder = (summary, ROOT) if program == "memory" else (RESULTS, ROOT / "benchmarks")
        _, *parts = re.split(r"\]\((\S+\.json)\)", page)
        below = dict(zip(parts[::2], parts[1::2], strict=True))
        paths = sorted(ROOT.glob(f"benchmarks/results/*/{program}*.json"))
        assert paths
        for path in paths:
            lines = below[path.relative_to(folder).as_posix()].splitlines()
            rows = json.loads(path.read_text())["rows"]
            assert rows
            for row in rows:
                keys = [str(row[name]) for name in names]
                (line,) = [line for line in lines if line.startswith(f"| {' | '.join(keys)} |")]
                assert f"**{row['ratio']:.2f}**" in line


def test_python_blocks_run(tmp_path, monkeypatch):
    """With a checkpoint where the first block looks for one."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    torch.save(resnext.ResNeXt50Fused().state_dict(), "resnext50_32x4d.pth")
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_digits_are_those_of_the_committed_log():
    rows = csv.DictReader((ROOT / "benchmarks/results/digits/resnet18_cifar.csv").read_text().splitlines())
    lines = [line({"epoch": int(row.pop("epoch")), **{key: float(text) for key, text in row.items()}}) for row in rows]
    assert re.findall(r"^    (Epoch:.*)$", README, re.MULTILINE) == lines


def test_commands_are_understood():
    """Of the command line, also behind torchrun."""
    commands = re.findall(
        r"(?:^    |`)(?:torchrun .* -m )?(resnext (?:train|evaluate|predict|summary|export)\b[^`#\n]*)", README, re.M
    )
    found = [shlex.split(command.replace(" ...", ""))[1:] for command in commands]
    assert len(found) > 12
    for arguments in found:
        options = parse(arguments)
        if options.command in ("train", "summary") and not options.model.startswith("runs"):
            assert options.model in resnext.list_models()


@pytest.mark.parametrize("page", ["README.md", "benchmarks/RESULTS.md", "benchmarks/ZOO.md"])
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_commands_are_targets_of_the_makefile():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = re.findall(r"^    make (\w+)", README, re.MULTILINE)
    assert commands == ["bench", "test"]
    assert set(commands) <= set(targets)
