"""The plan against what is there: bytes that autograd, the chunked pass and the optimizer keep, and runs on a GPU on record."""

import ast
import json
from pathlib import Path

import pytest
import torch

from longnet import DilatedPattern, LongNetCache, LongNetConfig, LongNetForCausalLM, plan, schedule
from longnet.model import transformer
from longnet.model.tiles import set_tile
from longnet.plan import Job, Machine, best_chunk, largest, pick, reading, strategies
from longnet.train.chunked import ChunkStore
from longnet.train.offload import offload_layer_inputs

GIB = 2**30
RECORDS = Path(__file__).parents[1] / "benchmarks/results/h200-2026-11-24/billion"
LATER = Path(__file__).parents[1] / "benchmarks/results/h200-2026-11-27/billion"


def small(key_heads=4, layers=3, **fields):
    return LongNetConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=key_heads,
        segment_lengths=[64, 256, 1024, 4096], dilation_rates=[1, 4, 16, 64], **fields,
    )  # fmt: skip


def geometric(preset=None, tokens=10**9, **fields):
    pattern = DilatedPattern.geometric(tokens, window=2048, ratio=4)
    fields |= {"segment_lengths": pattern.segment_lengths, "dilation_rates": pattern.dilation_rates}
    return LongNetConfig.preset(preset, **fields) if preset else LongNetConfig(**fields)


def four_by_256(tokens=10**9):
    return geometric(
        tokens=tokens, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4
    )


def kept_by_autograd(function):
    """Bytes of all storages that the graph of function() keeps, each once."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = function()
    assert result.requires_grad  # and alive until here, so that no address came twice
    return sum(storages.values())


def peak_of(function):
    """The most bytes that are allocated at one time while function() runs, beyond those before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def named(name, job, machine):
    return next(s for s in strategies(job, machine) if s.name == name)


def network_and_ids(config, tokens, batch=1):
    torch.manual_seed(0)
    return LongNetForCausalLM(config).train(), torch.randint(4, 260, (batch, tokens))


@pytest.mark.parametrize(("key_heads", "autocast"), [(4, False), (4, True), (2, True)])
def test_what_autograd_keeps_of_a_whole_step(key_heads, autocast):
    (network, ids), tokens = network_and_ids(small(key_heads), 2048, 2), 2 * 2048
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = kept_by_autograd(lambda: network.token_losses(ids, targets=ids).mean())
    job = Job(config=network.config, tokens=2048, batch=2, autocast=autocast, fused_norms=False)
    # Beside the layers: the last states before and after their norm, and its output; weights, in 16 bits under autocast.
    expected = job.kept(tokens, False) + 12 * 64 * tokens
    expected += (2 if autocast else 4) * network.num_parameters()
    assert found == pytest.approx(expected, rel=0.02)


def test_what_autograd_keeps_where_layers_are_recomputed():
    network, ids = network_and_ids(small(), 2048)
    network.gradient_checkpointing_enable()
    set_tile(network, 256)
    found = kept_by_autograd(lambda: network.token_losses(ids, targets=ids).mean())
    job = Job(config=network.config, tokens=2048, autocast=False, fused_norms=False)
    # The norm after the layers is tiled as well: its input and its output.
    assert found == pytest.approx(job.kept(2048, True) + 8 * 64 * 2048, rel=0.15)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_peak_of_a_step(recompute, monkeypatch):
    # The tile and the logits that exist at once are small, as they are beside a long sequence.
    monkeypatch.setattr(transformer, "LOSS_LOGITS", 2**15)
    monkeypatch.setattr(plan, "LOSS_LOGITS", 2**15)
    network, ids = network_and_ids(small(), 4096)
    if recompute:
        network.gradient_checkpointing_enable()
        set_tile(network, 512)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found = peak_of(lambda: network.token_losses(ids, targets=ids).mean().backward())
    job = Job(config=network.config, tokens=4096, autocast=False, fused_norms=False)
    expected = job.kept(4096, recompute) + job.working(4096, recompute, tile=512)
    assert found == pytest.approx(expected, rel=0.15)


