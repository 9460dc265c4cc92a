"""Rotary angles that stay honest at any position, and the shapes of the layers."""

import math
from fractions import Fraction

import pytest
import torch

from longnet.model.config import LongNetConfig
from longnet.model.layers import LongNetAttention, LongNetLayer, rotary_angles

PI = Fraction("3.14159265358979323846264338327950288419716939937510582097494459")


@pytest.mark.parametrize("position", [0, 1, 10**6, 10**9 + 7])
def test_angles_against_rational_arithmetic(position):
    head_dim, theta = 16, 10_000.0
    cos, sin = rotary_angles(torch.tensor([[position]]), head_dim, theta)
    for i in range(head_dim // 2):
        # theta^(-2i/D) is itself a float64; its rounding times the position is the error we allow.
        angle = Fraction(theta ** (-2 * i / head_dim)) * position
        angle = float(angle - int(angle / (2 * PI)) * 2 * PI)
        assert cos[0, 0, 0, i] == pytest.approx(math.cos(angle), abs=2e-6)
        assert sin[0, 0, 0, i] == pytest.approx(math.sin(angle), abs=2e-6)


def test_positions_may_differ_between_sequences():
    positions = torch.tensor([[3], [10**9]])
    cos, _ = rotary_angles(positions, 8, 10_000.0)
    assert cos.shape == (2, 1, 1, 4)
    torch.testing.assert_close(cos[1:], rotary_angles(positions[1:], 8, 10_000.0)[0])


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_keeps_shape_and_dtype(key_heads, dtype):
    config = LongNetConfig.preset(
        "tiny", num_key_value_heads=key_heads, segment_lengths=(8, 16, 32), dilation_rates=(1, 2, 4)
    )
    layer = LongNetLayer(config, 0).to(dtype)
    hidden = torch.randn(2, 37, config.hidden_size, dtype=dtype)
    rotary = rotary_angles(torch.arange(37)[None], config.head_dim, config.rope_theta)
    out = layer(hidden, rotary)
    assert out.shape == hidden.shape
    assert out.dtype == dtype
    assert torch.isfinite(out).all()


def test_head_dim_may_differ_from_hidden_over_heads():
    config = LongNetConfig.preset("tiny", head_dim=24)
    attention = LongNetAttention(config, 0)
    rotary = rotary_angles(torch.arange(5)[None], 24, config.rope_theta)
    assert attention(torch.randn(1, 5, 128), rotary).shape == (1, 5, 128)
