"""G1: any chunking gives the logits of one pass; a snapshot at any token continues bit for bit in a new process."""

import random
import subprocess
import sys

import pytest
import torch

from conftest import assert_within_budget
from longnet import LongNetCache, LongNetConfig, LongNetForCausalLM
from longnet.generate import generate

TOKENS = 150
PATTERNS = {
    "geometric": {"segment_lengths": [8, 16, 32], "dilation_rates": [1, 2, 4]},
    "uneven": {"segment_lengths": [7, 30, 100], "dilation_rates": [1, 6, 12], "head_offsets": "block"},
}


def make(name="geometric", dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    config = LongNetConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.2, **PATTERNS[name], **overrides,
    )  # fmt: skip
    return LongNetForCausalLM(config).to(dtype).eval()


def ids_of(*shape, seed=1):
    return torch.randint(4, 260, shape, generator=torch.Generator().manual_seed(seed))


def chunking(generator, tokens):
    """Chunks of 1 token up to several segments."""
    sizes = []
    while sum(sizes) < tokens:
        sizes.append(min(generator.choice([1, 1, 2, 5, 13, 31, 64, 110]), tokens - sum(sizes)))
    return sizes


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_random_chunkings_give_the_logits_of_one_pass(name, batch):
    model, exact = make(name), make(name, torch.float64, attention_impl="reference")
    ids, generator = ids_of(batch, TOKENS), random.Random(0)
    peer = make(name, attention_impl="reference")(input_ids=ids).logits
    true = exact(input_ids=ids).logits
    for _ in range(12):
        cache, parts = LongNetCache(model.config, batch), []
        for chunk in ids.split(chunking(generator, TOKENS), dim=1):
            parts.append(model(input_ids=chunk, past_key_values=cache, use_cache=True).logits)
        assert_within_budget("logits", torch.cat(parts, 1), true, peer)


@torch.no_grad()
def test_chunkings_of_ragged_batches_equal_single_runs():
    model, ids, generator = make("uneven"), ids_of(3, 2 * TOKENS), random.Random(1)
    for _ in range(6):
        cache, seen = LongNetCache(model.config, 3), [0, 0, 0]
        parts = [[], [], []]
        for n in chunking(generator, TOKENS):
            lengths = [generator.choice([0, n, generator.randint(0, n)]) for _ in range(3)]
            if not any(lengths):
                continue
            chunk = torch.stack([ids[b, seen[b] : seen[b] + n] for b in range(3)])
            logits = model(
                input_ids=chunk, past_key_values=cache, use_cache=True, lengths=torch.tensor(lengths)
            ).logits
            for b, m in enumerate(lengths):
                parts[b].append(logits[b, :m])
                seen[b] += m
        assert list(cache.host_positions) == seen
        for b, end in enumerate(seen):
            if end:
                alone = model(input_ids=ids[b : b + 1, :end]).logits[0]
                torch.testing.assert_close(torch.cat(parts[b]), alone, atol=2e-5, rtol=2e-5)


CONTINUE = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from test_streaming import LongNetCache, generate, ids_of, make
model, folder = make("uneven"), Path(sys.argv[3])
results = {}
with torch.no_grad():
    for path in sorted(folder.glob("*.cache")):
        cache = LongNetCache.load(path, model.config)
        at = cache.host_positions[0]
        out = model(input_ids=ids_of(1, 300)[:, at : at + 60], past_key_values=cache, use_cache=True).logits
        results[path.stem] = out, torch.tensor(generate(model, torch.tensor([[5]]), max_new_tokens=8, seed=3, cache=cache).ids)
