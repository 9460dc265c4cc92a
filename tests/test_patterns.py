import pytest
from hypothesis import given
from hypothesis import strategies as st

from longnet.patterns import DilatedPattern


@st.composite
def patterns(draw):
    branches = [(draw(st.integers(1, 12)), 1)]
    for _ in range(draw(st.integers(0, 3))):
        w = draw(st.integers(1, 40))
        branches.append((w, draw(st.integers(1, w))))
    return DilatedPattern(*zip(*branches, strict=True), draw(st.sampled_from(["cyclic", "block"])))


def visible(pattern, t, u, head, heads):
    """How often token t sees token u: the law of the paper, spelled out."""
    count = 0
    for w, r in pattern.branches:
        s = pattern.offset(head, r, heads)
        count += t // w == u // w and (t % w) % r == s and (u % w) % r == s
    return count


@given(patterns(), st.integers(1, 50), st.integers(1, 6), st.booleans())
def test_visible_pairs_counts_what_the_law_says(pattern, n, heads, causal):
    expected = sum(
        visible(pattern, t, u, h, heads)
        for h in range(heads)
        for t in range(n)
        for u in range(t + 1 if causal else n)
    )
    assert pattern.visible_pairs(n, heads, causal) == expected
    assert pattern.flops(n, heads, 16, causal) == 64 * expected


@given(patterns(), st.integers(1, 60), st.integers(1, 6))
def test_every_token_and_head_sees_itself(pattern, t, heads):
    assert all(visible(pattern, t, t, h, heads) >= 1 for h in range(heads))


@given(patterns(), st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 2), (8, 8)]))
def test_slots_hold_every_heads_rows(pattern, heads):
    num_heads, num_key_heads = heads
    for _, r in pattern.branches:
        slots = pattern.slots(r, num_heads, num_key_heads)
        assert len(set(slots)) == len(slots) <= num_heads
        for h, slot in enumerate(pattern.head_slots(r, num_heads, num_key_heads)):
            assert slots[slot] == (
                h // (num_heads // num_key_heads),
                pattern.offset(h, r, num_heads),
            )


def test_geometric_covers_the_length_with_constant_rows():
    pattern = DilatedPattern.geometric(1_000_000_000)
    assert pattern.segment_lengths[-1] >= 1_000_000_000 > pattern.segment_lengths[-2]
    assert {pattern.rows(w, r) for w, r in pattern.branches} == {2048}
    assert pattern.receptive_field() == pattern.segment_lengths[-1] - 1
    assert pattern.cache_entries(4, 4) == 4 * 2048 * len(pattern.branches)


def test_paper_offsets_and_torchscale_offsets_differ():
    assert [DilatedPattern((8,), (1,)).offset(h, 4, 8) for h in range(8)] == [
        0,
        1,
        2,
        3,
        0,
        1,
        2,
        3,
    ]
    block = DilatedPattern((8,), (1,), "block")
    assert [block.offset(h, 4, 8) for h in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("lengths", "rates", "message"),
    [
        ((), (), "at least one branch"),
        ((4, 8), (1,), "one dilation rate per segment length"),
        ((4,), (8,), "dilation rate <= segment length"),
        ((4,), (0,), "1 <="),
        ((4.0,), (1,), "integers"),
        ((4, 8), (2, 4), "add a branch of rate 1"),
    ],
)
def test_impossible_patterns_cannot_be_built(lengths, rates, message):
    with pytest.raises(ValueError, match=message):
        DilatedPattern(lengths, rates)


def test_unknown_offset_rule_is_refused():
    with pytest.raises(ValueError, match="head_offsets"):
        DilatedPattern((4,), (1,), "diagonal")  # type: ignore[arg-type]
