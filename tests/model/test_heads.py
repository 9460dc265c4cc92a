"""The heads: exact under padding and in pieces, gradients included; Hugging Face's habits."""

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from longnet import (
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
)
from longnet.model.pieces import piece_tokens

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "segment_lengths": [8, 16], "dilation_rates": [1, 2], "bidirectional": True}  # fmt: skip


def build(cls, **overrides):
    torch.manual_seed(0)
    model = cls(LongNetConfig(**{**SMALL, **overrides})).double().eval()
    with torch.no_grad():  # the initial weights are small enough to hide mistakes
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model


def documents(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 260, (n,), generator=generator) for n in lengths]


def right_padded(rows):
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
    return ids, torch.tensor([len(row) for row in rows])


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_do_not_depend_on_batch_mates(side):
    model = build(LongNetForSequenceClassification, num_labels=3)
    rows = documents(37, 5, 64, 1)
    ids, lengths = right_padded(rows)
    column = torch.arange(ids.shape[1])
    if side == "left":
        ids = torch.stack([row.roll(ids.shape[1] - int(n)) for row, n in zip(ids, lengths, strict=True)])
        mask = column >= ids.shape[1] - lengths[:, None]
    else:
        mask = column < lengths[:, None]
    ids = ids.masked_fill(~mask, 259)  # whatever stands in the padding
    batch = model(input_ids=ids, attention_mask=mask.long(), return_pooling=True)
    for b, row in enumerate(rows):
        alone = model(input_ids=row[None], return_pooling=True)
        torch.testing.assert_close(batch.logits[b], alone.logits[0], rtol=0, atol=1e-11)
        torch.testing.assert_close(batch.pooling_weights[b][mask[b]], alone.pooling_weights[0])
        assert not batch.pooling_weights[b][~mask[b]].any()
    torch.testing.assert_close(batch.pooling_weights.sum(1), torch.ones(4).double())


def test_pooling_is_the_formula():
    model = build(LongNetForSequenceClassification, num_labels=3)
    (row,) = documents(21)
    hidden = model.model(input_ids=row[None]).last_hidden_state[0]
    heads = []
    for p, vector in enumerate(model.pooling.scorer.weight):
        weight = torch.softmax(hidden @ vector, 0)
        heads.append(weight @ hidden[:, 4 * p : 4 * p + 4])
    expected = torch.cat(heads) @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(input_ids=row[None]).logits[0], expected)


def test_hierarchical_layers_are_read_in_one_pass():
    assert piece_tokens(LongNetConfig(**{**SMALL, "attention": "hierarchical"})) is None


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("cls", [LongNetForSequenceClassification, LongNetForTokenClassification])
def test_pieces_equal_the_whole_with_gradients(cls, bidirectional):
    model = build(cls, num_labels=3, bidirectional=bidirectional)
    ids, lengths = right_padded(documents(70, 33, 16))
    results = []
    for piece in (None, 16, 32):
        model.piece = piece
        model.zero_grad()
        logits = model(input_ids=ids, lengths=lengths).logits
        if cls is LongNetForTokenClassification:
            logits = logits.masked_fill((torch.arange(70) >= lengths[:, None])[..., None], 0)
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for other in results[1:]:
        for expected, actual in zip(results[0], other, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_a_piece_never_cuts_a_segment():
    assert piece_tokens(LongNetConfig(**SMALL), 100) == 96
    assert (
        piece_tokens(LongNetConfig(**{**SMALL, "segment_lengths": [6, 10], "dilation_rates": [1, 2]}), 20)
        == 30
    )


def test_single_and_multi_label_losses():
    model = build(LongNetForSequenceClassification, num_labels=3)
    ids, lengths = right_padded(documents(9, 4))
    logits = model(input_ids=ids, lengths=lengths).logits
    single = model(input_ids=ids, lengths=lengths, labels=torch.tensor([2, -100])).loss
    torch.testing.assert_close(single, -torch.log_softmax(logits[0], 0)[2])
    wanted = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    multi = model(input_ids=ids, lengths=lengths, labels=wanted).loss
    expected = -(wanted * logits.sigmoid().log() + (1 - wanted) * (1 - logits.sigmoid()).log()).mean()
    torch.testing.assert_close(multi, expected)
    with pytest.raises(ValueError, match=r"expected labels of shape \(2,\)"):
        model(input_ids=ids, lengths=lengths, labels=torch.tensor([[0, 1, 1], [0, 1, 1]]))
    with pytest.raises(ValueError, match="at least one token"):
        model(input_ids=ids, lengths=torch.tensor([9, 0]))


def test_token_losses_ignore_padding():
    model = build(LongNetForTokenClassification, num_labels=3)
    ids, lengths = right_padded(documents(9, 4))
    labels = torch.randint(0, 3, ids.shape)
    labels[0, 3] = -100
    output = model(input_ids=ids, lengths=lengths, labels=labels)
    log = torch.log_softmax(output.logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    counted = [n for n in range(9) if n != 3]
    torch.testing.assert_close(output.loss, -torch.cat([log[0, counted], log[1, :4]]).mean())
    multi = build(LongNetForTokenClassification, num_labels=3, problem_type="multi_label_classification")
    wanted = torch.nn.functional.one_hot(labels.clamp(min=0), 3).double()
    wanted[0, 3] = -100
    output = multi(input_ids=ids, lengths=lengths, labels=wanted)
    odds = output.logits.sigmoid()
    log = wanted * odds.log() + (1 - wanted) * (1 - odds).log()
    torch.testing.assert_close(output.loss, -torch.cat([log[0, counted], log[1, :4]]).mean())


def test_masked_lm_scores_only_masked_tokens():
    model = build(LongNetForMaskedLM)
    ids, lengths = right_padded(documents(30, 12))
    labels = torch.full_like(ids, -100)
    labels[0, [3, 4]], labels[1, 2] = ids[0, [3, 4]], ids[1, 2]
    logits = model(input_ids=ids, lengths=lengths).logits
    expected = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])
    torch.testing.assert_close(model(input_ids=ids, lengths=lengths, labels=labels).loss, expected)
    nothing = model(input_ids=ids, labels=torch.full_like(ids, -100)).loss
    nothing.backward()
    assert float(nothing.detach()) == 0
    with pytest.raises(ValueError, match="bidirectional=True"):
        LongNetForMaskedLM(LongNetConfig(**{**SMALL, "bidirectional": False}))


@pytest.mark.parametrize(
    ("auto", "cls"),
    [
        (AutoModelForSequenceClassification, LongNetForSequenceClassification),
        (AutoModelForTokenClassification, LongNetForTokenClassification),
        (AutoModelForMaskedLM, LongNetForMaskedLM),
    ],
)
def test_auto_classes_and_a_causal_checkpoint(auto, cls, tmp_path):
    causal = build(LongNetForCausalLM, bidirectional=False).float()
    causal.save_pretrained(tmp_path / "causal")
    model = cls.from_pretrained(tmp_path / "causal", bidirectional=True)
    for name, parameter in causal.model.named_parameters():
        assert torch.equal(parameter, model.model.get_parameter(name))
    model.save_pretrained(tmp_path / "head")
    again = auto.from_pretrained(tmp_path / "head")
    assert type(again) is cls
    (row,) = documents(20)
    assert torch.equal(model.eval()(input_ids=row[None]).logits, again.eval()(input_ids=row[None]).logits)
