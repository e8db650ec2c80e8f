"""Rewrite the tables in README.md and ZOO.md from the committed results, so that no figure there is typed by hand.

python benchmarks/readme.py            rewrite
python benchmarks/readme.py --check    say whether they are up to date (exit code 1 if not)
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
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "ZOO.md")
RESULTS = Path(__file__).resolve().parent / "results"
# In a page: <!-- results: <file below results/> --> ... <!-- end of results -->
SECTION = re.compile(r"(<!-- results: (?P<path>\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
PASSES = ("fwd", "dgrad", "wgrad")


def _about(result: Mapping[str, Any]) -> str:
    """What a run ran on."""
    about = result["environment"]
    machine = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads"
    return f"{machine}; torch {about['torch']}; {result['arguments']['dtype'].removeprefix('torch.')}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def convolutions(result: Mapping[str, Any]) -> list[str]:
    """One run of grouped_conv.py: a line per layer, the means."""
    cells: dict[str, dict[str, str]] = {}
    for row in result["rows"]:
        ours, theirs = (row["seconds"][name]["median"] * 1e3 for name in ("ours", row["fastest_baseline"]))
        cells.setdefault(row["layer"], {})[row["pass"]] = f"{ours:.2f} / {theirs:.2f} / **{row['ratio']:.2f}**"
    rows = [[layer, *(passes.get(name, "-") for name in PASSES)] for layer, passes in cells.items()]
    means = ["geometric mean", *(f"**{result['geometric_means'][name]:.2f}**" for name in PASSES)]
    return [
        f"{_about(result)}, batch {result['arguments']['batch']}. "
        "Milliseconds: ours / PyTorch's fastest layout / **ratio** (above 1 we are faster).",
        "",
        *_table(["layer", *PASSES], [*rows, means]),
    ]


def networks(result: Mapping[str, Any]) -> list[str]:
    """One run of model.py: a line per model, mode and batch size, a column per contender."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["seconds"]))
    rows = []
    for row in result["rows"]:
        times = [f"{row['seconds'][name]['median'] * 1e3:.0f}" if name in row["seconds"] else "-" for name in names]
        rows.append([row["model"], row["mode"], str(row["batch"]), *times, f"**{row['ratio']:.2f}**"])
    return [
        f"{_about(result)}, {result['arguments']['size']} pixels. Median milliseconds of a step; "
        "**ratio**: PyTorch's fastest over our fastest (above 1 we are faster).",
        "",
        *_table(["model", "mode", "batch", *names, "ratio"], rows),
    ]


def memory(result: Mapping[str, Any]) -> list[str]:
    """One run of memory.py: a line per model and batch size, a column per contender."""
    names = list(result["rows"][0]["peak_bytes"])
    rows = [
        [
            *(row["model"], str(row["batch"])),
            *(f"{row['peak_bytes'][name] / 1e6:.0f}" for name in names),
            f"**{row['ratio']:.2f}**",
        ]
        for row in result["rows"]
    ]
    return [
        f"{_about(result)}, {result['arguments']['size']} pixels. Peak megabytes of a training step, beyond parameters "
        "and optimizer; **ratio**: the least of PyTorch's over ours.",
        "",
        *_table(["model", "batch", *names, "ratio"], rows),
    ]


def zoo(result: Mapping[str, Any]) -> list[str]:
    """One run of zoo.py: a line per network."""

    def error(row: Mapping[str, Any], kind: str) -> str:
        if kind not in row["errors"]:
            return "-"
        difference, rounding = (row["errors"][kind][name] for name in ("difference", "rounding"))
        return f"{difference:.0e}" if rounding is None else f"{difference:.0e} ({rounding:.0e})"

    rows = [
        [
            *(row["name"], str(row["size"]), str(row["blocks"]), str(row["chains"]), str(row["convolutions"])),
            str(sum(row["skipped"].values())),
            *(error(row, kind) for kind in ("logits", "gradients")),
            f"{row['seconds']:.2f}",
            row["failure"] or row["note"],
        ]
        for row in result["rows"]
    ]
    header = ["network", "pixels", "blocks", "chains", "convolutions", "skipped", "logits", "gradients", "s", ""]
    return [
        f"{_about(result)}, batch {result['arguments']['batch']}. Relative errors against the unconverted network, in "
        "parentheses its own against float64; seconds of the conversion.",
        "",
        *_table(header, rows),
    ]


KINDS = {"grouped_conv": convolutions, "model": networks, "memory": memory, "zoo": zoo}


def section(path: str, result: Mapping[str, Any]) -> str:
    """A file of results as Markdown; the program that wrote it is the beginning of its name."""
    (kind,) = (kind for name, kind in KINDS.items() if Path(path).stem.startswith(name))
    return "\n".join(kind(result)) + "\n"


def rewritten(text: str) -> str:
    """A page's text with every results section made anew."""

    def replace(match: re.Match[str]) -> str:
        return match[1] + section(match["path"], json.loads((RESULTS / match["path"]).read_text())) + match[3]

    return SECTION.sub(replace, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 if ``--check`` finds a page out of date."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a page is out of date")
    args = parser.parse_args(argv)
    outdated = [page for page in PAGES if page.read_text() != rewritten(page.read_text())]
    for page in outdated:
        if args.check:
            print(f"{page.name}: the tables differ from benchmarks/results; run python benchmarks/readme.py")
        else:
            page.write_text(rewritten(page.read_text()))
    return int(args.check and bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
