"""The knowledge head against its formulas written out, and documents read in pieces against documents read whole."""

import math

import pytest
import torch

from longnet.model import LongNetConfig
from longnet.model import relations as room
from longnet.model.relations import (
    EntityInputs,
    LongNetForKnowledgeExtraction,
    adaptive_threshold_loss,
    antecedent_loss,
    segment_logsumexp,
)

torch.manual_seed(0)


def model_of(relations=("r", "s"), **fields):
    torch.manual_seed(0)
    fields = {"segment_lengths": [16, 64], "dilation_rates": [1, 4], **fields}
    config = LongNetConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_labels=4,
                           bidirectional=True, relation_labels=list(relations), problem_type="multi_label_classification",
                           **fields)  # fmt: skip
    return LongNetForKnowledgeExtraction(config).double().eval()


def test_segment_logsumexp_equals_its_definition():
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    segment = torch.tensor([2, 0, 2, 2, 0, 4, 4])
    out = segment_logsumexp(x, segment, 6)
    for s in range(6):
        rows = x[segment == s]
        expected = rows.logsumexp(0) if len(rows) else torch.full((3,), -math.inf).double()
        assert torch.allclose(out[s], expected)
    (gradient,) = torch.autograd.grad(out[[0, 2, 4]].sum(), x)
    assert torch.allclose(gradient.view(7, 3).sum(0), torch.full((3,), 3.0).double())


def test_antecedent_loss_equals_its_definition():
    scores = torch.randn(5, dtype=torch.float64, requires_grad=True)
    anaphor, right = torch.tensor([1, 2, 2, 3, 3]), torch.tensor([0, 3, 4])
    counted = torch.tensor([True, True, True, False])
    s = scores.tolist()
    expected = [
        -math.log(1 / 1),  # mention 0 has no candidate: opening an entity is all there is
        -math.log(math.exp(s[0]) / (1 + math.exp(s[0]))),
        -math.log(1 / (1 + math.exp(s[1]) + math.exp(s[2]))),  # mention 3 is not counted
    ]
    loss = antecedent_loss(scores, anaphor, right, counted)
    assert loss.item() == pytest.approx(sum(expected))
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.isfinite().all()
    assert gradient[3:].tolist() == [0, 0]
    both = antecedent_loss(scores, anaphor, right, torch.tensor([False, False, False, True]))
    total = 1 + math.exp(s[3]) + math.exp(s[4])
    assert both.item() == pytest.approx(-math.log((math.exp(s[3]) + math.exp(s[4])) / total))


def test_adaptive_threshold_loss_equals_its_definition():
    logits = torch.randn(3, 4, dtype=torch.float64)
    wanted = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    total = 0.0
    for row, own in zip(logits.exp().tolist(), wanted.tolist(), strict=True):
        inside = [r for r in (1, 2, 3) if own[r]]
        outside = [r for r in (1, 2, 3) if not own[r]]
        for r in inside:
            total -= math.log(row[r] / (row[0] + sum(row[i] for i in inside)))
        total -= math.log(row[0] / (row[0] + sum(row[i] for i in outside)))
    assert adaptive_threshold_loss(logits, wanted).item() == pytest.approx(total)


def graph_of(model, ids, lengths, positions):
    """Everything that comes of a batch, and one number that depends on all of it."""
    reading = model.read(ids, lengths, positions)
    sizes = [ids.shape[1]] * len(ids) if lengths is None else lengths.tolist()
    logits = torch.cat([row[:n] for row, n in zip(reading.logits, sizes, strict=True)])
    return [logits, *reading.states, *reading.memory], reading


