"""Rows in pinned host memory, copied on a stream of their own: the gradients are those of rows on the device."""

import pytest
import torch

from longnet import DilatedPattern, LongNetConfig, LongNetForCausalLM
from longnet.train.chunked import ChunkStore, chunked_backward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def network():
    torch.manual_seed(0)
    pattern = DilatedPattern.geometric(32768, window=512, ratio=4)
    config = LongNetConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=5, num_attention_heads=4,
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
