"""Chunk by chunk, the gradients are those of the whole sequence: to the last digits of fp64, for any chunk."""

import pytest
import torch

from longnet import LongNetConfig, LongNetForCausalLM
from longnet.plan import Job, best_chunk, state_bytes
from longnet.train.chunked import ChunkStore, chunked_backward

CASES = {
    "geometric": ([8, 32, 128], [1, 4, 16]),
    "ragged": ([5, 13, 60, 300], [1, 3, 7, 12]),
    "one branch": ([16], [1]),
}


def model(name="geometric", heads=4, key_heads=2, offsets="cyclic", dtype=torch.float64):
    torch.manual_seed(0)
    lengths, rates = CASES[name]
    config = LongNetConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=key_heads,
        segment_lengths=lengths, dilation_rates=rates, head_offsets=offsets, initializer_range=0.3,
    )  # fmt: skip
    return LongNetForCausalLM(config).to(dtype).train()


def data(batch, tokens):
    ids = torch.randint(4, 260, (batch, tokens + 1), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    targets[:, 3] = -100
    return ids[:, :-1], targets


def whole(network, ids, targets):
    losses = network.token_losses(ids, targets=targets)
    loss = losses.sum() / (targets != -100).sum()
    return loss.detach(), torch.autograd.grad(loss, [weight for _, weight in weights(network)])


def weights(network):
    """Those that learn; a convolution of width 0 has an empty one, without a gradient."""
    return [(name, w) for name, w in network.named_parameters() if w.numel() and w.requires_grad]


def compare(network, ids, targets, chunk, atol):
    loss, wanted = whole(network, ids, targets)
    found = chunked_backward(network, ids, targets, chunk)
    torch.testing.assert_close(found, loss, atol=atol, rtol=0)
    for (name, parameter), gradient in zip(weights(network), wanted, strict=True):
        assert (parameter.grad - gradient).abs().max() <= atol * max(1, gradient.abs().max()), name
    network.zero_grad()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [1, 7, 16, 32, 50, 64, 151, 200])
def test_gradients_equal_one_backward_pass(name, chunk):
    compare(model(name), *data(2, 151 if chunk > 1 else 67), chunk, 1e-12)


@pytest.mark.parametrize(
    ("heads", "key_heads", "offsets"), [(4, 4, "cyclic"), (4, 1, "block"), (8, 2, "cyclic"), (2, 2, "block")]
)
def test_groups_and_offset_rules(heads, key_heads, offsets):
    for name in ("geometric", "ragged"):
        compare(model(name, heads, key_heads, offsets), *data(1, 149), 24, 1e-12)


def test_single_precision_and_layer_checkpoints():
    network = model(dtype=torch.float32)
    compare(network, *data(1, 140), 32, 2e-5)
    network.gradient_checkpointing_enable()
    compare(network, *data(1, 140), 32, 2e-5)


def test_memory_keeps_only_what_later_chunks_can_see():
    network = model()
    pattern = network.config.pattern()
    store = ChunkStore(network.config, 1, 4096, 128, "cpu", torch.float64)
    assert store.nbytes() == 0  # every segment ends where a chunk ends
    store = ChunkStore(network.config, 1, 4096, 32, "cpu", torch.float64)
    # Only the branch (128, 16) crosses: 8 rows a segment, 2 layers, keys and values of 8 bytes.
    slots = len(pattern.slots(16, 4, 2))
    assert store.nbytes() == 2 * 2 * 8 * 8 * slots * 4096 // 16


def test_gradients_of_rows_are_kept_for_one_segment_whatever_the_length():
    sizes = []
    for tokens in (1000, 16000):
        store = ChunkStore(model().config, 1, tokens, 32, "cpu", torch.float64)
        kept = store.nbytes()
        store.begin(0, reverse=True)
        sizes.append((kept, store.nbytes() - kept))
    assert sizes[1][0] > 15 * sizes[0][0]
    assert sizes[1][1] == sizes[0][1] > 0


