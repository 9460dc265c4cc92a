"""What is measured of hierarchical attention: declared cases, nothing computed in passing."""

from __future__ import annotations

from dataclasses import dataclass

from longnet import HierarchicalPattern

# 16 leaves of 64 opened, a window of 8 blocks, the search as wide as what is opened or twice as wide; by beam and radix.
OPENED = {
    (beam, radix): HierarchicalPattern(radix=radix, top_k=16, beam=beam)
    for beam, radix in ((16, 16), (32, 16), (16, 8))
}
# The same with nothing opened.
COVER = HierarchicalPattern(radix=16, top_k=0)
# For a machine without a GPU: no claim.
SMALL = HierarchicalPattern(block=16, radix=4, window_blocks=2, top_k=2, beam=4)
SMALL_COVER = HierarchicalPattern(block=16, radix=4, window_blocks=2, top_k=0)


@dataclass(frozen=True)
class Case:
    """who: "opened" (with its beam and radix) or "cover" (hierarchical), "dense" (the library's), "nsa" (fla's).

    group: why it is measured.
    """

    group: str
    who: str
    tokens: int
    heads: int = 16
    key_heads: int = 1
    width: int = 128
    batch: int = 1
    beam: int = 16
    radix: int = 16

    @property
    def name(self) -> str:
        who = f"{self.who}, beam {self.beam}" if self.who == "opened" else self.who
        who += "" if self.radix == 16 else f", radix {self.radix}"
        batch = f"{self.batch} x " if self.batch > 1 else ""
        return (
            f"{who}, {batch}{self.tokens} tokens, {self.heads} heads on {self.key_heads}, width {self.width}"
        )


def _whole(tokens: int) -> list[Case]:
    shared, grouped = ("opened", "dense", "nsa"), ("opened", "dense")
    cases = [Case("whole", who, tokens) for who in shared] + [Case("whole", "opened", tokens, beam=32)]
    return cases + [Case("whole", who, tokens, key_heads=4) for who in grouped]


CASES = [
    # Local window and summaries against the library's rate on dense attention at 2048 tokens, on visible keys.
    Case("cover", "dense", 2048, key_heads=16, batch=64),
    *[Case("cover", "cover", 131072, key_heads=k) for k in (16, 4, 1)],
    Case("cover", "dense", 2048, heads=16, key_heads=16, width=64, batch=64),
    Case("cover", "cover", 131072, key_heads=4, width=64),
    # The whole operation against dense attention and NSA.
    *[case for tokens in (8192, 16384, 32768, 131072) for case in _whole(tokens)],
    # Cost of a token while the text grows; 4 million tokens with 16 heads and their gradients take most of 139 GiB.
    *[
        Case("cost", "opened", 65536 * 4**i, heads=heads, radix=radix)
        for heads, radix in ((16, 8), (16, 16), (4, 8))
        for i in range(4)
    ],
    # Memory: half a million and a million tokens.
    *[Case("memory", "opened", tokens) for tokens in (524288, 1048576)],
]
SMALL_CASES = [
    Case("cover", "dense", 64, 4, 4, 16, batch=2),
    Case("cover", "cover", 512, 4, 4, 16),
    *[Case("whole", who, 512, 4, 1, 16) for who in ("opened", "nsa", "dense")],
    *[Case("cost", "opened", 256 * 4**i, 2, 1, 16) for i in range(2)],
    Case("memory", "opened", 512, 4, 1, 16),
]
