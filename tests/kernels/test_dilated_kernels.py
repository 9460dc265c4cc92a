"""The Triton kernels of dilated attention: under Triton's interpreter, and compiled for GPUs with less shared memory."""

import importlib.util
from pathlib import Path

import pytest

from scripts import run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
HERE = Path(__file__).parent


@pytest.mark.parametrize("case", ["lengths", "groups", "widths", "windows", "batch", "half"])
def test_kernels_equal_the_oracle(case):
    run(HERE / "interpreted_dilated.py", case, TRITON_INTERPRET="1")


# A GPU of 227 KiB runs the kernels themselves (tests/gpu), also with the tiles for 99 and 164 KiB.
@pytest.mark.parametrize(("capability", "kib"), [("80", "164"), ("86", "99")])
def test_tiles_fit_the_shared_memory_of_the_gpu(capability, kib):
    lines = [line.split() for line in run(HERE / "compiled_dilated.py", capability, kib).splitlines()]
    assert {name for name, _ in lines} == {"dilated_forward", "dilated_dq", "dilated_dkv"}
    assert max(int(shared) for _, shared in lines) <= int(kib) * 1024
