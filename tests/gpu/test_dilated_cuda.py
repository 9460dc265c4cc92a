"""Dilated attention, its streaming and the models on a CUDA device, against the fp64 oracle."""

import math

import pytest
import torch

import longnet
from conftest import assert_attention_within_budget
from longnet import DilatedPattern, LongNetCache, LongNetConfig, LongNetForCausalLM, dilated_attention
from longnet.attention import cached, fused
from longnet.generate import generate
from longnet.model.graph import GraphedStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

GEOMETRIC = DilatedPattern.geometric(4096, window=256)
PAPER = DilatedPattern((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
BLOCK = DilatedPattern((128, 300, 1024), (1, 3, 4), "block")


def random(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def run(tensors, impl, pattern, dout, dlse, **options):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = dilated_attention(*tensors, pattern, impl=impl, **options)
    loss = (out * dout.to(out.dtype)).sum() + (
        torch.where(torch.isfinite(lse), lse, 0) * dlse.to(lse.dtype)
    ).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, tensors)]


def check(tokens, heads, key_heads, width, pattern, dtype, queries=None, batch=1, impl=None, **options):
    queries = queries or tokens
    shapes = [(batch, queries, heads, width)] + [(batch, tokens, key_heads, width)] * 2
    tensors = [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    dout = random(*shapes[0], dtype=dtype, seed=3)
    dlse = random(batch, heads, queries, dtype=torch.float32, seed=4)
    exact = run([x.double() for x in tensors], "reference", pattern, dout, dlse, **options)
    peer = run(tensors, "reference", pattern, dout, dlse, **options)
    actual = run(tensors, impl, pattern, dout, dlse, **options)
    assert_attention_within_budget(actual, exact, peer, len(pattern.branches))


@pytest.mark.parametrize("impl", ["strided", "triton"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 127, 255, 256, 257, 1021, 2100])
def test_lengths(tokens, causal, impl):
    check(tokens, 4, 4, 64, GEOMETRIC, torch.bfloat16, causal=causal, impl=impl)


@pytest.mark.parametrize(
    ("dtype", "impl"),
    [
        (torch.bfloat16, "strided"),
        (torch.float16, "strided"),
        (torch.bfloat16, "triton"),
        (torch.float16, "triton"),
        (torch.float32, "triton"),
    ],
)
@pytest.mark.parametrize(
    ("heads", "key_heads", "width"),
    [(4, 4, 128), (8, 1, 64), (6, 2, 96), (4, 2, 80), (3, 3, 24), (12, 3, 48), (2, 1, 16)],
)
def test_widths_groups_and_dtypes(heads, key_heads, width, dtype, impl):
    check(1100, heads, key_heads, width, GEOMETRIC, dtype, impl=impl)


@pytest.mark.parametrize("impl", ["strided", "triton"])
def test_block_offsets_lengths_start_and_late_queries(impl):
    lengths = torch.tensor([900, 1, 517], device="cuda")
    check(1500, 6, 2, 64, BLOCK, torch.bfloat16, impl=impl)
    check(900, 4, 2, 64, GEOMETRIC, torch.bfloat16, impl=impl, batch=3, lengths=lengths)
    check(900, 4, 4, 64, GEOMETRIC, torch.bfloat16, impl=impl, start=777)
    check(1400, 4, 4, 64, GEOMETRIC, torch.bfloat16, impl=impl, queries=333)


@pytest.mark.parametrize("impl", ["strided", "triton"])
def test_the_papers_pattern(impl):
    check(8700, 3, 3, 64, PAPER, torch.bfloat16, impl=impl)


@pytest.mark.parametrize("kib", [99, 164])
@pytest.mark.parametrize(
    ("width", "dtype"), [(128, torch.bfloat16), (64, torch.float16), (96, torch.float32)]
)
def test_tiles_of_smaller_gpus(monkeypatch, kib, width, dtype):
    monkeypatch.setattr(fused, "shared_memory", lambda device: kib * 1024)
    check(1100, 4, 2, width, GEOMETRIC, dtype, impl="triton")


def test_the_path_is_chosen_by_what_the_library_can_do():
    few = random(2, 300, 4, 64)
    assert "takes impl='triton'" in longnet.explain(few, few, few, GEOMETRIC)
    q = torch.empty(2, 2**17, 12, 64, dtype=torch.bfloat16, device="cuda")
    assert "takes impl='strided'" in longnet.explain(q, q, q, GEOMETRIC)
    assert "takes impl='triton'" in longnet.explain(q.float(), q.float(), q.float(), GEOMETRIC)
    lengths = torch.tensor([300, 17], device="cuda")
    assert "takes impl='triton'" in longnet.explain(q, q, q, GEOMETRIC, lengths=lengths)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert "takes impl='triton'" in longnet.explain(q, q, q, GEOMETRIC)
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradients_of_the_kernels_repeat_bit_for_bit():
    q, k, v, dout = (random(1, 3000, 4, 64, seed=i) for i in range(4))
    dlse = random(1, 4, 3000, dtype=torch.float32, seed=6)
    base = run((q, k, v), "triton", GEOMETRIC, dout, dlse)
    for _ in range(20):
        again = run((q, k, v), "triton", GEOMETRIC, dout, dlse)
        assert all(torch.equal(a, b) for a, b in zip(base, again, strict=True))


def test_causality_is_bit_equal_and_runs_repeat():
    q, k, v = (random(1, 3000, 4, 64, seed=i) for i in range(3))
    changed = [torch.cat((x[:, :2000], torch.randn_like(x[:, 2000:])), 1) for x in (q, k, v)]
    for impl in ("strided", "triton"):
        first = dilated_attention(q, k, v, GEOMETRIC, impl=impl).out
        assert torch.equal(dilated_attention(*changed, GEOMETRIC, impl=impl).out[:, :2000], first[:, :2000])
    dout, dlse = random(1, 3000, 4, 64, seed=5), random(1, 4, 3000, dtype=torch.float32, seed=6)
    base = run((q, k, v), "strided", GEOMETRIC, dout, dlse)
    for _ in range(20):
        again = run((q, k, v), "strided", GEOMETRIC, dout, dlse)
        # cuDNN adds up dq of the keys' programs with atomics; everything else repeats bit for bit.
        assert all(torch.equal(a, b) for a, b in zip(base[:2] + base[3:], again[:2] + again[3:], strict=True))


@pytest.mark.parametrize("impl", ["strided", "triton"])
def test_more_than_2_to_the_31_elements(impl):
    tokens, pattern = 1_200_000, DilatedPattern((2048, 65536), (1, 32))
    q, k, v = random(1, tokens, 16, 128), random(1, tokens, 1, 128, seed=1), random(1, tokens, 1, 128, seed=2)
    assert q.numel() > 2**31
    out = dilated_attention(q, k, v, pattern, impl=impl).out
    begin = tokens // 65536 * 65536
    tail = dilated_attention(q[:, begin:], k[:, begin:], v[:, begin:], pattern, start=begin, impl=impl).out
    assert ((out[:, begin:] - tail).float().norm() / tail.float().norm()) < 5e-3
    assert torch.isfinite(out[:, ::1000]).all()


@pytest.mark.parametrize("pattern", [GEOMETRIC, BLOCK, DilatedPattern((5, 64, 333), (1, 6, 16))])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(8, 2, 64), (4, 4, 128), (6, 1, 24)])
def test_single_tokens_match_the_explicit_softmax(pattern, heads, key_heads, width):
    """The fused step, whose buffers hold garbage beyond the valid rows, against the device-independent one in fp64."""
    positions = torch.tensor([0, 700, 1333], device="cuda")
    buffers = []
    for w, r in pattern.branches:
        shape = (3, pattern.rows(w, r), len(pattern.slots(r, heads, key_heads)), width)
        buffers.append(tuple(random(*shape, dtype=torch.float32, seed=i) for i in range(2)))
    exact = [tuple(x.cpu().double() for x in pair) for pair in buffers]
    q, k, v = (random(3, 1, h, width, dtype=torch.float32, seed=7 + h) for h in (heads, key_heads, key_heads))
    cached.write_step(buffers, k, v, pattern, heads, positions)
    cached.write_step(exact, k.cpu().double(), v.cpu().double(), pattern, heads, positions.cpu())
    for pair, wanted in zip(buffers, exact, strict=True):
        for x, y in zip(pair, wanted, strict=True):
            assert torch.equal(x.cpu(), y.float())
    out = cached.decode_attention(q, pattern, buffers, positions)
    true = cached.decode_attention(q.cpu().double(), pattern, exact, positions.cpu())
    torch.testing.assert_close(out.cpu().double(), true, atol=2e-5, rtol=2e-5)


