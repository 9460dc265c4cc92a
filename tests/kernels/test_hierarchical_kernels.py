"""The Triton kernels of hierarchical attention: under Triton's interpreter, forward and every gradient; compiled for sm_90."""

import importlib.util
from pathlib import Path

import pytest

from scripts import run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "case",
    [
        "summaries",
        "joint",
        "aligned",
        "groups",
        "levels",
        "capped",
        "chunks",
        "batches",
        "own block",
        "own block, summaries",
        "short",
        "pyramids",
        "readers",
        "tables",
        "compiled",
        "continued",
        "streams",
    ],
)
def test_kernels_equal_the_oracle(case):
    run(HERE / "interpreted_hierarchical.py", case, TRITON_INTERPRET="1")


def test_wide_blocks_fit_the_shared_memory():
    assert int(run(HERE / "compiled_hierarchical.py")) <= 227 * 1024
