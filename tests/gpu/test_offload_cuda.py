"""Rows and layer inputs in pinned host memory, copied on a stream of their own: the gradients are those without."""

import gc

import pytest
import torch

from longnet import DilatedPattern, LongNetConfig, LongNetForCausalLM
from longnet.model.tiles import set_tile
from longnet.train.chunked import ChunkStore, chunked_backward
from longnet.train.offload import offload_layer_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def network(layers=5):
    torch.manual_seed(0)
    pattern = DilatedPattern.geometric(32768, window=512, ratio=4)
    config = LongNetConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=layers, num_attention_heads=4,
        segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates,
    )  # fmt: skip
    return LongNetForCausalLM(config).cuda().train()


def gradients(model, ids, offload):
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        loss = chunked_backward(model, ids[:, :-1], ids[:, 1:], 3000, offload=offload)
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients(recompute):
    model = network()
    if recompute:
        model.gradient_checkpointing_enable()
    ids = torch.randint(4, 260, (2, 32769), generator=torch.Generator().manual_seed(0)).cuda()
    loss, wanted = gradients(model, ids, False)
    _, again = gradients(model, ids, False)
    # Two runs on the device differ by the order of atomic sums; a copy that came too late would be far off.
    budget = 2 * (again - wanted).norm() + 1e-3 * wanted.norm()
    for _ in range(5):
        found_loss, found = gradients(model, ids, True)
        torch.testing.assert_close(found_loss, loss)
        assert (found - wanted).norm() <= budget


def test_the_device_holds_two_layers_and_the_host_is_pinned():
    model = network()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    store = ChunkStore(model.config, 1, 2**22, 4096, "cuda", torch.bfloat16, offload=True)
    assert torch.cuda.memory_allocated() - before < store.nbytes() / 10
    assert all(x.is_pinned() for pair in store.rows.layers[0] for x in pair if x.numel())


LAYERS, TOKENS = 10, 65536


def step(model, ids):
    """(loss and all gradients of a whole window, peak bytes of the device beyond those before)."""
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model.token_losses(ids[:, :-1], targets=ids[:, 1:]).mean()
    loss.backward()
    found = torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())])
    return found, torch.cuda.max_memory_allocated() - before


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("low", [False, True])
def test_layer_inputs_give_the_same_bits_in_less_memory(deterministic, low):
    model = network(LAYERS)
    if low:  # the residual stream in 16 bits
        model.model.embed_tokens.register_forward_hook(lambda module, inputs, out: out.bfloat16())
    model.gradient_checkpointing_enable()
    set_tile(model, 8192)
    draw = torch.Generator().manual_seed(0)
    windows = [torch.randint(4, 260, (2, TOKENS + 1), generator=draw).cuda() for _ in range(3)]
    step(model, windows[0])  # makes kernels and their workspaces
    wanted = [step(model, ids) for ids in windows]
    assert torch.equal(step(model, windows[0])[0], wanted[0][0])  # else no copy could be judged by bits
    offload_layer_inputs(model)
    one = 2 * TOKENS * 256 * (2 if low else 4)
    for ids, (expected, whole) in zip(windows * 2, wanted * 2, strict=True):
        found, peak = step(model, ids)
        assert torch.equal(found, expected)
        # One is in use and one under way.
        assert whole - peak == pytest.approx((LAYERS - 2) * one, rel=0.1)


def test_layer_inputs_lie_in_pinned_memory_in_pieces_that_waste_none():
    model = network(3)
    model.gradient_checkpointing_enable()
    offload_layer_inputs(model)
    inputs = model.model.layers[0]._gradient_checkpointing_func
    ids = torch.randint(4, 260, (1, 2**17 + 2**15)).cuda()  # 160 MiB an input: 256 in one piece
    loss = model.token_losses(ids, targets=ids).mean()
    pieces = inputs.last().pieces
    assert [x.nbytes >> 20 for x in pieces] == [64, 64, 32]
    assert all(x.is_pinned() for x in pieces)
    torch.cuda.synchronize()
    assert torch.equal(torch.cat(pieces).cuda().view(inputs.leaving.x.shape), inputs.leaving.x)
    loss.backward()
    del loss, pieces
    gc.collect()
    assert inputs.last() is None
