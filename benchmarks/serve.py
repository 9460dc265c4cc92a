"""Serving: time to first token and throughput of the engine behind `longnet serve`, against transformers' generate.

Streams that all arrive at once read a text of random bytes each and write greedily. LongNet runs in the server's engine (chunks
of reading alternate with batched steps); the peer is a dense Llama of the same width, depth and heads, its texts in one batch
through `generate`. Both have random weights: time and memory do not depend on them. Neither goes through HTTP. Cells that
do not fit into memory or time are rows with their reason. One text of every length is also read as a
session, the cache that is kept of an uploaded document. results.json and results.md are written after every row; what an earlier
run measured there is kept, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import queue
import time
from pathlib import Path

import numpy as np
import torch

from longnet import DilatedPattern, LongNetConfig, LongNetForCausalLM, text
from longnet.integrations.tokenizer import BYTES
from longnet.serve.engine import Engine
from longnet.serve.jobs import Completion, Done, Failed, Reading, Text
from run import environment

SIZE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
# What rows of one table must share.
SAME = ("device", "model", "new_tokens", "chunk")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GIB = 2**30


def longnet_model(size: dict, longest: int, window: int, device: str) -> LongNetForCausalLM:
    """Every token may see the whole of the longest context: segments grow until they cover it."""
    pattern = DilatedPattern.geometric(longest, window=window, ratio=4)
    torch.manual_seed(0)
    config = LongNetConfig(
        **size, segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates
    )
    model = LongNetForCausalLM(config)
    model.lm_head.weight.data[text.EOS] = 0  # a random model would end some texts early
    return model.to(device, dtype_of(device)).eval()


def dense_model(size: dict, longest: int, device: str) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **size, num_key_value_heads=size["num_attention_heads"], vocab_size=text.VOCAB_SIZE, tie_word_embeddings=True,
        max_position_embeddings=2 * longest, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config).to(device, dtype_of(device)).eval()


def dtype_of(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def fresh(device: str) -> int:
    """Bytes held, after everything else was given back; the peak counts from here."""
    gc.collect()
    if device != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def prompts(streams: int, context: int) -> np.ndarray:
    """Ids (streams, context) of random bytes."""
    low, high = np.array([32, 127]) + text.FIRST_BYTE
    return np.random.default_rng(0).integers(low, high, (streams, context), dtype=np.uint16)


def serve_longnet(model: LongNetForCausalLM, streams: int, context: int, options: argparse.Namespace) -> dict:
    before = fresh(options.device)
    engine = Engine(
        model,
        BYTES,
        slots=streams,
        chunk=options.chunk,
        max_waiting=streams,
        max_backlog=2**40,
        max_wait=3600.0,
    )
    engine.start()
    try:
        engine.warm_up()
        answers: queue.Queue = queue.Queue()
        texts = prompts(streams, context)
        session = session_bytes(engine, texts[0], options)  # and kernels of this length are compiled
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for stream in range(streams):

            def emit(event: object, stream: int = stream) -> None:
                answers.put((stream, time.perf_counter(), event))

            engine.submit(Completion(emit=emit, ids=texts[stream], max_tokens=options.new, temperature=0.0))
        first: dict[int, float] = {}
        ended, written = 0, 0
        while ended < streams:
            stream, now, event = answers.get(timeout=options.budget_seconds)
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            if isinstance(event, Text | Done):
                first.setdefault(stream, now - began)
            if isinstance(event, Done):
                ended, written, last = ended + 1, written + event.written, now
        report = engine.statistics.between_tokens.report()
        row = timing(sorted(first.values()), last - began, written)
        row |= {"ms_between_tokens_p50": 1e3 * report["p50"] if report["p50"] else None}
        row["kept_bytes_per_stream"] = engine.writing.slots.cache.nbytes() // streams
        row |= peak(options.device, before)
        if streams == 1:
            row["session_bytes"] = session
    finally:
        engine.close()
    return row


def session_bytes(engine: Engine, document: np.ndarray, options: argparse.Namespace) -> int:
    """What is kept of a document that was uploaded once, to be asked many times."""
    events: queue.Queue = queue.Queue()
    engine.submit(Reading(emit=events.put, ids=document))
    while not isinstance(event := events.get(timeout=options.budget_seconds), Done | Failed):
        pass
    if isinstance(event, Failed):
        raise RuntimeError(event.message)
    return event.value[0].nbytes()


@torch.inference_mode()
def generate_dense(model: torch.nn.Module, streams: int, context: int, options: argparse.Namespace) -> dict:
    before = fresh(options.device)
    ids = torch.from_numpy(prompts(streams, context).astype(np.int64)).to(options.device)

    seen: list[float] = []

    def clock(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Called before every token is drawn."""
        synchronize(options.device)
        seen.append(time.perf_counter())
        return scores

    def run(prompt: torch.Tensor, count: int) -> float:
        seen.clear()
        synchronize(options.device)
        began = time.perf_counter()
        out = model.generate(  # pyrefly: ignore
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count,
            min_new_tokens=count, logits_processor=[clock],
        )  # fmt: skip
        synchronize(options.device)
        assert out.shape[1] == prompt.shape[1] + count
        return began

    run(ids[:, :64], 4)  # kernels are loaded before anything is timed
    began = run(ids, options.new)
    first, whole = seen[0] - began, time.perf_counter() - began
    row = timing([first] * streams, whole, streams * options.new)
    row["ms_between_tokens_p50"] = 1e3 * (whole - first) / (options.new - 1)
    row["kept_bytes_per_stream"] = dense_bytes(context + options.new, options)
    row |= peak(options.device, before)
    return row


