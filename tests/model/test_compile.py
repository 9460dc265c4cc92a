"""torch.compile takes the models whole: no graph break, the same numbers."""

import pytest
import torch

from longnet import LongNetConfig, LongNetForCausalLM, LongNetForSequenceClassification, LongNetModel


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


def masked(*spans, tokens=50):
    """(B, N) of 0 and 1: row b is 1 within its span."""
    mask = torch.zeros(len(spans), tokens, dtype=torch.long)
    for row, (first, end) in enumerate(spans):
        mask[row, first:end] = 1
    return mask


PADDED = {
    "nothing": [(0, 50), (0, 50)],
    "right": [(0, 50), (0, 17)],
    "left": [(13, 50), (49, 50)],
    "both": [(9, 30), (0, 50)],
}


@pytest.mark.parametrize("padding", PADDED)
def test_training_with_an_attention_mask_in_one_graph(padding):
    torch.manual_seed(0)
    model = LongNetForCausalLM(config()).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = torch.randint(4, 260, (2, 50)), masked(*PADDED[padding])
    results = []
    for run in (model, compiled):
        model.zero_grad()
        output = run(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False, return_logits=True)
        output.loss.backward()
        results.append([output.logits[mask.bool()].detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_classifying_with_an_attention_mask_in_one_graph():
    torch.manual_seed(0)
    model = LongNetForSequenceClassification(config(bidirectional=True, num_labels=3)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = torch.randint(4, 260, (2, 50)), masked(*PADDED["both"])
    with torch.no_grad():
        expected, actual = (run(input_ids=ids, attention_mask=mask).logits for run in (model, compiled))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_a_compiled_graph_refuses_a_mask_with_a_hole():
    model = LongNetModel(config()).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = masked((0, 50), (0, 50))
    mask[1, 20] = 0
    with torch.no_grad(), pytest.raises(RuntimeError, match="got a hole"):
        compiled(input_ids=torch.randint(4, 260, (2, 50)), attention_mask=mask)