torch.save(results, folder / "results.pt")
"""


@torch.no_grad()
def test_snapshots_at_any_token_continue_bit_for_bit_in_a_new_process(tmp_path, request):
    model, ids = make("uneven"), ids_of(1, 300)
    generator, expected = random.Random(2), {}
    ats = [0, 1, 6, 7, 8, 29, 30, 31, 99, 100, 101, *(generator.randint(2, 230) for _ in range(3))]
    for at in sorted(set(ats)):
        cache = LongNetCache(model.config, 1)
        for chunk in ids[:, :at].split(max(1, at // 3), dim=1) if at else ():
            model(input_ids=chunk, past_key_values=cache, use_cache=True)
        cache.save(tmp_path / f"{at}.cache")
        out = model(input_ids=ids[:, at : at + 60], past_key_values=cache, use_cache=True).logits
        new = generate(model, torch.tensor([[5]]), max_new_tokens=8, seed=3, cache=cache).ids
        expected[str(at)] = out, torch.tensor(new)
    here = request.path.parent
    command = [sys.executable, "-c", CONTINUE, str(here), str(here.parent), str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert results.keys() == expected.keys()
    for at, pair in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(results[at], pair, strict=True)), (
            f"snapshot at token {at}"
        )


@pytest.mark.parametrize(
    "change",
    [
        {"segment_lengths": [7, 30, 108]}, {"dilation_rates": [1, 6, 10]}, {"head_offsets": "cyclic"}, {"hidden_size": 64},
        {"num_hidden_layers": 3}, {"num_key_value_heads": 4}, {"head_dim": 16}, {"vocab_size": 300}, {"rope_theta": 5e4},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_snapshot_of_another_model_is_refused(tmp_path, change):
    model = make("uneven")
    cache = model(input_ids=ids_of(1, 40), use_cache=True).past_key_values
    cache.save(tmp_path / "cache")
    other = LongNetConfig(**{**model.config.to_dict(), "head_dim": None, **change})
    with pytest.raises(ValueError, match="configuration"):
        LongNetCache.load(tmp_path / "cache", other)


@torch.no_grad()
def test_a_copy_goes_back_where_a_crop_cannot():
    model, ids = make(), ids_of(1, 90)
    cache = LongNetCache(model.config, 1)
    model(input_ids=ids[:, :50], past_key_values=cache, use_cache=True)
    before = cache.copy()
    first = model(input_ids=ids[:, 50:], past_key_values=cache, use_cache=True).logits
    again = model(input_ids=ids[:, 50:], past_key_values=before, use_cache=True).logits
    assert torch.equal(first, again)
    assert cache.host_positions == before.host_positions == (90,)
    cache.crop(90)
    for length in (89, 0, -1):
        with pytest.raises(ValueError, match=r"copy\(\)"):
            cache.crop(length)


@pytest.mark.parametrize("chunk", [5, 16, 100])
@pytest.mark.parametrize("padding", [(0, 0), (0, 17), (3, 38)])
@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_hugging_face_prefills_in_chunks(chunk, padding, beams):
    model, ids = make(), ids_of(2, 45)
    mask = torch.ones_like(ids)
    for row, n in enumerate(padding):
        mask[row, :n], ids[row, :n] = 0, 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "num_beams": beams,
        "eos_token_id": None,
    }
    whole = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prefill_chunk_size=chunk, **options), whole)


def test_the_cache_file_is_plain_data(tmp_path):
    """Nothing but tensors and a JSON header: another program can read it."""
    from safetensors import safe_open

    model = make()
    model(input_ids=ids_of(1, 40), use_cache=True).past_key_values.save(tmp_path / "cache")
    with safe_open(tmp_path / "cache", framework="numpy") as file:
        assert set(file.metadata()) == {"longnet"}
        assert len(list(file.keys())) == 2 * 2 * 3


@pytest.mark.parametrize("attention", ["dilated", "hierarchical"])
def test_a_cache_from_inference_mode_goes_on_outside_it(attention, tmp_path):
    """Whatever was done to it in there: it holds ordinary tensors, which may be written to."""
    torch.manual_seed(0)
    config = LongNetConfig.preset("tiny", num_hidden_layers=1, attention=attention)
    model = LongNetForCausalLM(config).eval()
    ids = torch.randint(4, 260, (2, 80))

    def read(cache, n=5):
        return model(ids[:, :n], past_key_values=cache, use_cache=True).logits

    with torch.inference_mode():
        cache = LongNetCache(config, 2)
        read(cache, 80)
        cache.save(tmp_path / "snapshot")
        swapped, emptied = cache.copy(), cache.copy()
        swapped.batch_select_indices(torch.tensor([1, 0]))
        emptied.reset()
        others = [
            swapped,
            emptied,
            cache.take([0, 1]),
            cache.to("cpu"),
            LongNetCache.load(tmp_path / "snapshot", config),
        ]
        others[2].put(0, cache.take([1]))
        others[3].clear(1)
    with torch.no_grad():
        for other in (cache, *others):
            for n in (5, 1):
                assert read(other, n).isfinite().all()
