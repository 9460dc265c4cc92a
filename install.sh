#!/usr/bin/env bash
# Install LongNet for development into .venv, right for a laptop and for a GPU machine. Safe to run again.
# A torch >= 2.11 that is already there is kept; else CUDA torch where nvidia-smi works; else the CPU build.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
stamp=.venv/.installed
if [[ -f $stamp && $stamp -nt pyproject.toml && $stamp -nt constraints.txt && $stamp -nt install.sh ]]; then
  exit 0
fi
has_torch() { "$1" -c 'import torch; v = torch.__version__.split("+")[0].split("."); raise SystemExit((int(v[0]), int(v[1])) < (2, 11))' 2>/dev/null; }

if [[ ! -x .venv/bin/python ]]; then
  if has_torch "$python"; then
    "$python" -m venv --system-site-packages .venv
  else
    "$python" -m venv .venv
  fi
fi
pip=(.venv/bin/python -m pip --disable-pip-version-check)
if ! has_torch .venv/bin/python; then
  if nvidia-smi >/dev/null 2>&1; then
    "${pip[@]}" install "torch>=2.11"
  else
    # The extra index serves this one step only, so that no other package is ever looked up there. --no-deps keeps pip
    # from asking it for torch's dependencies; the next step installs those from the default index.
    "${pip[@]}" --retries 1 --timeout 10 install --no-deps torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
  fi
fi
"${pip[@]}" install --quiet -c constraints.txt -e ".[plots,tasks,logging,dev]"
# Triton's interpreter runs the kernels' tests without a GPU. CUDA builds of torch bring the triton they were made for; beside
# the CPU build this is the one of its version.
if ! .venv/bin/python -c 'import triton' 2>/dev/null && .venv/bin/python -c 'import torch; raise SystemExit(not torch.__version__.startswith("2.13."))'; then
  "${pip[@]}" install --quiet --no-deps triton==3.7.1
fi
.venv/bin/python -c 'import torch; print("LongNet is installed; torch", torch.__version__)'
touch $stamp
