import pytest
import torch

from longnet.attention.rotary import _one_pass, turn, turn_by_torch
from longnet.model.layers import rotary_angles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads", [1, 12])
def test_one_pass_and_its_gradient_equal_torch(given, heads):
    rotary = rotary_angles(torch.arange(10**6, 10**6 + 3001, device="cuda")[None], 64, 10_000.0)
    x = torch.randn(2, 3001, heads + 1, 64, device="cuda").to(given)[:, :, :heads].requires_grad_()
    for dtype in (given, torch.bfloat16):
        assert _one_pass(x, dtype, *rotary)
        out, wanted = turn(x, rotary, dtype), turn_by_torch(x, rotary, dtype)
        dout = torch.randn_like(out)
        tolerance = {"atol": 1e-5, "rtol": torch.finfo(dtype).eps}
        torch.testing.assert_close(out, wanted, **tolerance)
        got, true = (torch.autograd.grad(y, x, dout)[0] for y in (out, wanted))
        assert got.dtype == given
        assert torch.equal(got, turn(dout, (rotary[0], -rotary[1]), given))
        # torch rounds the two products apart, in the type of x.
        torch.testing.assert_close(
            got, true, atol=0.05 if given != torch.float32 else 1e-5, rtol=torch.finfo(given).eps
        )
