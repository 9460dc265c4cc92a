"""The results file of a recipe, and the tables made from it: python recipes/results.py R.json ... > report.md

Every finished run is on disk at once, so that a time limit loses nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WHOLE = "LongNet, whole documents"
# key of a run: (heading, scale); a table shows the keys that its runs have.
COLUMNS = {
    "accuracy": ("accuracy", 100),
    "macro_f1": ("macro F1", 100),
    "precision": ("precision", 100),
    "recall": ("recall", 100),
    "f1": ("F1", 100),
    "spans": ("span F1", 100),
    "b_cubed": ("B3 F1", 100),
    "clusters": ("cluster F1", 100),
    "relations": ("relation F1, end to end", 100),
    "relations_of_gold_entities": ("relation F1, gold entities", 100),
    "ignore_f1": ("Ign F1, gold entities", 100),
    "pairs": ("binary F1 (SciREX), end to end", 100),
    "tuples": ("4-ary F1 (SciREX), end to end", 100),
    "pairs_of_gold_entities": ("binary F1 (SciREX), gold entities", 100),
    "tuples_of_gold_entities": ("4-ary F1 (SciREX), gold entities", 100),
    "seconds": ("seconds of training", 1),
}
# Scores are repeated for documents of more bytes than these.
BORDERS = (512, 4096, 16384, 65536)
Results = dict[str, dict[str, list[dict[str, Any]]]]


def load(output: Path) -> Results:
    """Task -> row -> runs; empty without a file."""
    return json.loads(output.read_text()) if output.exists() else {}


def finished(output: Path, task: str, row: str, seed: int | None = None) -> bool:
    """Whether the file holds a run of this row and seed."""
    return any(run.get("seed") == seed for run in load(output).get(task, {}).get(row, ()))


def record(output: Path, task: str, row: str, run: dict[str, Any]) -> None:
    """Put one run into the JSON file; a run of the same row and seed is replaced. Processes side by side may share the file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_name(output.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = load(output)
        runs = results.setdefault(task, {}).setdefault(row, [])
        runs[:] = [r for r in runs if r.get("seed") != run.get("seed")] + [run]
        part = output.with_name(output.name + ".part")
        part.write_text(json.dumps(results, indent=1))
        os.replace(part, output)
    print(task, "|", row, "|", json.dumps(run), flush=True)


def by_length(
    texts: Sequence[str], measure: Callable[[list[int]], dict[str, float]]
) -> dict[str, dict[str, float]]:
    """`measure(indices)` of the documents longer than each of BORDERS that has some: {"512": {"documents": n, ...}}."""
    sizes = [len(text.encode("utf-8", "surrogateescape")) for text in texts]
    longer = {border: [i for i, size in enumerate(sizes) if size > border] for border in BORDERS}
    return {str(b): {"documents": len(own), **measure(own)} for b, own in longer.items() if own}


def report(results: Results) -> str:
    """Markdown of all tasks: scores, scores of long documents, whole against truncated."""
    parts = []
    for task, rows in results.items():
        parts += [f"### {task}", table(rows), *long_tables(rows), *comparisons(rows), machines(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def cell(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.1f}{spread}" if values else ""


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Mean and standard deviation over seeds, and their steps: on a busier machine the same seconds are fewer."""
    keys = [key for key in COLUMNS if any(key in run for runs in rows.values() for run in runs)]
    trained = any("steps" in run for runs in rows.values() for run in runs)
    headings = ["model", *(COLUMNS[key][0] for key in keys), *["steps, seed by seed"][:trained], "seeds"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for name, runs in rows.items():
        cells = [cell([COLUMNS[key][1] * run[key] for run in runs if key in run]) for key in keys]
        if trained:
            steps = sorted((run["seed"], run["steps"]) for run in runs if "steps" in run)
            cells.append(", ".join(str(n) for _, n in steps))
        lines.append(f"| {name} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def _measures(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    held = {k for runs in rows.values() for run in runs for own in run["longer_than"].values() for k in own}
    return [key for key in COLUMNS if key in held]


def long_tables(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """One table a measure: rows by how long documents are at least. Borders that leave nothing out are not shown."""
    counts = {
        b: own["documents"] for runs in rows.values() for r in runs for b, own in r["longer_than"].items()
    }
    total = max((run["documents"] for runs in rows.values() for run in runs), default=0)
    borders = [b for b, n in counts.items() if n < total]
    if not borders:
        return []
    found = []
    for measure in _measures(rows):
        heads = [f"> {int(b):,} bytes ({counts[b]} documents)" for b in borders]
        lines = [f"| {COLUMNS[measure][0]} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for name, runs in rows.items():
            cells = [cell([100 * run["longer_than"][b][measure] for run in runs]) for b in borders]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        found.append("\n".join(lines))
    return found


def comparisons(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The whole-document model minus every truncated one, seed by seed, on documents longer than the truncation."""
    whole = {run["seed"]: run for run in rows.get(WHOLE, ())}
    lines = []
    for name, runs in rows.items():
        for measure in _measures(rows):
            pairs = [
                (whole[run["seed"]]["longer_than"][border][measure], run["longer_than"][border][measure])
                for run in runs
                if (border := str(run.get("bytes"))) in run["longer_than"] and run["seed"] in whole
            ]
            if pairs:
                better = sum(a > b for a, b in pairs)
                lines.append(
                    f"- {COLUMNS[measure][0]}, whole minus {name.removeprefix('LongNet, ')}, on documents longer than that:"
                    f" {cell([100 * (a - b) for a, b in pairs], '+')}; whole is better in {better} of {len(pairs)} seeds"
                )
    return ["\n".join(lines)] if lines else []


def machines(rows: dict[str, list[dict[str, Any]]]) -> str:
    return "Machine: " + "; ".join(sorted({run["machine"] for runs in rows.values() for run in runs})) + "."


if __name__ == "__main__":
    merged: Results = {}
    for path in sys.argv[1:]:
        merged.update(load(Path(path)))
    print(report(merged), end="")
