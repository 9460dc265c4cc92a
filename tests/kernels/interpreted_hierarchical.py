"""Run by test_hierarchical_kernels.py in a process of its own: Triton decides at import whether it interprets."""

import sys

import torch

from longnet import HierarchicalPattern
from longnet.attention import hierarchical_cached, hierarchical_fused, opened_gradients, opened_work
from longnet.attention.far_work import Geometry, Shape, tokens_per_tile
from longnet.attention.hierarchical_cached import HierarchicalState, Step
from longnet.attention.hierarchical_reference import hierarchical_attention_reference
from longnet.attention.hierarchical_torch import Parameters
from longnet.attention.opened_work import Routes, Tables
from longnet.attention.pyramid import build_pyramid
from longnet.attention.pyramid_fused import Tree, pool, pool_backward
from longnet.attention.rotary import turn_by_torch

CASES = {
    # block 16 is the least that a tile may be; pattern, tokens, heads, key heads, width, beta
    "summaries": (HierarchicalPattern(16, 4, 2, 1, None, 0), 117, 2, 2, 16, 1.0),
    # without rotary: the same queries near and far
    "joint": (HierarchicalPattern(16, 4, 1, 0, None, 0), 69, 2, 1, 16, 1.0),
    # blocks whose lse a tensor descriptor can address; pairs of blocks, the first pair cut off by the sequence's begin
    "aligned": (HierarchicalPattern(16, 4, 2, 1, None, 0), 236, 3, 1, 24, 1.0),
    "groups": (HierarchicalPattern(16, 4, 2, 1, None, 2, 4), 117, 4, 2, 24, 0.3),
    # two families of nodes, and several items for most of them
    "levels": (HierarchicalPattern(16, 4, 1, 0, None, 2, 4), 117, 2, 1, 16, 0.0),
    "capped": (HierarchicalPattern(16, 4, 2, 1, 2, 3, 4), 147, 2, 1, 16, 1.0),
    # two or three chunks of the buffer of opened leaves, and a group that is no power of two
    "chunks": (HierarchicalPattern(16, 4, 2, 1, None, 2, 4), 131, 3, 1, 16, 0.7),
    # two sequences on two key heads, with several windows of tokens, every one a stretch of its own
    "batches": (HierarchicalPattern(16, 4, 2, 1, None, 2, 4), 99, 4, 2, 16, 0.4),
    # a window of the own block only, with a group that no two heads of which fit into one program
    "own block": (HierarchicalPattern(16, 4, 1, 1, None, 2, 4), 83, 3, 1, 16, 1.0),
    "own block, summaries": (HierarchicalPattern(16, 4, 1, 0, None, 0), 83, 2, 2, 16, 1.0),
    "short": (HierarchicalPattern(16, 4, 2, 1, None, 2, 4), 1, 2, 1, 16, 1.0),
}


def main(name: str) -> None:
    pattern, tokens, heads, key_heads, width, beta = CASES[name]
    if name == "chunks":
        opened_work.CHUNK_BYTES, opened_work.LEAF_ROWS = 48 * heads * pattern.top_k * width * 4, 0
    if name in ("levels", "batches"):
        opened_gradients.COLUMNS = opened_work.COLUMNS = 8
        opened_work.LEAF_READERS = opened_work.CHILD_READERS = 24
        opened_work.WINDOW_BYTES = 50 * 2 * heads * width * 4
    if name == "batches":
        opened_work.CHUNK_BYTES = 1
    torch.manual_seed(0)
    batch = 2 if name == "batches" else 1
    shapes = [(batch, tokens, x, width) for x in (heads, key_heads, key_heads)]
    tensors = [torch.randn(s, dtype=torch.float32) for s in shapes]
    angles = torch.randn(batch, tokens, 1, width // 2)
    prior = torch.randn(key_heads, width) / 2
    bias, mix = 0.3 * torch.randn(heads, pattern.num_levels(tokens)), torch.full((heads,), beta)
    scale = width**-0.5

    def run(exact: bool):
        given = (*tensors, angles.cos(), angles.sin(), prior, bias, mix)
        inputs = [(x.double() if exact else x.clone()).requires_grad_() for x in given]
        q, k, v, *rotary, p, level_bias, router_mix = inputs
        rotary = None if name in ("joint", "groups") else tuple(rotary)
        if exact:
            q_local, k_local = (x if rotary is None else turn_by_torch(x, rotary, x.dtype) for x in (q, k))
            out, lse = hierarchical_attention_reference(
                q, k, v, q_local, k_local, pattern, True, scale, p, level_bias, router_mix
            )
        else:
            out, lse = hierarchical_fused.attend(
                q, k, v, rotary, p, None, pattern, scale, level_bias, router_mix
            )
        g = torch.Generator().manual_seed(1)
        dout, dlse = (torch.randn(x.shape, generator=g).to(x.dtype) for x in (out, lse))
        loss = (out * dout).sum() + (lse * dlse).sum()
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
        return [
            out,
            lse,
            *(torch.zeros_like(x) if y is None else y for x, y in zip(inputs, found, strict=True)),
        ]

    names = ("out", "lse", "dq", "dk", "dv", "dcos", "dsin", "dprior", "dbias", "dmix")
    for label, a, b in zip(names, run(False), run(True), strict=True):
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1)
        assert error < 2e-5, f"{name}: {label} is off by {error:.1e}"


