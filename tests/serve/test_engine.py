"""The engine against plain generation: who shares the batch, joins, leaves or fails changes nothing for the others."""

import queue
import threading
import time

import numpy as np
import pytest
import torch

from longnet import LongNetCache, LongNetConfig, LongNetForCausalLM, text
from longnet.generate import generate
from longnet.integrations.tokenizer import BYTES
from longnet.serve.engine import Engine
from longnet.serve.jobs import Call, Completion, Done, Failed, Moved, Progress, Reading, Refused, Text
from longnet.serve.sampling import sample

ATTENTION = {
    "dilated": {},
    "hierarchical": {
        "attention": "hierarchical",
        "hierarchical": {"block": 4, "radix": 2, "window_blocks": 2, "top_k": 2},
    },
}


def tiny(kind="dilated"):
    torch.manual_seed(0)
    config = LongNetConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        segment_lengths=[8, 32, 128], dilation_rates=[1, 2, 4], **ATTENTION[kind],
    )  # fmt: skip
    model = LongNetForCausalLM(config).double().eval()
    for layer in model.model.layers:  # an untrained model repeats one byte whatever it reads
        layer.attention.o_proj.weight.data *= 40
    model.lm_head.weight.data *= 20
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture
def engine(model):
    engine = Engine(model, BYTES, slots=3, chunk=32)
    engine.start()
    yield engine
    engine.close()


class Client:
    """Submits a job and collects its events."""

    def __init__(self, engine, make=Completion, on_event=lambda event: None, data=None, **options):
        self.events, self.engine = queue.Queue(), engine
        self.seen = []

        def emit(event):
            on_event(event)
            self.events.put(event)

        if data is not None:
            options["ids"] = text.encode(data)
        self.job = make(emit=emit, **options)
        engine.submit(self.job)

    def next(self, timeout=30):
        event = self.events.get(timeout=timeout)
        self.seen.append(event)
        return event

    def until(self, *kinds):
        while not isinstance(event := self.next(), kinds):
            pass
        return event

    def result(self):
        """(text, the last event)."""
        last = self.until(Done, Failed)
        return "".join(e.text for e in self.seen if isinstance(e, Text)), last


def alone(model, data, count):
    """Greedy bytes by `longnet.generate`, as text."""
    ids = torch.from_numpy(text.encode(data).astype(np.int64))[None]
    new = generate(
        model,
        ids,
        max_new_tokens=count,
        temperature=0,
        eos_token_id=text.EOS,
        forbidden_ids=(text.PAD, text.BOS, text.MASK),
    ).ids[0]
    return text.decode(new)


TEXTS = [
    b"the first one",
    b"x",
    b"a much longer text " * 20,
    "zwölf Boxkämpfer".encode(),
    b"\xff\x00 bytes",
    b"last " * 9,
]


@pytest.mark.parametrize("kind", ["dilated", "hierarchical"])
def test_many_at_once_equal_each_alone(kind):
    """More requests than slots, of all lengths, longer than chunks; greedy, judged by generate()."""
    model = tiny(kind)
    expected = [alone(model, data, 20 + 5 * i) for i, data in enumerate(TEXTS)]
    assert len(set(expected)) == len(expected)
    engine = Engine(model, BYTES, slots=3, chunk=32)
    engine.start()
    clients = [
        Client(engine, data=data, max_tokens=20 + 5 * i, temperature=0.0) for i, data in enumerate(TEXTS)
    ]
    results = [client.result() for client in clients]
    engine.close()
    assert [written for written, _ in results] == expected
    assert all(done.reason in ("length", "stop") for _, done in results)
    assert engine.report()["free_slots"] == 3


def test_seeds_do_not_depend_on_the_company(engine):
    options = {"data": b"tell me", "max_tokens": 30, "temperature": 1.0, "top_p": 0.9}
    quiet, _ = Client(engine, seed=5, **options).result()
    crowd = [Client(engine, seed=seed, **options) for seed in (7, 5, 6, 5)]
    crowd = [client.result()[0] for client in crowd]
    assert crowd[1] == crowd[3] == quiet
    assert len(set(crowd)) == 3


def test_progress_is_by_chunks_and_memory_stays_flat(engine):
    client = Client(engine, make=Reading, data=b"0123456789" * 100)
    done = client.until(Done)
    steps = [event for event in client.seen if isinstance(event, Progress)]
    assert [s.read for s in steps] == [*range(32, 1000, 32), 1000]
    assert {s.total for s in steps} == {1000}
    assert len({s.cache_bytes for s in steps[8:]}) == 1
    kept, host = done.value
    assert kept.host_positions == (1000,)
    assert kept.nbytes() == host.nbytes() == steps[-1].cache_bytes


