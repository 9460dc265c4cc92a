"""torch.compile takes the models whole: no graph break, the same numbers."""

import pytest
import torch

from longnet import LongNetConfig, LongNetForCausalLM, LongNetModel


def config(**overrides):
    return LongNetConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        segment_lengths=[8, 30], dilation_rates=[1, 6], **overrides,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_training_in_one_graph(backend):
    torch.manual_seed(0)
    model = LongNetForCausalLM(config()).train()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ids = torch.randint(4, 260, (2, 50))
    results = []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_inference_in_one_graph(causal):
    torch.manual_seed(0)
    model = LongNetModel(config(bidirectional=not causal)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (50, 77):
        ids = torch.randint(4, 260, (1, tokens))
        lengths = torch.tensor([tokens - 9])
        expected = model(input_ids=ids, lengths=lengths).last_hidden_state
        torch.testing.assert_close(
            compiled(input_ids=ids, lengths=lengths).last_hidden_state, expected, atol=1e-5, rtol=1e-4
        )
