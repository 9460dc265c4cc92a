"""Attention maps against the reference: with one-hot values its output is the weight of every token."""

import math

import pytest
import torch

from longnet import HierarchicalPattern
from longnet.attention.attention_map import attention_map
from longnet.attention.hierarchical_reference import hierarchical_attention_reference
from longnet.attention.rotary import turn
from longnet.model.layers import rotary_angles

PATTERNS = {
    "opened": HierarchicalPattern(block=4, radix=2, window_blocks=2, top_k=2, beam=3),
    "summaries": HierarchicalPattern(block=4, radix=2, window_blocks=2, top_k=0),
    "guard 0, capped": HierarchicalPattern(
        block=2, radix=3, window_blocks=1, guard=0, levels=2, top_k=3, beam=1
    ),
    "everything": HierarchicalPattern(block=4, radix=2, window_blocks=2, top_k=100, beam=100),
    "bounded": HierarchicalPattern(block=4, radix=2, window_blocks=2, top_k=2, retention=(16, 8)),
}


def random(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 50, 64])
def test_weights_are_those_of_the_reference(name, tokens):
    pattern, width, heads, key_heads = PATTERNS[name], 64, 4, 2
    q, k = random(1, tokens, heads, width, seed=0), random(1, tokens, key_heads, width, seed=1)
    one_hot = torch.eye(tokens, width, dtype=torch.float64)[None, :, None].expand(1, -1, key_heads, -1)
    rotary = rotary_angles(torch.arange(tokens)[None], width, 10_000.0)
    q_local, k_local = (turn(x, rotary) for x in (q, k))
    prior, bias = random(key_heads, width, seed=2), random(heads, 8, seed=3)
    mix, scale, routes = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64), 1 / math.sqrt(width), {}
    weights, _ = hierarchical_attention_reference(
        q, k, one_hot, q_local, k_local, pattern, True, scale, prior, bias, mix, None, routes
    )
    maps = attention_map(q[0, -1], q_local[0, -1], k[0], k_local[0], pattern, scale, prior, bias, mix)
    assert len(maps) == heads
    for head, found in enumerate(maps):
        assert sum(item.weight for item in found.items) == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(found.tokens, weights[0, -1, head, :tokens], atol=1e-9, rtol=0)
        # every token in exactly one item, and the opened ones are the reference's
        spans = [(item.begin, item.end) for item in found.items]
        assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])]
        assert spans[-1][1] == tokens
        opened = [item.begin // pattern.block for item in found.items if item.kind == "opened"]
        assert opened == routes.get((0, head // 2, tokens - 1, 0), [])


def test_scores_of_a_level_sum_to_one_over_its_candidates():
    pattern = PATTERNS["opened"]
    q, k = random(2, 16, seed=0), random(80, 1, 16, seed=1)
    bias = torch.zeros(2, 8, dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    found = attention_map(q, q, k, k, pattern, 0.25, torch.zeros(1, 16, dtype=torch.float64), bias, ones)[0]
    leaves = [item for item in found.items if item.level == 0]
    assert sum(item.score for item in leaves) == pytest.approx(1)
    level, scored, opened = found.descent[-1]
    assert (level, scored, opened) == (0, len(leaves), 2)
    assert min(x.score for x in leaves if x.kind == "opened") >= max(
        x.score for x in leaves if x.kind == "summary"
    )
