"""The integers behind the launches of the kernels of hierarchical attention."""

import pytest

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
