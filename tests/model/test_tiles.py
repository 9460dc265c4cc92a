"""Tiles: gradients of the whole, hidden states of the SwiGLU never whole, nothing done where it does not pay."""

import pytest
import torch

from longnet.model import LongNetConfig, LongNetForCausalLM
from longnet.model.tiles import by_tiles, set_tile


def make(**overrides):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    pattern = {"segment_lengths": (8, 16, 32), "dilation_rates": (1, 2, 4)}
    config = LongNetConfig.preset("tiny", **{**pattern, **size, **overrides})
    config.initializer_range = 0.2
    return LongNetForCausalLM(config).double().train()


@pytest.mark.parametrize("tile", [1, 7, 41, 100])
@pytest.mark.parametrize("attention", ["dilated", "hierarchical"])
@pytest.mark.parametrize("layers_too", [False, True])
def test_gradients_are_those_of_the_whole(tile, attention, layers_too):
    plain, tiled = make(attention=attention), make(attention=attention)
    set_tile(tiled, tile)
    if layers_too:
        tiled.gradient_checkpointing_enable()
    ids = torch.randint(4, 260, (2, 41), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([41, 23])
    losses = [
        model(input_ids=ids, labels=ids, lengths=lengths, use_cache=False).loss for model in (plain, tiled)
    ]
    for loss in losses:
        loss.backward()
    assert abs(losses[0] - losses[1]) < 1e-12
    for (name, x), y in zip(plain.named_parameters(), tiled.parameters(), strict=True):
        assert (x.grad is None) == (y.grad is None), (
            name
        )  # None: weights of levels that so short a text does not have
        if x.grad is not None:
            error = (x.grad - y.grad).abs().max() / x.grad.abs().max().clamp(min=1)
            assert error < 1e-12, name


@pytest.mark.parametrize("backward", [False, True])
def test_the_hidden_states_of_the_mlp_are_never_whole(backward):
    model = make()
    model.gradient_checkpointing_enable()
    set_tile(model, 8)
    seen = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    ids = torch.randint(4, 260, (1, 41))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    forward = len(seen)
    if backward:
        loss.backward()
        assert len(seen) > forward  # recomputed
    assert max(seen) == 8


def test_what_a_layer_keeps_for_the_backward_pass_has_no_hidden_state():
    """Between forward and backward of one layer, saved tensors are no wider than the residual stream times three (q, k, v)."""
    model, kept = make(num_hidden_layers=1), []
    set_tile(model, 8)
    ids = torch.randint(4, 260, (1, 40))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(input_ids=ids, labels=ids, use_cache=False)
    assert kept
    width = model.config.intermediate_size
    weights = {p.data_ptr() for p in model.parameters()}
    assert not [x.shape for x in kept if x.shape[-1:] == (width,) and x.data_ptr() not in weights]


def test_without_gradients_it_is_one_call():
    calls = []
    x = torch.ones(1, 10, 2)

    def count(part):
        calls.append(part.shape[1])
        return part

    with torch.no_grad():
        by_tiles(count, 3, x)
    by_tiles(count, None, x)
    by_tiles(count, 10, x)
    assert calls == [10, 10, 10]
    by_tiles(count, 3, x)
    assert calls[3:] == [3, 3, 3, 1]


def test_a_tile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="tile_tokens: expected 1 or more"):
        set_tile(make(), 0)