def test_the_peak_of_a_step_whose_layer_inputs_are_offloaded(monkeypatch):
    monkeypatch.setattr(transformer, "LOSS_LOGITS", 2**15)
    monkeypatch.setattr(plan, "LOSS_LOGITS", 2**15)
    network, ids = network_and_ids(small(layers=12), 4096)
    network.gradient_checkpointing_enable()
    set_tile(network, 512)
    offload_layer_inputs(network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found = peak_of(lambda: network.token_losses(ids, targets=ids).mean().backward())
    job = Job(config=network.config, tokens=4096, autocast=False, fused_norms=False)
    way = named("checkpointed, offloaded", job, Machine(memory=GIB, host_memory=GIB))
    inputs = 12 * 4 * 64 * 4096
    assert (way.host, way.memory["activations"]) == (inputs, inputs // 6)
    # On a CPU both are one memory. Inputs that stayed in both places would take half as much again.
    expected = way.host + way.memory["activations"] + job.working(4096, True, tile=512)
    assert found == pytest.approx(expected, rel=0.1)


def test_offloaded_layer_inputs_against_those_on_the_device():
    job = Job(config=geometric("base", 2**20), tokens=2**20, batch=2)
    machine = Machine(memory=139 * GIB, host_memory=100 * GIB, host_link=10e9)
    here, there = (named(name, job, machine) for name in ("checkpointed", "checkpointed, offloaded"))
    one = 2 * 2**20 * 768 * 4
    assert here.host == here.copied == 0
    assert here.total - there.total == 10 * one  # one in use, one under way
    assert there.host == 12 * one
    assert there.copied == 23 * one  # the last is still there
    assert there.flops == here.flops
    assert there.seconds == pytest.approx(here.seconds + 23 * one / 10e9)
    assert there.options == here.options | {"offload": True}
    assert "host memory" not in there.problem
    poor = named("checkpointed, offloaded", job, Machine(memory=139 * GIB, host_memory=50 * GIB))
    assert poor.problem == "needs 72.0 GiB of host memory of 45.0 that may be filled"
    # A single layer has nothing under way.
    alone = Job(config=geometric("base", 2**20, num_hidden_layers=1), tokens=2**20)
    assert len({named(n, alone, machine).total for n in ("checkpointed", "checkpointed, offloaded")}) == 1


@pytest.mark.parametrize("chunk", [64, 100, 256, 1000, 8192])
@pytest.mark.parametrize("tokens", [1000, 5000])
def test_the_rows_that_the_chunked_pass_keeps(chunk, tokens):
    store = ChunkStore(small(2), 2, tokens, chunk, "cpu", torch.bfloat16)
    store.begin(0, reverse=True)
    job = Job(config=small(2), tokens=tokens, batch=2)
    assert store.nbytes() == job.rows(chunk) + job.row_gradients(chunk)


def test_weights_gradients_and_moments():
    network, ids = network_and_ids(small(), 64)
    optimizer = torch.optim.AdamW(network.parameters())
    network.token_losses(ids, targets=ids).mean().backward()
    optimizer.step()
    moments = sum(x.nbytes for s in optimizer.state.values() for name, x in s.items() if name != "step")
    parameters = list(network.parameters())
    found = sum(x.nbytes for x in parameters) + sum(x.grad.nbytes for x in parameters) + moments
    (whole, *_) = strategies(Job(config=network.config, tokens=64, autocast=False), Machine(memory=GIB))
    assert whole.memory["weights"] == found


def test_the_state_of_a_stream():
    network, ids = network_and_ids(small(2), 4096, 2)
    cache = LongNetCache(network.config, 2)
    with torch.no_grad():
        network.eval()(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    job = Job(config=network.config, tokens=4096, batch=2, autocast=False)
    assert reading(job, Machine(memory=GIB), 512).memory["state"] == cache.nbytes()


def test_the_recorded_training_step_of_a_billion_tokens():
    record = json.loads((RECORDS / "train-4x256-1000000000.json").read_text())
    job, chunk = Job(config=four_by_256(), tokens=record["trained"]), record["chunk"]
    assert job.config.num_parameters() == record["parameters"]
    # At that time the gradients of all rows were kept, 8 bytes for 4 of a key and a value.
    memory = (
        job.kept(chunk, False) + job.working(chunk, False) + 3 * job.rows(chunk) + 16 * record["parameters"]
    )
    assert memory / GIB == pytest.approx(record["steps"][0]["peak_gib"], rel=0.15)


def test_the_recorded_training_step_of_134_million_tokens():
    record = json.loads((LATER / "train-base-134217728.json").read_text())
    job = Job(config=geometric("base", record["trained"]), tokens=record["trained"])
    chunked = next(s for s in strategies(job, Machine(memory=139 * GIB)) if s.name == "chunked")
    assert chunked.options["chunk_tokens"] == record["chunk"]
    # The run kept its hidden states in 16 bits: two of them a layer and token.
    states = 2 * 2 * job.config.hidden_size * job.config.num_hidden_layers * record["chunk"]
    memory = chunked.total - states
    assert memory / GIB == pytest.approx(record["steps"][0]["peak_gib"], rel=0.15)


@pytest.mark.parametrize("preset", ["small", "base"])
def test_the_recorded_readings_of_a_billion_tokens(preset):
    record = json.loads((RECORDS / f"read-{preset}-1000000000.json").read_text())
    job = Job(config=geometric(preset), tokens=record["read"])
    # At the rate that it reached, the time must come out, too: operations are counted as its MFU counts them.
    machine = Machine(memory=139 * GIB, rate=record["mfu"] * 989e12)
    found = reading(job, machine, 524288)
    assert found.total / GIB == pytest.approx(record["peak_gib"], rel=0.15)
    assert found.memory["state"] == pytest.approx(record["cache_bytes"], rel=0.15)
    assert found.seconds == pytest.approx(record["seconds"], rel=0.01)


def test_what_is_picked_needs_less_memory_the_longer_the_sequence():
    machine = Machine(memory=80 * GIB)
    names = [pick(Job(config=geometric("base", n), tokens=n), machine)[0].name for n in (2**15, 2**20, 2**27)]
    assert names == ["whole", "chunked", "chunked and checkpointed"]
    with pytest.raises(ValueError, match=r"whole needs .* GiB.*chunked and checkpointed needs"):
        pick(Job(config=geometric("base"), tokens=10**9), Machine(memory=2 * GIB))
    offloaded, reason = pick(
        Job(config=four_by_256(), tokens=10**9), Machine(memory=12 * GIB, host_memory=64 * GIB)
    )
    assert offloaded.name.endswith("offloaded")
    assert offloaded.options["offload"]
    assert offloaded.host > 4 * GIB
    needs = f"needs about {offloaded.total / GIB:.2f} of 12.00 GiB and {offloaded.host / GIB:.2f} of 64.00 GiB of host memory"
    assert reason.startswith(f"{needs}, the fastest that fits; whole needs")
    # Several devices have no chunks: where layer inputs do not fit, the hosts take them.
    job = Job(config=geometric("base", 2**25), tokens=2**25)
    names = [
        pick(job, Machine(memory=memory * GIB, devices=16, host_memory=100 * GIB))[0].name
        for memory in (1000, 150, 75)
    ]
    assert names == ["whole", "checkpointed", "checkpointed, offloaded"]


def test_the_chosen_chunk_is_the_best_one_and_grows_with_the_root_of_the_length():
    config = LongNetConfig.preset(
        "base", segment_lengths=[2048 * 2**i for i in range(20)], dilation_rates=[2**i for i in range(20)]
    )
    jobs = [Job(config=config, tokens=n) for n in (10**6, 10**8, 10**9)]
    for recompute in (False, True):
        chunks = [best_chunk(job, recompute) for job in jobs]
        assert chunks == sorted(chunks)
        assert 2**16 <= chunks[1] <= 2**22

        def memory(chunk, recompute=recompute):
            rows = jobs[1].rows(chunk) + jobs[1].row_gradients(chunk)
            return jobs[1].kept(chunk, recompute) + jobs[1].working(chunk, recompute) + rows

        assert memory(chunks[1]) == min(memory(2**i) for i in range(11, 28))
    assert best_chunk(Job(config=config, tokens=1000)) == 1000


def test_the_largest_length_fits_and_a_longer_one_does_not():
    job, machine = Job(config=four_by_256(), tokens=10**6), Machine(memory=80 * GIB, host_memory=100 * GIB)
    for name in ("whole", "checkpointed", "checkpointed, offloaded", "chunked", "chunked, offloaded"):
        most = largest(name, job, machine)

        def problem(tokens, name=name):
            ways = strategies(Job(config=job.config, tokens=tokens), machine)
            return next(s.problem for s in ways if s.name == name)

        assert most > 10**5
        assert not problem(most)
        assert "GiB" in problem(most * 102 // 100)
    assert largest("whole", job, Machine(memory=1)) == 0
    # Chunks of whole segments keep nothing, so memory does not grow.
    assert largest("chunked", Job(config=small(), tokens=10**6), machine) == plan.LIMIT


def test_many_devices_divide_memory_and_receive_as_much_however_long_the_sequence():
    found = []
    for tokens in (2**27, 2**29):
        # As many rows a segment at four times the length: rates grow along with segments.
        config = LongNetConfig.preset(
            "base", segment_lengths=[2048, tokens], dilation_rates=[1, tokens // 2048]
        )
        found.append(strategies(Job(config=config, tokens=tokens), Machine(memory=80 * GIB, devices=64))[1])
    assert found[0].received == found[1].received > 0
    assert found[0].memory["exchange"] == found[1].memory["exchange"] > 0
    job = Job(config=geometric("small"), tokens=10**9)
    chosen, _ = pick(job, Machine(memory=139 * GIB, devices=256))
    assert chosen.name == "checkpointed"
    assert chosen.received < 20 * 10**9
    alone = named("checkpointed", job, Machine(memory=139 * GIB))
    assert chosen.flops == pytest.approx(alone.flops / 256)
    for host, expected in (
        (0, ["whole", "checkpointed"]),
        (1, ["whole", "checkpointed", "checkpointed, offloaded"]),
    ):
        ways = strategies(job, Machine(memory=139 * GIB, devices=2, host_memory=host))
        assert [s.name for s in ways] == expected  # in chunks on one device only


def test_a_plan_for_1024_devices_looks_at_few_of_their_segments(monkeypatch):
    """Counted instead of timed: rows of one rank in one shared segment, a microsecond each."""
    counted, rows = [0], schedule._rows

    def count(*arguments):
        counted[0] += 1
        return rows(*arguments)

    monkeypatch.setattr(schedule, "_rows", count)
    job, machine = Job(config=geometric("base"), tokens=10**9), Machine(memory=139 * GIB, devices=1024)
    assert len(strategies(job, machine)) == 2
    assert largest("checkpointed", job, machine) > 10**9
    assert 0 < counted[0] < 10**6


def test_operations_are_the_models_own_and_those_done_again():
    job = Job(config=small(), tokens=2048)
    whole, checkpointed, chunked, *_ = strategies(job, Machine(memory=GIB))
    forward = 2048 * job.config.flops_per_token(2048, training=False)
    assert whole.flops == 2048 * job.config.flops_per_token(2048)
    assert checkpointed.flops == pytest.approx(whole.flops + forward)  # one tile
    again = 1 - chunked.options["chunk_tokens"] / 2048
    assert chunked.flops == pytest.approx(whole.flops + again * forward)


def test_refusals():
    tree = LongNetConfig.preset("tiny", attention="hierarchical")
    for config in (tree, LongNetConfig.preset("tiny", bidirectional=True)):
        with pytest.raises(ValueError, match="dilated attention in every layer"):
            strategies(Job(config=config, tokens=100), Machine(memory=GIB))
    with pytest.raises(ValueError, match="above 0"):
        Machine(memory=0)
    with pytest.raises(ValueError, match="at least one token"):
        Job(config=small(), tokens=0)


def test_the_plan_knows_no_torch_and_the_models_own_loss_chunk():
    tree = ast.parse(Path(plan.__file__).read_text())
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert not any(name.split(".")[0] in ("torch", "transformers") for name in imported)
    assert plan.LOSS_LOGITS == transformer.LOSS_LOGITS
