"""Models that are fine-tuned: fresh and pre-trained ones are configured alike."""

import pytest

from longnet import LongNetConfig, LongNetForMaskedLM
from longnet.model.relations import LongNetForKnowledgeExtraction
from longnet.tasks.extraction import tag_fields
from longnet.tasks.fit import FitConfig, build_model

SIZE = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


@pytest.mark.parametrize("pretrained", [False, True])
def test_what_only_a_head_needs_is_configured(tmp_path, pretrained):
    """Fields that the pre-trained configuration has never heard of: dropout, relations."""
    if pretrained:
        config = LongNetConfig.preset("tiny", **SIZE, bidirectional=True)
        LongNetForMaskedLM(config).save_pretrained(tmp_path)
    options = FitConfig(
        preset="tiny", model=SIZE, pretrained=tmp_path if pretrained else None, dropout=0.25, device="cpu"
    )
    model = build_model(
        LongNetForKnowledgeExtraction, options, **tag_fields(["A", "B"]), relation_labels=["r", "s"]
    )
    assert model.config.relation_labels == ["r", "s"]
    assert model.dropout.p == 0.25
    assert model.num_labels == 4
    assert model.knowledge.relation.out_features == 3
