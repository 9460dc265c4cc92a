"""Real text at long context: bits per byte of books by position, dense against dilated, local and hierarchical attention.

All models have the same parameters and initial weights and read the same windows. Each trains once at a constant rate and is
measured twice, each time after a linear descent of the rate to zero over the last fifth: after the same number of bytes (what
the slowest model of the first call reads in its time), and after the same seconds of training. While the rate falls, the router
mix falls from 1 to a half; a model that opens blocks is also measured after the same seconds with its mix left at 1. Results are
written after every model; the same command goes on where it was stopped.

    python recipes/long_text.py --data BOOKS --out runs/long-text --budget-minutes 9       # BOOKS: train, validation .jsonl.gz
    python recipes/long_text.py --data BOOKS --out /tmp/long-text --reduced --budget-minutes 1     # two cores
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from classification import read_lines
from long_text_report import report
from variants import REACH, Variant, build, dense, lower_mix

from longnet import DilatedPattern, HierarchicalPattern, LongNetForCausalLM
from longnet.text import VOCAB_SIZE, encode

# Share of the bytes, or of the time, over which the learning rate falls to zero.
DESCENT = 0.2
WARMUP = 30
# Steps that kernels are compiled by.
WARM = 3
# Of the budget, for training; the rest measures.
SHARE = 0.9
# Steps between two looks at the clock, each of which waits for the device.
LOOK = 5


@dataclass(frozen=True)
class Setting:
    """What a result depends on, but for the time."""

    length: int
    batch: int
    learning_rate: float
    windows: int
    size: dict
    tree: HierarchicalPattern
    device: str

    def variants(self) -> dict[str, Variant]:
        segments = tuple(self.length // 16 * 4**i for i in range(3))
        named = [
            dense("dense", self.tree),
            Variant("hierarchical", self.tree),
            Variant("hierarchical, heads of different reach", self.tree, far_bias=REACH),
            Variant("dilated", self.tree, DilatedPattern(segments, (1, 4, 16))),
            Variant("local", replace(self.tree, top_k=0), summaries=False),
            Variant("summaries", replace(self.tree, top_k=0)),
        ]
        return {variant.name: variant for variant in named}

    def autocast(self):
        on_gpu = self.device.startswith("cuda")
        return torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()


class Books:
    """Whole texts, one after the other on the device; windows never cross from one into the next."""

    def __init__(self, path: Path, length: int, device: str) -> None:
        texts = [encode(record["text"]) for record in read_lines(path)]
        texts = [text for text in texts if len(text) > length]
        if not texts:
            raise ValueError(f"{path}: expected a text of more than {length} bytes; give a shorter --length")
        self.ids = torch.from_numpy(np.concatenate(texts).astype(np.int16)).to(device)
        sizes = np.array([len(text) for text in texts])
        self.first = np.cumsum([0, *sizes[:-1]])
        self.starts = sizes - length  # places where a window and one byte more fit
        self.length = length

    def sample(self, batch: int, generator: np.random.Generator) -> torch.Tensor:
        """(batch, length + 1) ids, every window of every text equally likely."""
        border = np.cumsum(self.starts)
        at = generator.integers(border[-1], size=batch)
        text = np.searchsorted(border, at, side="right")
        return self._cut(self.first[text] + at - (border - self.starts)[text])

    def spread(self, count: int) -> torch.Tensor:
        """(count or fewer, length + 1): windows without overlap, evenly spread."""
        texts = zip(self.first, self.starts, strict=True)
        every = np.concatenate([first + np.arange(0, n, self.length) for first, n in texts])
        return self._cut(every[np.unique(np.linspace(0, len(every) - 1, count).round().astype(int))])

    def _cut(self, begin: np.ndarray) -> torch.Tensor:
        begin = torch.from_numpy(begin).to(self.ids.device)
        return self.ids[begin[:, None] + torch.arange(self.length + 1, device=self.ids.device)].long()


@torch.no_grad()
def bits(model: LongNetForCausalLM, windows: torch.Tensor, setting: Setting) -> list[list[float]]:
    """Mean bits per byte of every window (row) in position buckets that double from 256."""
    borders = buckets(setting.length)
    rows = []
    for window in windows.split(1):
        with setting.autocast():
            loss = model.token_losses(window[:, :-1], targets=window[:, 1:])[0] / math.log(2)
        rows.append(torch.stack([loss[begin:end].mean() for begin, end in pairwise(borders)]))
    return torch.stack(rows).tolist()


def buckets(length: int) -> list[int]:
    borders = [0, min(256, length)]
    while borders[-1] < length:
        borders.append(min(length, 2 * borders[-1]))
    return borders


class Run:
    """One model in training; `seconds` counts nothing but its steps."""

    def __init__(self, variant: Variant, seed: int, setting: Setting, books: Books) -> None:
        self.setting, self.books = setting, books
        self.model = build(variant, seed, **setting.size).to(setting.device)
        weights = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in weights if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = setting.device.startswith("cuda")
        self.optimizer = torch.optim.AdamW(groups, setting.learning_rate, betas=(0.9, 0.95), fused=fused)
        self.generator = np.random.default_rng(seed)
        self.steps, self.seconds, self.curve = 0, 0.0, []

    @property
    def bytes(self) -> int:
        return self.steps * self.setting.batch * self.setting.length

    def steps_of(self, count: int, rate: Callable[[], float] = lambda: 1.0) -> None:
        """`count` steps at `rate()` of the learning rate, timed."""
        began = time.perf_counter()
        for _ in range(count):
            factor = min(1.0, (self.steps + 1) / WARMUP) * rate()
            for group in self.optimizer.param_groups:
                group["lr"] = self.setting.learning_rate * factor
            ids = self.books.sample(self.setting.batch, self.generator)
            with self.setting.autocast():
                loss = self.model.token_losses(ids[:, :-1], targets=ids[:, 1:]).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1
        last = loss.item() / math.log(2)  # waits for the device
        self.seconds += time.perf_counter() - began
        self.curve.append((self.bytes, round(self.seconds, 3), last))
        if not math.isfinite(last):
            raise ValueError(f"the loss is {last} after {self.bytes} bytes; lower --learning-rate")

    def descend(self, progress: Callable[[], float], mixed: bool = True) -> None:
        """Steps at a rate that falls linearly with `progress()` from 1 - DESCENT to the end, 1; the mix too, if `mixed`."""
        rate = lambda: max(0.0, min(1.0, (1 - progress()) / DESCENT))  # noqa: E731
        while progress() < 1:
            if mixed:
                lower_mix(self.model, 1 - rate())
            self.steps_of(1, rate)

    def state(self) -> tuple:
        parts = (self.model.state_dict(), self.optimizer.state_dict())
        return copy.deepcopy((*parts, self.generator.bit_generator.state, self.steps, self.seconds))

    def restore(self, state: tuple) -> None:
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])
        self.generator.bit_generator.state = state[2]
        self.steps, self.seconds = state[3:]


def measure(run: Run, windows: torch.Tensor) -> dict:
    return {"bytes": run.bytes, "seconds": run.seconds, "bits": bits(run.model, windows, run.setting)}


def train(
    variant: Variant,
    seed: int,
    setting: Setting,
    books: Books,
    windows: torch.Tensor,
    equal: dict,
    folder: Path,
) -> dict:
    """One row: the model after equal bytes and after equal seconds. The last one measured is kept as a folder in `folder`."""
    Run(variant, seed, setting, books).steps_of(WARM)  # compiles, in whatever process, before time counts
    run = Run(variant, seed, setting, books)
    row = {"model": variant.name, "seed": seed, "parameters": sum(p.numel() for p in run.model.parameters())}
    heads, width = setting.size["num_attention_heads"], run.model.config.head_dim
    row["path"] = variant.path(setting.device, heads, width, setting.length)
    row["keys_share"] = variant.keys_share(setting.length, heads)
    by_bytes = lambda: run.bytes / equal["bytes"]  # noqa: E731
    by_time = lambda: run.seconds / equal["seconds"]  # noqa: E731
    while by_bytes() < 1 - DESCENT:
        run.steps_of(LOOK)
    kept = run.state()
    run.descend(by_bytes)
    row["equal_bytes"] = measure(run, windows)
    run.restore(kept)
    while by_time() < 1 - DESCENT:
        run.steps_of(LOOK)
    kept = run.state()
    run.descend(by_time)
    row["equal_seconds"] = measure(run, windows)
    if variant.opens:
        run.restore(kept)
        run.descend(by_time, mixed=False)
        row["mix_kept"] = measure(run, windows)
    run.model.save_pretrained(folder / f"{variant.name}-{seed}")
    return row | {"curve": run.curve}


def speeds(names: list[str], setting: Setting, books: Books) -> dict[str, float]:
    """Bytes per second of training, after the kernels were compiled."""
    found = {}
    for name in names:
        run = Run(setting.variants()[name], 0, setting, books)
        run.steps_of(WARM)
        run.seconds, before = 0.0, run.bytes
        run.steps_of(2 * LOOK)
        found[name] = (run.bytes - before) / run.seconds
        print(f"{name}: {found[name] / 1e3:.0f} thousand bytes a second", flush=True)
    return found


class Results:
    """Rows so far, in a file that is whole at any time."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "long_text.json"
        facts = json.loads(json.dumps(asdict(setting)))
        self.data: dict = {"setting": facts, "borders": buckets(setting.length), "speeds": {}, "rows": []}
        if self.path.exists():
            self.data = json.loads(self.path.read_text())
            if self.data["setting"] != facts:
                raise ValueError(
                    f"{self.path}: expected results of the same setting; it holds {self.data['setting']}; give another --out"
                )

    def write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data))
        temporary.replace(self.path)