def tree_model(attention, key_conv=4, dtype=torch.float64, retention=(24, 12)):
    torch.manual_seed(0)
    tree = {
        "block": 4,
        "radix": 3,
        "window_blocks": 2,
        "guard": 1,
        "top_k": 2,
        "beam": 3,
        "retention": retention,
    }
    config = LongNetConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        attention=attention, hierarchical=tree, key_conv=key_conv, segment_lengths=[8, 32], dilation_rates=[1, 4],
        initializer_range=0.3,
    )  # fmt: skip
    network = LongNetForCausalLM(config).to(dtype).train()
    with torch.no_grad():  # parameters at their neutral start would hide mistakes
        for name, weight in network.named_parameters():
            if name.endswith(("prior_query", "level_bias", "key_conv")):
                weight.normal_(0, 0.3)
            if name.endswith("router_mix"):
                weight.requires_grad_().uniform_(0.2, 0.9)
    return network


# Shorter than the convolution, within a block, whole blocks, longer than what is kept, the whole sequence.
@pytest.mark.parametrize("chunk", [2, 7, 24, 50, 200])
@pytest.mark.parametrize("attention", ["hierarchical", ["hierarchical", "dilated"]])
def test_gradients_of_hierarchical_layers_equal_one_backward_pass(attention, chunk):
    compare(tree_model(attention), *data(2, 131 if chunk > 2 else 83), chunk, 1e-12)


def test_hierarchical_layers_whose_router_mix_does_not_learn():
    network = tree_model("hierarchical")
    mixes = [layer.attention.router_mix.requires_grad_(False) for layer in network.model.layers]
    compare(network, *data(1, 70), 16, 1e-12)
    assert all(mix.grad is None for mix in mixes)


def test_hierarchical_layers_without_convolution_recomputed_and_in_single_precision():
    for width in (0, 1):
        compare(tree_model("hierarchical", width), *data(1, 70), 16, 1e-12)
    network = tree_model("hierarchical", dtype=torch.float32)
    compare(network, *data(1, 90), 31, 2e-5)
    network.gradient_checkpointing_enable()
    compare(network, *data(1, 90), 31, 2e-5)
    compare(network.double(), *data(1, 90), 31, 1e-12)


def test_under_autocast_the_error_is_that_of_the_whole_pass():
    exact, rounded = (
        tree_model("hierarchical", dtype=torch.float32),
        tree_model("hierarchical", dtype=torch.float32),
    )
    batch = data(1, 110)
    _, wanted = whole(exact, *batch)
    with torch.autocast("cpu", torch.bfloat16):
        _, ordinary = whole(rounded, *batch)
        chunked_backward(rounded, *batch, 16)
    found = [weight.grad for _, weight in weights(rounded)]

    def distance(gradients):
        return sum((x - y).double().square().sum() for x, y in zip(gradients, wanted, strict=True)).sqrt()

    assert 0 < distance(found) <= 1.5 * distance(ordinary)


def test_what_earlier_chunks_handed_on_gets_a_gradient():
    """The last chunk's loss alone: without the states' gradients, the first chunk's tokens would not matter."""
    network, (ids, targets) = tree_model("hierarchical"), data(1, 120)
    targets[:, :100] = -100
    early = set(ids[0, :50].tolist()) - set(ids[0, 50:].tolist()) - set(targets[0, 100:].tolist())
    network.lm_head.weight = torch.nn.Parameter(
        network.lm_head.weight.detach().clone()
    )  # untied: inputs alone
    chunked_backward(network, ids, targets, 10)
    assert early
    embedded = network.get_input_embeddings().weight
    assert all(embedded.grad[token].abs().max() > 0 for token in early)


