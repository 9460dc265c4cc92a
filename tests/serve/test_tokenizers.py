"""Models over a file of the tokenizers library, served: ids from text and text from ids, at the server's borders alone."""

import json
import threading
import time

import numpy as np
import pytest
import torch

openai = pytest.importorskip("openai")

from longnet.generate import generate  # noqa: E402
from longnet.integrations import tokenizer_file  # noqa: E402
from longnet.integrations.tokenizer import load_tokenizer  # noqa: E402
from tokenizer_files import END, LINES, byte_level, lower_case, wide  # noqa: E402

pytest.register_assert_rewrite("serving")
from serving import KEY, tiny, until  # noqa: E402

pytest_plugins = ("serving",)

LONG = "".join(LINES) * 20
MAKERS = {"bpe": lambda path: byte_level(path, specials=("<pad>", END)), "wide": wide, "lossy": lower_case}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(kind) -> folder of a model with more ids than its tokenizer, which like to come."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "model"
            tokenizer = load_tokenizer(MAKERS[kind](folder.parent / "tokenizer.json"), END)
            size = len(tokenizer.spelling)
            ends = {"eos_token_id": tokenizer.end, "pad_token_id": None, "bos_token_id": None}
            model = tiny(vocab_size=size + 10, tie_word_embeddings=False, **ends)
            model.lm_head.weight.data[[*tokenizer.unwritten[:20], *range(size, size + 10)]] *= 3
            model.save_pretrained(folder)
            tokenizer.save(folder)
            made[kind] = folder
        return made[kind]

    return make


@pytest.fixture(scope="module")
def served(start, saved):
    """served(kind) -> a server of it."""
    running = {}

    def serve(kind):
        if kind not in running:
            running[kind] = start(model=saved(kind))
        return running[kind]

    return serve


@pytest.fixture
def server(served):
    return served("bpe")


@pytest.fixture
def tokenizer(server):
    return server.api.tokenizer


def no_text(server):
    """Ids of the model that are never to be written."""
    tokenizer = server.api.tokenizer
    return [*tokenizer.unwritten, *range(len(tokenizer.spelling), server.engine.model.config.vocab_size)]


def continued(server, ids, count, forbidden):
    """Ids by `generate`."""
    return generate(
        server.engine.model, torch.from_numpy(ids.astype(np.int64))[None], max_new_tokens=count, temperature=0,
        eos_token_id=server.api.tokenizer.end, forbidden_ids=forbidden,
    ).ids[0]  # fmt: skip


def greedy(server, ids, count):
    new = continued(server, ids, count, no_text(server))
    return server.api.tokenizer.decode_bytes(new).decode("utf-8", "replace")


