"""On a CUDA device: addresses beyond 2^31, wide grids, repeats, the models in bf16, snapshots, two steps of the trainer."""

import math

import pytest
import torch

from conftest import assert_within_budget
from longnet import DilatedPattern, LongNetCache, LongNetConfig, LongNetForCausalLM, dilated_attention
from longnet.attention.reference import multiplicity
from longnet.generate import generate
from longnet.train import TrainConfig, train
from longnet.train.data import prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

GEOMETRIC = DilatedPattern.geometric(4096, window=256)
SCALED_PAPER = DilatedPattern((64, 128, 256, 512, 1024), (1, 2, 4, 6, 12))
MODEL = {"segment_lengths": [64, 256, 1024], "dilation_rates": [1, 4, 16], "initializer_range": 0.2}


def random(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def with_gradients(inputs, impl, pattern, dout, dlse, **options):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, lse = dilated_attention(*inputs, pattern, impl=impl, **options)
    loss = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        loss = loss + (torch.where(torch.isfinite(lse), lse, 0) * dlse.to(lse.dtype)).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 11, 63, 65, 509, 1024, 2053])
def test_the_papers_pattern_scaled(tokens, causal):
    inputs = [random(2, tokens, h, 64, seed=h) for h in (12, 4, 4)]
    dout, dlse = random(2, tokens, 12, 64, seed=7), random(2, 12, tokens, dtype=torch.float32, seed=8)
    arguments = (SCALED_PAPER, dout, dlse)
    exact = with_gradients([x.double() for x in inputs], "reference", *arguments, causal=causal)
    peer = with_gradients(inputs, "reference", *arguments, causal=causal)
    for impl in ("strided", "triton"):
        actual = with_gradients(inputs, impl, *arguments, causal=causal)
        for name, a, e, p in zip(("out", "lse", "dq", "dk", "dv"), actual, exact, peer, strict=True):
            assert_within_budget(f"{impl} {name}", a, e, p)


def test_rows_without_a_token_and_views_of_other_layouts():
    """Expanded keys, transposed queries and gradients, sequences of length 0 and 1: as with contiguous copies."""
    q = random(3, 6, 700, 64).transpose(1, 2)
    k = random(1, 700, 1, 64, seed=1).expand(3, 700, 2, 64)
    v = random(3, 700, 64, 2, seed=2).transpose(2, 3)
    dout = random(64, 6, 700, 3, seed=3).permute(3, 2, 1, 0)
    lengths = torch.tensor([700, 0, 1], device="cuda")
    views = with_gradients([q, k, v], None, GEOMETRIC, dout, None, lengths=lengths)
    copies = [x.contiguous() for x in (q, k, v, dout)]
    plain = with_gradients(copies[:3], None, GEOMETRIC, copies[3], None, lengths=lengths)
    for a, b in zip(views, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)
    assert not views[0][1].any()
    assert (views[1][1] == -torch.inf).all()
    assert not any(g[1].any() for g in views[2:])


@pytest.mark.parametrize("window", [16, 128])
def test_more_segments_than_a_launch_dimension_holds(window):
    tokens = window * 70001 + 5
    q, k, v = (random(1, tokens, 1, 16, seed=i) for i in range(3))
    dout = random(1, tokens, 1, 16, seed=3)
    pattern = DilatedPattern((window,), (1,))
    whole = with_gradients([q, k, v], None, pattern, dout, None)
    for begin in (0, window * 35000, window * 70001):
        part = slice(begin, min(begin + 3 * window, tokens))
        inputs = [x[:, part].contiguous() for x in (q, k, v)]
        alone = with_gradients(inputs, "reference", pattern, dout[:, part], None, start=begin)
        whole_part = [whole[0][:, part], whole[1][..., part], *(g[:, part] for g in whole[2:])]
        for a, b in zip(whole_part, alone, strict=True):
            torch.testing.assert_close(a.float(), b.float(), atol=3e-2, rtol=3e-2)


