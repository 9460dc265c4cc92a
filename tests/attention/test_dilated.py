"""Every path that runs here against the fp64 oracle: values, statistics and all gradients, within a derived budget."""

import math

import pytest
import torch

import longnet
from conftest import assert_attention_within_budget
from longnet import DilatedPattern, dilated_attention

PATTERNS = {
    "geometric": DilatedPattern.geometric(128, window=16),
    "paper-like": DilatedPattern((16, 32, 64, 128, 256), (1, 2, 4, 6, 12)),
    "block": DilatedPattern((8, 30, 64), (1, 3, 4), "block"),
    "single": DilatedPattern((7,), (1,)),
}


def random_inputs(batch, tokens, heads, key_heads, width, dtype=torch.float64, queries=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, queries or tokens, heads, width)] + [(batch, tokens, key_heads, width)] * 2
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def with_gradients(inputs, impl, pattern, dout, dlse, **options):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = dilated_attention(*inputs, pattern, impl=impl, **options)
    seen = torch.isfinite(lse)
    loss = (out * dout.to(out.dtype)).sum() + (torch.where(seen, lse, 0) * dlse.to(lse.dtype)).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, inputs)]


def check(inputs, pattern, impl="strided", lse_gradient=True, **options):
    g = torch.Generator().manual_seed(1)
    dout = torch.randn(inputs[0].shape, generator=g, dtype=torch.float64)
    dlse = torch.randn(
        inputs[0].shape[0], inputs[0].shape[2], inputs[0].shape[1], generator=g, dtype=torch.float64
    )
    dlse = dlse * lse_gradient
    dout = dout.to(inputs[0].dtype)
    exact = with_gradients([x.double() for x in inputs], "reference", pattern, dout, dlse, **options)
    peer = with_gradients(inputs, "reference", pattern, dout, dlse, **options)
    actual = with_gradients(inputs, impl, pattern, dout, dlse, **options)
    assert_attention_within_budget(actual, exact, peer, len(pattern.branches))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 15, 16, 17, 31, 97, 128, 211])
def test_lengths_and_patterns(name, tokens, causal):
    check(random_inputs(2, tokens, 4, 4, 8, torch.float32), PATTERNS[name], causal=causal)


@pytest.mark.parametrize("key_heads", [12, 6, 4, 3, 2, 1])
@pytest.mark.parametrize("name", ["paper-like", "block"])
def test_grouped_queries(name, key_heads):
    check(random_inputs(1, 75, 12, key_heads, 8, torch.float32), PATTERNS[name])


@pytest.mark.parametrize("width", [16, 24, 48, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_widths_and_dtypes(width, dtype):
    check(random_inputs(1, 50, 4, 2, width, dtype), PATTERNS["geometric"])


@pytest.mark.parametrize(("start", "queries"), [(0, 5), (13, 60), (100, 1), (16, 33), (997, 60)])
@pytest.mark.parametrize("name", PATTERNS)
def test_windows_that_start_late_and_queries_that_start_later(name, start, queries):
    check(random_inputs(1, 60, 4, 2, 8, torch.float32, queries=queries), PATTERNS[name], start=start)


@pytest.mark.parametrize("causal", [True, False])
def test_lengths_within_a_batch(causal):
    inputs = random_inputs(4, 40, 4, 2, 8, torch.float32)
    check(inputs, PATTERNS["paper-like"], causal=causal, lengths=torch.tensor([40, 0, 1, 23]))


def test_without_lse_gradient_and_with_many_sequences():
    check(random_inputs(9, 128, 4, 4, 8, torch.float32), PATTERNS["geometric"], lse_gradient=False)


@pytest.mark.parametrize("impl", ["reference", "strided"])
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(impl, causal):
    inputs = [x.requires_grad_() for x in random_inputs(1, 11, 2, 1, 4)]
    pattern = DilatedPattern((4, 9), (1, 2))
    assert torch.autograd.gradcheck(
        lambda *x: tuple(dilated_attention(*x, pattern, causal=causal, impl=impl)), inputs
    )


def test_the_oracle_is_dense_attention_when_one_branch_covers_everything():
    q, k, v = random_inputs(2, 20, 4, 4, 8)
    out, lse = dilated_attention(q, k, v, DilatedPattern((64,), (1,)), impl="reference")
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-14)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8)
    mask = torch.ones(20, 20).tril() == 0
    torch.testing.assert_close(lse, scores.masked_fill(mask, -torch.inf).logsumexp(-1), rtol=0, atol=1e-13)


