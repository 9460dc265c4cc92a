"""The server's engine on a GPU: captured steps over slots that texts join and leave."""

import queue

import numpy as np
import pytest
import torch

from longnet import LongNetCache, LongNetConfig, LongNetForCausalLM, text
from longnet.integrations.tokenizer import BYTES
from longnet.serve.engine import Engine
from longnet.serve.jobs import Completion, Done, Failed, Reading, Text

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LongNetConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        segment_lengths=[64, 256, 1024], dilation_rates=[1, 4, 16],
    )  # fmt: skip
    model = LongNetForCausalLM(config)
    for layer in model.model.layers:  # an untrained model repeats one byte whatever it reads
        layer.attention.o_proj.weight.data *= 20
    model.lm_head.weight.data *= 10
    model.lm_head.weight.data[[*range(text.FIRST_BYTE), *range(text.FIRST_BYTE + 128, text.VOCAB_SIZE)]] = (
        0  # ASCII only
    )
    return model.to("cuda", torch.bfloat16).eval()


@pytest.fixture
def engine(model):
    engine = Engine(model, BYTES, slots=4, chunk=512)
    engine.start()
    engine.warm_up()
    yield engine
    engine.close()


def submit(engine, data, make=Completion, **options):
    events = queue.Queue()
    engine.submit(make(emit=events.put, ids=text.encode(data), **options))
    return events


def result(events):
    pieces = []
    while not isinstance(event := events.get(timeout=120), Done | Failed):
        if isinstance(event, Text):
            pieces.append(event.text)
    assert isinstance(event, Done), event
    return "".join(pieces), event


def test_steps_are_captured_once_and_buffers_stay(engine):
    assert engine.writing.slots._captured is not None
    graph, version = engine.writing.slots._captured.graph, engine.writing.slots.cache.version
    for size in (3, 700, 5000):
        result(submit(engine, data=b"x" * size, max_tokens=40))
    assert engine.writing.slots._captured.graph is graph
    assert engine.writing.slots.cache.version == version


def test_company_changes_no_bit(engine):
    """A batch of fixed size: whoever is in the other slots, the same seed gives the same text."""
    options = {"data": b"to be read " * 120, "max_tokens": 60, "temperature": 1.0, "top_p": 0.95}
    quiet, _ = result(submit(engine, seed=1, **options))
    crowd = [
        submit(engine, seed=seed, **{**options, "data": options["data"] * n})
        for seed, n in ((7, 1), (1, 1), (3, 4), (1, 1))
    ]
    crowd = [result(events)[0] for events in crowd]
    assert crowd[1] == crowd[3] == quiet
    assert len({crowd[0], crowd[1], crowd[2]}) == 3


def test_what_is_drawn_is_what_the_model_says(engine, model):
    """Teacher forcing without a cache: each greedy byte is a likeliest one, within the rounding of bf16."""
    data = b"the quick brown fox " * 40
    written, done = result(submit(engine, data=data, max_tokens=30, temperature=0.0))
    new = text.encode(written)
    assert len(new) == done.written
    ids = torch.from_numpy(np.concatenate((text.encode(data), new)).astype(np.int64))[None].cuda()
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(data) - 1 : -1].float()
        logits[:, [text.PAD, text.BOS, text.MASK]] = -torch.inf
    chosen = logits.gather(1, ids[0, len(data) :, None])[:, 0]
    assert (logits.amax(1) - chosen <= 0.05 * logits.amax(1).abs() + 0.05).all()


def test_a_session_kept_on_the_cpu_comes_back(engine, model, tmp_path):
    document = b"once upon a time " * 300
    kept, host = result(submit(engine, make=Reading, data=document[:-1]))[1].value
    assert (kept.device.type, host.device.type) == ("cuda", "cpu")
    host.save(tmp_path / "session")
    loaded = LongNetCache.load(tmp_path / "session", model.config)
    options = {"data": document[-1:] + b" and", "max_tokens": 30, "temperature": 0.0}
    texts = [result(submit(engine, prefix=prefix, **options))[0] for prefix in (kept, host, loaded)]
    assert texts[0] == texts[1] == texts[2]
    assert kept.host_positions == (len(document) - 1,)
