.PHONY: demo test lint test-gpu bench install

install:
	@./install.sh

demo: install
	.venv/bin/longnet demo

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyrefly check
	.venv/bin/lint-imports

test: lint
	.venv/bin/python -m pytest -n 2 --dist worksteal -q

# On a machine with a GPU, with the torch, triton and pytest that are already there.
test-gpu:
	PYTHONPATH=src:tests python3 -m pytest -o addopts="" -q -rs -m gpu tests/gpu tests/integrations/test_on_gpu.py

bench:
	PYTHONPATH=src python3 benchmarks/run.py
