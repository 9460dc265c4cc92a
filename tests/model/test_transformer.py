"""The models: saving, padding, losses, checkpointing, causality, positions, generation."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache

import longnet.model.transformer as transformer
from longnet.model import LongNetConfig, LongNetForCausalLM, LongNetModel

PATTERN = {"segment_lengths": (8, 16, 32), "dilation_rates": (1, 2, 4)}


def make(seed=0, **overrides):
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LongNetConfig.preset("tiny", **{**PATTERN, **size, **overrides})
    # A larger spread than one trains with, so that a wrong key visibly moves the logits.
    config.initializer_range = 0.2
    return LongNetForCausalLM(config).eval()


def ids_of(*shape, seed=1):
    return torch.randint(4, 260, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return make()


def test_shapes(model):
    ids = ids_of(2, 41)
    out = model(input_ids=ids, output_hidden_states=True)
    assert out.logits.shape == (2, 41, 260)
    assert [h.shape for h in out.hidden_states] == [(2, 41, 32)] * 3
    embeds = model.model.embed_tokens(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, out.logits)
    assert torch.equal(model(input_ids=ids, logits_to_keep=3).logits, out.logits[:, -3:])
    index = torch.tensor([5, 7])
    assert torch.equal(model(input_ids=ids, logits_to_keep=index).logits, out.logits[:, index])
    assert torch.equal(model(input_ids=ids, return_dict=False)[0], out.logits)


def test_saved_model_returns_bit_equal(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is LongNetForCausalLM
    assert again.lm_head.weight is again.model.embed_tokens.weight
    ids = ids_of(1, 20)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_residual_matrices_start_smaller():
    model = LongNetForCausalLM(LongNetConfig.preset("tiny"))
    layer = model.model.layers[0]
    assert layer.attention.qkv_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    assert torch.equal(layer.mlp_norm.weight, torch.ones(128))


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_documents_logits_do_not_depend_on_its_batch(model, side):
    total, sizes = 37, (37, 20, 1)
    ids, mask = torch.zeros(3, total, dtype=torch.long), torch.zeros(3, total, dtype=torch.long)
    spans = []
    for row, size in enumerate(sizes):
        first = {"left": total - size, "right": 0, "both": (total - size) // 2}[side]
        spans.append(slice(first, first + size))
        ids[row, spans[-1]], mask[row, spans[-1]] = ids_of(size, seed=row), 1
    logits = model(input_ids=ids, attention_mask=mask).logits
    losses = model.token_losses(ids, attention_mask=mask)
    for row, span in enumerate(spans):
        alone = ids[row : row + 1, span]
        want = model(input_ids=alone).logits[0]
        torch.testing.assert_close(logits[row, span], want, atol=1e-5, rtol=1e-5)
        want = model.token_losses(alone)[0]
        got = losses[row, span.start : span.stop - 1]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
    torch.testing.assert_close(loss, losses.sum() / (36 + 19))


def test_lengths_equal_a_right_padded_mask(model):
    ids, lengths = ids_of(2, 30), torch.tensor([30, 11])
    mask = (torch.arange(30) < lengths[:, None]).long()
    full = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(model(input_ids=ids, lengths=lengths).logits, full)
    last = model(input_ids=ids, lengths=lengths, logits_to_keep=1).logits
    torch.testing.assert_close(last[:, 0], full[torch.arange(2), lengths - 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "hole"),
        ({"attention_mask": torch.ones(1, 4, 4)}, "N x N"),
        ({"attention_mask": torch.ones(2, 4)}, r"\(1, N >= 4\)"),
        ({"input_ids": torch.arange(4)}, r"input_ids\[None\]"),
        ({"input_ids": torch.ones(1, 4)}, "int64"),
        ({"past_key_values": DynamicCache(), "use_cache": True}, "DynamicCache"),
        ({"attention_mask": torch.ones(1, 4), "lengths": torch.tensor([4])}, "at most one"),
        ({"inputs_embeds": torch.zeros(1, 4, 32)}, "exactly one"),
        ({"position_ids": torch.arange(4)[None]}, "position_ids"),
        ({"output_attentions": True}, "output_attentions"),
        ({"labels": torch.zeros(1, 5, dtype=torch.long)}, "labels"),
    ],
)
def test_bad_input_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": ids_of(1, 4)} | arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_loss_and_its_gradients_equal_cross_entropy(dtype, monkeypatch):
    monkeypatch.setattr(transformer, "LOSS_LOGITS", 7 * 260)
    model = make(tie_word_embeddings=False).to(dtype)
    ids = ids_of(2, 25)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    model(input_ids=ids, labels=labels).loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logits = model(input_ids=ids).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, loss)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, msg=name, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_the_loss_is_linear_work_in_the_number_of_chunks(monkeypatch):
    """Slices would each have a gradient as large as the whole: a million tokens then cost more than the model."""
    monkeypatch.setattr(transformer, "LOSS_LOGITS", 260)
    names = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            names.append((func.overloadpacket.__name__, out))
            return out

    model = make()
    hidden = torch.randn(1, 50, model.config.hidden_size, requires_grad=True)
    with Record():
        model._chunked_losses(hidden, torch.zeros(1, 50, dtype=torch.long)).sum().backward()
    whole = [
        name for name, out in names if isinstance(out, torch.Tensor) and out.shape[-2:] == hidden.shape[-2:]
    ]
    assert len(whole) < 10, whole


def test_loss_options(model):
    ids = ids_of(2, 12)
    out = model(input_ids=ids, labels=ids)
    assert out.logits is None
    assert model(input_ids=ids, labels=ids, return_logits=True).logits.shape == (2, 12, 260)
    scaled = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(44)).loss
    torch.testing.assert_close(scaled, out.loss / 2)
    assert model(input_ids=ids, labels=torch.full_like(ids, -100)).loss == 0


def test_token_losses_are_log_probabilities(model):
    ids = ids_of(2, 15)
    logp = model(input_ids=ids).logits.log_softmax(-1)[:, :-1]
    want = -logp.gather(2, ids[:, 1:, None])[..., 0]
    got = model.token_losses(ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model.token_losses(ids, targets=targets)[:, :-1], want)


def test_gradient_checkpointing_gives_equal_gradients():
    plain, saved = make().train(), make().train()
    saved.gradient_checkpointing_enable()  # the newer name is not in transformers 5.17
    ids = ids_of(2, 33)
    for model in (plain, saved):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_autocast_bfloat16_trains():
    model, ids = make().train(), ids_of(2, 33)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_later_tokens_do_not_move_earlier_logits(model):
    ids = ids_of(1, 40)
    changed = ids.clone()
    changed[:, 23:] = ids_of(1, 17, seed=9)
    before, after = model(input_ids=ids).logits, model(input_ids=changed).logits
    torch.testing.assert_close(before[:, :23], after[:, :23])
    assert not torch.allclose(before[:, 23:], after[:, 23:])


def test_bidirectional_model_looks_ahead():
    config = make().config.to_dict() | {"bidirectional": True}
    model = LongNetModel(LongNetConfig(**config)).eval()
    ids = ids_of(1, 12)
    changed = ids.clone()
    changed[:, -1] = 5
    a, b = (model(input_ids=x).last_hidden_state for x in (ids, changed))
    assert not torch.allclose(a[:, 9], b[:, 9])
    with pytest.raises(ValueError, match="bidirectional"):
        LongNetForCausalLM(LongNetConfig(**config))
    with pytest.raises(ValueError, match="bidirectional"):
        model(input_ids=ids, use_cache=True)


def test_logits_at_a_billion_tokens_equal_those_at_zero(model):
    start = 10**9 // 32 * 32  # segments begin at the same place
    ids = ids_of(1, 40)
    far, near = model(input_ids=ids, start=start).logits, model(input_ids=ids).logits
    torch.testing.assert_close(far, near, atol=1e-3, rtol=1e-3)


def test_chunks_through_a_cache_equal_one_pass(model):
    ids = ids_of(2, 50)
    want = model(input_ids=ids).logits
    cache, pieces = None, []
    for chunk in ids.split([20, 1, 17, 12], dim=1):
        out = model(input_ids=chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), want, atol=1e-4, rtol=1e-4)
    assert cache.positions.tolist() == [50, 50]


def test_streamed_token_losses_equal_one_pass(model):
    ids = ids_of(1, 51)
    cache = model(input_ids=ids[:, :20], use_cache=True).past_key_values
    got = model.token_losses(ids[:, 20:50], targets=ids[:, 21:], past_key_values=cache)
    torch.testing.assert_close(got, model.token_losses(ids)[:, 20:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_and_without_cache(model, padded, beams):
    ids = ids_of(2, 21)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :9], ids[1, :9] = 0, 0
    options = {"max_new_tokens": 24, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    fast = model.generate(ids, attention_mask=mask, use_cache=True, **options)
    slow = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(fast, slow)
    assert fast.shape == (2, 45)
    if padded and beams == 1:
        alone = model.generate(ids[1:, 9:], **options)
        assert torch.equal(alone[0], fast[1, 9:])
