"""Shared fixtures: every test file collects on a laptop; scratch memory is poisoned so an unwritten output cannot pass."""

import math
import sys

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
    if not any(part in str(request.node.path) for part in ("tests/attention", "tests/kernels", "tests/gpu")):
        return
    if "compiles" in request.node.name:  # the compiler traces torch.empty itself
        return

    def poisoned(original):
        def create(*args, **kwargs):
            tensor = original(*args, **kwargs)
            with torch.no_grad():
                return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return create

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture
def longnet(monkeypatch, capfd):
    """Run a command in this process: (exit code, standard output, standard error)."""
    from longnet.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["longnet", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capfd.readouterr()

    return run


def assert_within_budget(name, actual, exact, peer, roundings=1):
    """err(actual) <= factor err(peer) + roundings; `peer` is the same formula in the input dtype, `exact` in fp64.

    The factors are FlashAttention's rule: 2 for values, 3 for gradients (their two products round independently). One
    rounding is that of the largest exact value or of 1, the scale of the inputs: a gradient that is 0 in exact arithmetic
    is a difference of such numbers. fp64 has no more exact judge than itself and gets 1e-12.
    """
    factor = 3 if name.startswith("d") else 2
    eps = 1e-12 if actual.dtype == torch.float64 else roundings * torch.finfo(actual.dtype).eps
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(exact.shape)}"
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(actual), finite), (
        f"{name}: NaN or infinity where the oracle has none, or the reverse"
    )
    if not finite.any():
        return
    exact, actual, peer = exact[finite].double(), actual[finite].double(), peer[finite].double()
    error, allowed = (actual - exact).abs().max(), factor * (peer - exact).abs().max()
    allowed = allowed + eps * exact.abs().max().clamp(min=1)
    assert error <= allowed, f"{name}: error {error:.3e} exceeds the budget {allowed:.3e}"
