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