def timing(first: list[float], whole: float, written: int) -> dict:
    return {
        "first_token_s_p50": first[(len(first) - 1) // 2], "first_token_s_max": first[-1], "seconds": whole,
        "written_tokens": written, "tokens_per_second": written / whole,
    }  # fmt: skip


def peak(device: str, before: int) -> dict:
    if device != "cuda":
        return {}
    return {"peak_extra_bytes": torch.cuda.max_memory_allocated() - before}


def dense_bytes(tokens: int, options: argparse.Namespace) -> int:
    """Keys and values of one text in a dense model."""
    size = options.size
    return 2 * size["num_hidden_layers"] * size["hidden_size"] * tokens * dtype_of(options.device).itemsize


def does_not_fit(who: str, streams: int, context: int, options: argparse.Namespace) -> str | None:
    """Why a dense cell is not tried: its keys and values, with the half more that appending to them takes for a moment."""
    if who != "dense" or options.device != "cuda":
        return None
    needed = 1.5 * streams * dense_bytes(context + options.new, options)
    free = torch.cuda.mem_get_info()[0]
    return None if needed < free else f"keys and values need {needed / 1.5 / GIB:.0f} GiB of {free / GIB:.0f}"


def cells(options: argparse.Namespace) -> list[tuple[int, int]]:
    """(streams, context)."""
    return [(s, c) for s in options.streams for c in options.contexts]


def dense_flops(context: int, facts: dict, size: dict) -> int:
    """Of reading one text: all weights once a token, and causal attention."""
    pairs = 2 * size["num_hidden_layers"] * size["hidden_size"] * context**2
    return 2 * facts["dense_parameters"] * context + pairs


def measured_before(options: argparse.Namespace, environment: dict) -> dict[tuple[str, int, int], dict]:
    """Rows of an earlier run by (who, streams, context), without those that were left out."""
    path = options.output / "results.json"
    if not path.is_file():
        return {}
    report = json.loads(path.read_text())
    if differing := [name for name in SAME if report["environment"].get(name) != environment[name]]:
        raise SystemExit(
            f"{path}: expected the same {', '.join(differing)} as now; got a run with others; give another --output"
        )
    return {(r["who"], r["streams"], r["context"]): r for r in report["rows"] if "left_out" not in r}


def wanted_cells(options: argparse.Namespace, before: dict) -> list[tuple[int, int]]:
    """Cells to measure and those that were, the cheap ones first."""
    chosen = {*cells(options), *((streams, context) for _, streams, context in before)}
    return sorted(chosen, key=lambda cell: (cell[0] * cell[1], cell[1]))


def measure(options: argparse.Namespace, environment: dict) -> None:
    before = measured_before(options, environment)
    longest = max(options.contexts) + options.new
    window = 64 if options.small else 2048
    models = {"longnet": longnet_model(options.size, max(options.contexts), window, options.device)}
    models["dense"] = dense_model(options.size, longest, options.device)
    facts = {f"{who}_parameters": sum(p.numel() for p in m.parameters()) for who, m in models.items()}
    facts["branches"] = str(models["longnet"].config.pattern().branches)
    runs = {"longnet": serve_longnet, "dense": generate_dense}
    end, rows = time.monotonic() + options.budget_seconds, []
    rates: dict[str, float] = {}  # seconds that a token (dense: a flop) took, to guess the next cell
    for streams, context in wanted_cells(options, before):
        for who, run in runs.items():
            row: dict = {"who": who, "streams": streams, "context": context}
            work = streams * (context if who == "longnet" else dense_flops(context, facts, options.size))
            guess = rates.get(who, 0.0) * work
            if known := before.get((who, streams, context)):
                row = known
                rates[who] = known["first_token_s_max"] / work
            elif reason := does_not_fit(who, streams, context, options):
                row["left_out"] = reason
            elif time.monotonic() + guess > end:
                row["left_out"] = f"about {guess:.0f} s, more than was left of {options.budget_seconds:.0f}"
            else:
                try:
                    row |= run(models[who], streams, context, options)
                    rates[who] = row["first_token_s_max"] / work
                except (torch.OutOfMemoryError, RuntimeError, queue.Empty) as error:
                    row["left_out"] = f"{type(error).__name__}: {str(error)[:80]}"
            rows.append(row)
            print(line(row), flush=True)
            write(rows, environment | facts, options)


HEAD = (
    "| streams | context | who | first token s, median | slowest | ms a token | tokens/s, all | kept MiB a stream | session MiB |"
    " peak GiB |"
)


def line(row: dict) -> str:
    start = f"| {row['streams']} | {row['context']} | {row['who']} | "
    if "left_out" in row:
        return start + f"{row['left_out']} | | | | | | |"
    between, top, session = (
        row.get(key) for key in ("ms_between_tokens_p50", "peak_extra_bytes", "session_bytes")
    )
    return start + (
        f"{row['first_token_s_p50']:.3f} | {row['first_token_s_max']:.3f} | "
        f"{'' if between is None else f'{between:.2f}'} | {row['tokens_per_second']:.0f} | "
        f"{row['kept_bytes_per_stream'] / 2**20:.1f} | "
        f"{'' if session is None else f'{session / 2**20:.1f}'} | {'' if top is None else f'{top / GIB:.1f}'} |"
    )


NOTE = (
    "Random weights, greedy, all streams at once, no HTTP. ms a token, longnet: median of the last 1,000 gaps between two tokens"
    " of a stream, most of them after the last text was read; while others are being read, a gap is a chunk longer (slowest first"
    " token by chunks read, about). Dense: mean. tokens/s: all that was written over all of the time, reading included. Session:"
    " what is kept of one uploaded document."
)


def write(rows: list[dict], facts: dict, options: argparse.Namespace) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps({"environment": facts, "rows": rows}, indent=1))
    top = ", ".join(f"{name} {value}" for name, value in facts.items())
    table = [HEAD, "|---" * (HEAD.count("|") - 1) + "|", *map(line, rows)]
    (options.output / "results.md").write_text("\n".join([top, "", NOTE, "", *table]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 65536, 524288])
    parser.add_argument("--new", type=int, default=128, help="tokens that each stream writes")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens read at once")
    parser.add_argument(
        "--budget-seconds", type=float, default=140.0, help="cells that would end later are left out"
    )
    parser.add_argument("--small", action="store_true", help="tiny models and texts: a smoke test, no claim")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/serve"))
    options = parser.parse_args()
    options.size = SMALL if options.small else SIZE
    if options.small:
        options.streams, options.contexts, options.new, options.chunk = [1, 3], [100, 400], 8, 64
    print(HEAD, flush=True)
    facts = {"model": options.size, "new_tokens": options.new, "chunk": options.chunk}
    measure(options, environment(options.device) | facts)


if __name__ == "__main__":
    main()
