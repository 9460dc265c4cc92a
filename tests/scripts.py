"""Scripts that tests run in a process of their own: Triton decides at import whether it interprets."""

import os
import subprocess
import sys
from pathlib import Path


def run(script: Path, *arguments: str, **environment: str) -> str:
    """What it printed; fails with the end of what it complained about."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    command = [sys.executable, script, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout
