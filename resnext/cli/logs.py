"""What a run tells of each epoch: a line, tables, curves."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnext.checkpoint_files import write_atomically
from resnext.cli import plots

Record = dict[str, Any]


def line(record: Record) -> str:
    """An epoch's line."""
    return (
        f"Epoch:{record['epoch']:2d}, Train_acc:{record['train_acc']:.1%}, Train_loss:{record['train_loss']:.3f}, "
        f"Test_acc:{record['test_acc']:.1%}, Test_loss:{record['test_loss']:.3f}, Lr:{record['lr']:.2E}"
    )


def write_logs(folder: Path, history: Sequence[Record]) -> None:
    """Write ``log.csv``, ``log.jsonl`` and ``curves.png``, each anew: so they fit the checkpoint also after a kill."""
    if not history:
        return
    write_text(folder / "log.csv", table(history))
    write_text(folder / "log.jsonl", "".join(json.dumps(record) + "\n" for record in history))
    plots.save(plots.curves(history), folder / "curves.png")


def table(rows: Sequence[Record]) -> str:
    """Rows with the same keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_atomically(path, lambda file: file.write_text(text))
