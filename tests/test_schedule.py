"""Who sends what to whom, counted for jobs of up to 1024 ranks."""

import ast
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet import schedule
from longnet.patterns import DilatedPattern, HierarchicalPattern
from longnet.schedule import (
    Shards,
    exchanges,
    halo,
    hierarchical_traffic,
    leaf_counts,
    rank_exchanges,
    rank_plan,
    traffic,
    work,
)


def some_shards(data, borders):
    """(tokens, first position, shards) with up to `borders` borders anywhere, shards without a token included."""
    n, start = data.draw(st.integers(1, 80)), data.draw(st.sampled_from([0, 17, 2**40 + 3]))
    inner = sorted(data.draw(st.lists(st.integers(0, n), max_size=borders)))
    return n, start, Shards((start, *(start + x for x in inner), start + n))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_work_of_all_ranks_is_the_work_of_one_device(data):
    n, start, shards = some_shards(data, 4)
    lengths = (data.draw(st.integers(1, 20)), data.draw(st.integers(4, 90)), 40)
    pattern = DilatedPattern(lengths, (1, data.draw(st.integers(1, 4)), 7))
    key_heads, causal = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.booleans())
    parts = [work(pattern, 4, key_heads, shards, i, causal) for i in range(shards.ranks)]
    whole = work(pattern, 4, key_heads, Shards((start, start + n)), 0, causal)
    assert sum(map(sum, parts)) == sum(whole)
    if start == 0:
        assert sum(whole) == pattern.visible_pairs(n, 4, causal)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_exchanges_of_a_rank_are_those_of_all_that_it_takes_part_in(data):
    _, _, shards = some_shards(data, 5)
    pattern = DilatedPattern((data.draw(st.integers(1, 20)), data.draw(st.integers(4, 90)), 40), (1, 3, 7))
    everywhere = exchanges(pattern, 4, 2, shards)
    for rank in range(shards.ranks):
        mine = rank_exchanges(pattern, 4, 2, shards, rank)
        assert mine == tuple(e for e in everywhere if rank in e.members)


def test_segments_within_a_shard_do_not_communicate():
    pattern = DilatedPattern((8, 32, 128), (1, 4, 16))
    assert exchanges(pattern, 4, 4, Shards.even(128, 1)) == ()
    (only,) = exchanges(pattern, 4, 4, Shards.even(128, 4))
    assert only.members == (0, 1, 2, 3)
    assert [s.rate for s in only.segments] == [16]
    pairs = [e.members for e in exchanges(pattern, 4, 4, Shards.even(128, 8))]
    assert pairs == [(0, 1), (0, 1, 2, 3, 4, 5, 6, 7), (2, 3), (4, 5), (6, 7)]


def test_causal_ranks_see_only_earlier_rows_and_the_first_of_a_segment_none():
    pattern, shards = DilatedPattern((8, 64), (1, 4)), Shards.even(128, 8)
    for rank in range(8):
        plan = rank_plan(pattern, 4, 4, shards, rank, True)
        ends = {x.end for group in plan.rectangles for x in group}
        assert ends == ({rank % 4 * 4} if rank % 4 else set())


@pytest.mark.parametrize("ranks", [8, 64, 1024])
def test_a_large_job_is_balanced_and_its_traffic_follows_the_number_of_shared_branches(ranks):
    """2^20 tokens a rank, 12 heads of 64, window 2048: bytes a rank, layer and step, and the most loaded rank."""
    shards = Shards.even(ranks << 20, ranks)
    pattern = DilatedPattern.geometric(ranks << 20)
    some = sorted({*range(0, ranks, max(1, ranks // 16)), ranks - 1})
    shared = ranks.bit_length() - 1
    for rank in some:
        bytes_ = traffic(pattern, 12, 12, 64, shards, rank)
        # Each shared branch brings at most 2048 rows of each head, keys and values.
        assert bytes_.forward <= shared * 2 * 2048 * 12 * 64 * 2
        assert bytes_.backward == 2 * bytes_.forward
    pairs = [sum(work(pattern, 12, 12, shards, rank)) for rank in some]
    assert max(pairs) <= 1.002 * min(pairs)
    if ranks <= 64:
        grown = DilatedPattern((2048, ranks << 24), (1, ranks << 13))
        base = DilatedPattern((2048, ranks << 20), (1, ranks << 9))
        few, many = (
            traffic(p, 12, 12, 64, Shards.even(n, ranks), 1)
            for p, n in ((base, ranks << 20), (grown, ranks << 24))
        )
        assert few == many


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_halo_is_the_tokens_before_a_shard_each_from_its_owner(data):
    n, reach = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 50))
    shards = Shards((0, *sorted(data.draw(st.lists(st.integers(0, n), max_size=5))), n))
    plans = [halo(shards, reach, i) for i in range(shards.ranks)]
    for rank, plan in enumerate(plans):
        begin, end = shards.span(rank)
        sources = []
        for owner, other in enumerate(plans):
            a, b = other.sent[rank]
            sources += range(shards.borders[owner] + a, shards.borders[owner] + b)
            assert b - a == plan.received[owner]
        assert sources == (list(range(max(0, begin - reach), begin)) if begin < end else [])
        assert plan.begin == begin - len(sources)


def test_leaves_belong_to_one_rank_and_the_unfinished_last_one_to_none():
    pattern = HierarchicalPattern(block=4)
    shards = Shards.even(30, 3, block=4)
    assert shards.borders == (0, 12, 24, 30)
    assert leaf_counts(pattern, shards) == (3, 3, 1)
    assert Shards.even(9, 4, block=4).borders == (0, 4, 8, 9, 9)
    assert leaf_counts(pattern, Shards((0, 8, 8, 10, 10))) == (2, 0, 0, 0)
    for borders in ((4, 8), (0, 6, 8), (0, 4, 6, 8)):
        with pytest.raises(ValueError, match="multiples of the leaf block of 4 tokens"):
            leaf_counts(pattern, Shards(borders))


def test_hierarchical_traffic_grows_with_the_leaves_alone():
    """12 heads of 64, blocks of 64, bf16: at 2^20 tokens a rank, and at twice as many."""
    pattern, rows = HierarchicalPattern(), 12 * 64 * 2 * 2
    for ranks in (8, 64):
        few, many = (
            hierarchical_traffic(pattern, 12, 64, Shards.even(ranks << shift, ranks), 1) for shift in (20, 21)
        )
        leaves = (ranks - 1) << 14
        assert few.forward == 7 * 64 * rows + leaves * (rows + 12 * 8)
        assert many.forward - few.forward == leaves * (rows + 12 * 8)
        opened = hierarchical_traffic(pattern, 12, 64, Shards.even(ranks << 20, ranks), 1, 1000, 10)
        assert opened.forward - few.forward == 1000 * 64 * 64 * 2 * 2
        assert opened.backward - few.backward == 10 * 64 * 64 * 2 * 4


def test_misuse_is_named():
    for borders in ((0,), (0, 0), (3, 2), (-1, 4)):
        with pytest.raises(ValueError, match="borders: expected"):
            Shards(borders)
    for arguments in ((10, 0), (10, 1, 0, 0)):
        with pytest.raises(ValueError, match="at least one rank"):
            Shards.even(*arguments)


def test_no_torch():
    tree = ast.parse(Path(schedule.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert modules == {"__future__", "bisect", "dataclasses", "functools", "longnet.patterns", "typing"}
