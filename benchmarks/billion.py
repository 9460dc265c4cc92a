"""One billion tokens on one GPU: a whole model reads them, and takes exact-gradient training steps on them.

    python benchmarks/billion.py read  --preset base --tokens 1000000000 --max-seconds 540 --state /tmp/read     # again: goes on
    python benchmarks/billion.py train --layers 4 --width 256 --tokens 1000000000 --chunk 1048576
    python benchmarks/billion.py train --preset base --tokens 134217728 --steps 1 --compile --residual bf16 --shrink
    python benchmarks/billion.py checkpoint --preset base --tokens 65536 1048576 3145728 --compare 2097152
    python benchmarks/billion.py checkpoint --preset base --tokens 1048576 --offload

`checkpoint` is ordinary training, the whole sequence at once: layers recomputed in the backward pass, token-wise work in
tiles, the residual stream in bf16; with --offload their inputs wait in host memory. It ends with the longest sequence that fits.

The text is what stands in the source files below --root, in the order of their names, from the beginning again when it
ends before `--tokens` bytes do: every report says how many bytes are distinct. Weights are random: what is shown is cost,
exactness and memory, not quality. The pattern is geometric with ratio 4 and spans the whole text.
MFU counts 2 operations per weight and token and 4 D per visible pair (training: three and three and a half times that; the
recomputation is not counted), over the 989 TFLOP/s that NVIDIA states for dense bf16 products of a H100 or H200.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch

from billion_checkpoint import checkpoint
from billion_setup import PEAK, build, corpus, memory
from billion_train import train
from longnet import LongNetCache
from longnet.train.evaluate import stream
from run import environment


def read(options: argparse.Namespace, ids: np.ndarray, facts: dict) -> dict:
    """Reads on from --state, if it is there, for at most --max-seconds; time per million tokens by position."""
    model = (
        build(options, options.tokens)
        .to(torch.bfloat16 if options.device == "cuda" else torch.float32)
        .eval()
    )
    state, log = options.state / "cache", options.state / "report.json"
    report = json.loads(log.read_text()) if log.exists() else {"marks": [], "seconds": 0.0, "bits": []}
    if log.exists():
        cache = LongNetCache.load(state, model.config, options.device)
    else:
        cache = LongNetCache(model.config, 1, options.device, model.dtype)
    begun = cache.host_positions[0]
    began = time.perf_counter()
    end = began + options.max_seconds
    marks = report["marks"]
    last = [began, begun]
    interval = max(options.chunk, options.tokens // 100)

    def show(done: int, cache_bytes: int) -> None:
        if begun + done - last[1] < interval:
            return
        now = time.perf_counter()
        rate = (begun + done - last[1]) / (now - last[0])
        left = (len(ids) - begun - done) / rate
        marks.append([begun + done, rate, memory(options.device), cache_bytes])
        line = f"{begun + done:>13,} tokens  {rate:>12,.0f} tokens/s  peak {marks[-1][2]:.2f} GiB"
        print(f"{line}  cache {cache_bytes / 2**20:.1f} MiB  {left:.0f} s to go", flush=True)
        last[:] = [now, begun + done]

    result = stream(
        model, ids[begun:], chunk=options.chunk, cache=cache, on_chunk=show, stop=lambda: time.perf_counter() > end
    )  # fmt: skip
    report["seconds"] += result.seconds
    report["bits"].append([list(result.borders), list(result.bits_per_byte)])
    report["read"] = cache.host_positions[0]
    options.state.mkdir(parents=True, exist_ok=True)
    cache.save(state)
    log.write_text(json.dumps(report))
    rates = [mark[1] for mark in marks]
    tenth = max(1, len(rates) // 10)
    flops = model.config.flops_per_token(options.tokens, training=False)
    overall = report["read"] / report["seconds"]
    return facts | {
        "parameters": model.num_parameters(), "read": report["read"], "seconds": report["seconds"], "tokens_per_second": overall,
        "mfu": flops * overall / PEAK, "peak_gib": max(m[2] for m in marks) if marks else 0, "cache_bytes": cache.nbytes(),
        "first_tenth_tokens_per_second": float(np.median(rates[:tenth])) if rates else 0,
        "last_tenth_tokens_per_second": float(np.median(rates[-tenth:])) if rates else 0, "marks": marks, "bits": report["bits"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["read", "train", "checkpoint"])
    parser.add_argument("--preset", help="a preset of LongNetConfig, instead of --layers and --width")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[10**9], help="checkpoint takes several lengths"
    )
    parser.add_argument("--tile", type=int, default=65536, help="checkpoint: tokens of a tile")
    parser.add_argument(
        "--compare",
        type=int,
        nargs="?",
        const=2097152,
        default=0,
        help="checkpoint: compare gradients at so many tokens",
    )
    parser.add_argument(
        "--largest", type=int, default=2**23, help="checkpoint: where the search for the longest ends"
    )
    parser.add_argument(
        "--offload", action="store_true", help="checkpoint: inputs of layers wait in host memory"
    )
    parser.add_argument("--chunk", type=int, default=131072)
    parser.add_argument(
        "--compile", type=int, nargs="?", const=120, default=0, metavar="SECONDS",
        help="train: compiled token-wise work, if that is the faster and ready in so many seconds",
    )  # fmt: skip
    parser.add_argument("--residual", choices=["fp32", "bf16"], default="fp32", help="train: hidden states")
    parser.add_argument(
        "--fresh", action="store_true", help="train: every step on the next tokens, not on the same"
    )
    parser.add_argument(
        "--shrink", action="store_true", help="train: halve --tokens until a step fits --max-seconds"
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--warmup", type=int, default=0, help="train: steps over which the learning rate rises to its value"
    )
    parser.add_argument("--max-seconds", type=float, default=540, help="train: preparation included")
    parser.add_argument("--state", type=Path, default=Path("/tmp/longnet-billion"), help="where a read stops")
    parser.add_argument(
        "--text", type=Path, default=Path("/dev/shm/longnet-text"), help="where the ids are kept"
    )
    parser.add_argument("--root", type=Path, default=Path(sysconfig.get_path("stdlib")).parent)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    began = time.perf_counter()
    several, lengths = options.what == "checkpoint", options.tokens
    if not several:
        if len(lengths) > 1:
            raise SystemExit(f"--tokens: expected one length for {options.what}; got {lengths}")
        options.tokens = lengths[0]
    size = max(*lengths, options.largest, options.compare) + 1 if several else options.tokens
    if options.what == "train":
        size = options.tokens * (options.steps if options.fresh else 1) + 1
    ids, distinct = corpus(options.text, size, options.root)
    facts = environment(options.device) | {
        "what": options.what,
        "tokens": options.tokens,
        "distinct_bytes": distinct,
    }
    facts["preparing_seconds"] = time.perf_counter() - began
    name = f"{options.what}-{options.preset or f'{options.layers}x{options.width}'}-{max(lengths)}"
    if several:
        checkpoint(options, ids, facts, name + "-offload" * options.offload)
        return

    def write(result: dict) -> None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{name}.json").write_text(json.dumps(result, indent=1))
        print(
            {key: value for key, value in result.items() if key not in ("marks", "bits", "steps")}, flush=True
        )

    if options.what == "train":
        train(options, ids, facts, began, write)
    else:
        write(read(options, ids, facts))


if __name__ == "__main__":
    main()