def _judge(q, k, v, pattern, rows, dout, head):
    """out, lse and gradients of one head for the queries `rows`, straight from the law, in fp64."""
    group = q.shape[2] // k.shape[2]
    qs = q[0, rows, head].double().requires_grad_()
    ks, vs = (x[0, :, head // group].double().requires_grad_() for x in (k, v))
    keys = torch.arange(k.shape[1], device=q.device)
    count = multiplicity(pattern, q.shape[2], rows, keys, True)[head]
    scores = qs @ ks.T / math.sqrt(q.shape[3]) + count.double().log()
    out = scores.softmax(-1) @ vs
    gradients = torch.autograd.grad((out * dout[0, rows, head].double()).sum(), (qs, ks, vs))
    return out.detach(), scores.logsumexp(-1).detach(), *gradients


def test_gradients_where_addresses_exceed_2_to_the_31():
    """q, k and v of more than 2^31 elements, a branch with rows 2^20 elements apart; a few queries against the law."""
    free = torch.cuda.mem_get_info()[0]
    if free < 70 << 30:
        pytest.skip(f"needs 70 GiB of GPU memory; {free >> 30} GiB are free")
    tokens, heads, width = (1 << 20) + 5000, 16, 128
    pattern = DilatedPattern((2048, 1 << 21), (1, 512))
    q, k, v = (random(1, tokens, heads, width, seed=i) for i in range(3))
    assert q.numel() > 2**31
    rows = torch.tensor([0, 511, 2048, tokens // 2, tokens - 4096, tokens - 1], device="cuda")
    dout = torch.zeros_like(q)
    dout[:, rows] = random(1, len(rows), heads, width, seed=4)
    out, lse, dq, dk, dv = with_gradients([q, k, v], None, pattern, dout, None)
    for head in (0, 7, 15):
        true = _judge(q, k, v, pattern, rows, dout, head)
        got = (out[0, rows, head], lse[0, head, rows], dq[0, rows, head], dk[0, :, head], dv[0, :, head])
        for name, a, e in zip(("out", "lse", "dq", "dk", "dv"), got, true, strict=True):
            error = (a.double() - e).norm() / e.norm()
            assert error < 1e-2, f"head {head}, {name}: relative error {error:.2e}"


def test_the_deterministic_mode_repeats_bit_for_bit():
    inputs = [random(4, 1500, h, 64, seed=h) for h in (4, 2, 2)]
    dout, dlse = random(4, 1500, 4, 64, seed=7), random(4, 4, 1500, dtype=torch.float32, seed=8)
    torch.use_deterministic_algorithms(True)
    try:
        base = with_gradients(inputs, None, GEOMETRIC, dout, dlse)
        for _ in range(50):
            again = with_gradients(inputs, None, GEOMETRIC, dout, dlse)
            assert all(torch.equal(a, b) for a, b in zip(base, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_refused_call_leaves_the_device_usable():
    q = random(1, 300, 4, 64)
    for bad in (q.cpu(), q.float(), random(1, 300, 3, 64), q[0]):
        with pytest.raises(ValueError, match="expected"):
            dilated_attention(q, bad, bad, GEOMETRIC)
    torch.cuda.synchronize()
    assert torch.isfinite(dilated_attention(q, q, q, GEOMETRIC).out).all()


def make(device, dtype, **overrides):
    torch.manual_seed(0)
    model = LongNetForCausalLM(LongNetConfig.preset("tiny", **{**MODEL, **overrides}))
    return model.to(device, dtype)


def test_the_model_in_bf16_stays_near_fp64_on_the_cpu():
    ids = torch.randint(4, 260, (2, 700), generator=torch.Generator().manual_seed(0))
    exact = make("cpu", torch.float64, attention_impl="reference")
    got = make("cuda", torch.bfloat16)
    for model in (exact, got):
        model.train()
        x = ids.to(model.device)
        out = model(input_ids=x, labels=x, return_logits=True)
        out.loss.backward()
        model.result = out.logits.detach().double().cpu()
    assert (got.result - exact.result).norm() / exact.result.norm() < 5e-2
    for (name, a), b in zip(got.named_parameters(), exact.parameters(), strict=True):
        error = (a.grad.double().cpu() - b.grad).norm() / b.grad.norm()
        assert error < 0.12, f"{name}: relative error {error:.2e}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("padding", [None, 250])
def test_the_model_compiles_whole_and_keeps_its_loss(padding):
    model = make("cuda", torch.float32).train()
    ids = torch.randint(4, 260, (2, 600), device="cuda")
    mask = None
    if padding:
        mask = torch.ones_like(ids)
        mask[1, :padding] = 0
    compiled = torch.compile(model, fullgraph=True)
    losses, gradients = [], []
    for run in (model, compiled):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = run(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 0.1 * b.norm()


def test_a_ragged_batch_and_a_snapshot_continue_as_single_runs(tmp_path):
    model = make("cuda", torch.float32).eval()
    ids = torch.randint(4, 260, (3, 900), device="cuda")
    lengths = [900, 65, 400]
    together = generate(model, ids, lengths=lengths, max_new_tokens=12, temperature=0, chunk_size=250)
    with torch.no_grad():
        for b, n in enumerate(lengths):
            context = ids[b : b + 1, :n]
            for token in together.ids[b]:
                logits = model(context, logits_to_keep=1).logits[0, -1]
                assert logits[token] >= logits.max() - 2e-3
                context = torch.cat((context, torch.tensor([[token]], device="cuda")), 1)
    path = tmp_path / "cache.safetensors"
    together.cache.save(path)
    last = torch.tensor([new[-1:] for new in together.ids], device="cuda")
    loaded = LongNetCache.load(path, model.config, "cuda")
    more = [
        generate(model, last, max_new_tokens=12, temperature=0, cache=cache).ids
        for cache in (together.cache, loaded)
    ]
    assert more[0] == more[1]


def test_the_trainer_takes_steps_in_bf16_and_resumes(tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    prepare([tmp_path / "a.txt"], tmp_path / "data")
    settings = {"data": tmp_path / "data", "output": tmp_path / "run", "model": MODEL, "sequence_length": 256}
    settings |= {"batch_size": 2, "warmup": 1, "save_every": 1, "device": "cuda"}

    class Stop(Exception):
        pass

    def stop(event):
        if event["step"] == 2:
            raise Stop

    with pytest.raises(Stop):
        train(TrainConfig(**settings, steps=4), stop)
    summary = train(TrainConfig(**settings, steps=4))
    assert summary.resumed_from == 1
    assert summary.finished
    assert math.isfinite(summary.loss)
