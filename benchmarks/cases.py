"""What is measured: declared cases, nothing computed in passing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from longnet import DilatedPattern


@dataclass(frozen=True)
class Case:
    name: str
    heads: int
    key_heads: int
    head_width: int
    tokens: int
    pattern: DilatedPattern
    causal: bool = True
    dtype: str = "bfloat16"


def _geometric(name: str, heads: int, width: int, tokens: int) -> Case:
    return Case(name, heads, heads, width, tokens, DilatedPattern.geometric(tokens))


_CAUSAL = [
    _geometric("h16d128-256k", 16, 128, 262144),
    _geometric("h12d64-256k", 12, 64, 262144),
    _geometric("h16d128-128k", 16, 128, 131072),
    _geometric("h12d64-64k", 12, 64, 65536),
    _geometric("h12d64-4m", 12, 64, 4194304),
]
CASES = {c.name: c for c in _CAUSAL}
CASES |= {c.name + "-full": replace(c, name=c.name + "-full", causal=False) for c in _CAUSAL}
SMALL = Case("small", 4, 4, 16, 512, DilatedPattern.geometric(512, window=64), dtype="float32")
