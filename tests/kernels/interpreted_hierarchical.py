"""Run by test_hierarchical_kernels.py in a process of its own: Triton decides at import whether it interprets."""

import sys

import torch

from longnet import HierarchicalPattern
from longnet.attention import hierarchical_fused, opened_gradients, opened_work
from longnet.attention.hierarchical_reference import hierarchical_attention_reference
from longnet.attention.pyramid import build_pyramid
from longnet.attention.pyramid_fused import Tree, pool, pool_backward

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
    # two sequences on two key heads, with several windows of tokens
    "batches": (HierarchicalPattern(16, 4, 2, 1, None, 2, 4), 99, 4, 2, 16, 0.4),
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
    torch.manual_seed(0)
    batch = 2 if name == "batches" else 1
    shapes = [(batch, tokens, x, width) for x in (heads, key_heads, key_heads, heads, key_heads)]
    tensors = [torch.randn(s, dtype=torch.float32) for s in shapes]
    prior = torch.randn(key_heads, width) / 2
    bias, mix = 0.3 * torch.randn(heads, pattern.num_levels(tokens)), torch.full((heads,), beta)
    scale = width**-0.5

    def run(exact: bool):
        inputs = [(x.double() if exact else x.clone()).requires_grad_() for x in (*tensors, prior, bias, mix)]
        q, k, v, q_local, k_local, p, level_bias, router_mix = inputs
        if name in ("joint", "groups"):
            q_local = q
        if name in ("aligned", "groups"):
            k_local = k
        if exact:
            out, lse = hierarchical_attention_reference(
                q, k, v, q_local, k_local, pattern, True, scale, p, level_bias, router_mix
            )
        else:
            out, lse = hierarchical_fused.attend(
                q, k, v, q_local, k_local, p, None, pattern, scale, level_bias, router_mix
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

    names = ("out", "lse", "dq", "dk", "dv", "dq_local", "dk_local", "dprior", "dbias", "dmix")
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
    bias, mix = torch.zeros(4, 4), torch.ones(4)

    def attend(q, k, v):
        return hierarchical_fused.attend(q * 2, k, v, q, k, None, None, pattern, 0.3, bias, mix)[0] + 1

    results = []
    for call in (attend, torch.compile(attend, backend="eager")):
        out = call(q, k, v)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


PARTS = {"pyramids": pyramids, "readers": readers, "compiled": compiled}
if sys.argv[1] in PARTS:
    PARTS[sys.argv[1]]()
else:
    main(sys.argv[1])
