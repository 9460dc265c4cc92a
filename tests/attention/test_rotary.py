import pytest
import torch

from longnet.attention.rotary import turn
from longnet.model.layers import rotary_angles


def test_products_depend_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64)

    def product(at):
        near = rotary_angles(torch.tensor([[at]]), 32, 10_000.0)
        far = rotary_angles(torch.tensor([[at + 17]]), 32, 10_000.0)
        return (turn(q, near) * turn(k, far)).sum()

    torch.testing.assert_close(product(10**9), product(0), atol=2e-5, rtol=0)


def test_pairs_are_complex_numbers_times_a_unit():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=g, requires_grad=True)
    angles = torch.randn(2, 5, 1, 4, dtype=torch.float64, generator=g)
    out = turn(x, (angles.cos(), angles.sin()))
    wanted = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(out, torch.cat((wanted.real, wanted.imag), -1))
    # Its gradient turns back.
    dout = torch.randn(x.shape, dtype=x.dtype, generator=g)
    (dx,) = torch.autograd.grad(out, x, dout)
    torch.testing.assert_close(dx, turn(dout, (angles.cos(), -angles.sin())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(dtype):
    x = torch.randn(1, 7, 2, 16).to(dtype)
    rotary = rotary_angles(torch.arange(7)[None], 16, 10_000.0)
    exact = turn(x.double(), tuple(y.double() for y in rotary))
    out = turn(x, rotary)
    assert out.dtype == dtype
    torch.testing.assert_close(out, exact.to(dtype), atol=1e-6, rtol=torch.finfo(dtype).eps)
    assert turn(x, rotary, torch.float32).dtype == torch.float32
