"""A sequence over 1 to 4 ranks equals one device, fp64: values, lse, gradients; and what travels does not grow with it."""

import random

import pytest
import torch

import ranks
from longnet import DilatedPattern, dilated_attention
from longnet.attention import collectives
from longnet.attention.collectives import SequenceParallel
from longnet.attention.reference import dilated_attention_reference
from longnet.attention.sequence_parallel import sequence_parallel_attention
from longnet.schedule import Shards, traffic

HEADS, WIDTH = 4, 8


def compare(parallel, pattern, start, n, key_heads, causal, seed, dtype=torch.float64):
    """The largest error of this rank, relative to the largest exact value (at least 1), over out, lse, dq, dk, dv."""
    g = torch.Generator().manual_seed(seed)
    batch = 1 + seed % 2

    def draw(heads):
        return torch.randn(batch, n, heads, WIDTH, generator=g, dtype=dtype)

    q, dout, k, v = draw(HEADS), draw(HEADS), draw(key_heads), draw(key_heads)
    dlse = torch.randn(batch, HEADS, n, generator=g, dtype=dtype)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = dilated_attention_reference(*whole, pattern, causal, 0.3, None, start)
    loss = (out * dout).sum() + ((lse * dlse).sum() if seed % 3 else 0)
    exact = (out, lse.transpose(1, 2), *torch.autograd.grad(loss, whole))
    a, b = (x - start for x in parallel.shards.span(parallel.rank))
    mine = [x[:, a:b].clone().requires_grad_() for x in (q, k, v)]
    out, lse = sequence_parallel_attention(*mine, pattern, parallel, causal=causal, scale=0.3)
    loss = (out * dout[:, a:b]).sum() + ((lse * dlse[:, :, a:b]).sum() if seed % 3 else 0)
    got = (out, lse.transpose(1, 2), *torch.autograd.grad(loss, mine))
    worst = 0.0
    for x, y in zip(exact, got, strict=True):
        assert y.isfinite().all()
        if y.numel():
            worst = max(worst, float((x[:, a:b] - y).abs().max() / x.abs().max().clamp(min=1)))
    return worst


def equality():
    rank, world = ranks.join()
    worst, parallel = {}, None
    rng = random.Random(world)
    cases = [  # segments inside, at and across borders; ragged tails; shards of unequal length, some empty; far positions
        ((8, 16, 32), (1, 2, 4), Shards.even(8 * world, world)),
        ((4, 8, 64), (1, 2, 4), Shards.even(16 * world, world)),
        ((6, 18, 36), (1, 6, 12), Shards.even(37, world)),
        ((8, 32), (1, 4), Shards.even(1, world)),
        ((8, 32), (1, 4), Shards.even(world + 1, world, start=2**33 + 5)),
        ((64, 64, 64), (1, 1, 16), Shards.even(61, world)),
    ]
    for _ in range(30):
        n, first = rng.randint(1, 90), rng.choice([0, 0, 13, 2**33 + 5])
        inner = sorted(first + rng.randint(0, n) for _ in range(world - 1))
        lengths = (rng.randint(1, 20), rng.randint(4, 90), 40, 64)
        cases.append((lengths, (1, rng.randint(1, 4), 7, 1), Shards((first, *inner, first + n))))
    for i, (lengths, rates, shards) in enumerate(cases):
        pattern = DilatedPattern(lengths, rates, "block" if i % 4 == 3 else "cyclic")
        parallel = (
            parallel.with_shards(shards) if parallel else SequenceParallel(shards, timeout=ranks.TIMEOUT)
        )
        first, n = shards.borders[0], shards.borders[-1] - shards.borders[0]
        for causal in (True, False):
            error = compare(parallel, pattern, first, n, (1, 2, 4)[i % 3], causal, i)
            worst[f"{i} {causal} {shards} {pattern}"] = error
    return {"worst": worst, "low": low_precision(parallel), "bytes": constant_traffic(rank, world)}


def low_precision(parallel):
    """bf16 against the oracle, in units of the error of one device in bf16."""
    shards = Shards.even(120, parallel.shards.ranks)
    return compare(
        parallel.with_shards(shards), DilatedPattern((8, 120), (1, 3)), 0, 120, 2, True, 1, torch.bfloat16
    )


def constant_traffic(rank, world):
    """Numbers received while N grows at fixed N / r: counted in the collectives, and as the schedule predicts."""
    received = []
    gather, scatter = collectives._all_gather, collectives._reduce_scatter

    def count_gather(target, source, **kwargs):
        received.append(target.numel() - source.numel())
        return gather(target, source, **kwargs)

    def count_scatter(target, source, **kwargs):
        received.append(source.numel() - target.numel())
        return scatter(target, source, **kwargs)

    collectives._all_gather, collectives._reduce_scatter = count_gather, count_scatter
    table = []
    for n in (256, 1024, 4096):
        received.clear()
        pattern, shards = DilatedPattern((16, n), (1, n // 16)), Shards.even(n, world)
        parallel = SequenceParallel(shards, timeout=ranks.TIMEOUT)
        x = [torch.randn(1, n // world, HEADS, WIDTH, dtype=torch.float64).requires_grad_() for _ in range(3)]
        if n % world == 0:
            sequence_parallel_attention(*x, pattern, parallel).out.sum().backward()
            planned = traffic(pattern, HEADS, HEADS, WIDTH, shards, rank, element_size=1, gradient_size=1)
            table.append([sum(received), sum(planned)])
    collectives._all_gather, collectives._reduce_scatter = gather, scatter
    return table


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_one_device_and_traffic_does_not_grow(world, tmp_path):
    for result in ranks.results(ranks.run(equality, world, tmp_path)):
        bad = {case: error for case, error in result["worst"].items() if not error <= 1e-12}
        assert not bad
        assert result["low"] <= 0.04
        assert all(counted == planned for counted, planned in result["bytes"])
        assert len({counted for counted, _ in result["bytes"]}) <= 1
        if world in (2, 4):
            assert result["bytes"][0][0] > 0
            assert len(result["bytes"]) == 3


def misfit():
    ranks.join()
    parallel = SequenceParallel(Shards.even(10, 2), timeout=ranks.TIMEOUT)
    x = torch.randn(1, 4, 2, 8)
    return ranks.refusals(
        lambda: sequence_parallel_attention(x, x, x, DilatedPattern((4,), (1,)), parallel),
        lambda: SequenceParallel(Shards.even(10, 3)),
        lambda: parallel.with_shards(Shards.even(10, 1)),
    )


def test_arguments_that_do_not_fit_are_refused_before_anything_is_sent(tmp_path):
    for rank, messages in enumerate(ranks.results(ranks.run(misfit, 2, tmp_path))):
        assert f"expected the 5 tokens of rank {rank}" in messages[0]
        assert "expected 3 ranks" in messages[1]
        assert "expected 2; got 1" in messages[2]


def test_a_window_of_one_segment_length_that_begins_inside_a_segment():
    """Its two partial segments once passed for a whole one, and gradients were added to unwritten memory."""
    q, k, v = (torch.randn(1, 17, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    pattern = DilatedPattern((17, 40), (1, 7))
    grads = []
    for impl in ("strided", "reference"):
        out = dilated_attention(q, k, v, pattern, start=5, impl=impl).out
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() < 1e-12
