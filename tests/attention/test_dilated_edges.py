"""Dilated attention at its edges: odd shapes and layouts, broken values, repeats, compilation, arguments that cannot be."""

import math
import time

import numpy as np
import pytest
import torch

from conftest import assert_attention_within_budget
from longnet import DilatedPattern, dilated_attention
from longnet.attention import pieces, strided
from longnet.attention.reference import multiplicity

# The paper's ({2048, 4096, 8192, 16384, 32768}, {1, 2, 4, 6, 12}), 128 times smaller: 6 and 12 divide no segment length.
PAPER = DilatedPattern((16, 32, 64, 128, 256), (1, 2, 4, 6, 12))
UNEVEN = DilatedPattern((7, 30, 100), (1, 6, 12), "block")
LONE = DilatedPattern((5, 64), (1, 64))


def random_inputs(batch, tokens, heads, key_heads, width=8, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, tokens, heads, width)] + [(batch, tokens, key_heads, width)] * 2
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in (*shapes, shapes[0])]


def with_gradients(q, k, v, dout, pattern, impl="strided", dlse=None, **options):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = dilated_attention(q, k, v, pattern, impl=impl, **options)
    loss = (out * dout).sum()
    if dlse is not None:
        loss = loss + (lse.nan_to_num(neginf=0.0) * dlse).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v))]


def check(q, k, v, dout, pattern, **options):
    exact = with_gradients(*(x.double() for x in (q, k, v, dout)), pattern, "reference", **options)
    peer = with_gradients(q, k, v, dout, pattern, "reference", **options)
    actual = with_gradients(q, k, v, dout, pattern, **options)
    assert_attention_within_budget(actual, exact, peer, len(pattern.branches))
    return actual


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "key_heads"), [(12, 4), (7, 7), (3, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 5, 11, 15, 16, 17, 127, 255, 256, 257, 307])
def test_the_papers_pattern_at_every_border(tokens, heads, key_heads, causal):
    check(*random_inputs(1, tokens, heads, key_heads), PAPER, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("start", "tokens"), [(0, 2049), (32768 - 301, 700), (6 * 4096 - 301, 700)])
def test_the_papers_pattern_in_its_own_size(start, tokens, causal):
    """The first segment and its border; where segments of all five lengths end; where those of the first three do."""
    pattern = DilatedPattern((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
    heads = 1 if tokens > 1000 else 12
    check(*random_inputs(1, tokens, heads, max(1, heads // 4)), pattern, start=start, causal=causal)


@pytest.mark.parametrize("groups", range(1, 9))
@pytest.mark.parametrize("pattern", [PAPER, UNEVEN], ids=["paper", "uneven"])
def test_groups_of_1_to_8_query_heads(pattern, groups):
    check(*random_inputs(1, 83, 2 * groups, 2), pattern)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 6, 63, 64, 65, 131])
def test_rates_beyond_the_length_and_rows_of_one_key(tokens):
    check(*random_inputs(2, tokens, 3, 3), LONE)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [0, -0.7])
def test_scales_that_are_not_positive(scale, causal):
    """The library scales what it has masked with -inf: 0 times that is NaN, and a negative multiple +inf."""
    q, k, v, dout = random_inputs(2, 83, 4, 2)
    check(q, k, v, dout, PAPER, scale=scale, causal=causal, dlse=torch.randn(2, 4, 83))


def test_an_empty_batch():
    actual = with_gradients(*random_inputs(0, 20, 4, 2), PAPER)
    assert [tuple(x.shape) for x in actual] == [
        (0, 20, 4, 8),
        (0, 4, 20),
        (0, 20, 4, 8),
        (0, 20, 2, 8),
        (0, 20, 2, 8),
    ]


@pytest.mark.parametrize("causal", [True, False])
def test_rows_without_a_token_are_exact_zeros(causal):
    lengths = torch.tensor([0, 1, 50, 17])
    q, k, v, dout = random_inputs(4, 50, 4, 2)
    # What lies beyond a length must not matter, whatever it is.
    for x in (q, k, v):
        for b, n in enumerate(lengths):
            x[b, n:] = math.nan
    dlse = torch.randn(4, 4, 50)
    out, lse, *gradients = with_gradients(q, k, v, dout, UNEVEN, dlse=dlse, lengths=lengths, causal=causal)
    for b, n in enumerate(lengths.tolist()):
        assert not out[b, n:].any()
        assert (lse[b, :, n:] == -torch.inf).all()
        assert not any(g[b, n:].any() for g in gradients)
        if n:
            part = [x[b : b + 1, :n] for x in (q, k, v, dout)]
            alone = with_gradients(*part, UNEVEN, dlse=dlse[b : b + 1, :, :n], causal=causal)
            got = [out[b : b + 1, :n], lse[b : b + 1, :, :n], *(g[b : b + 1, :n] for g in gradients)]
            assert all(torch.equal(x, y) for x, y in zip(got, alone, strict=True))


LAYOUTS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "width outermost": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "part of a wider tensor": lambda x: torch.cat((x, x), 3)[..., : x.shape[3]],
    "behind an offset": lambda x: torch.cat((x[:, :1], x), 1)[:, 1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "dout"])
def test_the_layout_of_an_input_does_not_matter(layout, which):
    tensors = random_inputs(3, 70, 4, 2)
    plain = with_gradients(*tensors, PAPER)
    tensors[which] = LAYOUTS[layout](tensors[which])
    for a, b in zip(with_gradients(*tensors, PAPER), plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 2])
