"""LongNetConfig: costs that match the model, errors that say what to do, equal reloads."""

import pytest

from longnet.model import PRESETS, LongNetConfig, LongNetForCausalLM


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 2}])
def test_num_parameters_formula_counts_the_model(overrides):
    config = LongNetConfig.preset("tiny", **overrides)
    model = LongNetForCausalLM(config)
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [("tiny", 1), ("mini", 5), ("small", 20), ("base", 85), ("large", 360), ("xl", 1000)],
)
def test_presets_have_the_size_they_promise(name, millions):
    assert LongNetConfig.preset(name).num_parameters() == pytest.approx(millions * 1e6, rel=0.1)
    assert set(PRESETS) == {"tiny", "mini", "small", "base", "large", "xl"}


def test_flops_per_token_of_a_single_layer_by_hand():
    config = LongNetConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        segment_lengths=(4,),
        dilation_rates=(1,),
    )
    matrices = 2 * (4 * 8 * 8 + 3 * 8 * 16 + 8 * 10)
    attention = 2 * (4 * 4) * 10 / 4  # heads * 4 D * (1 + 2 + 3 + 4) pairs / tokens
    assert config.flops_per_token(4, training=False) == matrices + attention
    assert config.flops_per_token(4) == 3 * matrices + 3.5 * attention


def test_reloaded_configuration_is_equal(tmp_path):
    config = LongNetConfig.preset("mini", head_offsets="block", segment_lengths=(64, 128, 512))
    config.save_pretrained(tmp_path)
    again = LongNetConfig.from_pretrained(tmp_path)
    assert again.pattern() == config.pattern()
    ours, theirs = config.to_dict(), again.to_dict()
    assert {k: v for k, v in ours.items() if k in theirs and theirs[k] != v} == {}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 130, "num_attention_heads": 4}, "divisible"),
        ({"num_key_value_heads": 5}, "divisor"),
        ({"head_dim": 7}, "even"),
        ({"attention_impl": "magic"}, "attention_impl"),
        ({"dilation_rates": (2, 4, 16)}, "rate 1"),
        ({"dilation_rates": (1, 4)}, "one dilation rate per segment length"),
        ({"head_offsets": "random"}, "head_offsets"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"pad_token_id": 260}, "pad_token_id"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
    ],
)
def test_bad_configuration_is_refused_when_built(bad, message):
    with pytest.raises(ValueError, match=message):
        LongNetConfig.preset("tiny", **bad)


def test_unknown_preset():
    with pytest.raises(ValueError, match="tiny"):
        LongNetConfig.preset("gigantic")
