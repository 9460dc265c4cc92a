"""Published weights: an oracle of torchscale's rule by explicit padding, and torchscale itself where it is checked out."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longnet.integrations.torchscale import TorchscaleConfig, TorchscaleLongNet, load_torchscale, zero_keys
from longnet.model import LongNetCache

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6}
# Rates that do not divide lengths, and so many zero keys. 203 is longer than every document here: torchscale misplaces outputs
# beyond a first segment that its rate does not divide, which is not reproduced.
PATTERN = {"segment_lengths": (8, 22, 203), "dilation_rates": (1, 2, 4)}
LENGTHS = (1, 2, 7, 8, 9, 41, 50, 64, 77, 130)


def attention_oracle(q, k, v, branches, causal):
    """One document, (N, H, D) -> (N, H, D): real zero rows, cut as torchscale cuts, one softmax per query over all branches.

    Every branch lists for each query the keys it sees, zero rows included; there are no strides, no closed form, no merging.
    """
    n, heads, width = q.shape
    zero = torch.zeros(width, dtype=q.dtype)
    out = torch.empty_like(q)
    for h in range(heads):
        for t in range(n):
            keys, values = [], []
            for w, r in branches:
                g = min(w, n)
                s = h // math.ceil(heads / r)
                begin = t // g * g
                if (t - begin) % r != s:
                    continue
                for u in range(begin + s, begin + math.ceil(g / r) * r, r):
                    if causal and u > t:
                        break
                    real = u < min(begin + g, n)
                    keys.append(k[u, h] if real else zero)
                    values.append(v[u, h] if real else zero)
            weights = torch.softmax(torch.stack(keys) @ q[t, h] / math.sqrt(width), 0)
            out[t, h] = weights @ torch.stack(values)
    return out


def model_oracle(model, x):
    """One document (N, C) through the whole model in torch.nn.functional, from its state dict."""
    c, state = model.config, model.state_dict()

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], c.layernorm_eps)

    alpha = (2 * c.num_hidden_layers) ** 0.25 if c.deepnorm else 1
    branches = list(zip(c.segment_lengths, c.dilation_rates, strict=True))
    for i in range(c.num_hidden_layers):
        name = f"layers.{i}."

        def attend(x, name=name + "self_attn."):
            q, k, v = (
                linear(x, name + f"{p}_proj").unflatten(-1, (c.num_attention_heads, -1)) for p in "qkv"
            )
            out = attention_oracle(q, k, v, branches, c.causal).flatten(1)
            return linear(norm(out, name + "inner_attn_ln") if c.subln else out, name + "out_proj")

        def feed(x, name=name + "ffn."):
            x = F.gelu(linear(x, name + "fc1"))
            return linear(norm(x, name + "ffn_layernorm") if c.subln else x, name + "fc2")

        if c.normalize_before:
            x = alpha * x + attend(norm(x, name + "self_attn_layer_norm"))
            x = alpha * x + feed(norm(x, name + "final_layer_norm"))
        else:
            x = norm(alpha * x + attend(x), name + "self_attn_layer_norm")
            x = norm(alpha * x + feed(x), name + "final_layer_norm")
    return norm(x, "layer_norm") if c.normalize_output else x


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            # Large enough that attention is far from uniform and every bias and norm counts.
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() > 1 else 0.2) + (p == 1))
    return model


def make(causal=False, **options):
    return randomize(
        TorchscaleLongNet(TorchscaleConfig(**{**SIZES, **PATTERN, "causal": causal, **options})).double()
    )


def embeddings(n, batch=1, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, SIZES["hidden_size"], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 9, 41, 77])
def test_equals_explicit_padding(n, causal):
    model, x = make(causal), embeddings(n)
    torch.testing.assert_close(model(inputs_embeds=x)[0], model_oracle(model, x[0]), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"subln": False},
        {"subln": False, "deepnorm": True, "normalize_before": False, "normalize_output": False},
    ],
)
def test_other_architectures(options):
    model, x = make(**options), embeddings(50)
    torch.testing.assert_close(model(inputs_embeds=x)[0], model_oracle(model, x[0]), atol=1e-9, rtol=1e-9)


def test_zero_padding_is_a_choice_that_matters():
    x = embeddings(41)
    leaky, clean = (make(zero_padding=choice)(inputs_embeds=x) for choice in (True, False))
    assert (leaky - clean).abs().max() > 1e-2
    whole = {"segment_lengths": (8, 16, 64), "dilation_rates": (1, 2, 4)}
    leaky, clean = (
        make(zero_padding=choice, **whole)(inputs_embeds=embeddings(64)) for choice in (True, False)
    )
    assert torch.equal(leaky, clean), "nothing is padded where every length divides"


def test_where_torchscale_misplaces_outputs_a_warning_says_so():
    model = make(segment_lengths=(8, 21), dilation_rates=(1, 2))
    with pytest.warns(UserWarning, match="misplaces"):
        y = model(inputs_embeds=embeddings(41))
    torch.testing.assert_close(y[0], model_oracle(model, embeddings(41)[0]), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("lengths", [(8, 22, 203), (8, 21, 34)])
def test_zero_keys_by_counting(lengths):
    pattern = make(segment_lengths=lengths).config.pattern()
    for n in LENGTHS:
        expected = torch.zeros(6, n, dtype=torch.int64)
        for w, r in pattern.branches:
            g = min(w, n)
            rows = math.ceil(g / r) * r
            for h in range(6):
                for t in range(n):
                    begin = t // g * g
                    if (t - begin) % r == h // math.ceil(6 / r):
                        seen = range(t % g % r + begin, begin + rows, r)
                        expected[h, t] += sum(u >= min(begin + g, n) for u in seen)
        assert torch.equal(zero_keys(pattern, 6, n, torch.tensor([n]))[0], expected), n


@pytest.mark.parametrize("causal", [False, True])
def test_a_row_is_what_it_is_alone(causal):
    model, spans = make(causal), [(0, 77), (0, 41), (30, 77), (5, 6)]
    x, mask = embeddings(77, len(spans)), torch.zeros(len(spans), 77, dtype=torch.long)
    for row, (first, end) in zip(mask, spans, strict=True):
        row[first:end] = 1
    batched = model(inputs_embeds=x, attention_mask=mask)
    for b, (first, end) in enumerate(spans):
        alone = model(inputs_embeds=x[b : b + 1, first:end])[0]
        torch.testing.assert_close(batched[b, first:end], alone, atol=1e-12, rtol=1e-12)


def test_gradients_are_exact_and_finite_under_padding():
    config = TorchscaleConfig(
        **{**SIZES, **PATTERN, "causal": False, "num_hidden_layers": 1, "hidden_size": 12}
    )
    model = randomize(TorchscaleLongNet(config).double())
    x, mask = embeddings(9, 2)[..., :12].clone().requires_grad_(), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0

    def f(x):
        return model(inputs_embeds=x, attention_mask=mask)[mask.bool()]

    assert torch.autograd.gradcheck(f, (x,), atol=1e-5)


def decoder_state():
    model = make(True, vocab_size=11, positions=140, layernorm_embedding=True, output_size=11)
    return model, {f"decoder.{k}": v for k, v in model.state_dict().items()}


def test_decoder_from_a_file_with_its_prefix(tmp_path):
    model, state = decoder_state()
    torch.save({"model": state}, tmp_path / "checkpoint.pt")
    loaded = load_torchscale(
        tmp_path / "checkpoint.pt", num_heads=6, causal=True, prefix="decoder.", **PATTERN
    ).double()
    assert loaded.config == model.config
    ids = torch.arange(100)[None] % 11
    assert torch.equal(loaded(ids), model(ids))


def test_decoder_streams():
    model, _ = decoder_state()
    ids = torch.randint(0, 11, (2, 100), generator=torch.Generator().manual_seed(0))
    cache, parts = LongNetCache(model.config, 2, dtype=torch.float64), []
    with torch.no_grad():
        for part in ids.split((33, 1, 50, 16), 1):
            parts.append(model(part, past_key_values=cache))
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("layers.0.self_attn.xpos.scale", "xPos"),
        ("self_attn_relative_position.relative_attention_bias.weight", "relative position"),
        ("layers.0.encoder_attn.q_proj.weight", "cross-attention"),
        ("layers.1.moe_layer.gate.wg.weight", "experts"),
        ("layers.0.self_attn.q_proj.A.weight", "multiway"),
        ("layers.0.self_attn.q_proj.weights", "Unexpected"),
    ],
)
def test_what_is_not_computed_is_refused(name, reason):
    state = {**make().state_dict(), name: torch.zeros(3)}
    with pytest.raises(ValueError, match=reason):
        load_torchscale(state, num_heads=6, causal=False, **PATTERN)


def test_bad_arguments_are_refused():
    state = make().state_dict()
    with pytest.raises(ValueError, match="divisor"):
        load_torchscale(state, num_heads=5, causal=False, **PATTERN)
    with pytest.raises(ValueError, match="prefix"):
        load_torchscale(state, num_heads=6, causal=False, prefix="model.", **PATTERN)
    with pytest.raises(ValueError, match="inputs_embeds"):
        make()(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="learned"):
        decoder_state()[0](torch.zeros(1, 139, dtype=torch.long))


@pytest.fixture
def peer():
    if "TORCHSCALE_PATH" not in os.environ:
        pytest.skip(
            "TORCHSCALE_PATH is not set: no checkout of torchscale to compare with (the oracle above covers the rule)"
        )
    import torchscale_peer

    return torchscale_peer


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"deepnorm": True, "subln": False, "normalize_before": False}])
@pytest.mark.parametrize("n", [9, 77, 130])
def test_equals_torchscale(peer, causal, options, n):
    sizes = {"embed_dim": 24, "ffn_embed_dim": 40, "layers": 2, "attention_heads": 6, "vocab_size": 11}
    lists = {"segment_length": (8, 22, 203), "dilated_ratio": (1, 2, 4)}
    theirs = randomize(
        peer.longnet(causal, embed_tokens=nn.Embedding(11, 24), **sizes, **lists, **options).double()
    )
    norms = {k: v for k, v in options.items() if k in ("deepnorm", "normalize_before")}
    ours = load_torchscale(theirs.state_dict(), num_heads=6, causal=causal, **PATTERN, **norms).double()
    ids = torch.randint(0, 11, (2, n), generator=torch.Generator().manual_seed(n))
    result = theirs(ids)
    expected = result[0] if causal else result["encoder_out"]
    # Their activation rounds to fp32.
    torch.testing.assert_close(ours(ids), expected, atol=1e-5, rtol=1e-5)