def ask(server, **body):
    with server.client() as http:
        answer = http.post("/v1/completions", json={"temperature": 0, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()


def stream(server, **body):
    """(the pieces of text, the reason of the end, usage) of a stream."""
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with server.client() as http, http.stream("POST", "/v1/completions", json=body) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    chunks = [json.loads(line) for line in lines]
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    return [c["text"] for c in choices[:-1]], choices[-1]["finish_reason"], chunks[-1]["usage"]


@pytest.fixture
def script(monkeypatch):
    """script(ids): what the model writes from now on."""

    def write(ids):
        fixed = torch.tensor(ids)
        draw = lambda logits, temperature, top_p, seeds, steps: fixed[steps.clamp(max=len(ids) - 1)]  # noqa: E731
        monkeypatch.setattr("longnet.serve.slots.sample", draw)

    return write


@pytest.mark.parametrize("kind", ["bpe", "wide"])
def test_completions_are_those_of_generate_and_usage_counts_tokens(served, kind, monkeypatch):
    monkeypatch.setattr(tokenizer_file, "PIECE", 512)  # the long prompt is encoded in several
    server = served(kind)
    tokenizer = server.api.tokenizer
    prompts = ("the quick", "Straße 🐋", LONG)
    free = {i for prompt in prompts for i in continued(server, tokenizer.encode(prompt), 20, ())}
    assert free & set(no_text(server))  # what the model would write
    texts = set()
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        expected = greedy(server, ids, 20)
        with openai.OpenAI(api_key=KEY, base_url=server.url + "/v1", max_retries=0) as client:
            answer = client.completions.create(model="longnet", prompt=prompt, max_tokens=20, temperature=0)
        assert answer.choices[0].text == expected
        texts.add(expected)
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 20)
        assert len(ids) < len(prompt.encode()) or kind == "wide"
        pieces, reason, usage = stream(server, prompt=prompt, max_tokens=20, temperature=0)
        assert ("".join(pieces), reason, usage["total_tokens"]) == (expected, "length", len(ids) + 20)
        assert ask(server, prompt=ids.tolist(), max_tokens=20)["choices"] == answer.model_dump()["choices"]
    assert len(texts) == len(prompts)
    empty = greedy(server, np.array([tokenizer.end]), 5)
    assert ask(server, prompt="", max_tokens=5)["choices"][0]["text"] == empty


def test_ids_are_those_of_the_tokenizer(server):
    with server.client() as http:
        answer = http.post("/v1/completions", json={"prompt": [340]})
    assert answer.status_code == 400
    assert "from 0 to 339" in answer.json()["error"]["message"]


def test_text_comes_in_whole_characters(server, tokenizer, script):
    """A character of four tokens arrives at once, and what is no character is said to be none."""
    one_by_one = {piece[0]: i for i, piece in enumerate(tokenizer.spelling) if len(piece) == 1}
    expected = "naïve 🐋 für"
    script([*(one_by_one[byte] for byte in expected.encode()), tokenizer.end])
    pieces, reason, usage = stream(server, prompt="x", max_tokens=100)
    assert pieces == list(expected)
    assert (reason, usage["completion_tokens"]) == ("stop", len(expected.encode()) + 1)
    pieces, reason, _ = stream(server, prompt="x", max_tokens=9)  # ends within the whale
    assert (pieces, reason) == ([*"naïve ", "\ufffd"], "length")
    assert ask(server, prompt="x", max_tokens=100)["choices"][0]["text"] == expected


@pytest.mark.parametrize("stop", ["st + se", "ond\n", "return", "ß", " +", "nd\n\nEin F"])
def test_stops_lie_anywhere_in_tokens(server, tokenizer, script, stop):
    whole = "".join(LINES[1:])
    ids = tokenizer.encode(whole).tolist()
    ends = np.cumsum([len(tokenizer.spelling[i]) for i in ids])
    at = whole.encode().index(stop.encode())
    if stop == "st + se":
        assert not {at, at + len(stop)} & set(ends.tolist())  # begins and ends within tokens
    written = int(np.searchsorted(ends, at + len(stop.encode()))) + 1
    script([*ids, tokenizer.end])
    expected = whole[: whole.index(stop)]
    answer = ask(server, prompt="x", max_tokens=200, stop=[stop, "never there"])
    assert answer["choices"][0]["text"] == expected
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == written
    pieces, reason, usage = stream(server, prompt="x", max_tokens=200, stop=stop)
    assert ("".join(pieces), reason, usage["completion_tokens"]) == (expected, "stop", written)
    assert len(pieces) > 3


def test_a_document_is_read_once_and_asked_many_times(server, tokenizer):
    document = tokenizer.encode(LONG)
    with server.client() as http:
        with http.stream("POST", "/v1/sessions?stream=true", content=LONG.encode()) as response:
            told = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
        assert [p["read"] for p in told[:-1]] == [*range(64, len(document) - 1, 64), len(document) - 1]
        session = told[-1]
        assert session["tokens"] == len(document)
        for question in ("", " and then", "ß"):
            asked = np.concatenate((document, tokenizer.encode(question)))
            answer = ask(server, prompt=question, session_id=session["id"], max_tokens=12)
            assert answer["choices"][0]["text"] == greedy(server, asked, 12)
            assert answer["usage"]["prompt_tokens"] == len(asked)
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(document) - 1
        one = http.post("/v1/sessions", json={"text": "x"}).json()
        assert one["tokens"] == 1
        expected = greedy(server, np.concatenate(([tokenizer.end], tokenizer.encode("x"))), 6)
        assert ask(server, session_id=one["id"], max_tokens=6)["choices"][0]["text"] == expected


def test_a_session_is_refused_with_another_tokenizer(start, saved, tmp_path, caplog):
    options = {"model": saved("bpe"), "session_folder": tmp_path / "sessions"}
    server = start(**options)
    with server.client() as http:
        name = http.post("/v1/sessions", content=LONG.encode()).json()["id"]
    told = ask(server, prompt=" and", session_id=name)["choices"][0]["text"]
    server.stop()
    mine = {file: file.read_bytes() for file in saved("bpe").glob("tokenizer*")}
    try:
        other = byte_level(tmp_path / "other.json", specials=(END, "<pad>"))  # the same texts, other ids
        load_tokenizer(other, END).save(saved("bpe"))
        changed = start(**options)
        with changed.client() as http:
            assert http.get("/v1/sessions").json()["data"] == []
            answer = http.post("/v1/completions", json={"prompt": " and", "session_id": name})
            assert answer.status_code == 404
            assert "this model and its tokenizer" in answer.json()["error"]["message"]
        names = (changed.api.tokenizer.name, server.api.tokenizer.name)
        assert f"expected a session with tokenizer {names[0]}; got {names[1]}" in caplog.text
        changed.stop()
    finally:
        for file, content in mine.items():
            file.write_bytes(content)
    again = start(**options)
    assert ask(again, prompt=" and", session_id=name)["choices"][0]["text"] == told


def test_text_that_the_tokenizer_cannot_write_is_400(served, saved):
    server = served("bpe")
    with server.client() as http:
        answer = http.post("/v1/sessions", content="Fußgänger".encode() + b"\xff")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_text")
        assert "the tokenizer of longnet needs; got byte 0xff at offset 11" in answer.text
        assert str(saved("bpe")) not in answer.text
    lossy = served("lossy")
    with lossy.client() as http:
        assert http.post("/v1/completions", json={"prompt": "the fox"}).status_code == 200
        answer = http.post("/v1/completions", json={"prompt": "the Fox"})
        assert answer.status_code == 400
        assert "at offset 4" in answer.text
        assert str(saved("lossy")) not in answer.text
    for each in (server, lossy):
        until(lambda each=each: each.api.bodies.held == 0)


def test_prompts_are_limited_in_tokens_and_bodies_in_bytes(start, saved):
    server = start(model=saved("bpe"), max_prompt_tokens=10, max_prompt_mb=1e-3)
    tokenizer = server.api.tokenizer
    fits = tokenizer.decode_bytes(tokenizer.encode(LONG)[:10]).decode()
    assert len(fits) > 20
    assert ask(server, prompt=fits)["usage"]["prompt_tokens"] == 10
    with server.client() as http:
        for prompt in (fits + "☃", [7] * 13):
            answer = http.post("/v1/completions", json={"prompt": prompt})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "prompt_too_long")
            assert "at most 10 tokens; got 13" in answer.json()["error"]["message"]
        assert http.post("/v1/completions", json={"prompt": "x" * 2000}).status_code == 413
    until(lambda: server.api.bodies.held == 0)


def test_who_goes_away_stops_the_encoding(server, monkeypatch):
    import httpx

    made = []

    def slow(data):
        while True:
            made.append(threading.current_thread().name)
            time.sleep(0.02)
            yield np.zeros(0, np.uint16)

    monkeypatch.setattr(server.api.tokenizer, "pieces", slow)
    with server.client() as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/sessions", content=b"x" * 1000, timeout=0.3)
    until(lambda: server.api.bodies.held == 0)
    assert len(made) > 3
    assert server._thread.name not in made  # the event loop serves others meanwhile
    count = len(made)
    time.sleep(0.1)
    assert len(made) == count
