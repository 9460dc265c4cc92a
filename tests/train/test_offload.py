"""Inputs of recomputed layers in host memory: what is kept, in which order it comes back, and gradients equal bit for bit."""

import gc
import weakref

import pytest
import torch

from longnet import LongNetConfig, LongNetForCausalLM, LongNetForMaskedLM
from longnet.model.tiles import set_tile
from longnet.train import offload
from longnet.train.offload import HostInputs, offload_layer_inputs

LAYERS = 4
TREE = {"block": 4, "radix": 3, "window_blocks": 2, "top_k": 2, "beam": 3}


def network(kind=LongNetForCausalLM, **fields):
    torch.manual_seed(0)
    config = LongNetConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        segment_lengths=[8, 32, 128], dilation_rates=[1, 4, 16], initializer_range=0.3, **fields,
    )  # fmt: skip
    model = kind(config).train()
    model.gradient_checkpointing_enable()
    return model


def inputs_of(model):
    """The `HostInputs` of an offloaded model: one for all layers."""
    (found,) = {
        id(x): x for x in (layer._gradient_checkpointing_func for layer in model.model.layers)
    }.values()
    assert isinstance(found, HostInputs)
    return found


def data(batch=2, tokens=151, seed=1):
    return torch.randint(4, 260, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def gradients(model, ids, **arguments):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **arguments).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def equal(found, wanted):
    return len(found) == len(wanted) and all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def watched(monkeypatch):
    """(what happened to which input, in order), counted by the order in which inputs were kept."""
    events, number = [], {}
    send, fetch = HostInputs._send, HostInputs._fetch

    def sent(self, x):
        kept = send(self, x)
        number[kept] = len(number)
        events.append(("sent", number[kept], tuple(x.shape)))
        return kept

    def fetched(self, kept):
        events.append(("fetched", number[kept]))
        fetch(self, kept)

    monkeypatch.setattr(HostInputs, "_send", sent)
    monkeypatch.setattr(HostInputs, "_fetch", fetched)
    return events


KINDS = {
    "dilated": (LongNetForCausalLM, {}),
    "hierarchical": (LongNetForCausalLM, {"attention": "hierarchical", "hierarchical": TREE}),
    "masked spans": (LongNetForMaskedLM, {"bidirectional": True}),
}


@pytest.mark.parametrize("tile", [None, 50])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_without_it_bit_for_bit(kind, autocast, tile, monkeypatch):
    monkeypatch.setattr(offload, "PIECE", 4096)  # several pieces an input, the last one shorter
    model = network(KINDS[kind][0], **KINDS[kind][1])
    set_tile(model, tile)
    for arguments in ({}, {"lengths": torch.tensor([151, 90])}):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.gradient_checkpointing_enable()
            wanted = gradients(model, data(), **arguments)
            offload_layer_inputs(model)
            for _ in range(2):
                assert equal(gradients(model, data(), **arguments), wanted)


def test_one_tensor_a_layer_goes_and_comes_back_a_layer_ahead(monkeypatch):
    model = network()
    set_tile(model, 50)  # the tiles' own inputs stay where they are
    offload_layer_inputs(model)
    events = watched(monkeypatch)
    gradients(model, data(), lengths=torch.tensor([151, 90]))  # as do the lengths
    # The last one is still there; while it is in use the one before it is fetched, and so on, once each.
    shape = (2, 151, 32)
    assert events == [("sent", i, shape) for i in range(LAYERS)] + [("fetched", i) for i in (2, 1, 0)]
    inputs = inputs_of(model)
    assert inputs.leaving is inputs.coming is None


