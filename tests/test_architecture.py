"""The house rules that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import longnet

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def _run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_import_is_light():
    _run("import sys, longnet; assert not {'triton', 'transformers', 'tokenizers'} & set(sys.modules)")


def test_reference_runs_without_triton():
    _run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from longnet import DilatedPattern, dilated_attention\n"
        "q = torch.randn(1, 20, 2, 8)\n"
        "assert dilated_attention(q, q, q, DilatedPattern((8,), (1,)), impl='reference').out.isfinite().all()"
    )


def test_public_names():
    assert longnet.__all__ == [
        "AttentionOutput",
        "DilatedPattern",
        "HierarchicalPattern",
        "LongNetCache",
        "LongNetConfig",
        "LongNetForCausalLM",
        "LongNetForMaskedLM",
        "LongNetForSequenceClassification",
        "LongNetForTokenClassification",
        "LongNetModel",
        "dilated_attention",
        "explain",
        "hierarchical_attention",
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document):
    targets = re.findall(r"\]\(([^)\s#]+)", document.read_text())
    broken = [t for t in targets if "://" not in t and not (document.parent / t).exists()]
    assert not broken


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_cli_prints(source):
    if source.parent.name == "cli":
        return
    calls = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call)]
    assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


def test_no_machine_paths():
    texts = [*DOCUMENTS, *SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    texts += [ROOT / name for name in ("Makefile", "install.sh", "constraints.txt", "pyproject.toml")]
    assert not [str(path) for path in texts if "/" + "work/" in path.read_text()]
