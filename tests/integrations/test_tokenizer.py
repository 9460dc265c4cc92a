"""The Hugging Face byte tokenizer against `longnet.text`."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from longnet import text
from longnet.integrations import byte_tokenizer
from longnet.train import TrainConfig, train
from longnet.train.data import prepare

TOKENIZER = byte_tokenizer()
SAMPLE = "Aé€😀\r\n\t  x <pad><eos></s>\u200d\x00 end "


@given(st.text())
def test_ids_text_and_offsets(value):
    batch = TOKENIZER(value, return_offsets_mapping=True)
    assert batch.input_ids == text.encode(value).tolist()
    assert TOKENIZER.decode(batch.input_ids) == value
    expected = [(i, i + 1) for i, character in enumerate(value) for _ in character.encode()]
    assert batch["offset_mapping"] == expected


def test_every_byte_and_special_has_its_id():
    assert len(TOKENIZER) == text.VOCAB_SIZE
    ids = TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.mask_token_id
    assert ids == (text.PAD, text.BOS, text.EOS, text.MASK)
    raw = bytes(range(256)).decode("latin-1")
    assert TOKENIZER(raw).input_ids == text.encode(raw).tolist()
    assert TOKENIZER.decode([text.BOS, *text.encode("é"), text.EOS], skip_special_tokens=True) == "é"


def test_saved_and_found_without_our_code(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "longnet" not in json.dumps(stated).lower()
    assert "auto_map" not in stated
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(SAMPLE).input_ids == text.encode(SAMPLE).tolist()
    assert loaded.decode(loaded(SAMPLE).input_ids) == SAMPLE


def test_a_long_document_is_one_piece():
    value = SAMPLE * 5000
    assert TOKENIZER(value).input_ids == text.encode(value).tolist()


def test_batches_are_padded_on_the_left():
    batch = TOKENIZER(["abc", "é"], padding=True)
    assert batch.attention_mask == [[1, 1, 1], [0, 1, 1]]
    assert batch.input_ids[1][0] == text.PAD


def test_a_lone_surrogate_is_refused():
    with pytest.raises((TypeError, UnicodeEncodeError, ValueError)):
        TOKENIZER("\ud800")


def test_a_training_run_leaves_it_next_to_the_model(tmp_path):
    (tmp_path / "text.txt").write_text("some text, over and over. " * 40)
    (tmp_path / "more.txt").write_text("other text, held out. " * 40)
    prepare([tmp_path / "text.txt", tmp_path / "more.txt"], tmp_path / "data")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = {"sequence_length": 32, "batch_size": 1, "steps": 1, "device": "cpu", "model": sizes}
    train(TrainConfig(data=tmp_path / "data", output=tmp_path / "run", **options))
    folder = tmp_path / "run" / "model"
    assert AutoTokenizer.from_pretrained(folder)(SAMPLE).input_ids == text.encode(SAMPLE).tolist()
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 16
