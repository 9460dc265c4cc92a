"""The Triton kernels of dilated attention: under Triton's interpreter, and compiled for GPUs with less shared memory."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
HERE = Path(__file__).parent


def run(script, *arguments, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    result = subprocess.run(
        [sys.executable, HERE / script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("case", ["lengths", "groups", "widths", "windows", "batch", "half"])
def test_kernels_equal_the_oracle(case):
    run("interpreted_dilated.py", case, TRITON_INTERPRET="1")


# A GPU of 227 KiB runs the kernels themselves (tests/gpu), also with the tiles for 99 and 164 KiB.
@pytest.mark.parametrize(("capability", "kib"), [("80", "164"), ("86", "99")])
def test_tiles_fit_the_shared_memory_of_the_gpu(capability, kib):
    lines = [line.split() for line in run("compiled_dilated.py", capability, kib).splitlines()]
    assert {name for name, _ in lines} == {"dilated_forward", "dilated_dq", "dilated_dkv"}
    assert max(int(shared) for _, shared in lines) <= int(kib) * 1024