PYRAMIDS = [
    (117, 1, 2, True, None),
    (300, 2, 2, True, [5, 290]),
    (300, 2, 1, False, [300, 77]),
    (9, 1, 1, True, None),
]


def pyramids() -> None:
    """Every output and gradient of the pooling kernels, with sequences of unequal length, against plain torch."""
    torch.manual_seed(0)
    for tokens, batch, key_heads, prior, lengths in PYRAMIDS:
        sizes = tuple(tokens // n for n in (16, 64, 256))
        k, v = (torch.randn(batch, tokens, key_heads, 24, requires_grad=True) for _ in "kv")
        p = torch.randn(key_heads, 24, requires_grad=True) if prior else None
        inputs = [x for x in (k, v, p) if x is not None]
        valid = None if lengths is None else torch.tensor(lengths)
        if valid is not None:
            # What lies beyond a sequence may be anything.
            k, v = (
                torch.where((torch.arange(tokens) < valid[:, None])[..., None, None], x, 1e3) for x in (k, v)
            )
        tree = Tree(0.3, 16, 4, sizes)
        nodes = pool(*(x.detach() for x in (k, v)), None if p is None else p.detach(), valid, tree)
        exact = build_pyramid(k, v, p, *tree[:3], sizes, valid)
        finite = torch.isfinite(exact.mass)
        assert torch.equal(torch.isfinite(nodes[2]), finite)
        parts = [exact.kbar, exact.vbar, torch.where(finite, exact.mass, 0), exact.entropy]
        g = torch.Generator().manual_seed(1)
        above = [torch.randn(x.shape, generator=g) for x in parts]
        found = torch.autograd.grad(sum((x * y).sum() for x, y in zip(parts, above, strict=True)), inputs)
        above[2] = torch.where(finite, above[2], 0)
        elsewhere = [torch.randn(k.shape, generator=g) for _ in "kv"]
        wanted = [x + y for x, y in zip(found, elsewhere, strict=False)] + list(found[2:])
        with torch.no_grad():
            grads = pool_backward(k, v, p, valid, tree, nodes, tuple(above), *(x.clone() for x in elsewhere))
        nodes = (*nodes[:2], torch.where(finite, nodes[2], 0), nodes[3])
        for a, b in zip((*nodes, *grads), (*parts, *wanted), strict=False):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def readers() -> None:
    """Every reader in one item of its group, in order; nothing else is work."""
    g = torch.Generator().manual_seed(0)
    for count, groups, most in ((1000, 130, 7), (1, 1, 4), (300, 200, 1000), (64, 3, 8)):
        # Some groups are empty, and some readers read nothing.
        keys = torch.randint(0, groups + 1, (count,), generator=g, dtype=torch.int32)
        keys = torch.where(keys % 5 == 3, groups, keys).to(torch.int32)
        order, items, ranges = opened_work.Readers.of(keys, groups, most)
        work = items[items[:, 0] >= 0]
        for group in range(groups):
            mine = work[work[:, 0] == group]
            begin, end = ranges[group].tolist()
            assert torch.equal(items[begin:end], mine)
            assert ((mine[:, 2] - mine[:, 1]) <= most).all()
            found = torch.cat([order[a:b] for _, a, b in mine.tolist()] or [order[:0]])
            assert torch.equal(found, (keys == group).nonzero()[:, 0])


def compiled() -> None:
    """A compiled caller gets the same bits, forward and backward."""
    pattern = HierarchicalPattern(16, 4, 2, 1, None, 2, 4)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 117, heads, 16, generator=g).requires_grad_() for heads in (4, 2, 2))
    bias, mix, angles = torch.zeros(4, 4), torch.ones(4), torch.randn(1, 117, 1, 8, generator=g)
    rotary = angles.cos(), angles.sin()

    def attend(q, k, v):
        return hierarchical_fused.attend(q * 2, k, v, rotary, None, None, pattern, 0.3, bias, mix)[0] + 1

    results = []
    for call in (attend, torch.compile(attend, backend="eager")):
        out = call(q, k, v)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def continued() -> None:
    """The last queries of every prefix get what they get in the whole text, with and without opening."""
    g = torch.Generator().manual_seed(0)
    for pattern, tokens, heads, key_heads in (
        (HierarchicalPattern(16, 4, 2, 1, None, 0), 140, 3, 1),
        (HierarchicalPattern(16, 4, 2, 1, None, 2, 4), 119, 4, 2),
        (HierarchicalPattern(16, 4, 1, 0, None, 2, 4), 100, 8, 1),
    ):
        q, k, v, q_local, k_local = (
            torch.randn(2, tokens, n, 16, generator=g)
            for n in (heads, key_heads, key_heads, heads, key_heads)
        )
        bias, mix = 0.3 * torch.randn(heads, 5, generator=g), torch.rand(heads, generator=g)
        wholly = None
        for begin, end in ((0, tokens), (16, 33), (48, 64), (64, tokens)):
            sizes = pattern.node_counts(end)
            pyramid = build_pyramid(k[:, :end], v[:, :end], None, 0.3, pattern.block, pattern.radix, sizes)
            levels = [pyramid.level(i) for i in range(len(sizes))]
            part, before = slice(begin, end), slice(end)
            tensors = (q[:, part], k[:, before], v[:, before], q_local[:, part], k_local[:, before])
            out = hierarchical_fused.attend_next(*tensors, levels, pattern, 0.3, bias, mix)
            wholly = out if wholly is None else wholly
            torch.testing.assert_close(out, wholly[:, part], rtol=1e-5, atol=1e-5)


