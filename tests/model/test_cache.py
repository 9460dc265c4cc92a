"""The cache grows no further than the pattern says, survives on disk bit for bit, and refuses what it did not write."""

import pickle
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from longnet.attention.reference import dilated_attention_reference
from longnet.model.cache import LongNetCache
from longnet.patterns import DilatedPattern


@dataclass
class Config:
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 4
    segment_lengths: tuple = (4, 64, 320)
    dilation_rates: tuple = (1, 2, 4)

    def pattern(self):
        return DilatedPattern(self.segment_lengths, self.dilation_rates)


def tokens(batch, n, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, h, 4, dtype=dtype, generator=generator) for h in (4, 2, 2)]


def feed(cache, q, k, v, lengths=None):
    outs = [cache.attend(i, q, k, v, lengths) for i in range(len(cache.layers))]
    assert torch.equal(outs[0], outs[1])
    cache.advance(q.shape[1] if lengths is None else lengths)
    return outs[0]


def test_a_stream_equals_the_parallel_pass_and_stays_within_the_formula():
    config = Config()
    cache = LongNetCache(config, 2, dtype=torch.float64)
    q, k, v = tokens(2, 420)
    exact, _ = dilated_attention_reference(q, k, v, config.pattern(), True, 0.5)
    limit = 2 * 2 * 2 * 4 * 8 * config.pattern().cache_entries(4, 2)  # layers, k and v, batch, D, bytes
    begin, sizes = 0, []
    for n in (3, 1, 1, 90, 1, 200, 124):
        part = slice(begin, begin + n)
        out = feed(cache, q[:, part], k[:, part], v[:, part])
        torch.testing.assert_close(out, exact[:, part], atol=1e-10, rtol=0)
        begin += n
        sizes.append(cache.nbytes())
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] == limit
    assert cache.positions.tolist() == [420, 420] == list(cache.host_positions)


def test_sequences_of_different_lengths_equal_single_runs():
    config = Config()
    cache = LongNetCache(config, 3, dtype=torch.float64)
    q, k, v = tokens(3, 120)
    seen = [0, 0, 0]
    for n, lengths in (
        (50, [50, 13, 50]),
        (30, [0, 30, 7]),
        (1, [1, 0, 1]),
        (20, [20, 20, 0]),
        (1, [1, 1, 1]),
    ):
        window = torch.tensor(seen)[:, None] + torch.arange(n)
        window = window.clamp(max=119)
        take = [x[torch.arange(3)[:, None], window] for x in (q, k, v)]
        out = feed(cache, *take, torch.tensor(lengths))
        for b, m in enumerate(lengths):
            end = seen[b] + m
            single = [x[b : b + 1, :end] for x in (q, k, v)]
            if m:
                exact, _ = dilated_attention_reference(*single, config.pattern(), True, 0.5)
                torch.testing.assert_close(out[b, :m], exact[0, seen[b] :], atol=1e-10, rtol=0)
            seen[b] = end
    assert cache.positions.tolist() == seen == list(cache.host_positions)


def test_batch_operations():
    cache = LongNetCache(Config(), 2, dtype=torch.float64)
    q, k, v = tokens(2, 10)
    feed(cache, q, k, v, [10, 6])
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.positions.tolist() == [6, 10]
    cache.batch_repeat_interleave(2)
    assert cache.positions.tolist() == [6, 6, 10, 10] == list(cache.host_positions)
    assert cache.layers[0][0][0].shape[0] == 4
    cache.batch_select_indices(torch.tensor([3]))
    assert cache.get_seq_length() == 10
    assert cache.batch_size == 1
    cache.reset()
    assert cache.get_seq_length() == 0


CONTINUE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_cache import Config, LongNetCache, feed, tokens
cache = LongNetCache.load(sys.argv[2], Config())
torch.save(feed(cache, *tokens(2, 40, seed=1, dtype=cache.dtype)), sys.argv[3])
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_snapshot_continues_in_a_new_process_bit_for_bit(tmp_path, request, dtype):
    cache = LongNetCache(Config(), 2, dtype=dtype)
    feed(cache, *tokens(2, 150, dtype=dtype), [150, 133])
    cache.save(tmp_path / "cache.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]
    here = str(request.path.parent)
    files = [str(tmp_path / name) for name in ("cache.safetensors", "out.pt")]
    subprocess.run([sys.executable, "-c", CONTINUE, here, *files], check=True, timeout=120)
    expected = feed(cache, *tokens(2, 40, seed=1, dtype=dtype))
    assert torch.equal(torch.load(files[1], weights_only=True), expected)


def test_damage_is_noticed_wherever_it_is(tmp_path):
    cache = LongNetCache(Config(num_hidden_layers=1), 1)
    q, k, v = tokens(1, 30, dtype=torch.float32)
    cache.attend(0, q, k, v)
    cache.advance(30)
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    good = path.read_bytes()
    for position in [*range(0, len(good), 97), len(good) - 1]:
        if good[position : position + 1] == b" ":
            continue  # padding between header and data means nothing
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(ValueError, match="expected"):
            LongNetCache.load(path, Config(num_hidden_layers=1))
    for size in (0, 7, 100, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(ValueError, match="expected"):
            LongNetCache.load(path, Config(num_hidden_layers=1))


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "cache.safetensors"
    path.write_bytes(pickle.dumps({"positions": [1]}))
    with pytest.raises(ValueError, match="safetensors"):
        LongNetCache.load(path, Config())
    LongNetCache(Config(), 1).save(path)
    assert LongNetCache.load(path, Config()).get_seq_length() == 0
    with pytest.raises(ValueError, match="configuration"):
        LongNetCache.load(path, Config(segment_lengths=(4, 64, 324)))


def test_arguments():
    cache = LongNetCache(Config(), 2, dtype=torch.float64)
    q, k, v = tokens(2, 3)
    with pytest.raises(ValueError, match="lengths"):
        cache.attend(0, q, k, v, [4, 1])
    with pytest.raises(ValueError, match="layer_index"):
        cache.attend(2, q, k, v)
    with pytest.raises(ValueError, match="batch size"):
        cache.attend(0, q[:1], k[:1], v[:1])
    with pytest.raises(ValueError, match="batch_size"):
        LongNetCache(Config(), 0)
