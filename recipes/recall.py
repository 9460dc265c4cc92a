"""What each attention can recall, at the trained length and beyond it, and how many blocks it has to open for that.

Tasks: multi-query associative recall, the same in a haystack of needles, passkeys, selective copying (recall_tasks.py). All
models of a task have the same parameters, start from the same weights per seed and see the same batches. Results are written
after every run; the same command goes on where it was stopped.

    python recipes/recall.py --task recall --out runs/recall --budget-seconds 360            # a GPU: the whole grid
    python recipes/recall.py --task recall --out runs/small --length 256 --steps 300 --seeds 0 --models dense opened-4
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from recall_report import report
from recall_tasks import SHORTEST, TASKS, VOCABULARY, Batch
from variants import MIX, REACH, TAPS, Variant, build, dense, layers, lower_mix

from longnet import DilatedPattern, HierarchicalPattern, LongNetForCausalLM

SIZE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "initializer_range": 0.05}
# A needle in the mean of 64 tokens is hard to tell from none: of the 30 such nodes at the trained length this beam opens 16.
TREE = HierarchicalPattern(block=16, radix=4, window_blocks=2, guard=1, top_k=4, beam=16)
BUDGETS = (1, 2, 4, 8)
# The model whose number of opened blocks is also changed after training.
CHANGED = "opened-4"


def variants() -> dict[str, Variant]:
    named = [dense("dense", TREE), dense("dense, no angles", TREE, turned=False)]
    named += [Variant("local", replace(TREE, top_k=0), summaries=False)]
    # A window of 64 and four heads: at rate 4 every position is seen, beyond it a share that falls with the rate.
    dilated = DilatedPattern(tuple(64 * 4**i for i in range(6)), tuple(4**i for i in range(6)))
    named += [Variant("dilated", TREE, dilated), Variant("summaries", replace(TREE, top_k=0))]
    named += [Variant(f"opened-{k}", replace(TREE, top_k=k)) for k in BUDGETS]
    most = replace(TREE, top_k=BUDGETS[-1])
    named += [
        Variant("opened-8, beam 8", replace(most, beam=8)),
        Variant("opened-8, mix learned", most, mix_learned=True),
        Variant("opened-8, heads of different reach", most, far_bias=REACH),
    ]
    return {variant.name: variant for variant in named}


@dataclass(frozen=True)
class Setting:
    """What a result depends on. taps: spread of the key convolution's taps at first; grow: short texts first."""

    task: str
    length: int
    doublings: int
    steps: int
    tokens: int
    learning_rate: float
    texts: int
    device: str
    path: str | None
    taps: float = TAPS
    grow: bool = False

    def __post_init__(self) -> None:
        longest = self.length * 2**self.doublings
        if self.length < SHORTEST or self.length & (self.length - 1) or self.tokens < self.length:
            raise ValueError(
                f"expected --length to be a power of two >= {SHORTEST} and --tokens to hold one text; got {self.length} and "
                f"{self.tokens}"
            )
        if self.task == "haystack" and longest > 16 * (VOCABULARY - 134):
            raise ValueError(f"haystack: expected at most 16384 tokens (there are 1024 keys); got {longest}")

    @property
    def lengths(self) -> list[int]:
        return [self.length * 2**i for i in range(self.doublings + 1)]

    def autocast(self):
        """The Triton kernels compute in 16 bits."""
        on_gpu = self.device.startswith("cuda")
        return torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()


def answers(model: LongNetForCausalLM, batch: Batch) -> torch.Tensor:
    """Logits (B, A, V) of the tokens after the places that ask."""
    hidden = model.model(input_ids=batch.ids).last_hidden_state
    return model.lm_head(hidden.gather(1, batch.places[..., None].expand(-1, -1, hidden.shape[2])))


