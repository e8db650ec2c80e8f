"""Rewrite the results in the pages and the pictures beside the committed JSON: no figure is typed by hand.

python benchmarks/readme.py            rewrite
python benchmarks/readme.py --check    say whether they are up to date (exit code 1 if not)

README.md has the summary, RESULTS.md every row, ZOO.md the converted networks. Every folder below benchmarks/results
is a device, and the program that wrote a file is the beginning of its name; launch settings are those of
kernels/tuned. In a page, <!-- results: NAME --> ... <!-- end of results --> holds what `SECTIONS` makes of all of them.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import plots
import tables
from tables import Run

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "benchmarks/RESULTS.md", "benchmarks/ZOO.md")
SECTION = re.compile(r"(<!-- results: (?P<name>\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


@dataclass(frozen=True)
class Repository:
    """The committed results, with paths as links from one page.

    Attributes:
        root: Its root.
        folder: Where the page lies, below the root.
    """

    root: Path
    folder: str = "."

    def link(self, path: Path) -> PurePosixPath:
        """A file as linked from the page, which lies above all that it links to."""
        return PurePosixPath(path.relative_to(self.root / self.folder).as_posix())

    def runs(self, program: str) -> list[Run]:
        """Every result of a program that has rows, of all devices: largest images and batches first, then by name."""
        paths = self.root.glob(f"benchmarks/results/*/{program}*.json")
        runs = [Run(self.link(path), json.loads(path.read_text())) for path in paths]

        def order(run: Run) -> tuple[int, int, PurePosixPath]:
            return -int(run.result["arguments"].get("size", 0)), -max(run.batches), run.path

        return sorted((run for run in runs if run.result.get("rows")), key=order)


def picture(run: Run) -> PurePosixPath:
    """Where the picture of a run of grouped_conv.py or model.py lies."""
    roofline = run.path.name.startswith("grouped_conv")
    return run.path.with_name(f"{run.path.stem}{'_roofline' if roofline else ''}.svg")


def pictures(root: Path) -> Mapping[Path, plots.Roofline | plots.BarChart]:
    """File -> what it shows."""
    results = Repository(root)
    rooflines = {root / picture(run): plots.roofline(run.result) for run in results.runs("grouped_conv")}
    return rooflines | {root / picture(run): plots.bars(run.result) for run in results.runs("model")}


def _picture(run: Run) -> str:
    shows = "Roofline plot: operations per second over operations per byte of each layer and pass"
    if not run.path.name.startswith("grouped_conv"):
        shows = "Bar chart: milliseconds per step of ours and of PyTorch's"
    return f"![{tables.escaped(f'{shows}, {run.title}')}]({picture(run)})"


def _collapsed(summary: str, *paragraphs: str) -> list[str]:
    """Markdown inside is rendered only after an empty line."""
    return [f"<details>\n<summary>{html.escape(summary, quote=False)}</summary>", *paragraphs, "</details>"]


def _grouped(runs: Sequence[Run]) -> list[str]:
    return [
        "**Grouped 3x3 convolutions**, fwd / dgrad / wgrad: the time of PyTorch's fastest layout over ours (above 1 we "
        "are faster), geometric mean over a network's distinct layers.",
        tables.means(runs),
        "\n".join(f"* {run.source}" for run in runs),
        _picture(runs[0]),
    ]


def _networks(runs: Sequence[Run]) -> list[str]:
    paragraphs = [
        "**Whole networks**: median time of a step, bars from the 20th to the 80th percentile; ratio: PyTorch's "
        "fastest over our fastest (above 1 we are faster)."
    ]
    return paragraphs + _each(runs, _picture)


def _memory(runs: Sequence[Run]) -> list[str]:
    paragraphs = [
        "**Memory**: peak megabytes of a training step, beyond parameters and optimizer; ratio: the least of PyTorch's "
        "over ours."
    ]
    return paragraphs + _each(runs, tables.memory)


def _kernel_times(runs: Sequence[Run]) -> list[str]:
    paragraphs = [
        "**Kernels of a step**, in milliseconds, eager, by PyTorch's profiler. What a step takes beyond its kernels, "
        "and a step of two images, is what Python and PyTorch need to start them."
    ]
    return paragraphs + _each(runs, tables.kernel_times)


def _each(runs: Sequence[Run], write: Callable[[Run], str]) -> list[str]:
    return [paragraph for run in runs for paragraph in (run.source, write(run))]


def _settings(results: Repository) -> list[str]:
    paragraphs = []
    for path in sorted(results.root.glob("kernels/tuned/*.json")):
        measured = json.loads(path.read_text())
        if entries := [entry for entry in measured["entries"] if entry["kernel_size"] == 3]:
            commits = sorted({entry["measured"]["commit"][:10] for entry in entries})
            paragraphs += [
                f"**Measured launch settings** ([{path.name}]({results.link(path)}), "
                f"{tables.escaped(measured['device'])}, commits {', '.join(commits)}) of grouped 3x3 convolutions, in "
                "microseconds: our fastest / PyTorch's faster layout / **ratio**, and which backend serves. In "
                "training and inference with what blocks fuse; PyTorch's then with separate passes of ours. What these "
                "times are worth: [NOTES](benchmarks/NOTES.md#gpu).",
                tables.settings(measured),
            ]
    return paragraphs


def _heading(device: str) -> str:
    return device.replace("_", " ").upper()


def performance(results: Repository) -> list[str]:
    """Of every device: grouped convolutions, networks, memory. And of all together: what is not faster."""
    kinds = {"grouped_conv": _grouped, "model": _networks, "memory": _memory, "kernel_times": _kernel_times}
    found = {program: results.runs(program) for program in (*kinds, "block")}
    every = [run for runs in found.values() for run in runs]
    paragraphs = []
    for device in sorted({run.device for run in every}):
        paragraphs.append(f"### {_heading(device)}")
        for program, write in kinds.items():
            if runs := [run for run in found[program] if run.device == device]:
                paragraphs += write(runs)
    if not any("gpu" in run.result["environment"] for run in every):
        paragraphs += ["### GPU", "Not yet measured."]
    if settings := _settings(results):
        paragraphs += ["### Launch settings", *settings]
    counted, *slower = tables.not_faster([run for name in ("grouped_conv", "block", "model") for run in found[name]])
    paragraphs += ["### What is not faster", counted]
    return paragraphs + (_collapsed(f"Those below {tables.CLEARLY_SLOWER}", *slower) if slower else [])


def _layers(runs: Sequence[Run]) -> list[str]:
    paragraphs = ["Grouped 3x3 convolutions in milliseconds: ours / PyTorch's fastest layout / **ratio**."]
    for run in runs:
        paragraphs += [f"### {tables.escaped(run.title)}", run.source, _picture(run), tables.convolutions(run)]
    return paragraphs


def _steps(runs: Sequence[Run]) -> list[str]:
    return ["Steps of whole networks in milliseconds.", *_each(runs, tables.networks)]


def rows(results: Repository) -> list[str]:
    """Of every device each layer and network."""
    kinds = {"grouped_conv": ("grouped 3x3 convolutions", _layers), "model": ("networks", _steps)}
    found = {program: results.runs(program) for program in kinds}
    paragraphs = []
    for device in sorted({run.device for runs in found.values() for run in runs}):
        for program, (what, write) in kinds.items():
            if runs := [run for run in found[program] if run.device == device]:
                paragraphs += [f"## {_heading(device)}: {what}", *write(runs)]
    return paragraphs


def zoo(results: Repository) -> list[str]:
    """Every run of zoo.py."""
    paragraphs = []
    for run in results.runs("zoo"):
        paragraphs += [
            f"{tables.escaped(run.title)}: {run.machine}. Relative errors against the unconverted network, in "
            "parentheses its own against float64; seconds of the conversion.",
            tables.zoo(run),
        ]
    return paragraphs


SECTIONS: Mapping[str, Callable[[Repository], list[str]]] = {"performance": performance, "rows": rows, "zoo": zoo}


def rewritten(text: str, results: Repository) -> str:
    """A page's text with its sections made anew."""

    def replace(match: re.Match[str]) -> str:
        return match[1] + "\n\n".join(SECTIONS[match["name"]](results)) + "\n" + match[3]

    return SECTION.sub(replace, text)


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line; returns 0, or 1 if ``--check`` finds a page or a picture out of date."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if anything is out of date")
    args = parser.parse_args(argv)
    new_pages = {}
    for name in PAGES:
        old = (root / name).read_text()
        text = rewritten(old, Repository(root, str(PurePosixPath(name).parent)))
        if text != old:
            new_pages[root / name] = text
    new_pictures = {path: plot for path, plot in pictures(root).items() if not plots.is_current(path, plot)}
    if args.check:
        for path in (*new_pages, *new_pictures):
            print(f"{path.relative_to(root)}: differs from benchmarks/results; run python benchmarks/readme.py")
        return int(bool(new_pages or new_pictures))
    for path, text in new_pages.items():
        path.write_text(text)
    for path, plot in new_pictures.items():
        plots.write(path, plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
