"""Tables and pictures of the tasks' results, each beside its file: python recipes/recall_report.py docs/recall/recall.json .."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


def report(path: Path) -> str:
    """Write the Markdown tables and the picture beside the JSON file; returns the Markdown."""
    results = json.loads(path.read_text()) if path.exists() else {"rows": []}
    if not results["rows"]:
        return "no run has finished"
    rows = results["rows"]
    names = list(dict.fromkeys(row["model"] for row in rows))
    lengths = list(rows[0]["accuracy"])
    parts = (
        conditions(results),
        by_length(rows, names, lengths),
        by_opened(rows, lengths),
        by_mix(rows),
        agreement(rows),
    )
    text = "\n\n".join(part for part in parts if part) + "\n"
    path.with_suffix(".md").write_text(text)
    draw(rows, names, lengths, results["setting"], path.with_suffix(".png"))
    return text


def conditions(results: dict) -> str:
    setting, where = results["setting"], results["environment"]
    grown = ", short ones first" if setting["grow"] else ""
    return (
        f"{setting['task'].capitalize()}: {setting['steps']} steps of {setting['tokens']} tokens, texts of up to"
        f" {setting['length']}{grown}; {where['machine']}, torch {where['torch']}; taps at first {setting['taps']}."
        " Accuracy by tokens of the text, mean (least to most) over seeds; keys: what the last token sees of a text of the"
        " trained length."
    )


def values(rows: list[dict], name: str, length: str) -> list[float]:
    return [row["accuracy"][length]["accuracy"] for row in rows if row["model"] == name]


def cell(found: list[float]) -> str:
    mean = f"{statistics.mean(found):.3f}"
    return mean if len(found) == 1 else f"{mean} ({min(found):.3f} to {max(found):.3f})"


def by_length(rows: list[dict], names: list[str], lengths: list[str]) -> str:
    lines = [f"| model | keys | seeds | {' | '.join(lengths)} |", "|---" * (len(lengths) + 3) + "|"]
    for name in names:
        mine = [row for row in rows if row["model"] == name]
        cells = " | ".join(cell(values(rows, name, length)) for length in lengths)
        lines.append(f"| {name} | {100 * mine[0]['keys_share']:.1f} % | {len(mine)} | {cells} |")
    return "\n".join(lines)


def by_opened(rows: list[dict], lengths: list[str]) -> str:
    """One trained model, other numbers of opened blocks."""
    changed = [row for row in rows if "opened_after_training" in row]
    if not changed:
        return ""
    head = f"| {changed[0]['model']}, tested with | {' | '.join(lengths)} |"
    lines = [head, "|---" * (len(lengths) + 1) + "|"]
    for opened in changed[0]["opened_after_training"]:
        found = [
            [row["opened_after_training"][opened][length]["accuracy"] for row in changed]
            for length in lengths
        ]
        lines.append(f"| {opened} blocks opened | {' | '.join(map(cell, found))} |")
    return "\n".join(lines)


def by_mix(rows: list[dict]) -> str:
    """The same trained model, other router mixes."""
    changed = [row for row in rows if "mix_after_training" in row]
    found = []
    for mix in changed[0]["mix_after_training"] if changed else ():
        found.append(
            f"{cell([row['mix_after_training'][mix]['accuracy'] for row in changed])} with mix {mix}"
        )
    return f"At the trained length {changed[0]['model']} reaches, tested {', '.join(found)}." if found else ""


def agreement(rows: list[dict]) -> str:
    """Accuracy by the kernels and by plain tensor operations, over the same texts at the trained length."""
    pairs = [(row, row["accuracy_without_triton"]) for row in rows if "accuracy_without_triton" in row]
    if not pairs:
        return ""
    worst = max(abs(next(iter(row["accuracy"].values()))["accuracy"] - other["accuracy"]) for row, other in pairs)  # fmt: skip
    return (
        f"Tested again without Triton kernels, {len(pairs)} models differ in accuracy by at most {worst:.4f}."
    )


def draw(rows: list[dict], names: list[str], lengths: list[str], setting: dict, path: Path) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no picture")
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    x = [int(n) for n in lengths]
    for name in names:
        found = [values(rows, name, n) for n in lengths]
        (line,) = left.plot(x, [statistics.mean(f) for f in found], marker="o", markersize=4, label=name)
        for seed in zip(*found, strict=True) if len(found[0]) > 1 else ():
            left.plot(x, seed, color=line.get_color(), linewidth=0.7, alpha=0.6)
    left.axvline(setting["length"], color="grey", linestyle=":")
    left.set_xscale("log", base=2)
    left.set_xlabel("tokens (dotted: the longest in training; thin: each seed)")
    left.set_ylabel("accuracy")
    left.set_title(setting["task"])
    left.legend(fontsize=7)
    split = [(name.removeprefix("opened-"), name) for name in names]
    trained = [
        (int(k), name) for k, name in split if k.isdigit()
    ]  # trained with as many, nothing else changed
    for length, style in ((lengths[0], "-"), (lengths[-1], "--")):
        if trained:
            means = [statistics.mean(values(rows, name, length)) for _, name in trained]
            right.plot(
                [k for k, _ in trained], means, style, marker="o", label=f"trained with k, {length} tokens"
            )
        changed = [row for row in rows if "opened_after_training" in row]
        if changed:
            budgets = list(changed[0]["opened_after_training"])
            means = [
                statistics.mean(
                    row["opened_after_training"][k][length]["accuracy"] for row in changed
                )
                for k in budgets
            ]  # fmt: skip
            label = f"{changed[0]['model']} tested with k, {length} tokens"
            right.plot([int(k) for k in budgets], means, style, marker="s", label=label)
    right.set_xscale("log", base=2)
    right.set_xlabel("blocks opened")
    if right.lines:
        right.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(report(Path(name)))