def test_what_is_kept_is_on_the_host_alone_in_pieces_and_gone_after_the_backward_pass(monkeypatch):
    monkeypatch.setattr(offload, "PIECE", 10000)
    model = network()
    offload_layer_inputs(model)
    kept, send = [], HostInputs._send

    def sent(self, x):
        kept.append(weakref.ref(made := send(self, x)))
        return made

    monkeypatch.setattr(HostInputs, "_send", sent)
    inputs = inputs_of(model)
    loss = model(input_ids=data(), labels=data()).loss
    pieces = [x().pieces for x in kept]
    size = 2 * 151 * 32 * 4
    assert [sum(piece.nbytes for piece in each) for each in pieces] == [size] * LAYERS
    assert [piece.nbytes for piece in pieces[0]] == [10000] * 3 + [size - 30000]
    del pieces
    # On the device there is the last one only.
    assert inputs.leaving.kept is kept[-1]()
    loss.backward()
    del loss
    gc.collect()
    assert not any(x() for x in kept)
    del kept[:]
    model(input_ids=data(), labels=data()).loss.detach()  # no backward pass: the last one holds no graph
    gc.collect()
    assert [x() is not None for x in kept] == [False] * (LAYERS - 1) + [True]


def test_the_device_holds_two_at_most(monkeypatch):
    model = network()
    offload_layer_inputs(model)
    inputs, alive, most = inputs_of(model), weakref.WeakSet(), []
    fetch, unpack = HostInputs._fetch, HostInputs._unpack

    def fetched(self, kept):
        fetch(self, kept)
        alive.add(self.coming.x)

    def unpacked(self, kept):
        found = unpack(self, kept)
        if not isinstance(kept, torch.Tensor):  # torch 2.11 saves an empty one beside every input
            most.append(len(alive))
        return found

    monkeypatch.setattr(HostInputs, "_fetch", fetched)
    # Bound when the hooks are made, at every call.
    monkeypatch.setattr(HostInputs, "_unpack", unpacked)
    gradients(model, data())
    assert len(most) == LAYERS
    assert max(most) == 2
    assert not alive
    assert inputs.coming is None


def test_nothing_is_used_or_freed_before_its_copy_has_ended(monkeypatch):
    """Copies are done as late as a stream may do them: when the computation waits for them."""
    pending, move = [], HostInputs._move

    def late(self, kept, x, targets, sources):
        assert not pending  # what is copied and what was copied before are not free yet
        if targets is not kept.pieces:
            x.fill_(torch.nan)
        moving = move(self, kept, x, (), ())._replace(done=len(pending))
        pending.append(lambda: move(self, kept, x, targets, sources))
        return moving

    def wait(self, moving):
        while pending:
            pending.pop(0)()

    model = network()
    wanted = gradients(model, data())
    offload_layer_inputs(model)
    monkeypatch.setattr(HostInputs, "_move", late)
    monkeypatch.setattr(HostInputs, "_wait", wait)
    assert equal(gradients(model, data()), wanted)
    assert not pending


def test_a_pass_that_ended_early_does_not_disturb_the_next():
    model = network()
    wanted = gradients(model, data())
    offload_layer_inputs(model)
    model(input_ids=data(seed=2), labels=data(seed=2))  # no backward pass
    assert equal(gradients(model, data()), wanted)

    def stop(gradient):
        raise RuntimeError("enough")

    model.zero_grad()
    loss = model(input_ids=data(seed=3), labels=data(seed=3)).loss
    handle = model.model.layers[1].attention.qkv_proj.weight.register_hook(stop)
    with pytest.raises(RuntimeError, match="enough"):
        loss.backward()
    handle.remove()
    assert inputs_of(model).coming is not None  # that of layer 0 was under way
    assert equal(gradients(model, data()), wanted)


def test_two_forwards_before_a_backward_and_a_graph_that_is_used_twice():
    def steps(model):
        model.zero_grad()
        losses = [model(input_ids=data(seed=s), labels=data(seed=s)).loss for s in (1, 2)]
        losses[0].backward()  # not in the order of the stack
        (3 * losses[1]).backward(retain_graph=True)
        losses[1].backward()
        return [p.grad.clone() for p in model.parameters()]

    model = network()
    wanted = steps(model)
    offload_layer_inputs(model)
    assert equal(steps(model), wanted)


def test_without_gradients_nothing_is_kept(monkeypatch):
    model = network()
    offload_layer_inputs(model)
    events = watched(monkeypatch)
    with torch.no_grad():
        model(input_ids=data())
    model.eval()(input_ids=data())
    assert events == []


def test_layers_that_are_not_recomputed_are_refused():
    model = network()
    model.gradient_checkpointing_disable()
    with pytest.raises(ValueError, match="gradient_checkpointing_enable"):
        offload_layer_inputs(model)
