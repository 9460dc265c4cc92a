"""Shared fixtures: every test file collects on a laptop; scratch memory is poisoned so an unwritten output cannot pass."""

import math

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """CPU always, CUDA where there is one; skips with the reason otherwise."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch, request):
    """Fill torch.empty* with NaN in attention and kernel tests: reading unwritten memory fails the test."""
    if not any(part in str(request.node.path) for part in ("tests/attention", "tests/kernels")):
        return

    def poisoned(original):
        def create(*args, **kwargs):
            tensor = original(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return create

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def assert_within_budget(name, actual, exact, peer, rounding_of=None):
    """err(actual) <= 2 err(peer) + one rounding of the largest exact value; `peer` is the same formula in the input dtype.

    The budget is derived, not tuned: a fast path may be as wrong as twice the naive formula in its own precision.
    """
    dtype = rounding_of or actual.dtype
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(exact.shape)}"
    assert torch.equal(torch.isfinite(actual), torch.isfinite(exact)), f"{name}: finite where it must not be, or NaN"
    finite = torch.isfinite(exact)
    if not finite.any():
        return
    exact, actual, peer = exact[finite].double(), actual[finite].double(), peer[finite].double()
    error, allowed = (actual - exact).abs().max(), 2 * (peer - exact).abs().max()
    allowed = allowed + torch.finfo(dtype).eps * exact.abs().max()
    assert error <= allowed, f"{name}: error {error:.3e} exceeds the budget {allowed:.3e}"
