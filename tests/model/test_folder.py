"""A saved folder: found by transformers in fresh processes, in every order of imports, and ready for a hub."""

import json
import subprocess
import sys

import pytest
import yaml

from longnet import LongNetConfig, LongNetForCausalLM, LongNetForSequenceClassification
from longnet.integrations import byte_tokenizer
from longnet.model.folder import load_whole

LOAD = "m = AutoModelForCausalLM.from_pretrained({folder!r}{options}); t = AutoTokenizer.from_pretrained({folder!r})\n"
CHECK = "assert type(m).__name__ == 'LongNetForCausalLM' and t('é').input_ids == [199, 173]"
IMPORT = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "a-model"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LongNetForCausalLM(LongNetConfig(**sizes)).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    ("imports", "options"),
    [
        ("import longnet\nfrom transformers.models.auto.modeling_auto import AutoModel\n" + IMPORT, ""),
        (IMPORT + "import longnet\n", ""),
        (IMPORT, ", trust_remote_code=True"),
    ],
    ids=["longnet-first", "transformers-first", "stub"],
)
def test_found_by_the_auto_classes(folder, imports, options):
    done = run(imports + LOAD.format(folder=str(folder), options=options) + CHECK)
    assert "not registered" not in done.stderr


def test_the_stub_says_which_package_is_missing(folder):
    code = "import sys; sys.modules['longnet'] = None\n" + IMPORT
    code += f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip install longnet-attention" in done.stderr


def test_ready_for_a_hub(folder):
    names = {path.name for path in folder.iterdir()}
    wanted = {"README.md", "config.json", "longnet_stub.py", "model.safetensors", "tokenizer.json"}
    assert wanted | {"tokenizer_config.json"} <= names
    assert not {path.suffix for path in folder.iterdir()} & {".bin", ".pt", ".pkl"}
    front = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "longnet_stub.LongNetForCausalLM"


def test_a_card_that_somebody_wrote_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LongNetForCausalLM(LongNetConfig(**sizes)).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_folder_of_another_model_is_not_filled_with_random_numbers(folder, tmp_path):
    assert load_whole(LongNetForCausalLM, folder).config.vocab_size == 260
    config = LongNetConfig.from_pretrained(folder, num_labels=3)
    LongNetForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"LongNetForSequenceClassification.*classifier\.bias"):
        load_whole(LongNetForCausalLM, tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"weights of a LongNetForSequenceClassification.*classifier\.bias"):
        load_whole(LongNetForSequenceClassification, folder)
    foreign = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(foreign))
    with pytest.raises(ValueError, match="'llama'"):
        load_whole(LongNetForCausalLM, tmp_path)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_whole(LongNetForCausalLM, tmp_path / "nowhere")
