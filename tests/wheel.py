"""Installs a wheel into a fresh environment, with whatever torch some interpreter has, and tries it there.

python -m tests.wheel dist/resnext-0.1.0-cp310-abi3-linux_x86_64.whl --interpreter other-venv/bin/python
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

SMOKE = Path(__file__).with_name("smoke.py")


def environment(folder: Path, interpreter: str) -> str:
    """Make a virtual environment that sees the packages beside the interpreter's torch; downloads nothing."""
    subprocess.run([interpreter, "-m", "venv", "--without-pip", folder], check=True)
    python = str(folder / "bin" / "python")
    packages = output(interpreter, "-c", "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])")
    site = output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    Path(site, "borrowed.pth").write_text(packages + "\n")
    return python


def install(wheel: Path, python: str) -> None:
    """Install the wheel and nothing else, even if the borrowed packages include an editable one of its name."""
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--force-reinstall", wheel], check=True)


def output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def smoke(python: str) -> str:
    """Run the smoke test on what is installed: isolated, so that no checkout and no PYTHONPATH comes first."""
    return output(python, "-I", str(SMOKE))


def check_types(python: str, folder: Path) -> None:
    """Type-check the smoke test as a user's file, against what is installed; elsewhere, or mypy sees the checkout."""
    user = folder / "user.py"
    user.write_text(SMOKE.read_text())
    # Calling a torch module gives Any, as torch declares it.
    strict = ["--strict", "--no-warn-return-any", "--cache-dir", ".mypy_cache", "--python-executable", python]
    subprocess.run([sys.executable, "-m", "mypy", *strict, user.name], cwd=folder, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--interpreter", default=sys.executable, help="whose torch to use (default: this one's)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = environment(Path(folder, "environment"), arguments.interpreter)
        install(arguments.wheel, python)
        print(smoke(python))
        check_types(python, Path(folder))


if __name__ == "__main__":
    main()