def test_a_session_is_read_once_and_asked_many_times(engine, model):
    document = b"once upon a time " * 30
    kept, _ = Client(engine, make=Reading, data=document[:-1]).until(Done).value
    before = {name: x.clone() for name, x in kept._tensors().items()}
    for question in (b"", b" and then", b" or else"):
        asked = Client(engine, data=document[-1:] + question, prefix=kept, max_tokens=12, temperature=0.0)
        assert asked.result()[0] == alone(model, document + question, 12)
    assert all(torch.equal(x, before[name]) for name, x in kept._tensors().items())
    assert kept.host_positions == (len(document) - 1,)


def test_a_long_text_does_not_hold_up_the_others(engine):
    """A short request that comes while a long one is read is done long before it."""
    long = Client(engine, make=Reading, data=b"word " * 4000)
    long.until(Progress)
    short = Client(engine, data=b"hi", max_tokens=5)
    short.result()
    read = [event.read for event in list(long.events.queue) if isinstance(event, Progress)]
    assert not any(isinstance(event, Done) for event in list(long.events.queue))
    assert max(read, default=0) < 20000 / 4
    engine.cancel(long.job)


def test_short_texts_go_first_and_long_ones_do_not_starve(model):
    engine = Engine(model, BYTES, slots=3, chunk=32)
    order, clients = [], []
    for name, size in (("long", 640), ("short", 64), ("middle", 320)):
        note = lambda event, name=name: order.append(name) if isinstance(event, Progress) else None  # noqa: E731
        clients.append(Client(engine, on_event=note, data=b"x" * size, max_tokens=1))
    engine.start()
    for client in clients:
        client.result()
    engine.close()
    assert order[:2] == ["short", "short"]
    assert len(order) == (640 + 64 + 320) // 32
    last = {name: len(order) - order[::-1].index(name) for name in ("short", "middle", "long")}
    assert last["short"] < last["middle"] < last["long"]
    assert order[: last["middle"]].count("long") == last["middle"] // 4  # every fourth goes to the oldest


def test_cancelling_stops_within_a_chunk_and_frees_the_slot(engine, model):
    chunks = []
    original = type(model).forward

    def counted(self, input_ids=None, **options):
        chunks.append(input_ids.shape)
        return original(self, input_ids=input_ids, **options)

    model.forward = counted.__get__(model)
    try:
        client = Client(engine, data=b"z" * 100000, max_tokens=5)
        for _ in range(3):
            client.until(Progress)
        engine.cancel(client.job)
        at = len(chunks)
        deadline = time.monotonic() + 10
        while engine.report()["free_slots"] < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert engine.report()["free_slots"] == 3
        assert len(chunks) <= at + 2
        writing = Client(engine, data=b"z", max_tokens=100000)
        writing.until(Text)
        engine.cancel(writing.job)
        while engine.report()["free_slots"] < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        steps = len(chunks)
        time.sleep(0.05)
        assert len(chunks) == steps
        assert engine.statistics.jobs["cancelled"] == 2
    finally:
        del model.forward


@pytest.mark.parametrize("error", [RuntimeError("shape"), torch.OutOfMemoryError("CUDA out of memory"), None])
@pytest.mark.parametrize("where", ["reading", "writing"])
def test_only_the_faulty_request_fails(model, error, where):
    """A byte of 0x01 in what the model reads raises, or (None) gives NaN."""
    original = type(model).forward

    def faulty(self, input_ids=None, **options):
        bad = (input_ids == 1 + text.FIRST_BYTE).any(-1)
        if where == "writing" and input_ids.shape[1] > 1:
            bad[:] = False
        if error is not None and bad.any():
            raise error
        output = original(self, input_ids=input_ids, **options)
        output.logits[bad] = torch.nan
        return output

    engine = Engine(model, BYTES, slots=3, chunk=32)
    expected = [alone(model, data, 25) for data in (TEXTS[0], TEXTS[3])]
    if where == "writing":  # the third writes 0x01 at once, between steps of the others

        def pick(logits, *rest, real=sample):
            ids = real(logits, *rest)
            spoiled = [
                slot for slot, r in engine.writing.running.items() if r.job.seed == 666 and r.written == 3
            ]
            ids[spoiled] = 1 + text.FIRST_BYTE
            return ids
    else:
        pick = sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", faulty.__get__(model), raising=False)
        patch.setattr("longnet.serve.slots.sample", pick)
        engine.start()
        good = [Client(engine, data=d, max_tokens=25, temperature=0.0) for d in (TEXTS[0], TEXTS[3])]
        bad = Client(
            engine, data=b"ab" if where == "writing" else b"a\x01", max_tokens=25, temperature=0.0, seed=666
        )
        failure = bad.result()[1]
        assert isinstance(failure, Failed)
        code = {
            RuntimeError: "internal_error",
            torch.OutOfMemoryError: "out_of_memory",
            type(None): "numerical_error",
        }
        assert failure.code == code[type(error)]
        assert "shape" not in failure.message
        assert [client.result()[0] for client in good] == expected
        again = Client(engine, data=TEXTS[0], max_tokens=25, temperature=0.0)
        assert again.result()[0] == expected[0]  # the slot that failed has no trace of it
        engine.close()
    assert engine.report()["free_slots"] == 3


