import importlib.util
from pathlib import Path

import pytest

from scripts import run


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_equal_torch():
    run(Path(__file__).with_name("interpreted_rotary.py"), TRITON_INTERPRET="1")