def streams() -> None:
    """A stream that is left to the kernels equals one without kernels, whatever its chunks."""
    torch.manual_seed(0)
    pattern = HierarchicalPattern(16, 4, 2, 1, None, 2, 4)
    parameters = Parameters(0.25, 0.3 * torch.randn(4, 6), torch.rand(4), None)
    prior, by_kernels = torch.randn(2, 16) / 2, hierarchical_cached._by_kernels
    step = Step(*(torch.randn(1, 130, heads, 16) for heads in (4, 4, 2, 2, 2)))
    for sizes in ([130], [7, 60, 1, 16, 46]):
        outs = []
        for rule in (by_kernels, lambda *tensors: True):
            hierarchical_cached._by_kernels = rule
            state = HierarchicalState(pattern, 2, 16, torch.float32, "cpu")
            parts = zip(*(x.split(sizes, 1) for x in step), strict=True)
            with torch.no_grad():
                outs.append(torch.cat([state.attend(Step(*part), parameters, prior) for part in parts], 1))
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


# Pattern, tokens, query heads on a key head, sequences, whether sort keys are wide.
TABLES = [
    (HierarchicalPattern(16, 4, 1, 1, None, 2, 4), 333, 4, 2, False),
    (HierarchicalPattern(16, 4, 1, 1, None, 2, 4), 333, 4, 2, True),
    # many nodes of a token in one running sum
    (HierarchicalPattern(16, 2, 2, 0, None, 2, 32), 403, 16, 1, False),
    (HierarchicalPattern(16, 8, 1, 1, None, 4, 16), 1200, 8, 1, False),
    (HierarchicalPattern(16, 16, 1, 1, None, 4, 16), 1100, 3, 1, False),
    (HierarchicalPattern(32, 32, 1, 0, None, 2, 16), 2100, 1, 1, False),
    (HierarchicalPattern(16, 4, 1, 1, 2, 2, 4), 1091, 64, 1, False),
]