@torch.no_grad()
def accuracy(model: LongNetForCausalLM, length: int, setting: Setting) -> dict[str, float]:
    """Share of right answers, of texts answered without an error, and the number of answers."""
    generator = torch.Generator(setting.device).manual_seed(10**6 + length)
    right = []
    at_once = max(1, 2 * setting.tokens // length)
    while sum(map(len, right)) < setting.texts:
        batch = TASKS[setting.task](min(at_once, setting.texts), length, generator)
        with setting.autocast():
            right.append(answers(model, batch).argmax(-1) == batch.answers)
    found = torch.cat(right)[: setting.texts]
    return {
        "accuracy": found.float().mean().item(),
        "whole": found.all(1).float().mean().item(),
        "asked": found.numel(),
    }


def set_mix(model: LongNetForCausalLM, done: float) -> None:
    """The router mix after this share of the training: lowered in the last quarter of the steps."""
    lower_mix(model, 4 * done - 3)


def lengths_of_steps(setting: Setting, seed: int) -> list[int]:
    """Of every step: lengths from an eighth of the trained one, each as likely.

    With `grow` from a sixteenth: the shortest alone in the first eighth of the steps, one more in every other, all from the
    half on. In the shortest texts nearly everything is opened, so that questions find their answers as in a dense model, and
    a step asks many more; the router learns from that when texts grow.
    """
    first = setting.length // (16 if setting.grow else 8)
    lengths = [n for n in (first * 2**i for i in range(5)) if SHORTEST <= n <= setting.length]
    generator = torch.Generator().manual_seed(seed)
    if not setting.grow:
        return [lengths[i] for i in torch.randint(len(lengths), (setting.steps,), generator=generator)]
    drawn = torch.rand(setting.steps, generator=generator).tolist()
    known = [min(len(lengths), 1 + 8 * step // setting.steps) for step in range(setting.steps)]
    return [lengths[int(x * n)] for x, n in zip(drawn, known, strict=True)]


def train(model: LongNetForCausalLM, name: str, seed: int, setting: Setting, deadline: float) -> list | None:
    """The learning curve, or None if time ran out. Tokens a step are always as many."""
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = setting.device.startswith("cuda")
    optimizer = torch.optim.AdamW(trained, setting.learning_rate, weight_decay=0.01, fused=fused)
    # A warm-up of exactly one step would divide by zero.
    warmup = min(0.75, max(0.05, 1.5 / setting.steps))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, setting.learning_rate, setting.steps, pct_start=warmup
    )
    generator = torch.Generator(setting.device).manual_seed(seed)
    curve = []
    for step, length in enumerate(lengths_of_steps(setting, seed), 1):
        set_mix(model, step / setting.steps)
        batch = TASKS[setting.task](setting.tokens // length, length, generator)
        with setting.autocast():
            logits = answers(model, batch)
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch.answers.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, setting.steps // 8) == 0:
            curve.append((step, round(accuracy(model, setting.length, setting)["accuracy"], 4)))
            print(
                f"{setting.task}: {name} seed {seed} step {step}: loss {loss.item():.3f}, accuracy {curve[-1][1]:.3f}",
                flush=True,
            )
        if time.time() > deadline:
            return None
    return curve


def run(name: str, seed: int, setting: Setting, deadline: float) -> dict | None:
    """Train and test one model; None if the time ended before."""
    torch.set_num_threads(1 if setting.device.startswith("cuda") else torch.get_num_threads())
    variant, began = variants()[name], time.time()
    model = build(variant, seed, setting.taps, **SIZE).to(setting.device)
    for layer in layers(model):
        layer.impl = setting.path
    curve = train(model, name, seed, setting, deadline)
    if curve is None:
        return None
    width = model.config.head_dim
    row = {
        "model": name, "seed": seed, "curve": curve, "parameters": sum(p.numel() for p in model.parameters()),
        "keys_share": variant.keys_share(setting.length, SIZE["num_attention_heads"]),
        "path": setting.path or variant.path(setting.device, SIZE["num_attention_heads"], width, setting.length),
        "accuracy": {n: accuracy(model, n, setting) for n in setting.lengths},
        "router_mix": [layer.router_mix.tolist() for layer in layers(model)],
    }  # fmt: skip
    if name == CHANGED:
        row["opened_after_training"] = opened_after_training(model, setting)
        row["mix_after_training"] = mix_after_training(model, setting)
    if row["path"] == "triton":
        for layer in layers(model):
            layer.impl = "torch"
        row["accuracy_without_triton"] = accuracy(model, setting.length, setting)
    return row | {"seconds": time.time() - began}


def opened_after_training(model: LongNetForCausalLM, setting: Setting) -> dict[int, dict]:
    """Accuracy by length for other numbers of opened leaves than the trained one."""
    result = {}
    for top_k in (*BUDGETS, 2 * BUDGETS[-1]):
        for layer in layers(model):
            layer.pattern = replace(layer.pattern, top_k=top_k)
        result[top_k] = {n: accuracy(model, n, setting) for n in setting.lengths}
    for layer in layers(model):
        layer.pattern = replace(layer.pattern, top_k=TREE.top_k)
    return result


def mix_after_training(model: LongNetForCausalLM, setting: Setting) -> dict[float, dict]:
    """Accuracy at the trained length for other router mixes than the last one of the training."""
    trained, result = [layer.router_mix.clone() for layer in layers(model)], {}
    with torch.no_grad():
        for mix in (1.0, 0.5, 0.0):
            for layer in layers(model):
                layer.router_mix.fill_(mix)
            result[mix] = accuracy(model, setting.length, setting)
        for layer, own in zip(layers(model), trained, strict=True):
            layer.router_mix.copy_(own)
    return result


class Results:
    """The rows so far, in a file that is whole at any time."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / f"{setting.task}.json"
        self.setting = asdict(setting) | {"tree": asdict(TREE), "size": SIZE, "mix": MIX}
        self.rows: list[dict] = []
        if self.path.exists():
            before = json.loads(self.path.read_text())
            if before["setting"] != json.loads(json.dumps(self.setting)):
                raise ValueError(
                    f"{self.path}: expected results of the same setting; it holds {before['setting']}; give another --out"
                )
            self.rows = before["rows"]

    def has(self, name: str, seed: int) -> bool:
        return any((row["model"], row["seed"]) == (name, seed) for row in self.rows)

    def add(self, row: dict) -> None:
        self.rows.append(json.loads(json.dumps(row)))
        order = list(variants())
        self.rows.sort(key=lambda row: (order.index(row["model"]), row["seed"]))
        facts = {"torch": torch.__version__, "machine": machine(self.setting["device"])}
        text = json.dumps({"setting": self.setting, "environment": facts, "rows": self.rows}, indent=1)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self.path)


def machine(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"


def grid(
    todo: list[tuple[str, int]], setting: Setting, results: Results, workers: int, deadline: float
) -> int:
    """Run what is missing; returns how many runs the deadline cut off or kept from beginning."""
    missing = 0
    if not workers:
        for name, seed in todo:
            row = run(name, seed, setting, deadline) if time.time() < deadline else None
            missing += row is None
            if row is not None:
                results.add(row)
        return missing
    # Small models leave a GPU waiting for launches: several processes share it.
    context, failures = multiprocessing.get_context("spawn"), []
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting: set[Future] = set()
        while todo or waiting:
            while todo and len(waiting) < workers and time.time() < deadline:
                waiting.add(pool.submit(run, *todo.pop(0), setting, deadline))
            if not waiting:
                break
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                if error := future.exception():  # the others go on
                    failures.append(error)
                    continue
                row = future.result()
                missing += row is None
                if row is not None:
                    results.add(row)
    if failures:
        raise ExceptionGroup(f"{len(failures)} runs failed; the others are in {results.path}", failures)
    return missing + len(todo)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--task", required=True, choices=list(TASKS))
    parser.add_argument("--out", type=Path, required=True, help="folder; TASK.json, .md and .png are written")
    parser.add_argument("--models", nargs="+", default=list(variants()), choices=list(variants()))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--length", type=int, default=2048, help="longest text in training")
    parser.add_argument("--doublings", type=int, default=4, help="tests up to 2^this times that")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--texts", type=int, default=64, help="texts of a test")
    parser.add_argument(
        "--taps", type=float, default=TAPS, help="spread of the key convolution's taps at first"
    )
    parser.add_argument(
        "--grow", action="store_true", help="short texts first, all lengths from half of the steps"
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--path", choices=["torch", "triton"], help="a path for trees instead of the best one"
    )
    parser.add_argument("--workers", type=int, default=6 if cuda else 0, help="processes; 0: this one")
    parser.add_argument("--budget-seconds", type=float, default=10**9)
    options = parser.parse_args()
    deadline = time.time() + options.budget_seconds
    fields = (
        "task",
        "length",
        "doublings",
        "steps",
        "tokens",
        "learning_rate",
        "texts",
        "taps",
        "grow",
        "device",
        "path",
    )
    setting = Setting(**{name: getattr(options, name) for name in fields})
    results = Results(options.out, setting)
    todo = [(name, seed) for seed in options.seeds for name in options.models if not results.has(name, seed)]
    missing = grid(todo, setting, results, options.workers, deadline)
    print(report(results.path))
    if missing:
        print(f"{missing} runs were left out: the time ended. The same command goes on with them.")


if __name__ == "__main__":
    main()
