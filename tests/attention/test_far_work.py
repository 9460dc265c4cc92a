"""The integers behind the launches of the kernels of hierarchical attention."""

import pytest
import torch

from longnet import HierarchicalPattern

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("pattern", "tokens"),
    [
        (HierarchicalPattern(radix=16, top_k=16, beam=32), 8192),
        (HierarchicalPattern(radix=8, guard=0), 8192),
        # The last level of a capped tree lists everything.
        (HierarchicalPattern(radix=8, levels=1), 2048),
        (HierarchicalPattern(radix=4, levels=2, beam=16), 8192),
    ],
)
def test_lists_have_room(pattern, tokens):
    from longnet.attention.far_work import Geometry

    bounds = pattern.bounds(tokens)
    assert (bounds[:, 1] - bounds[:, 0]).max() <= Geometry.of(pattern, tokens).listed


def test_descriptors_of_rows_have_strides_that_hardware_takes():
    from longnet.attention.far_work import rows_of

    x = torch.randn(1, 5, 1, 16)
    for given in (x, x.expand(1, 5, 3, 16), x.expand(2, 5, 1, 16), x.as_strided(x.shape, (0, 16, 0, 1))):
        rows = rows_of(given, 64, 16)
        assert rows.base.equal(given)
        assert rows.block_shape == [1, 64, 1, 16]
        assert all(stride > 0 and stride % 4 == 0 for stride in rows.strides[:3])
        assert rows.strides[3] == 1
        assert rows.base.as_strided(rows.shape, rows.strides).equal(given)


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 1, 128), (16, 1, 128), (8, 8, 64), (1, 1, 16)])
def test_chunks_of_long_texts_are_few_and_their_numbers_have_31_bits(heads, key_heads, width):
    from longnet.attention.far_work import Geometry, shape_of
    from longnet.attention.opened_work import CHUNK_BYTES, chunks_of

    pattern = HierarchicalPattern(radix=8, top_k=16, beam=16)
    for tokens in (2000, 2**16 + 1, 2**20, 2**22, 2**24):
        q = torch.empty(1, tokens, heads, width, dtype=torch.bfloat16, device="meta")
        shape = shape_of(q, q[:, :, :key_heads])
        chunks = chunks_of(q, shape, Geometry.of(pattern, tokens))
        # They follow each other from the first token that sees far.
        assert [c.first for c in chunks] == [512, *(c.first + c.tokens for c in chunks[:-1])]
        assert chunks[-1].first < tokens <= chunks[-1].first + chunks[-1].tokens < tokens + 64
        place = heads * width * q.element_size()
        assert all(c.tokens * shape.heads * max(width, pattern.top_k) < 2**31 for c in chunks)
        assert all(c.tokens * place * pattern.top_k <= max(CHUNK_BYTES, tokens * place) for c in chunks)
        # Each reads every leaf before it: cost is linear while their number stays bounded.
        assert len(chunks) <= 18


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 1, 128), (16, 1, 128), (8, 8, 64), (1, 1, 16)])
def test_sums_of_children_are_linear_in_the_text(heads, key_heads, width):
    """Every window may have sums of every family: with windows of a fixed size they would grow with the square."""
    from longnet.attention.far_work import Geometry, Shape
    from longnet.attention.opened_work import CHUNK_BYTES, COLUMNS, WINDOWS, families_of, stretches_of

    pattern = HierarchicalPattern(radix=8, top_k=16, beam=16)
    for tokens in (2000, 2**16 + 1, 2**20, 2**22, 2**24, 2**26):
        shape = Shape(1, tokens, heads, key_heads, width)
        families = families_of(Geometry.of(pattern, tokens), torch.device("cpu"))[1]
        stretches = stretches_of(shape, families, 2)
        assert [s.first for s in stretches] == [0, *(s.first + s.tokens for s in stretches[:-1])]
        assert stretches[-1].first + stretches[-1].tokens == tokens
        sums = 4 * key_heads * families * COLUMNS * (2 * width + 1)
        assert all(s.windows * sums <= CHUNK_BYTES or s.windows == 1 for s in stretches)
        assert sum(s.windows for s in stretches) <= WINDOWS