SIZE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
SIZE |= {"num_key_value_heads": 1, "vocab_size": VOCAB_SIZE}
TREE = HierarchicalPattern(block=64, radix=8, window_blocks=8, guard=1, top_k=8, beam=16)
REDUCED = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
REDUCED |= {"num_key_value_heads": 1, "vocab_size": VOCAB_SIZE}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--length", type=int, help="bytes of a window; 65536, reduced 512")
    parser.add_argument("--batch", type=int, help="windows of a step; 65536 bytes a step")
    parser.add_argument("--heads", type=int, help="on one key head; 8, reduced 2")
    parser.add_argument("--head-width", type=int, help="default: hidden size / heads")
    parser.add_argument("--leaves", type=int, help="blocks that a token opens; 8, reduced 2")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--windows", type=int, default=48, help="validation windows")
    parser.add_argument("--budget-minutes", type=float, default=9.0, help="of everything")
    parser.add_argument(
        "--equal",
        nargs=2,
        type=float,
        metavar=("SECONDS", "BYTES"),
        help="what is equal; default: what the budget allows and the slowest model reads then",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--reduced", action="store_true", help="a model and windows for two cores")
    return parser.parse_args()


def share(variant: Variant) -> float:
    """What one model's training takes at most, its descents included, in equal seconds."""
    return 1 + DESCENT * (1 + variant.opens)


def chosen(
    given: argparse.Namespace, setting: Setting, books: Books, names: list[str], data: dict, began: float
) -> dict[str, float]:
    """Seconds and bytes of training that are equal for all models; notes the speeds in `data` where it measures them."""
    if given.equal:
        return dict(zip(("seconds", "bytes"), given.equal, strict=True))
    data["speeds"] = speeds(names, setting, books)
    left = 60 * given.budget_minutes - (time.perf_counter() - began)
    every = sum(share(setting.variants()[name]) for name in names) * len(given.seeds)
    seconds = SHARE * left / every
    return {"seconds": seconds, "bytes": seconds * min(data["speeds"].values())}


def main() -> None:
    began, given = time.perf_counter(), options()
    length = given.length or (512 if given.reduced else 65536)
    batch = given.batch or max(1, (2048 if given.reduced else 65536) // length)
    tree = replace(TREE, block=16, window_blocks=2, radix=4, top_k=2, beam=4) if given.reduced else TREE
    size = dict(REDUCED if given.reduced else SIZE)
    size |= {"num_attention_heads": given.heads} if given.heads else {}
    size |= {"head_dim": given.head_width} if given.head_width else {}
    tree = replace(tree, top_k=given.leaves or tree.top_k)
    setting = Setting(length, batch, given.learning_rate, given.windows, size, tree, given.device)
    names = given.models or list(setting.variants())
    if unknown := set(names) - set(setting.variants()):
        raise ValueError(
            f"--models: expected some of {', '.join(setting.variants())}; got {', '.join(unknown)}"
        )
    results = Results(given.out, setting)
    books = Books(given.data / "train.jsonl.gz", length, given.device)
    windows = Books(given.data / "validation.jsonl.gz", length, given.device).spread(given.windows)
    data = results.data
    if "equal" not in data:  # the first call decides what is equal, for all that follow
        data["equal"] = chosen(given, setting, books, names, data, began)
        machine = torch.cuda.get_device_name() if "cuda" in given.device else "CPU"
        data["environment"] = {"torch": torch.__version__, "machine": machine}
        results.write()
    finished = {(row["model"], row["seed"]) for row in data["rows"]}
    for seed in given.seeds:
        for name in names:
            if (name, seed) in finished:
                continue
            took = share(setting.variants()[name]) * data["equal"]["seconds"]
            if time.perf_counter() - began + took > 60 * given.budget_minutes * 1.05:
                print(f"{name} seed {seed} is left out: the time ended. The same command goes on with it.")
                continue
            data["rows"].append(
                train(setting.variants()[name], seed, setting, books, windows, data["equal"], given.out)
            )
            results.write()
            print(f"{name} seed {seed}: {time.perf_counter() - began:.0f} s so far", flush=True)
    print(report(results.path))


if __name__ == "__main__":
    main()