def test_a_key_in_two_branches_counts_twice():
    q, k, v = random_inputs(1, 12, 2, 2, 8)
    once = dilated_attention(q, k, v, DilatedPattern((12,), (1,)), impl="strided")
    twice = dilated_attention(q, k, v, DilatedPattern((12, 12), (1, 1)), impl="strided")
    torch.testing.assert_close(twice.out, once.out)
    torch.testing.assert_close(twice.lse, once.lse + math.log(2))


@pytest.mark.parametrize("impl", ["reference", "strided"])
@pytest.mark.parametrize("poison", [0.0, math.nan, math.inf])
def test_later_tokens_leave_earlier_outputs_bit_equal(impl, poison):
    q, k, v = random_inputs(1, 90, 4, 2, 16, torch.float32)
    before = dilated_attention(q, k, v, PATTERNS["paper-like"], impl=impl)
    for cut in (1, 16, 47, 89):
        changed = [torch.cat([x[:, :cut], torch.full_like(x[:, cut:], poison)], 1) for x in (q, k, v)]
        after = dilated_attention(*changed, PATTERNS["paper-like"], impl=impl)
        assert torch.equal(before.out[:, :cut], after.out[:, :cut])
        assert torch.equal(before.lse[..., :cut], after.lse[..., :cut])


def test_non_contiguous_inputs():
    q, k, v = random_inputs(2, 50, 4, 4, 8, torch.float32)
    expected = dilated_attention(q, k, v, PATTERNS["geometric"])
    for layout in ((0, 2, 1, 3), (3, 2, 1, 0), (1, 0, 3, 2)):
        views = [
            x.permute(layout).contiguous().permute(*(layout.index(i) for i in range(4))) for x in (q, k, v)
        ]
        actual = dilated_attention(*views, PATTERNS["geometric"])
        torch.testing.assert_close(actual.out, expected.out)


def test_two_runs_are_bit_equal():
    inputs = random_inputs(2, 77, 4, 2, 16, torch.float32)
    dout, dlse = torch.randn(2, 77, 4, 16), torch.randn(2, 4, 77)
    first = with_gradients(inputs, "strided", PATTERNS["paper-like"], dout, dlse)
    for _ in range(5):
        again = with_gradients(inputs, "strided", PATTERNS["paper-like"], dout, dlse)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_explain_names_the_path_and_the_reasons():
    text = longnet.explain(*random_inputs(1, 20, 2, 2, 8, torch.float32), PATTERNS["geometric"])
    assert "impl='strided'" in text
    assert "reference: can run" in text


def bad(**changes):
    arguments = dict(zip("qkv", random_inputs(2, 12, 4, 2, 8, torch.float32), strict=True))
    arguments |= {"pattern": PATTERNS["single"]} | changes
    positional = [arguments.pop(name) for name in ("q", "k", "v", "pattern")]
    return dilated_attention(*positional, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": (4, 1)}, "DilatedPattern"),
        ({"q": torch.randn(2, 12, 8)}, "4 dimensions"),
        ({"q": torch.randn(2, 12, 3, 8)}, "multiple of K"),
        ({"q": torch.randn(2, 13, 4, 8)}, "queries"),
        ({"q": torch.randn(2, 5, 4, 8), "causal": False}, "queries"),
        ({"q": torch.ones(2, 12, 4, 8, dtype=torch.int64)}, "floating"),
        ({"k": torch.randn(2, 12, 2, 8, dtype=torch.float64)}, "dtype"),
        ({"v": torch.randn(2, 12, 2, 4)}, "k and v"),
        ({"q": torch.randn(2, 12, 4, 8, device="meta")}, "device"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "lengths"),
        ({"lengths": torch.tensor([1])}, "lengths"),
        ({"start": -1}, "start"),
        ({"impl": "cuda"}, "impl"),
    ],
)
def test_bad_arguments_are_refused_with_the_reason(changes, message):
    with pytest.raises(ValueError, match=message):
        bad(**changes)


@pytest.mark.parametrize("start", [3, 13, 20])
def test_a_window_as_long_as_a_segment_that_begins_within_one(start):
    """Two partial segments, whose periods add up to the window, do not fill it at once: unwritten gradients were read."""
    check(random_inputs(1, 16, 4, 4, 8), PATTERNS["geometric"], start=start)