def tables() -> None:
    """Unions and columns of random choices, against sets: every tile, level and token."""
    g = torch.Generator().manual_seed(0)
    integers = lambda high, *lead: torch.randint(-(2**31), high, lead, generator=g).int()  # noqa: E731
    for pattern, tokens, group, batch, wide in TABLES:
        opened_work.NARROW = 0 if wide else 2**31 - 1
        geometry, shape = Geometry.of(pattern, tokens), Shape(batch, tokens, 2 * group, 2, 16)
        routes = Routes.empty(shape, geometry, torch.device("cpu"))
        routes = Routes(
            routes.opened, integers(2**31, *routes.base_bits.shape), integers(2**31, *routes.child_bits.shape)
        )
        for level, size in enumerate(geometry.sizes):
            many = min(size, pattern.opened(level))
            chosen = (
                torch.rand(*routes.opened.shape[:3], size, generator=g)
                .argsort(-1)[..., :many]
                .sort(-1)
                .values
            )
            routes.opened[..., level, :] = -1
            routes.opened[..., level, :many] = chosen
        entropy = torch.randn(batch, sum(geometry.sizes), 2, generator=g)
        offsets = torch.tensor(geometry.offsets, dtype=torch.int32)
        # The tiles of the last block, which end beyond the text.
        first, tile = (tokens - 1) // pattern.block * pattern.block, tokens_per_tile(group)
        chunk = opened_work.Chunk(first, -(-(tokens - first) // tile), tile)
        whole = Tables.of(routes, entropy, offsets, shape, geometry, chunk)
        for level in range(geometry.levels):
            check_columns(whole, routes, entropy, pattern, level, kept=True)
        for level in range(geometry.levels - 1, -1, -1):
            whole.mark(routes, entropy, offsets, level)
            check_columns(whole, routes, entropy, pattern, level, kept=False)


def check_columns(whole: Tables, routes: Routes, entropy, pattern, level: int, kept: bool) -> None:
    shape, geometry, chunk = whole.shape, whole.geometry, whole.chunk
    bounds, radix = pattern.bounds(shape.tokens), geometry.radix
    for pair in range(shape.pairs):
        b, kh = divmod(pair, shape.key_heads)
        for tile in range(chunk.tiles):
            t0 = chunk.first + tile * chunk.tile
            inside = range(min(chunk.tile, shape.tokens - t0))
            mine = []
            if level + 1 < geometry.levels:
                mine = [
                    [x for x in routes.opened[b, kh, t0 + t, level + 1].tolist() if x >= 0] for t in inside
                ]
                mine = [x[: geometry.beam] for x in mine]
            union = sorted({x for nodes in mine for x in nodes})
            lo, hi = bounds[level, :2, t0 // geometry.block].tolist()
            nodes = [p * radix + c for p in union for c in range(radix)] + list(range(lo, hi))
            bits = []
            for p in union:
                holders = [t for t in inside if p in mine[t]]
                places = [mine[t].index(p) for t in holders]
                assert whole.places[level, pair, tile, union.index(p), holders].tolist() == places
                words = [
                    int(routes.child_bits[b, kh, t0 + t, level, place])
                    for t, place in zip(holders, places, strict=True)
                ]
                bits += [
                    sum(1 << t for t, w in zip(holders, words, strict=True) if not (kept and w >> c & 1))
                    for c in range(radix)
                ]
            for i in range(hi - lo):
                words = [int(routes.base_bits[b, kh, t0 + t, level]) for t in inside]
                seen = sum(1 << t for t, w in enumerate(words) if not w >> i & 1)
                bits.append(seen if kept else -1)
            count = int(whole.totals[level, pair, tile])
            assert count == len(nodes)
            found = whole.records[level, pair, tile, : -(-count // opened_work.PAD) * opened_work.PAD]
            wanted = torch.tensor(bits + [0] * (len(found) - count)).int()
            seeing = found.int()
            if kept:  # tokens beyond the text may be said to see anything that is listed
                seeing = seeing & ((1 << len(inside)) - 1)
            assert torch.equal(seeing, wanted), (level, pair, tile)
            rows = (b * sum(geometry.sizes) + geometry.offsets[level] + torch.tensor(nodes).int()) * 2 + kh
            assert torch.equal(whole.rows[level, pair, tile, :count], rows.int())
            h = (found[:count] >> 32).int().view(torch.float32)
            torch.testing.assert_close(h, entropy.flatten()[rows.long()] * 1.4426950408889634)


PARTS = {"pyramids": pyramids, "readers": readers, "tables": tables, "compiled": compiled}
PARTS |= {"continued": continued, "streams": streams}
if sys.argv[1] in PARTS:
    PARTS[sys.argv[1]]()
else:
    main(sys.argv[1])
