"""The distributions: what is in them, and that the wheel works where it is installed.

Built without a compiler, in seconds; `make wheel` does the same with the extension.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import resnext

from . import wheel

ROOT = Path(__file__).parent.parent
BUILD_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
FOLDERS = ("csrc", "kernels", "resnext")
NAME = f"resnext-{resnext.__version__}"


def files(folder: str, *patterns: str) -> set[str]:
    """What the checkout has in a folder; resnext/kernels is a symlink, which some versions of Python follow."""
    paths = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in (ROOT / folder).rglob(pattern)}
    return {path for path in paths if not path.startswith("resnext/kernels/") and (ROOT / path).is_file()}


PACKAGE = files("resnext", "*.py", "*.pyi", "py.typed") | files("kernels", "*.py", "*.json")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and with the wheel built from that."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        leave_out = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=leave_out)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist)]
    env = os.environ | {"CXX": "no-such-compiler"}
    result = subprocess.run(command, cwd=source, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    assert "resnext: installing without the C++ extension: no C++ compiler" in result.stdout
    return dist


def test_source_distribution_has_what_builds_the_package(built):
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        names = {member.name.removeprefix(f"{NAME}/") for member in archive.getmembers() if member.isfile()}
    generated = {"PKG-INFO", "setup.cfg"} | {name for name in names if name.startswith("resnext.egg-info/")}
    assert names - generated == PACKAGE | files("csrc", "*") | set(BUILD_FILES)


def test_wheel_has_every_module_and_nothing_else(built):
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"{NAME}.dist-info/METADATA").decode().splitlines()
        assert archive.read(f"{NAME}.dist-info/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert names == {f"resnext/{name}" if name.startswith("kernels/") else name for name in PACKAGE}
    required = [line for line in metadata if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.11"]


def test_wheel_works_where_it_is_installed(built, tmp_path):
    python = wheel.environment(tmp_path / "environment", sys.executable)
    wheel.install(built / f"{NAME}-py3-none-any.whl", python)
    assert wheel.smoke(python).startswith(f"resnext {resnext.__version__} without the extension, on torch ")
