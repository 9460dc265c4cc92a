"""Hierarchical attention over 1 to 4 ranks equals one device, fp64: values, lse, all gradients; and what travels is counted."""

import random

import pytest
import torch
import torch.distributed as dist

import ranks
from longnet import HierarchicalPattern, hierarchical_attention
from longnet.attention import collectives
from longnet.attention.collectives import SequenceParallel
from longnet.attention.hierarchical_parallel import sequence_parallel_hierarchical_attention, tokens_before
from longnet.schedule import Shards, hierarchical_traffic
from test_sequence_parallel import HEADS, TIMEOUT, WIDTH, start

PATTERNS = (
    HierarchicalPattern(block=4, radix=2, window_blocks=2, guard=1, top_k=3, beam=2),
    HierarchicalPattern(block=4, radix=2, window_blocks=1, guard=0, top_k=1, beam=None),
    HierarchicalPattern(block=2, radix=3, window_blocks=4, guard=1, top_k=0),
    HierarchicalPattern(block=8, radix=2, window_blocks=2, guard=0, levels=1, top_k=2),
    HierarchicalPattern(block=4, radix=2, window_blocks=1, guard=0, levels=6, top_k=40),
    HierarchicalPattern(block=3, radix=2, window_blocks=2, guard=0, top_k=2, beam=3, retention=(9, 8)),
)


def draw(pattern, n, key_heads, seed, dtype=torch.float64):
    """q, k, v, prior query, level bias, router mix (0 and 1 among them), rotary, and the gradients of out and lse."""
    g = torch.Generator().manual_seed(seed)
    batch = 1 + seed % 2

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    tensors = [normal(batch, n, heads, WIDTH) for heads in (HEADS, key_heads, key_heads)]
    mix = torch.tensor([0, 1, 0.3, 0.8] if seed % 4 else [1.0] * HEADS, dtype=dtype)
    tensors += [normal(key_heads, WIDTH), normal(HEADS, pattern.num_levels(n) + 1), mix]
    angles = torch.arange(n)[None, :, None, None] * torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=dtype)
    rotary = (angles.cos(), angles.sin()) if seed % 3 else None
    return tensors, rotary, normal(batch, n, HEADS, WIDTH), normal(batch, HEADS, n) * (seed % 5 > 0)


def compare(parallel, pattern, key_heads, seed, impl, dtype=torch.float64):
    """The largest error of this rank, relative to the largest exact value (at least 1), over out, lse and all gradients."""
    n = parallel.shards.borders[-1]
    tensors, rotary, dout, dlse = draw(pattern, n, key_heads, seed, dtype)

    def call(function, inputs, rotary, *arguments, **options):
        q, k, v, prior, bias, mix = inputs
        return function(
            q, k, v, pattern, *arguments, scale=0.4, prior_query=prior, level_bias=bias, router_mix=mix, rotary=rotary,
            **options,
        )  # fmt: skip

    def gradients(result, inputs, dout, dlse):
        loss = (result.out * dout).sum() + ((result.lse * dlse).sum() if seed % 5 else 0)
        return torch.autograd.grad(loss, inputs, materialize_grads=True)

    whole = [x.clone().requires_grad_() for x in tensors]
    result = call(hierarchical_attention, whole, rotary, impl=impl)
    exact = [result.out, result.lse.transpose(1, 2), *gradients(result, whole, dout, dlse)]
    a, b = parallel.shards.span(parallel.rank)
    mine = [x[:, a:b].clone().requires_grad_() for x in tensors[:3]]
    mine += [x.clone().requires_grad_() for x in tensors[3:]]
    turns = rotary and tuple(x[:, a:b] for x in rotary)
    result = call(sequence_parallel_hierarchical_attention, mine, turns, parallel)
    got = [result.out, result.lse.transpose(1, 2), *gradients(result, mine, dout[:, a:b], dlse[..., a:b])]
    for x in got[5:]:
        dist.all_reduce(x)
    exact[:5] = [x[:, a:b] for x in exact[:5]]
    worst = 0.0
    for x, y in zip(exact, got, strict=True):
        assert x.shape == y.shape
        assert y.isfinite().all()
        if y.numel():
            worst = max(worst, float((x - y).detach().abs().max() / x.detach().abs().max().clamp(min=1)))
    return worst


def equality():
    rank, world = start()
    rng, worst = random.Random(world), {}
    parallel = SequenceParallel(Shards.even(world, world), timeout=TIMEOUT)
    cases = [(PATTERNS[0], Shards.even(12 * world, world)), (PATTERNS[4], Shards.even(29, world, block=4))]
    cases += [(PATTERNS[3], Shards.even(1, world)), (PATTERNS[1], Shards.even(9, world, block=4))]
    for i in range(24):  # shards of unequal length, some empty, some shorter than the window; ragged tails
        pattern, n = PATTERNS[i % len(PATTERNS)], rng.randint(1, 110)
        inner = sorted(pattern.block * rng.randint(0, n // pattern.block) for _ in range(world - 1))
        cases.append((pattern, Shards((0, *inner, n))))
    for i, (pattern, shards) in enumerate(cases):
        # The oracle takes a second for every 100 tokens; the vectorised path is judged by it elsewhere.
        impl = "reference" if i < 4 else "torch"
        error = compare(parallel.with_shards(shards), pattern, (1, 2, 4)[i % 3], i, impl)
        worst[f"{i} {shards} {pattern}"] = error
    shards = Shards.even(120, world, block=4)
    low = compare(parallel.with_shards(shards), PATTERNS[0], 2, 1, "torch", torch.bfloat16)
    return {"worst": worst, "low": low}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_one_device(world, tmp_path):
    for result in ranks.results(ranks.run(equality, world, tmp_path)):
        bad = {case: error for case, error in result["worst"].items() if not error <= 1e-12}
        assert not bad
        assert result["low"] <= 0.04
