"""`longnet plan`: the table, the JSON, the command line that it recommends, and what it refuses."""

import json
import shlex

import pytest
import tyro

from longnet import LongNetConfig


@pytest.fixture
def plan(longnet):
    return lambda *arguments: longnet("plan", *arguments)


def test_the_table_and_the_figures_agree(plan):
    arguments = ["--tokens", 2**20, "--ratio", 4, "--memory", 40, "--host-memory", 64]
    code, out, _ = plan(*arguments)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("85.2 million parameters, 12 layers of 768, 6 branches up to 2,097,152 tokens")
    code, out, _ = plan(*arguments, "--json")
    found = json.loads(out)
    assert [s["name"] for s in found["training"]] == [line.split("  ")[0].rstrip() for line in lines[2:9]]
    for way, line in zip([*found["training"], found["reading"]], lines[2:10], strict=True):
        assert f" {way['total'] / 2**30:,.1f} " in line
        assert sum(way["memory"].values()) == way["total"]
        assert (" no " in line) == bool(way["problem"])
    assert lines[-1].startswith(f"{found['pick']}: longnet train --sequence-length 1048576 ")


@pytest.mark.parametrize(
    ("memory", "flag"), [(600, "whole"), (40, "chunked"), (8, "--gradient-checkpointing")]
)
def test_the_recommended_options_are_those_of_the_trainer(plan, memory, flag):
    from longnet.cli.recipe import registry
    from longnet.train import TrainConfig

    code, out, _ = plan("--tokens", 2**20, "--ratio", 4, "--memory", memory)
    assert code == 0
    command = shlex.split(out.splitlines()[-1].split("longnet train ")[1])
    assert flag in command
    config = tyro.cli(TrainConfig, args=["--data", "d", "--output", "o", *command], registry=registry)
    assert config.sequence_length == 2**20


def test_layer_inputs_on_the_hosts_of_several_devices(plan):
    from longnet.cli.recipe import registry
    from longnet.train import TrainConfig
    from longnet.train.config import _check_strategy

    arguments = ["--tokens", 2**25, "--ratio", 4, "--devices", 16, "--memory", 75, "--host-memory", 100]
    code, out, _ = plan(*arguments)
    assert code == 0
    name, command = out.splitlines()[-1].split(": longnet train ")
    assert name == "checkpointed, offloaded"
    config = tyro.cli(
        TrainConfig, args=["--data", "d", "--output", "o", *shlex.split(command)], registry=registry
    )
    assert (config.sequence_strategy, config.gradient_checkpointing, config.offload) == ("whole", True, True)
    _check_strategy(config, LongNetConfig.preset("base"))
    _, out, _ = plan(*arguments[:-1], 50)
    assert "nothing fits" in out


def test_a_saved_model_many_devices_and_nothing_that_fits(plan, tmp_path):
    LongNetConfig.preset("tiny").save_pretrained(tmp_path)
    code, out, _ = plan("--tokens", 10**8, "--folder", tmp_path, "--memory", 2, "--devices", 8)
    assert code == 0
    assert out.startswith("1.1 million parameters")
    assert "nothing fits" in out
    assert "on 8 devices" in out


def test_refusals(plan, tmp_path):
    for arguments, part in (
        (["--model", "nothing=1"], "nothing"),
        (["--model", "attention=hierarchical"], "dilated attention in every layer"),
        (["--folder", tmp_path], "config.json"),
        (["--memory", 0], "memory"),
        (["--chunk", 0], "chunk"),
        (["--preset", "huge"], "huge"),
    ):
        code, out, error = plan("--tokens", 1000, *arguments)
        assert (code, out) == (2, "")
        assert part in error
