"""Hierarchical attention: the laws, and the vectorised path against the explicit covers."""

import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longnet import HierarchicalPattern, hierarchical_attention
from longnet.attention.hierarchical_cached import HierarchicalState, Step
from longnet.attention.hierarchical_torch import Parameters


def inputs(batch, tokens, heads, key_heads, width=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, tokens, heads, width)] + [(batch, tokens, key_heads, width)] * 2
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


def gradients(out, lse, tensors):
    g = torch.Generator().manual_seed(5)
    dout = torch.randn(out.shape, generator=g, dtype=torch.float64)
    dlse = torch.randn(lse.shape, generator=g, dtype=torch.float64)
    loss = (out * dout).sum() + (torch.where(torch.isfinite(lse), lse, 0) * dlse).sum()
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(x) if y is None else y for x, y in zip(tensors, found, strict=True)]


@pytest.mark.parametrize("seed", range(24))
def test_the_vectorised_path_equals_the_oracle(seed):
    """Random patterns, causal and not, retention, lengths, groups, rotary; out, lse and the gradient of every input."""
    choose = random.Random(seed)
    causal = choose.random() < 0.6
    block, radix, window, guard = (
        choose.choice([2, 3, 4]),
        choose.choice([2, 3, 4]),
        choose.randint(1, 3),
        choose.randint(0, 2),
    )
    kept = None
    if causal and choose.random() < 0.4:
        kept = (
            block * (window + choose.randint(0, 3)),
            radix * (guard + 1) + window + guard + choose.randint(0, 3),
        )
    levels = None if kept else choose.choice([None, None, 2])
    pattern = HierarchicalPattern(
        block, radix, window, guard, levels, choose.choice([0, 1, 3]), choose.choice([None, 2, 4]), kept
    )
    tokens, key_heads = choose.randint(1, 80), choose.choice([1, 2])
    heads = key_heads * choose.choice([1, 2, 3])
    q, k, v = inputs(2, tokens, heads, key_heads, seed=seed)
    prior = torch.randn(key_heads, 8, dtype=torch.float64).requires_grad_()
    bias = (
        0.3 * torch.randn(heads, pattern.num_levels(tokens, causal), dtype=torch.float64)
    ).requires_grad_()
    beta = torch.tensor(
        [choose.choice([0.0, 0.3, 1.0]) for _ in range(heads)], dtype=torch.float64
    ).requires_grad_()
    angle = torch.randn(1, tokens, 1, 4, dtype=torch.float64)
    lengths = torch.tensor([tokens, choose.randint(1, tokens)]) if choose.random() < 0.5 else None
    options = {
        "causal": causal, "prior_query": prior, "level_bias": bias, "router_mix": beta,
        "rotary": (angle.cos(), angle.sin()), "lengths": lengths,
    }  # fmt: skip
    tensors = (q, k, v, prior, bias, beta)
    fast = hierarchical_attention(q, k, v, pattern, impl="torch", **options)
    true = hierarchical_attention(q, k, v, pattern, impl="reference", **options)
    for a, b in zip((*fast, *gradients(*fast, tensors)), (*true, *gradients(*true, tensors)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("causal", [True, False])
def test_everything_opened_without_router_is_dense_attention(impl, causal):
    q, k, v = inputs(1, 67, 4, 2)
    pattern = HierarchicalPattern(block=4, radix=3, window_blocks=2, top_k=100, beam=100)
    options = {
        "router_mix": torch.zeros(4, dtype=torch.float64),
        "prior_query": torch.randn(2, 8, dtype=torch.float64),
    }
    out, lse = hierarchical_attention(q, k, v, pattern, causal=causal, impl=impl, **options)
    keys, values = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
    scores = q.transpose(1, 2) @ keys.mT / math.sqrt(8)
    if causal:
        scores = scores.masked_fill(torch.ones(67, 67).triu(1).bool(), -torch.inf)
    dense = (scores.softmax(-1) @ values).transpose(1, 2)
    # A causal leaf that is not yet complete stays in the window, so nothing is left unopened.
    torch.testing.assert_close(out, dense, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-12, rtol=0)
    for a, b in zip(
        gradients(out, lse, (q, k, v)), gradients(dense, scores.logsumexp(-1), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_wider_than_the_text_is_dense_attention(causal):
    q, k, v = inputs(1, 70, 2, 2)
    out = hierarchical_attention(q, k, v, HierarchicalPattern(window_blocks=10**6), causal=causal).out
    by_head = (x.transpose(1, 2) for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(*by_head, is_causal=causal).transpose(1, 2)
    torch.testing.assert_close(out, dense, atol=1e-12, rtol=0)


def test_zero_logits_give_the_mean_of_all_tokens():
    """The entropy keeps the count of what was pooled: with nothing to tell keys apart, every token weighs the same."""
    _, k, v = inputs(1, 200, 2, 1)
    q = torch.zeros(1, 200, 2, 8, dtype=torch.float64)
    pattern = HierarchicalPattern(block=4, radix=3, window_blocks=2, top_k=2)
    out, lse = hierarchical_attention(q, k, v, pattern)
    mean = v.cumsum(1) / torch.arange(1, 201)[:, None, None]
    torch.testing.assert_close(out, mean.expand_as(out), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        lse[0, 0], torch.arange(1.0, 201, dtype=torch.float64).log(), atol=1e-12, rtol=0
    )


def test_later_tokens_leave_earlier_outputs_bit_equal():
    q, k, v = inputs(1, 150, 2, 1)
    pattern = HierarchicalPattern(block=4, radix=3, window_blocks=2, top_k=2, beam=3)
    for t in (1, 4, 63, 64, 65, 149):
        changed = [torch.cat((x[:, :t], 9 * torch.randn_like(x[:, t:])), 1) for x in (q, k, v)]
        before, after = (hierarchical_attention(*x, pattern).out[:, :t] for x in ((q, k, v), changed))
        assert torch.equal(before, after)


def test_a_sequence_does_not_depend_on_what_shares_its_batch():
    for causal in (True, False):
        q, k, v = inputs(2, 90, 2, 1)
        pattern = HierarchicalPattern(block=4, radix=3, window_blocks=2, top_k=2, beam=3)
        both = hierarchical_attention(q, k, v, pattern, causal=causal, lengths=torch.tensor([90, 41]))
        alone = hierarchical_attention(*(x[1:, :41] for x in (q, k, v)), pattern, causal=causal)
        torch.testing.assert_close(both.out[1, :41], alone.out[0], atol=1e-12, rtol=0)
        assert torch.equal(both.out[1, 41:], torch.zeros_like(both.out[1, 41:]))
        assert torch.isinf(both.lse[1, :, 41:]).all()


def test_the_router_learns_through_the_output():
    q, k, v = inputs(1, 120, 2, 1)
    pattern = HierarchicalPattern(block=4, radix=3, window_blocks=1, top_k=1, beam=2)
    prior = torch.zeros(1, 8, dtype=torch.float64, requires_grad=True)
    out = hierarchical_attention(q, k, v, pattern, prior_query=prior).out
    assert torch.autograd.grad(out.square().sum(), prior)[0].abs().max() > 1e-6


def test_single_precision_and_repeatability():
    q, k, v = inputs(1, 300, 4, 2)
    pattern = HierarchicalPattern(block=8, radix=4, window_blocks=2, top_k=2, beam=4)
    exact = hierarchical_attention(q, k, v, pattern)
    single = [hierarchical_attention(q.float(), k.float(), v.float(), pattern) for _ in range(2)]
    assert torch.equal(single[0].out, single[1].out)
    assert (single[0].out - exact.out).abs().median() < 1e-6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pattern": 3}, "HierarchicalPattern"),
        ({"k": torch.zeros(1, 9, 2, 8)}, "k and v"),
        ({"v": torch.zeros(1, 10, 2, 8, dtype=torch.int64)}, "floating dtype"),
        ({"prior_query": torch.zeros(4, 8)}, "prior_query"),
        ({"level_bias": torch.zeros(3, 9)}, "level_bias"),
        ({"router_mix": torch.zeros(2)}, "router_mix"),
        ({"rotary": (torch.zeros(1, 10, 1, 3),) * 2}, "rotary"),
        ({"rotary": (torch.zeros(1, 10, 1, 4), torch.zeros(1, 1, 1, 4))}, "rotary"),
        ({"rotary": (torch.zeros(3, 10, 1, 4),) * 2}, "rotary"),
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, "lengths"),
        ({"causal": "no"}, "causal"),
        ({"impl": "fast"}, "impl"),
        ({"impl": "triton"}, "CUDA"),
    ],
)
def test_refusals_name_the_argument(change, words):
    arguments = {"q": torch.zeros(1, 10, 4, 8), "k": torch.zeros(1, 10, 2, 8), "v": torch.zeros(1, 10, 2, 8)}
    with pytest.raises(ValueError, match=words):
        hierarchical_attention(**(arguments | {"pattern": HierarchicalPattern()} | change))


def test_tensors_without_data_are_refused():
    q = torch.empty(1, 20, 2, 8, device="meta")
    with pytest.raises(ValueError, match="hold data; got device 'meta'"):
        hierarchical_attention(q, q, q, HierarchicalPattern(block=4, radix=2))


class Asked(TorchDispatchMode):
    """Counts values of tensors that the host asks for: on a GPU each waits for all that was queued."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("causal", [True, False])
def test_the_host_never_asks_the_device(causal):
    pattern = HierarchicalPattern(block=4, radix=4, window_blocks=2, top_k=2, beam=4)
    q = k = v = torch.randn(1, 203, 2, 8)
    with Asked() as asked:
        hierarchical_attention(q, k, v, pattern, causal=causal, impl="torch")
    assert asked.count == 0


def test_a_stream_never_asks_the_device():
    pattern = HierarchicalPattern(block=4, radix=4, window_blocks=2, top_k=2, beam=4, retention=(64, 16))
    state = HierarchicalState(pattern, 1, 8, torch.float32, "cpu")
    parameters = Parameters(0.3, torch.zeros(2, pattern.most_levels()), torch.ones(2), None)
    with Asked() as asked:
        for count in (150, 1, 1, 30, 1):
            q, k = torch.randn(1, count, 2, 8), torch.randn(1, count, 1, 8)
            state.attend(Step(q, q, k, k, k), parameters, None)
    assert state.position == 183
    assert asked.count == 0


@pytest.mark.parametrize(("gigabytes", "times"), [(6, 1), (8, 1), (16, 2), (24, 3), (141, 4)])
def test_groups_of_a_forward_pass_follow_the_memory_of_the_device(monkeypatch, gigabytes, times):
    from types import SimpleNamespace

    from longnet.attention import hierarchical_torch

    properties = SimpleNamespace(total_memory=gigabytes * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert hierarchical_torch.at_once(torch.device("cuda", 0)) == times
    assert hierarchical_torch.at_once(torch.device("cpu")) == 1
    k = SimpleNamespace(is_cuda=True, shape=(1, 10**5, 1, 64))
    sizes = [
        part.stop - part.start
        for part in hierarchical_torch.parts(64, 10**5, k, HierarchicalPattern(top_k=8), times)
    ]
    assert max(sizes) == 4096 * times
    assert sum(sizes) == 10**5


def test_kernels_refuse_capped_trees_by_the_length_of_the_text(monkeypatch):
    """A stream asks with the queries of its chunk: one, of a text of any length."""
    from types import SimpleNamespace

    from longnet.attention import hierarchical

    monkeypatch.setattr(hierarchical, "has_triton", lambda: True)
    capped = HierarchicalPattern(block=16, levels=1)
    for queries in (1, 2000):
        q = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, queries, 4, 64))
        reason = hierarchical.unsupported(q, torch.empty(1, 2000, 1, 64, device="meta"), capped, True)
        assert "at most 32 nodes; this pattern lists up to 125" in reason
        assert hierarchical.unsupported(q, torch.empty(1, 400, 1, 64, device="meta"), capped, True) is None