def tiny(**changes):
    torch.manual_seed(0)
    config = LongNetConfig.preset(
        "tiny", segment_lengths=[64, 256, 1024], dilation_rates=[1, 4, 16], initializer_range=0.2, **changes
    )
    return LongNetForCausalLM(config).cuda().eval()


def test_the_fused_norm_and_turn_equal_the_layers():
    model = tiny()
    ids = torch.randint(4, 260, (2, 300), device="cuda")
    with torch.no_grad():
        fused = model(ids, start=10**9).logits
    plain = model(ids, start=10**9).logits.detach()
    torch.testing.assert_close(fused, plain, atol=2e-4, rtol=2e-4)


def test_a_stream_equals_the_parallel_pass():
    model = tiny()
    ids = torch.randint(4, 260, (2, 1500), device="cuda")
    with torch.no_grad():
        whole = model(ids).logits
        cache, parts, begin = LongNetCache(model.config, 2, "cuda"), [], 0
        for n in (1, 700, 1, 1, 300, 497):
            parts.append(model(ids[:, begin : begin + n], past_key_values=cache, use_cache=True).logits)
            begin += n
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-3, rtol=2e-3)
    out = generate(model, ids[:, :900], max_new_tokens=20, temperature=0)
    with torch.no_grad():
        for b in range(2):
            context = ids[b : b + 1, :900]
            for token in out.ids[b]:
                logits = model(context, logits_to_keep=1).logits[0, -1]
                assert logits[token] >= logits.max() - 2e-3
                context = torch.cat((context, torch.tensor([[token]], device="cuda")), 1)


