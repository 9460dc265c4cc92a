"""The Triton kernels of hierarchical attention: under Triton's interpreter, forward and every gradient; compiled for sm_90."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(script, *arguments, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, Path(__file__).with_name(script), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


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
    run("interpreted_hierarchical.py", case, TRITON_INTERPRET="1")


def test_wide_blocks_fit_the_shared_memory():
    assert int(run("compiled_hierarchical.py")) <= 227 * 1024
