"""Tables and picture of the long-text comparison: python recipes/long_text_report.py runs/long-text/long_text.json"""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

MEASURES = {"equal_bytes": "equal bytes", "equal_seconds": "equal seconds of training"}


def report(path: Path) -> str:
    """Write Markdown and picture beside the JSON file; returns the Markdown."""
    data = json.loads(path.read_text())
    if not data["rows"]:
        return "no model has finished"
    text = "\n\n".join((conditions(data), *(table(data, measure) for measure in MEASURES))) + "\n"
    path.with_suffix(".md").write_text(text)
    draw(data, path.with_suffix(".png"))
    return text


def conditions(data: dict) -> str:
    setting, where, row = data["setting"], data["environment"], data["rows"][0]
    return (
        f"Bits per byte of {len(row['equal_bytes']['bits'])} held-out windows of {setting['length']} bytes, by position; "
        f"{row['parameters'] / 1e6:.1f} million parameters; {where['machine']}, torch {where['torch']}. Against dense: the mean"
        " difference over the windows and its standard error. Keys: what the last byte of a window sees."
    )


def whole(data: dict, bits: list[list[float]]) -> np.ndarray:
    """Bits per byte of every window."""
    return np.array(bits) @ np.diff(data["borders"]) / data["borders"][-1]


def against(data: dict, row: dict, base: dict | None, measure: str) -> str:
    """Difference to the dense model of the same seed over the same windows, with its standard error."""
    if base is None or base is row:
        return "" if base is None else "0"
    difference = whole(data, row[measure]["bits"]) - whole(data, base[measure]["bits"])
    error = difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
    return f"{difference.mean():+.4f} ± {error:.4f}"


def shown(rows: list[dict], measure: str) -> list[dict]:
    """The rows of a table; after equal seconds also what a model has whose router mix was left at 1."""
    if measure != "equal_seconds":
        return rows
    kept = [
        row | {"model": f"{row['model']}, mix 1", measure: row["mix_kept"]}
        for row in rows
        if "mix_kept" in row
    ]
    return [*rows, *kept]


def table(data: dict, measure: str) -> str:
    borders = data["borders"]
    spans = [f"{a} to {b}" for a, b in pairwise(borders)]
    head = f"| {MEASURES[measure]} | keys | MB read | seconds | all | against dense | {' | '.join(spans)} |"
    lines = [head, "|---" * (len(spans) + 6) + "|"]
    rows = sorted(
        shown(data["rows"], measure), key=lambda row: (row["seed"], whole(data, row[measure]["bits"]).mean())
    )
    for row in rows:
        base = next((r for r in rows if r["model"] == "dense" and r["seed"] == row["seed"]), None)
        found = row[measure]
        name = row["model"] if len({r["seed"] for r in rows}) == 1 else f"{row['model']}, seed {row['seed']}"
        cells = [
            name,
            f"{100 * row['keys_share']:.1f} %",
            f"{found['bytes'] / 1e6:.1f}",
            f"{found['seconds']:.0f}",
        ]
        cells += [
            f"{whole(data, found['bits']).mean():.4f}",
            against(data, row, base, measure),
        ]
        cells += [f"{x:.3f}" for x in np.mean(found["bits"], 0)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(data: dict, path: Path) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no picture")
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    borders = data["borders"]
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        for name in dict.fromkeys(row["model"] for row in data["rows"]):
            mine = [np.mean(row[measure]["bits"], 0) for row in data["rows"] if row["model"] == name]
            axis.plot(borders[1:], np.mean(mine, 0), marker="o", markersize=4, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("end of the position bucket, bytes")
        axis.set_title(title)
    axes[0].set_ylabel("bits per byte")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    print(report(Path(sys.argv[1])))
