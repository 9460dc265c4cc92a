"""The results file of a recipe: every finished run is on disk at once, so that a time limit loses nothing."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

# key of a run: (heading, scale); a table shows the keys that its runs have.
COLUMNS = {
    "accuracy": ("accuracy", 100),
    "macro_f1": ("macro F1", 100),
    "accuracy_long": ("accuracy, > 4,096 bytes", 100),
    "precision": ("precision", 100),
    "recall": ("recall", 100),
    "f1": ("F1", 100),
    "spans": ("span F1", 100),
    "b_cubed": ("B3 F1", 100),
    "clusters": ("cluster F1", 100),
    "relations": ("relation F1, end to end", 100),
    "relations_of_gold_entities": ("relation F1, gold entities", 100),
    "ignore_f1": ("Ign F1, gold entities", 100),
    "seconds": ("seconds of training", 1),
}


def record(output: Path, task: str, row: str, run: dict[str, Any]) -> None:
    """Put one run into the JSON file (a run of the same row and seed is replaced) and write the tables beside it as .md."""
    results = json.loads(output.read_text()) if output.exists() else {}
    runs = results.setdefault(task, {}).setdefault(row, [])
    runs[:] = [r for r in runs if r.get("seed") != run.get("seed")] + [run]
    _replace(output, json.dumps(results, indent=1))
    _replace(output.with_suffix(".md"), "\n\n".join(table(t, rows) for t, rows in results.items()) + "\n")
    print(task, "|", row, "|", json.dumps(run), flush=True)


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def table(task: str, rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: mean and standard deviation over seeds."""
    keys = [key for key in COLUMNS if any(key in run for runs in rows.values() for run in runs)]
    headings = ["model", *(COLUMNS[key][0] for key in keys), "seeds"]
    lines = [f"### {task}", "", f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for name, runs in rows.items():
        cells = []
        for key in keys:
            values = [COLUMNS[key][1] * run[key] for run in runs if key in run]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1f}{spread}" if values else "")
        if any(cells[:-1]):
            lines.append(f"| {name} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)