def test_a_captured_step_equals_the_model_while_buffers_grow():
    model = tiny()
    ids = torch.randint(4, 260, (2, 300), device="cuda")
    plain, graphed = (LongNetCache(model.config, 2, "cuda") for _ in range(2))
    step = GraphedStep(model, graphed)
    with torch.inference_mode():
        for cache in (plain, graphed):
            model(
                ids[:, :50],
                past_key_values=cache,
                use_cache=True,
                lengths=torch.tensor([50, 31], device="cuda"),
            )
        for i in range(50, 300):
            want = model(ids[:, i : i + 1], past_key_values=plain, use_cache=True).logits[:, -1]
            torch.testing.assert_close(step(ids[:, i : i + 1]), want, atol=1e-5, rtol=1e-5)
    assert plain.host_positions == graphed.host_positions == (300, 281)
    assert torch.equal(plain.positions, graphed.positions)


def test_a_captured_step_leaves_captures_outside_inference_mode_possible():
    model = tiny()
    with torch.inference_mode():
        step = GraphedStep(model, LongNetCache(model.config, 1, "cuda"))
        step(torch.full((1, 1), 70, device="cuda"))
    x, graph = torch.ones(4, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x *= 2
    graph.replay()
    assert x.tolist() == [2.0] * 4
    assert step(torch.full((1, 1), 71, device="cuda")).isfinite().all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("impl", [None, "strided"])
def test_compiles_without_a_graph_break(impl):
    q, k, v = (random(1, 1030, 4, 64, seed=i).requires_grad_() for i in range(3))
    compiled = torch.compile(
        lambda q, k, v: dilated_attention(q * 1.0, k, v, GEOMETRIC, impl=impl).out.square(), fullgraph=True
    )
    expected = torch.autograd.grad(
        dilated_attention(q, k, v, GEOMETRIC, impl=impl).out.square().sum(), (q, k, v)
    )
    for a, b in zip(torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v)), expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_bf16_training_learns():
    model = tiny().train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    ids = torch.randint(4, 260, (1, 64), device="cuda").repeat(2, 8)
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert math.isfinite(losses[-1])
    assert losses[-1] < losses[0] / 2