@pytest.mark.parametrize("segments", [([16, 64], [1, 4]), ([40], [1])], ids=["aligned", "cut blocks"])
def test_pieces_equal_the_whole_with_gradients(segments):
    model = model_of(segment_lengths=segments[0], dilation_rates=segments[1])
    ids = torch.randint(4, 260, (2, 500))
    positions = [torch.tensor([0, 63, 64, 199, 499]), torch.tensor([5, 128, 300])]
    lengths = torch.tensor([500, 301])
    results = []
    for piece in (None, 64 if segments[0] == [16, 64] else 40):
        model.piece, model.training = piece, True
        outputs, _ = graph_of(model, ids, lengths, positions)
        model.zero_grad()
        sum((o**2).sum() for o in outputs).backward()
        results.append((outputs, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    for whole, pieces in zip(results[0][0], results[1][0], strict=True):
        assert torch.allclose(
            whole, pieces.to(whole.dtype), atol=1e-6 if whole.dtype == torch.float32 else 1e-11
        )
    assert len(results[0][1]) == len(results[1][1]) > 5
    for whole, pieces in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(whole, pieces, rtol=1e-5, atol=1e-6)


def test_a_document_does_not_depend_on_its_batch():
    model = model_of()
    ids = torch.randint(4, 260, (2, 300))
    wanted = torch.tensor([3, 77])
    alone, _ = graph_of(model, ids[1:, :100], None, [wanted])
    _, reading = graph_of(model, ids, torch.tensor([300, 100]), [wanted, wanted])
    assert torch.allclose(alone[1], reading.states[1], atol=1e-11)
    assert torch.allclose(alone[2], reading.memory[1], atol=1e-6)


def test_memory_is_a_weighted_mean_of_at_most_so_many_blocks(monkeypatch):
    monkeypatch.setattr(room, "MEMORY", 3)
    model = model_of()
    ids = torch.randint(4, 260, (1, 64 * 9 + 1))
    reading = model.read(ids, positions=[torch.arange(ids.shape[1])])
    assert (reading.block[0], len(reading.memory[0])) == (256, 3)
    hidden = reading.states[0]
    gate = torch.sigmoid(model.knowledge.gate(hidden))
    for b in range(3):
        part = slice(256 * b, 256 * (b + 1))
        expected = (gate[part] * hidden[part]).sum(0) / gate[part].sum()
        assert torch.allclose(reading.memory[0][b].double(), expected, atol=1e-6)


def test_states_where_a_tag_is_likely_enough():
    model = model_of()
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    ids = torch.randint(4, 260, (2, 150))
    reading = model.read(ids, torch.tensor([150, 90]), floor=0.9)
    for row, n in enumerate((150, 90)):
        expected = torch.nonzero(reading.logits[row, :n].sigmoid().amax(-1) >= 0.9)[:, 0]
        assert 0 < len(expected) < n
        assert torch.equal(reading.positions[row], expected)


def entity_inputs():
    return EntityInputs(torch.tensor([0, 2, 1, 3]), torch.tensor([0, 0, 1, 2]), torch.tensor([1, 6, 3, 3]), 3)


def test_distance_to_the_nearest_mention():
    found = room.KnowledgeHead._block_distance(entity_inputs(), 8)
    expected = [[min(abs(b - m) for m in own) for b in range(8)] for own in ([1, 6], [3], [3])]
    assert found.tolist() == expected


def test_relations_equal_the_formula_pair_by_pair(monkeypatch):
    monkeypatch.setattr(room, "PAIR_CHUNK", 2)
    head = model_of().knowledge
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    entities, memory, inputs = torch.randn(3, 32).double(), torch.randn(8, 32).double(), entity_inputs()
    pairs, between = torch.tensor([[0, 1], [1, 0], [2, 0]]), torch.tensor([3, 19, 0])
    logits = head.relations(entities, memory, inputs, pairs, between)
    near = room.buckets(head._block_distance(inputs, 8))
    key, value = head.key_value(memory).chunk(2, -1)
    for q, (h, t) in enumerate(pairs.tolist()):
        context = []
        for p in range(4):
            part = slice(8 * p, 8 * (p + 1))
            weights = torch.ones(8).double()
            for e in (h, t):
                score = key[:, part] @ head.query(entities[e])[part] / math.sqrt(8)
                weights = weights * torch.exp(score + head.nearness(near[e])[:, p] - 0.5 * near[e])
            context.append((weights / weights.sum()) @ value[:, part])
        z = [torch.tanh(head.sides[i](entities[e]) + head.contexts[i](torch.cat(context)) + head.between(between[q]))
             for i, e in enumerate((h, t))]  # fmt: skip
        outer = torch.cat([torch.outer(z[0][g : g + 16], z[1][g : g + 16]).flatten() for g in (0, 16)])
        expected = head.relation(outer)
        coarse = head.coarse[0](entities[h]) @ head.coarse[1](entities[t]) / math.sqrt(32)
        expected = expected + torch.tensor([0.0, 1.0, 1.0]) * coarse
        assert torch.allclose(logits[q].double(), expected, atol=1e-5)


def test_best_tails_are_the_best_others():
    head = model_of().knowledge
    entities = torch.randn(20, 32).double()
    pairs = head.best_tails(entities, 4)
    every = torch.cartesian_prod(torch.arange(20), torch.arange(20))
    scores = head.coarse_scores(entities, every).view(20, 20).fill_diagonal_(-math.inf)
    for e in range(20):
        own = pairs[pairs[:, 0] == e, 1].tolist()
        assert sorted(own) == sorted(scores[e].topk(4).indices.tolist())
        assert e not in own


def test_folders_open_as_token_classifiers_too(tmp_path):
    from longnet.model import LongNetForTokenClassification

    model = model_of().float()
    model.save_pretrained(tmp_path)
    again = LongNetForKnowledgeExtraction.from_pretrained(tmp_path).eval()
    assert again.config.relation_labels == ["r", "s"]
    tagger = LongNetForTokenClassification.from_pretrained(tmp_path).eval()
    ids = torch.randint(4, 260, (1, 90))
    expected = model(input_ids=ids).logits
    assert torch.equal(again.read(ids).logits, expected)
    assert torch.equal(tagger(input_ids=ids).logits, expected)
    for name, parameter in model.knowledge.named_parameters():
        assert torch.equal(parameter, again.knowledge.get_parameter(name))