def test_states_at_the_borders_take_the_bytes_that_the_chunk_is_chosen_by(monkeypatch):
    network, sizes = tree_model("hierarchical", dtype=torch.float32), {}
    closing = ChunkStore.close

    def close(store, end):
        before = store.nbytes()
        closing(store, end)
        sizes[end] = store.nbytes() - before

    monkeypatch.setattr(ChunkStore, "close", close)
    chunked_backward(network, *data(1, 601), 100)
    tail = 3 * 2 * 8 * 4  # the raw keys of the convolution: 3 of 2 heads of width 8
    for end, size in sizes.items():
        state = state_bytes(network.config.hierarchical_pattern(), network.config, end, 4)
        assert size == 2 * (state + tail)
    assert list(sizes) == [100, 200, 300, 400, 500, 600]
    # Tokens and each level are bounded: six times the text adds a few nodes of coarse levels.
    assert sizes[600] < 1.5 * sizes[200]


def test_the_chosen_chunk_counts_hierarchical_states():
    config = LongNetConfig.preset("base", attention="hierarchical", hierarchical={"retention": [8192, 128]})
    chunks = [best_chunk(Job(config=config, tokens=n)) for n in (10**6, 10**8, 10**9)]
    assert chunks == sorted(chunks)
    assert chunks[0] < chunks[2] < 10**8


def test_refusals():
    network = model()
    with pytest.raises(ValueError, match="alike"):
        chunked_backward(
            network, torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64), 2
        )
    everything = tree_model("hierarchical", retention=None)
    with pytest.raises(ValueError, match="retention"):
        chunked_backward(everything, *data(1, 20), 5)
    config = LongNetConfig(num_hidden_layers=1, bidirectional=True)
    with pytest.raises(ValueError, match="causal"):
        ChunkStore(config, 1, 10, 2, "cpu", torch.float32)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("name", "chunk"), [("geometric", 7), ("geometric", 50), ("ragged", 24), ("ragged", 200)]
)
def test_rows_in_host_memory_give_the_gradients_of_one_backward_pass(name, chunk, recompute):
    network = model(name)
    if recompute:
        network.gradient_checkpointing_enable()
    ids, targets = data(2, 151)
    loss, wanted = whole(network, ids, targets)
    found = chunked_backward(network, ids, targets, chunk, offload=True)
    torch.testing.assert_close(found, loss, atol=1e-12, rtol=0)
    for (parameter_name, parameter), gradient in zip(weights(network), wanted, strict=True):
        error = (parameter.grad - gradient).abs().max()
        assert error <= 1e-12 * max(1, gradient.abs().max()), parameter_name


def test_rows_in_host_memory_are_copied_a_layer_ahead_and_never_stand_in_two_places():
    """What is taken is a copy in one of two sets; what is not given back does not change what is kept."""
    config = model().config
    store = ChunkStore(config, 1, 151, 7, "cpu", torch.float64, offload=True)
    rows, asked = store.rows, []
    fetch = rows._fetch

    def watched(layer, tokens):
        asked.append((layer, tokens))
        fetch(layer, tokens)

    rows._fetch = watched
    first = rows.take(0, (14, 20), 1)
    assert asked == [(0, (14, 20)), (1, (14, 20))]
    second = rows.take(1, (14, 20), 2)
    assert len(asked) == 2  # layer 1 was under way, and there is no layer 2
    addresses = [
        {x.data_ptr() for buffers in taken for pair in buffers for x in pair if x.numel()}
        for taken in (first, second)
    ]
    assert not addresses[0] & addresses[1]
    second[1][2][0].fill_(1.0)
    assert not rows.segments(1, 20)[2][0].any()
    rows.give(1, 20, second[1])
    assert rows.segments(1, 20)[2][0].all()
    assert rows.take(1, (20,), 0)[0][2][0].all()


def test_rows_in_host_memory_are_for_dilated_layers():
    with pytest.raises(ValueError, match="offload"):
        chunked_backward(tree_model(["hierarchical", "dilated"]), *data(1, 20), 5, offload=True)
