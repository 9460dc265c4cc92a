"""The Triton kernels of hierarchical attention in fp32 under Triton's interpreter, forward and every gradient."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("interpreted_hierarchical.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "case", ["summaries", "joint", "groups", "levels", "capped", "chunks", "short", "pyramids"]
)
def test_kernels_equal_the_oracle(case):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, SCRIPT, case], env=environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr[-2000:]
