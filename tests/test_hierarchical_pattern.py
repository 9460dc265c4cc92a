"""Laws of the cover: every visible token exactly once, from positions alone; clear refusals."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet import HierarchicalPattern
from longnet.patterns import hierarchical as patterns_hierarchical


@st.composite
def patterns(draw):
    return HierarchicalPattern(
        block=draw(st.integers(1, 5)), radix=draw(st.integers(2, 5)), window_blocks=draw(st.integers(1, 4)),
        guard=draw(st.integers(0, 2)), levels=draw(st.sampled_from([None, None, 1, 2, 3])), top_k=draw(st.integers(0, 3)),
    )  # fmt: skip


@settings(max_examples=3000, deadline=None)
@given(patterns(), st.integers(1, 400), st.booleans(), st.data())
def test_every_visible_token_is_covered_exactly_once(pattern, tokens, causal, data):
    block = data.draw(st.integers(0, (tokens - 1) // pattern.block))
    cover, sizes = pattern.cover(block, tokens, causal), pattern.node_counts(tokens, causal)
    count = [0] * tokens
    for t in range(*cover.local):
        count[t] += 1
    for level, lists in enumerate(zip(cover.left, cover.right, strict=True)):
        for lo, hi in lists:
            assert 0 <= lo <= hi <= sizes[level]
            span = pattern.node_tokens(level)
            for t in range(lo * span, min(tokens, hi * span)):
                count[t] += 1
    end = min(tokens, (block + 1) * pattern.block) if causal else tokens
    assert count == [1] * end + [0] * (tokens - end)


@settings(max_examples=300, deadline=None)
@given(patterns(), st.integers(1, 400), st.booleans())
def test_the_table_of_all_covers_agrees(pattern, tokens, causal):
    table = pattern.bounds(tokens, causal)
    for block in range(table.shape[2]):
        cover = pattern.cover(block, tokens, causal)
        for level, lists in enumerate(zip(cover.left, cover.right, strict=True)):
            for (lo, hi), column in zip(lists, table[level, :, block].reshape(2, 2), strict=True):
                assert (lo, hi) == tuple(column) or (lo == hi and column[0] == column[1])


@settings(max_examples=300, deadline=None)
@given(patterns(), st.integers(1, 300), st.integers(0, 300))
def test_a_causal_cover_depends_on_the_position_only(pattern, tokens, more):
    if pattern.levels is not None:
        return
    for block in range(tokens // pattern.block):
        short, long = pattern.cover(block, tokens), pattern.cover(block, tokens + more)
        some = lambda lists: [x for x in lists if x[0] < x[1]]  # noqa: E731
        assert some(short.left) == some(long.left)


def test_lists_stay_short_and_costs_grow_with_the_logarithm():
    pattern = HierarchicalPattern()
    for block in (10, 1000, 10**6, 10**9):
        cover = pattern.cover(block, (block + 1) * 64)
        assert max(hi - lo for lo, hi in cover.left) <= 8 * 2 - 1
    scored, attended = pattern.keys_per_query(10**9)
    assert scored < 2000
    assert attended < 3500
    assert pattern.cache_entries(10**9)[0] == 10**9
    assert pattern.cache_entries(10**9)[1] == pytest.approx(10**9 / 64 * 8 / 7, rel=1e-6)
    bounded = HierarchicalPattern(retention=(4096, 256))
    tokens, nodes = bounded.cache_entries(10**9)
    assert tokens == 4096
    assert nodes <= 256 * 9


def test_flops_count_what_a_query_attends():
    pattern = HierarchicalPattern(block=4, radix=2, window_blocks=2, top_k=0)
    pairs = 0
    for t in range(100):
        cover = pattern.cover(t // 4, 100)
        pairs += t + 1 - cover.local[0] + sum(hi - lo for lo, hi in cover.left)
    assert pattern.flops(100, 1, 1) == 4 * pairs


@pytest.mark.parametrize("options", [{}, {"levels": 3}, {"block": 16, "radix": 2, "window_blocks": 2}])
def test_operations_of_a_long_text_are_counted_in_a_sample(options, monkeypatch):
    pattern = HierarchicalPattern(**options)
    exact = pattern.flops(2**18, 1, 1)
    monkeypatch.setattr(patterns_hierarchical, "_COUNTED", 2**11)
    assert pattern.flops(2**18, 1, 1) == pytest.approx(exact, rel=1e-3)
    assert pattern.flops(2**18, 1, 1) != exact
    started = time.perf_counter()
    pattern.flops(10**9, 1, 1)
    assert time.perf_counter() - started < 10  # counted block by block it took minutes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block": 0}, "block"),
        ({"radix": 1}, "radix"),
        ({"beam": 0}, "beam"),
        ({"levels": 0}, "levels"),
        ({"top_k": -1}, "top_k"),
        ({"retention": (64, 64)}, "retention"),
        ({"retention": (4096, 8)}, "retention"),
        ({"retention": (4096, 64), "levels": 2}, "levels=None"),
        ({"retention": (4096,)}, "at least one number"),
        ({"retention": (4100, 64)}, "whole blocks"),
    ],
)
def test_refusals_name_the_argument(change, words):
    with pytest.raises(ValueError, match=words):
        HierarchicalPattern(**change)
