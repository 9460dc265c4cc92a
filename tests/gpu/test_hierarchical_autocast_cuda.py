"""A hierarchical model under autocast on a CUDA device: the kernels run, and the result is that of the other path."""

import pytest
import torch

from longnet import LongNetConfig, LongNetForCausalLM
from longnet.attention import hierarchical

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
TREE = {"block": 16, "radix": 4, "window_blocks": 2, "top_k": 4, "beam": 8}


def test_training_under_autocast_takes_the_kernels(monkeypatch):
    torch.manual_seed(0)
    config = LongNetConfig.preset("tiny", attention="hierarchical", hierarchical=TREE, initializer_range=0.1)
    model = LongNetForCausalLM(config).cuda()
    ids = torch.randint(4, 260, (2, 1000), device="cuda")
    taken = []
    real = hierarchical.unsupported
    monkeypatch.setattr(hierarchical, "unsupported", lambda *x: taken.append(real(*x)) or taken[-1])
    losses, gradients = {}, {}
    for impl in (None, "torch"):
        for layer in model.model.layers:
            layer.attention.impl = impl
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        losses[impl] = loss.item()
        gradients[impl] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        if impl is None:
            assert taken
            assert set(taken) == {None}
    assert losses[None] == pytest.approx(losses["torch"], rel=5e-3)
    # Near ties are opened otherwise now and then; the direction of the gradient is the same.
    assert torch.cosine_similarity(gradients[None], gradients["torch"], dim=0) > 0.98
