"""Rewrite the tables in README.md from the committed results, so that no figure there is typed by hand.

python benchmarks/readme.py            rewrite
python benchmarks/readme.py --check    say whether README.md is up to date (exit code 1 if not)
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = Path(__file__).resolve().parent / "results"
# In README.md: <!-- results: <file below results/> --> ... <!-- end of results -->
SECTION = re.compile(r"(<!-- results: (?P<path>\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
PASSES = ("fwd", "dgrad", "wgrad")


def section(result: Mapping[str, Any]) -> str:
    """One run of grouped_conv.py as Markdown: what it ran on, a line per layer, the means."""
    about, arguments = result["environment"], result["arguments"]
    machine = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads"
    dtype = arguments["dtype"].removeprefix("torch.")
    cells: dict[str, dict[str, str]] = {}
    for row in result["rows"]:
        ours, theirs = (row["seconds"][name]["median"] * 1e3 for name in ("ours", row["fastest_baseline"]))
        cells.setdefault(row["layer"], {})[row["pass"]] = f"{ours:.2f} / {theirs:.2f} / **{row['ratio']:.2f}**"
    means = result["geometric_means"]
    lines = [
        f"{machine}; torch {about['torch']}; {dtype}, batch {arguments['batch']}. "
        "Milliseconds: ours / PyTorch's fastest layout / **ratio** (above 1 we are faster).",
        "",
        "| layer | " + " | ".join(PASSES) + " |",
        "|---|" + "---|" * len(PASSES),
        *(
            f"| {layer} | " + " | ".join(passes.get(name, "-") for name in PASSES) + " |"
            for layer, passes in cells.items()
        ),
        "| geometric mean | " + " | ".join(f"**{means[name]:.2f}**" for name in PASSES) + " |",
    ]
    return "\n".join(lines) + "\n"


def rewritten(text: str) -> str:
    """README.md's text with every results section made anew."""

    def replace(match: re.Match[str]) -> str:
        return match[1] + section(json.loads((RESULTS / match["path"]).read_text())) + match[3]

    return SECTION.sub(replace, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 if ``--check`` finds README.md out of date."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if README.md is out of date")
    args = parser.parse_args(argv)
    before = README.read_text()
    after = rewritten(before)
    if args.check:
        if before != after:
            print("README.md: the tables differ from benchmarks/results; run python benchmarks/readme.py")
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
