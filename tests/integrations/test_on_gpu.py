"""The same models on a GPU in half precision, judged by their fp32 selves on the CPU."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longnet import DilatedPattern, HierarchicalPattern
from longnet.integrations import StreamingCache, patch
from longnet.integrations.gigapath import GigaPathSlideEncoder
from longnet.integrations.torchscale import TorchscaleConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def llama(pattern):
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=2,
        vocab_size=97,
        pad_token_id=0,
        eos_token_id=None,
        initializer_range=0.08,
    )
    return patch(LlamaForCausalLM(config).eval(), pattern)


def distance(actual, expected):
    return float((actual.float().cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "pattern",
    [
        DilatedPattern((64, 256, 1024), (1, 2, 4)),
        HierarchicalPattern(block=16, radix=4, window_blocks=2, top_k=99, beam=99),
    ],
    ids=["dilated", "hierarchical"],
)
def test_padded_batch_equals_cpu(pattern):
    ids, mask = torch.randint(3, 97, (2, 700)), torch.ones(2, 700, dtype=torch.long)
    mask[0, :133] = 0
    model = llama(pattern)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
        peer = model.to(torch.bfloat16)(ids, attention_mask=mask).logits[mask.bool()]
        actual = model.cuda()(ids.cuda(), attention_mask=mask.cuda()).logits[mask.bool().cuda()]
    # What bf16 costs the same model on the CPU: 2.4 % with dilated, 4.2 % with hierarchical attention.
    assert distance(actual, expected) <= 2 * distance(peer, expected)


def test_streaming_equals_parallel():
    model = llama(DilatedPattern((64, 256, 1024), (1, 2, 4))).cuda()
    ids = torch.randint(3, 97, (2, 900), device="cuda")
    cache, parts = StreamingCache(model.config), []
    with torch.no_grad():
        for part in ids.split((500, 1, 300, 99), 1):
            parts.append(model(part, past_key_values=cache).logits)
        expected = model(ids).logits.cpu()
    assert distance(torch.cat(parts, 1), expected) < 1e-3


def test_trains():
    model = llama(DilatedPattern((64, 256, 1024), (1, 2, 4))).to("cuda", torch.bfloat16).train()
    model.gradient_checkpointing_enable()
    ids = torch.randint(3, 97, (2, 700), device="cuda")
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_slide_encoder_equals_cpu(dtype):
    config = TorchscaleConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=2,
        num_attention_heads=16,
        segment_lengths=(256, 1448, 8192),
        dilation_rates=(1, 2, 16),
        causal=False,
    )
    torch.manual_seed(0)
    model = GigaPathSlideEncoder(config, in_channels=64, global_pool=True).eval()
    tiles, coords = torch.randn(2, 2001, 64), torch.randint(0, 1000, (2, 2001, 2)).float() * 256
    lengths = torch.tensor([2001, 1234])
    with torch.no_grad():
        expected = model(tiles, coords, lengths)
        actual = model.to("cuda", dtype)(tiles.to("cuda", dtype), coords.cuda(), lengths.cuda())
    assert distance(actual, expected) < 3e-2
