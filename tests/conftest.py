"""Shared fixtures: every test file collects on a laptop; scratch memory is poisoned so an unwritten output cannot pass."""

import contextlib
import io
import math
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


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


def run_longnet(*arguments):
    """Run a command in this process: (exit code, standard output, standard error)."""
    from longnet.cli import main

    out, error = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="", write_through=True) for _ in range(2))
    code = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
    ):
        patch.setattr(sys, "argv", ["longnet", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    return code, *(stream.buffer.getvalue().decode() for stream in (out, error))


@pytest.fixture(scope="session")
def longnet():
    return run_longnet


@pytest.fixture
def recipes(monkeypatch):
    """The folder of recipes, whose modules a test can then import."""
    folder = Path(__file__).resolve().parents[1] / "recipes"
    monkeypatch.syspath_prepend(str(folder))
    return folder


def assert_attention_within_budget(actual, exact, peer, branches):
    """`assert_within_budget` of (out, lse, dq, dk, dv) of a mixture of `branches`.

    Where inputs are fp32, as the statistics are, nothing is more precise than the result: each branch adds two roundings, of its
    products and of the sum, and gradients make p again from the lse that was stored, whose rounding, half an ulp of |lse|, is
    a relative error of all of a row's p.
    """
    lse = exact[1][torch.isfinite(exact[1])].abs()
    remade = float(lse.max()) / 2 if len(lse) else 0.0
    for name, a, e, p in zip(("out", "lse", "dq", "dk", "dv"), actual, exact, peer, strict=True):
        more = 0 if name == "lse" else 2 * branches + remade * name.startswith("d")
        assert_within_budget(name, a, e, p, more * (actual[0].dtype == torch.float32))


def assert_within_budget(name, actual, exact, peer, more=0.0):
    """err(actual) <= 2 err(peer) + one rounding and `more`; `peer` is the same formula in the input dtype, `exact` in fp64.

    The rounding is that of the largest exact value or of 1, the scale of the inputs: a gradient that is 0 in exact
    arithmetic is a difference of such numbers. fp64 has no more exact judge than itself and gets 1e-12.
    """
    error, base, rounding = errors(name, actual, exact, peer)
    allowed = 2 * base + (1 + more) * rounding
    assert error <= allowed, f"{name}: error {error:.3e} exceeds the budget {allowed:.3e}"


def errors(name, actual, exact, peer):
    """(largest error, that of the peer, one rounding); infinities must stand where the oracle has them."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(exact.shape)}"
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(actual), finite), (
        f"{name}: NaN or infinity where the oracle has none, or the reverse"
    )
    if not finite.any():
        return 0.0, 0.0, 0.0
    eps = 1e-12 if actual.dtype == torch.float64 else torch.finfo(actual.dtype).eps
    exact, actual, peer = exact[finite].double(), actual[finite].double(), peer[finite].double()
    rounding = eps * exact.abs().max().clamp(min=1)
    return float((actual - exact).abs().max()), float((peer - exact).abs().max()), float(rounding)