def test_expanded_inputs(axis):
    q, k, v, dout = random_inputs(3, 70, 4, 4)
    k, v, dout = (x.select(axis, 0).unsqueeze(axis).expand_as(x) for x in (k, v, dout))
    expected = with_gradients(q, k.contiguous(), v.contiguous(), dout.contiguous(), PAPER)
    for a, b in zip(with_gradients(q, k, v, dout, PAPER), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_more_segments_than_a_library_call_takes(monkeypatch):
    tensors = random_inputs(5, 96, 4, 2)
    whole = with_gradients(*tensors, PAPER)
    monkeypatch.setattr(pieces, "BATCH_LIMIT", 3)
    sizes, real = [], strided.attend

    def counted(qkv, *rest):
        sizes.append(len(qkv[0]))
        return real(qkv, *rest)

    monkeypatch.setattr(strided, "attend", counted)
    for a, b in zip(with_gradients(*tensors, PAPER), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert max(sizes) == 3


@pytest.mark.parametrize("impl", ["strided", "reference"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_key_reaches_exactly_who_sees_it(impl, causal, value):
    q, k, v, _ = random_inputs(1, 70, 4, 2)
    before = dilated_attention(q, k, v, PAPER, causal=causal, impl=impl)
    positions = torch.arange(70)
    sees = multiplicity(PAPER, 4, positions, positions, causal) > 0
    for p in (0, 13, 16, 42, 69):
        for name in ("k", "v"):
            tensors = {"q": q, "k": k.clone(), "v": v.clone()}
            tensors[name][0, p, 1, 3] = value
            after = dilated_attention(**tensors, pattern=PAPER, causal=causal, impl=impl)
            reached = sees[:, :, p].clone()
            reached[:2] = False  # the heads of key head 0
            assert torch.equal(after.out[0, ~reached.T], before.out[0, ~reached.T])
            if name == "v" or math.isnan(value):
                assert not torch.isfinite(after.out[0, reached.T]).all(-1).any()
            if name == "k":
                assert torch.equal(after.lse[0, ~reached], before.lse[0, ~reached])


def test_fifty_repeats_are_bit_equal_in_deterministic_mode():
    tensors, dlse = random_inputs(60, 33, 4, 2), torch.randn(60, 4, 33)
    torch.use_deterministic_algorithms(True)
    try:
        first = with_gradients(*tensors, PAPER, dlse=dlse)
        for _ in range(50):
            again = with_gradients(*tensors, PAPER, dlse=dlse)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("impl", ["strided", "reference"])
@pytest.mark.parametrize(
    "pattern", [DilatedPattern((4, 10), (1, 3)), DilatedPattern((3, 8), (1, 2), "block")]
)
@pytest.mark.parametrize(
    "options", [{"start": 5}, {"lengths": torch.tensor([7, 4])}, {"causal": False}], ids=str
)
def test_gradcheck_through_out_and_lse(impl, pattern, options):
    q, k, v, _ = random_inputs(2, 7, 2, 1, 2, torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def attend(q, k, v):
        out, lse = dilated_attention(q, k, v, pattern, impl=impl, **options)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("impl", ["strided", "reference"])
def test_gradcheck_of_queries_that_start_later(impl):
    q, k, v, _ = random_inputs(1, 11, 2, 1, 2, torch.float64)
    inputs = [x.requires_grad_() for x in (q[:, -4:], k, v)]
    pattern = DilatedPattern((4, 10), (1, 3))
    assert torch.autograd.gradcheck(
        lambda q, k, v: tuple(dilated_attention(q, k, v, pattern, start=2, impl=impl)), inputs
    )


@pytest.mark.parametrize("through", ["out", "lse", "both"])
def test_each_output_may_be_used_alone(through):
    q, k, v, dout = random_inputs(1, 40, 4, 2, dtype=torch.float64)
    gradients = []
    for impl in ("strided", "reference"):
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = dilated_attention(*inputs, PAPER, impl=impl)
        loss = (out * dout).sum() * (through != "lse") + lse.square().sum() * (through != "out")
        gradients.append(torch.autograd.grad(loss, inputs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_it_compiles_without_a_graph_break(causal):
    tensors = random_inputs(2, 50, 4, 2)

    def attend(q, k, v):
        out, lse = dilated_attention(q * 2, k, v, UNEVEN, causal=causal)
        return (out.square().sum() + lse.sum()) / 2

    results = []
    for run in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        inputs = [x.detach().requires_grad_() for x in tensors[:3]]
        results.append(torch.autograd.grad(run(*inputs), inputs))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_operator_keeps_torchs_rules():
    """Schema, fake tensors, autograd registration and ahead-of-time dispatch with dynamic shapes."""
    q, k, v, _ = random_inputs(2, 20, 4, 2)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    arguments = (*inputs, None, [7, 30], [1, 6], "block", True, 0.5, 3, "strided")
    torch.library.opcheck(torch.ops.longnet.dilated_forward, arguments)


GOOD = dict(zip("qkv", random_inputs(2, 12, 4, 2)[:3], strict=True)) | {"pattern": DilatedPattern((7,), (1,))}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"pattern": ((7,), (1,))}, ("pattern", "tuple")),
        ({"pattern": None}, ("pattern", "NoneType")),
        ({"q": np.zeros((2, 12, 4, 8))}, ("q", "ndarray")),
        ({"k": None}, ("k", "NoneType")),
        ({"q": torch.zeros(2, 12, 8)}, ("q", "4 dimensions", "(2, 12, 8)")),
        ({"v": torch.zeros(2, 12, 2, 8, 1)}, ("v", "4 dimensions")),
        ({"q": torch.zeros(2, 12, 3, 8)}, ("multiple", "(2, 12, 3, 8)")),
        ({"q": torch.zeros(3, 12, 4, 8)}, ("(3, 12, 4, 8)",)),
        ({"q": torch.zeros(2, 12, 4, 7)}, ("(2, 12, 4, 7)",)),
        ({"q": torch.zeros(2, 0, 4, 8)}, ("at least one token",)),
        ({"q": torch.zeros(2, 13, 4, 8)}, ("13 queries",)),
        ({"q": torch.zeros(2, 5, 4, 8), "causal": False}, ("5 queries",)),
        ({"q": torch.zeros(2, 12, 4, 8, dtype=torch.int32)}, ("q", "floating")),
        ({"q": torch.zeros(2, 12, 4, 8, dtype=torch.complex64)}, ("q", "floating")),
        ({"k": torch.zeros(2, 12, 2, 8).half()}, ("k", "float16")),
        ({"v": torch.zeros(2, 11, 2, 8)}, ("k and v", "(2, 11, 2, 8)")),
        ({"k": torch.zeros(2, 12, 2, 8, device="meta")}, ("k", "device")),
        ({"lengths": [12, 3]}, ("lengths", "list")),
        ({"lengths": torch.tensor([12.0, 3.0])}, ("lengths", "float")),
        ({"lengths": torch.tensor([True, False])}, ("lengths", "bool")),
        ({"lengths": torch.tensor([12, 3, 4])}, ("lengths", "2 integers")),
        ({"lengths": torch.tensor([[12, 3]])}, ("lengths", "2 integers")),
        ({"start": -1}, ("start",)),
        ({"start": 1.5}, ("start",)),
        ({"scale": math.nan}, ("scale",)),
        ({"scale": math.inf}, ("scale",)),
        ({"scale": "big"}, ("scale",)),
        ({"causal": "no"}, ("causal", "'no'")),
        ({"causal": None}, ("causal", "None")),
        ({"impl": "cuda"}, ("impl", "'strided'")),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_a_bad_argument_is_named_at_once(changes, parts):
    started = time.perf_counter()
    with pytest.raises(ValueError, match="expected") as error:
        dilated_attention(**(GOOD | changes))
    assert time.perf_counter() - started < 1
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert dilated_attention(**GOOD).out.isfinite().all()


def test_a_path_that_cannot_run_says_why():
    q, k, v, _ = (x.to("meta") for x in random_inputs(1, 12, 4, 2))
    with pytest.raises(ValueError, match=r"impl='strided' cannot run here: .*meta.*leave impl=None"):
        dilated_attention(q, k, v, PAPER, impl="strided")


@pytest.mark.parametrize("impl", [None, "reference"])
def test_tensors_without_data_are_refused(impl):
    q, k, v, _ = (x.to("meta") for x in random_inputs(1, 12, 4, 2))
    with pytest.raises(ValueError, match="hold data; got device 'meta'"):
        dilated_attention(q, k, v, PAPER, impl=impl)


def test_second_derivatives_exist_in_the_reference_and_are_refused_elsewhere():
    q, k, v, _ = random_inputs(1, 12, 2, 1, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    for impl in ("reference", "strided"):
        out = dilated_attention(*inputs, PAPER, impl=impl).out
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        if impl == "reference":
            assert torch.autograd.grad(dq.square().sum(), k)[0].isfinite().all()
        else:
            with pytest.raises(
                NotImplementedError, match="whose second derivatives do not exist; use impl='reference'"
            ):
                torch.autograd.grad(dq.square().sum(), k)
