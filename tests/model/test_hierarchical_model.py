"""Models with hierarchical layers: train, stream exactly, keep bounded memory, survive on disk."""

import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

from longnet import (
    LongNetCache,
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForSequenceClassification,
    LongNetModel,
)
from longnet.generate import generate

TREE = {"block": 4, "radix": 3, "window_blocks": 2, "guard": 1, "top_k": 2, "beam": 3}
BOUNDED = TREE | {"retention": [24, 12]}


def model(tree=TREE, attention="hierarchical", dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = LongNetConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        attention=attention, hierarchical=tree, segment_lengths=[8, 32], dilation_rates=[1, 4], initializer_range=0.3, **changes,
    )  # fmt: skip
    network = LongNetForCausalLM(config).to(dtype)
    with torch.no_grad():  # parameters at their neutral start would hide mistakes
        for name, weight in network.named_parameters():
            if name.endswith(("prior_query", "level_bias", "key_conv")):
                weight.normal_(0, 0.3)
            if name.endswith("router_mix"):
                weight.requires_grad_().uniform_(0.2, 0.9)
    return network.eval()


def tokens(batch, n, seed=0):
    return torch.randint(4, 260, (batch, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attention", ["hierarchical", ["hierarchical", "dilated"]])
@pytest.mark.parametrize(
    "tree",
    # The last keeps more nodes than leaves of tokens: no leaf may be opened.
    [TREE, BOUNDED, TREE | {"levels": 2}, TREE | {"retention": [8, 12]}],
)
@pytest.mark.parametrize("chunks", [(1,) * 60, (130,), (3, 1, 40, 1, 25, 60), (8, 4, 4, 12, 36, 1, 1, 64)])
def test_a_stream_equals_the_parallel_pass(chunks, tree, attention):
    network = model(tree, attention)
    ids = tokens(1, sum(chunks))
    with torch.no_grad():
        whole = network(ids).logits
        cache, begin = LongNetCache(network.config, 1, dtype=torch.float64), 0
        for n in chunks:
            part = network(ids[:, begin : begin + n], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(part, whole[:, begin : begin + n], atol=1e-9, rtol=0)
            begin += n


def test_bounded_memory_stays_flat():
    network = model(BOUNDED)
    cache, sizes = LongNetCache(network.config, 1, dtype=torch.float64), []
    ids = tokens(1, 3000)
    with torch.no_grad():
        for begin in range(0, 3000, 50):
            network(ids[:, begin : begin + 50], past_key_values=cache, use_cache=True, logits_to_keep=1)
            sizes.append(cache.nbytes())
    # Room for growth is bounded by what is held, and what is held no longer grows but for the first nodes of a new level.
    held = sum(x.nbytes for layer in cache.layers for x in layer.tensors().values())
    assert max(sizes) <= 2.5 * held
    # One long chunk leaves no more behind than many short ones.
    long = LongNetCache(network.config, 1, dtype=torch.float64)
    with torch.no_grad():
        network(ids, past_key_values=long, use_cache=True, logits_to_keep=1)
    assert long.nbytes() <= sizes[-1]
    rows, nodes = network.config.hierarchical_pattern().cache_entries(3000)
    state = cache.layers[0].states[0]
    assert len(state.tokens[0]) == rows
    assert sum(len(level[0]) for level in state.levels) == nodes


def test_sequences_at_different_positions_and_beams():
    network = model()
    ids = tokens(2, 70)
    with torch.no_grad():
        cache = LongNetCache(network.config, 2, dtype=torch.float64)
        network(ids, past_key_values=cache, use_cache=True, lengths=torch.tensor([70, 33]))
        cache.reorder_cache(torch.tensor([1, 0]))
        step = tokens(2, 1, seed=1)
        out = network(step, past_key_values=cache, use_cache=True).logits
        for b, (source, n) in enumerate(((1, 33), (0, 70))):
            alone = network(torch.cat((ids[source : source + 1, :n], step[b : b + 1]), 1)).logits
            torch.testing.assert_close(out[b, -1], alone[0, -1], atol=1e-9, rtol=0)


@pytest.mark.parametrize("tree", [TREE, BOUNDED])
def test_a_snapshot_continues_bit_for_bit(tmp_path, tree):
    network = model(tree, dtype=torch.float32)
    ids = tokens(1, 90)
    with torch.no_grad():
        cache = LongNetCache(network.config, 1)
        network(ids[:, :77], past_key_values=cache, use_cache=True)
        cache.save(tmp_path / "cache.safetensors")
        again = LongNetCache.load(tmp_path / "cache.safetensors", network.config)
        sent = pickle.loads(pickle.dumps(cache))  # to another process
        ends = [network(ids[:, 77:], past_key_values=c, use_cache=True).logits for c in (cache, again, sent)]
    assert torch.equal(*ends[:2])
    assert torch.equal(*ends[1:])
    with pytest.raises(ValueError, match="configuration"):
        LongNetCache.load(tmp_path / "cache.safetensors", model(TREE | {"top_k": 1}).config)


def test_generation_matches_the_parallel_pass():
    network = model()
    ids = tokens(1, 50)
    out = generate(network, ids, max_new_tokens=12, temperature=0, eos_token_id=None).ids[0]
    for token in out:
        assert token == network(ids).logits[0, -1].argmax()
        ids = torch.cat((ids, torch.tensor([[token]])), 1)
    again = network.generate(tokens(1, 50), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert again[0, 50:].tolist() == out


def test_it_learns_and_every_parameter_gets_a_gradient():
    network = model(dtype=torch.float32).train()
    network.gradient_checkpointing_enable()
    ids = tokens(1, 20).repeat(2, 6)
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    losses = []
    for _ in range(25):
        loss = network(ids, labels=ids).loss
        loss.backward()
        if not losses:
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_it_is_saved_and_loaded_whole(tmp_path):
    network = model(dtype=torch.float32)
    network.save_pretrained(tmp_path)
    again = LongNetForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(network(tokens(1, 60)).logits, again(tokens(1, 60)).logits)
    assert sum(p.numel() for p in again.parameters()) == again.config.num_parameters()


def test_heads_begin_with_different_reach(tmp_path):
    config = LongNetConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1,
        attention="hierarchical", hierarchical=TREE, far_bias=-9,
    )  # fmt: skip
    network = LongNetForCausalLM(config)
    attention, levels = network.model.layers[0].attention, config.hierarchical_pattern().most_levels()
    expected = torch.tensor([0.0, -3.0, -6.0, -9.0])[:, None].expand(4, levels)
    assert torch.equal(attention.level_bias, expected)
    with torch.no_grad():  # what was learned is loaded, not begun again
        attention.level_bias.fill_(0.5)
    network.save_pretrained(tmp_path)
    again = LongNetForCausalLM.from_pretrained(tmp_path).model.layers[0].attention
    assert torch.equal(again.level_bias, torch.full((4, levels), 0.5))


def test_a_far_bias_leaves_the_window_alone_and_takes_weight_from_the_rest():
    """The share of the window in a new model's softmax, in the head without a bias and in the last one."""
    hidden = torch.randn(1, 200, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    attention = model().model.layers[0].attention
    with torch.no_grad():  # which `model` drew anew
        attention.level_bias.copy_(torch.linspace(0, -6, 4)[:, None].expand_as(attention.level_bias))
    angles = torch.zeros(1, 200, 1, 4, dtype=torch.float64)
    shares = []
    for seen in attention.attention_maps(hidden, (angles.cos(), angles.sin())):
        weights = [item.weight for item in seen.items]
        near = [item.weight for item in seen.items if item.kind == "window"]
        assert sum(weights) == pytest.approx(1)
        shares.append(sum(near))
    assert shares[0] < 0.5 < 0.9 < shares[-1]


def test_an_encoder_sees_both_directions():
    torch.manual_seed(0)
    config = LongNetConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, attention="hierarchical",
        hierarchical=TREE, bidirectional=True, key_conv=0,
    )  # fmt: skip
    network = LongNetModel(config).double().eval()
    ids = tokens(2, 90)
    both = network(ids, lengths=torch.tensor([90, 40])).last_hidden_state
    alone = network(ids[1:, :40]).last_hidden_state
    torch.testing.assert_close(both[1, :40], alone[0], atol=1e-10, rtol=0)
    changed = ids.clone()
    changed[0, -1] = 5 if ids[0, -1] != 5 else 6
    assert (
        network(changed).last_hidden_state[0, 0] - network(ids).last_hidden_state[0, 0]
    ).abs().max() > 1e-9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention": "sparse"}, "attention"),
        ({"attention": ["dilated"]}, "list of 2"),
        ({"key_conv": 100}, "key_conv"),
        ({"far_bias": float("nan")}, "far_bias"),
        ({"far_bias": True}, "far_bias"),
        ({"far_bias": "far"}, "far_bias"),
        ({"hierarchical": {"blok": 3}}, "HierarchicalPattern"),
        ({"hierarchical": {"block": 0}}, "block"),
    ],
)
def test_refusals_name_the_field(change, words):
    with pytest.raises(ValueError, match=words):
        LongNetConfig(num_hidden_layers=2, **change)


def test_autocast_changes_neither_dtypes_nor_the_precision_of_pooling(monkeypatch):
    """On CUDA autocast norms give float32; queries, keys and values must still agree, and pooling must not be rounded."""
    from longnet.model import hierarchical_layer

    seen = []
    operation = hierarchical_layer.hierarchical_attention

    def spy(q, k, v, pattern, **options):
        seen.append((q.dtype, k.dtype, v.dtype, torch.is_autocast_enabled("cpu")))
        return operation(q, k, v, pattern, **options)

    monkeypatch.setattr(hierarchical_layer, "hierarchical_attention", spy)
    network = model(dtype=torch.float32)
    for layer in network.model.layers:
        for norm in (layer.attention.q_norm, layer.attention.k_norm):
            norm.register_forward_hook(lambda module, inputs, output: output.float())
    ids = tokens(1, 100)
    true = network(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(ids).logits
        logits.float().square().mean().backward()
        cache = LongNetCache(network.config, 1, dtype=torch.bfloat16)
        with torch.no_grad():
            streamed = network(ids, past_key_values=cache, use_cache=True).logits
    assert seen[2:] == [(torch.bfloat16,) * 3 + (False,)] * 2
    assert network.model.layers[0].attention.prior_query.grad.abs().sum() > 0
    assert (logits.float() - true).norm() < 0.1 * true.norm()
    assert (streamed.float() - true).norm() < 0.1 * true.norm()


@pytest.mark.parametrize("border", [0, 1])
def test_a_router_mix_that_an_optimizer_moved_over_the_border_can_come_back(border):
    """Outside [0, 1] it counts as the border; its gradient dies only where a descent would lead farther out."""
    network, ids = model(), tokens(1, 60)
    attention = network.model.layers[0].attention
    gradients, logits = [], []
    for overshoot in (0.0, 0.01):
        with torch.no_grad():
            attention.router_mix.fill_(border + overshoot * (2 * border - 1))
        attention.router_mix.grad = None
        logits.append(network(ids).logits)
        logits[-1].square().sum().backward()
        gradients.append(attention.router_mix.grad.clone())
    assert torch.equal(*logits)
    inside, outside = gradients
    inward = inside > 0 if border else inside < 0
    assert inward.any()
    assert not inward.all()
    torch.testing.assert_close(outside, inside * inward)


def test_the_router_mix_does_not_learn_unless_asked():
    """Its gradient would take the blocks' masses away from the router, which learns by them."""
    config = LongNetConfig(num_hidden_layers=1, attention="hierarchical", hierarchical=TREE)
    mix = LongNetModel(config).layers[0].attention.router_mix
    assert mix.tolist() == [1] * config.num_attention_heads
    assert not mix.requires_grad


@pytest.mark.parametrize("options", [{}, {"output_loading_info": True}])
@pytest.mark.parametrize(
    "load", [LongNetForCausalLM, LongNetModel, LongNetForSequenceClassification, AutoModelForCausalLM]
)
def test_a_loaded_router_mix_does_not_learn_either_and_still_may(load, options, tmp_path):
    """transformers makes every parameter that it loads learn."""
    network = model(dtype=torch.float32)
    network.save_pretrained(tmp_path)
    loaded = load.from_pretrained(tmp_path, **options)
    again = loaded[0] if options else loaded
    held = {name for name, weight in again.named_parameters() if not weight.requires_grad}
    assert held == {name for name, _ in again.named_parameters() if name.endswith("router_mix")}
    assert len(held) == 2
    mixes = [layer.attention.router_mix for layer in again.base_model.layers]
    assert all(
        torch.equal(mix, layer.attention.router_mix)
        for mix, layer in zip(mixes, network.model.layers, strict=True)
    )
    for mix in mixes:
        mix.requires_grad_()
    again.base_model(input_ids=tokens(1, 60)).last_hidden_state.sum().backward()
    assert all(mix.grad.abs().sum() > 0 for mix in mixes)