def test_a_broken_device_ends_everything(model, monkeypatch):
    def broken(*_, **__):
        raise torch.AcceleratorError("illegal memory access")

    engine = Engine(model, BYTES, slots=2, chunk=32)
    monkeypatch.setattr(model, "forward", broken, raising=False)
    engine.start()
    clients = [Client(engine, data=b"a", max_tokens=3), Client(engine, make=Reading, data=b"b")]
    assert all(client.until(Failed).code == "engine_dead" for client in clients)
    with pytest.raises(Refused) as refused:
        Client(engine, data=b"a", max_tokens=3)
    assert refused.value.status == 503


def test_the_queue_is_bounded_by_jobs_and_by_tokens(model):
    engine = Engine(
        model, BYTES, slots=1, chunk=32, max_waiting=3, max_backlog=1000
    )  # not started: nothing leaves the queue
    for _ in range(3):
        Client(engine, data=b"12345", max_tokens=2)
    with pytest.raises(Refused) as refused:
        Client(engine, data=b"12345", max_tokens=2)
    assert (refused.value.status, refused.value.code) == (429, "overloaded")
    assert 1 <= refused.value.retry_after <= 600
    engine = Engine(model, BYTES, slots=1, chunk=32, max_waiting=3, max_backlog=1000)
    Client(engine, data=b"x" * 100000, max_tokens=2)  # alone it is taken, however long
    with pytest.raises(Refused):
        Client(engine, data=b"x", max_tokens=2)


def test_waiting_ends(model):
    engine = Engine(model, BYTES, slots=1, chunk=32, max_wait=0.0)
    clients = [Client(engine, data=b"a", max_tokens=50), Client(engine, data=b"a", max_tokens=50)]
    time.sleep(0.01)
    engine.start()
    assert clients[1].until(Failed).code == "waited_too_long"
    engine.close()


def test_drain_finishes_what_runs_and_takes_no_more(model):
    engine = Engine(model, BYTES, slots=2, chunk=32)
    engine.start()
    client = Client(engine, data=b"go", max_tokens=40, temperature=0.0)
    client.until(Text)
    engine.drain(60)
    with pytest.raises(Refused) as refused:
        Client(engine, data=b"late", max_tokens=1)
    assert refused.value.code == "draining"
    assert client.result()[0] == alone(model, b"go", 40)
    engine._thread.join(timeout=5)
    assert not engine._thread.is_alive()


def test_drain_has_an_end(model):
    engine = Engine(model, BYTES, slots=2, chunk=32)
    engine.start()
    client = Client(engine, data=b"go", max_tokens=10**9)
    client.until(Text)
    engine.drain(0.2)
    assert client.until(Failed).code == "draining"


def test_calls_run_in_the_thread_of_the_engine():
    engine = Engine(None, None)
    engine.start()
    client = Client(engine, make=Call, function=lambda: threading.current_thread().name)
    assert client.until(Done).value == "longnet-engine"
    broken = Client(engine, make=Call, function=lambda: 1 / 0)
    assert broken.until(Failed).code == "internal_error"
    engine.close()


def test_a_receiver_that_is_gone_is_a_cancelled_job(engine):
    def gone(event):
        raise RuntimeError("loop is closed")

    Client(engine, on_event=gone, data=b"a", max_tokens=10**9)
    assert Client(engine, data=b"a", max_tokens=3).result()[1].written == 3
    deadline = time.monotonic() + 10
    while engine.report()["free_slots"] < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.report()["free_slots"] == 3


def test_a_cache_of_another_device_is_moved_once(engine, model, monkeypatch):
    cache = LongNetCache(model.config, 1, dtype=torch.float64)
    model(input_ids=torch.full((1, 9), 70), past_key_values=cache, use_cache=True)
    monkeypatch.setattr(
        LongNetCache, "device", property(lambda self: "elsewhere" if self is cache else self.positions.device)
    )
    client = Client(engine, data=b"a", prefix=cache, max_tokens=2)
    assert client.until(Moved).cache.host_positions == (9,)
    client.result()


def test_top_p_of_one_request_changes_no_other(engine):
    """Whether somebody asks for an order or not: the same draws, before, beside and after."""
    options = {"data": b"tell me", "max_tokens": 30, "seed": 5}
    alone, _ = Client(engine, **options).result()
    cut = Client(engine, **options, top_p=0.5)
    beside = Client(engine, **options)
    assert cut.result()[0] != alone
    assert beside.result()[0] == alone
    assert Client(engine, **options).result()[0] == alone
    assert Client(engine, **options, top_p=0.5).result()[0] == "".join(
        event.text for event in cut.seen if isinstance(event, Text)
    )
