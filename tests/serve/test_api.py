"""The API over a real socket: OpenAI's client unchanged, sessions, tasks."""

import json
import threading
import time

import numpy as np
import pytest
import torch

openai = pytest.importorskip("openai")

from longnet import LongNetCache, text  # noqa: E402
from longnet.generate import generate  # noqa: E402
from longnet.tasks.classification import DocumentClassifier  # noqa: E402
from longnet.tasks.extraction import EntityExtractor  # noqa: E402

pytest.register_assert_rewrite("serving")
from serving import KEY, OTHER, tiny, until  # noqa: E402

pytest_plugins = ("serving",)

LONG = "It was the best of times, it was the worst of times. " * 40


@pytest.fixture(scope="module")
def model():
    return tiny()


def greedy(model, prompt, count):
    ids = torch.from_numpy(text.encode(prompt).astype(np.int64))[None]
    forbidden = (text.PAD, text.BOS, text.MASK)
    new = generate(
        model, ids, max_new_tokens=count, temperature=0, eos_token_id=text.EOS, forbidden_ids=forbidden
    ).ids[0]
    return text.decode(new)


@pytest.fixture
def client(server):
    with openai.OpenAI(api_key=KEY, base_url=server.url + "/v1", max_retries=0) as client:
        yield client


def test_openai_client_completes(client, model):
    for prompt in ("Hello", LONG):
        answer = client.completions.create(model="longnet", prompt=prompt, max_tokens=24, temperature=0)
        assert answer.choices[0].text == greedy(model, prompt, 24)
        assert answer.choices[0].finish_reason in ("length", "stop")
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.completion_tokens == 24
        assert answer.object == "text_completion"


def test_openai_client_streams(client):
    options = {
        "model": "longnet",
        "prompt": LONG,
        "max_tokens": 40,
        "seed": 9,
        "temperature": 0.8,
        "top_p": 0.9,
    }
    whole = client.completions.create(**options).choices[0].text
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole
    assert len(chunks) > 10
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.total_tokens == len(LONG) + 40
    assert len({c.id for c in chunks}) == 1


def test_openai_client_lists_models_and_gets_typed_errors(client, server):
    assert [m.id for m in client.models.list()] == ["longnet", "longnet-classify", "longnet-extract"]
    assert client.models.retrieve("longnet").id == "longnet"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-2")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-2", prompt="x")
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(model="longnet", prompt="x", echo=True)
    with pytest.raises(openai.BadRequestError, match="n: expected 1"):
        client.completions.create(model="longnet", prompt="x", n=2)
    with (
        pytest.raises(openai.AuthenticationError),
        openai.OpenAI(api_key="wrong", base_url=server.url + "/v1") as other,
    ):
        other.models.list()


def test_stop_ends_and_is_left_out(client):
    options = {"model": "longnet", "prompt": "a stop", "temperature": 1.5, "seed": 3}
    free = client.completions.create(**options, max_tokens=60).choices[0].text
    at = next(i for i in range(5, len(free)) if free[i].isascii() and free.find(free[i]) == i)
    stop = free[at]
    for stops in (stop, ["never there", stop]):
        answer = client.completions.create(**options, max_tokens=60, stop=stops)
        assert answer.choices[0].text == free[:at]
        assert answer.choices[0].finish_reason == "stop"
        chunks = client.completions.create(**options, max_tokens=60, stop=stops, stream=True)
        assert "".join(c.choices[0].text for c in chunks) == free[:at]


def test_prompts_as_ids_and_empty_ones(server, model):
    with server.client() as client:

        def ask(**body):
            answer = client.post("/v1/completions", json={"max_tokens": 9, "temperature": 0, **body})
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]

        assert (
            ask(prompt=[69, 199, 173])
            == ask(prompt="Aé")
            == ask(prompt=["Aé"])
            == ask(prompt=[[69, 199, 173]])
        )
        first = generate(
            model,
            torch.tensor([[text.EOS]]),
            max_new_tokens=9,
            temperature=0,
            forbidden_ids=(0, 1, 3),
            eos_token_id=2,
        )
        assert ask(prompt="") == ask() == text.decode(first.ids[0])


def test_concurrent_requests_equal_sequential_ones(server):
    options = [
        {"prompt": LONG[: 37 * i + 1], "max_tokens": 30, "seed": i, "temperature": 1.0} for i in range(10)
    ]

    def ask(body, into):
        with server.client() as client:
            into.append(client.post("/v1/completions", json=body).json()["choices"][0]["text"])

    one_by_one = []
    for body in options:
        ask(body, one_by_one)
    together = [[] for _ in options]
    threads = [threading.Thread(target=ask, args=pair) for pair in zip(options, together, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [x[0] for x in together] == one_by_one


def events(response):
    return [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]


def test_a_document_is_uploaded_once_and_asked_many_times(server, client, model):
    with server.client() as http:
        with http.stream("POST", "/v1/sessions?stream=true", content=LONG.encode()) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            told = events(response)
        progress, session = told[:-1], told[-1]
        assert [p["read"] for p in progress] == [*range(64, len(LONG) - 1, 64), len(LONG) - 1]
        assert len({p["cache_bytes"] for p in progress[5:]}) == 1  # flat
        assert session["object"] == "session"
        assert session["tokens"] == len(LONG)
        for question in ("", " And then", " Or"):
            answer = client.completions.create(
                model="longnet",
                prompt=question,
                max_tokens=16,
                temperature=0,
                extra_body={"session_id": session["id"]},
            )
            assert answer.choices[0].text == greedy(model, LONG + question, 16)
            assert answer.usage.prompt_tokens == len(LONG + question)
            assert answer.usage.prompt_tokens_details.cached_tokens == len(LONG) - 1
        assert http.get(f"/v1/sessions/{session['id']}").json()["tokens"] == len(LONG)
        assert session["id"] in [s["id"] for s in http.get("/v1/sessions").json()["data"]]
        with server.client(OTHER) as stranger:  # another key sees nothing of it
            assert stranger.get("/v1/sessions").json()["data"] == []
            assert stranger.get(f"/v1/sessions/{session['id']}").status_code == 404
            assert stranger.delete(f"/v1/sessions/{session['id']}").status_code == 404
            body = {"prompt": "x", "session_id": session["id"]}
            assert stranger.post("/v1/completions", json=body).status_code == 404
        assert http.delete(f"/v1/sessions/{session['id']}").json()["deleted"] is True
        assert http.get(f"/v1/sessions/{session['id']}").status_code == 404
        whole = http.post("/v1/sessions", json={"text": "é"})
        assert whole.json()["tokens"] == 2
        one = http.post("/v1/sessions", content=b"\xff")  # any byte, even one alone
        body = {"session_id": one.json()["id"], "max_tokens": 4, "temperature": 0}
        assert http.post("/v1/completions", json=body).status_code == 200


def test_sessions_survive_memory_and_restarts_and_the_oldest_goes(start, tmp_path):
    options = {"session_folder": tmp_path / "sessions", "max_sessions": 3, "resident_mb": 1e-3}
    server = start(**options)
    with server.client() as http:
        made = [
            http.post("/v1/sessions", content=LONG[:900].encode() + b"%d" % i).json()["id"] for i in range(4)
        ]
        assert http.get(f"/v1/sessions/{made[0]}").status_code == 404

        def ask(http, name):
            body = {"session_id": name, "max_tokens": 12, "temperature": 0, "prompt": "?"}
            return http.post("/v1/completions", json=body).json()["choices"][0]["text"]

        assert server.api.sessions.report()["resident"] == 1
        told = [ask(http, name) for name in made[1:]]
        assert [ask(http, name) for name in made[1:]] == told
        ask(http, made[1])
    server.stop()
    again = start(**options)
    with again.client() as http:
        assert [ask(http, name) for name in made[1:]] == told
        newest = http.post("/v1/sessions", content=b"new").json()[
            "id"
        ]  # made[1] was used before made[2] just now
        listed = [s["id"] for s in http.get("/v1/sessions").json()["data"]]
        assert listed == [made[2], made[3], newest]
        file = tmp_path / "sessions" / f"{made[2]}.safetensors"
        file.write_bytes(file.read_bytes()[:-3])
        with again.client() as fresh:
            body = {"session_id": made[2], "prompt": "?"}
            again.api.sessions._caches.clear()
            answer = fresh.post("/v1/completions", json=body)
        assert answer.status_code == 404
        assert "damaged" in answer.json()["error"]["message"]
        assert str(tmp_path) not in answer.text
    assert len(list((tmp_path / "sessions").glob("*.safetensors"))) == 2
    other = start(session_folder=tmp_path / "sessions", model=_retrained(tmp_path))
    with other.client() as http:  # the same shape, other weights: its sessions would be nonsense
        assert http.get("/v1/sessions").json()["data"] == []


def _retrained(folder):
    model = tiny()
    model.lm_head.weight.data += 1
    model.save_pretrained(folder / "retrained")
    return folder / "retrained"


def test_a_full_disk_is_an_error_and_leaves_nothing(start, tmp_path, monkeypatch):
    server = start(session_folder=tmp_path / "sessions")

    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(LongNetCache, "save", full)
    with server.client() as http:
        answer = http.post("/v1/sessions", content=b"text")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "storage"
        assert str(tmp_path) not in answer.text
        assert http.get("/v1/sessions").json()["data"] == []
    assert list((tmp_path / "sessions").iterdir()) == []


def test_what_a_model_of_relations_finds(monkeypatch):
    """The JSON that the page draws; `KnowledgeExtractor.read` itself has tests of its own."""
    from longnet.serve.app import Api
    from longnet.tasks.annotations import Annotation
    from longnet.tasks.knowledge import KnowledgeExtractor

    content = "Anna lives in Köln."
    found = Annotation(
        [(0, 4, "PER"), (14, 18, "LOC")], {"Anna": [0], "Köln": [1]}, [("Anna", "Köln", "lives in")]
    )
    monkeypatch.setattr(KnowledgeExtractor, "read", lambda self, texts: [found for _ in texts])
    api = object.__new__(Api)
    api.extractor = object.__new__(KnowledgeExtractor)
    anna, town = ({"start": s, "end": e, "label": label, "text": content[s:e]} for s, e, label in found.spans)
    assert api._extracted([content], 0) == [
        {
            "entities": [anna, town],
            "clusters": {"Anna": [anna], "Köln": [town]},
            "relations": [{"head": "Anna", "tail": "Köln", "label": "lives in"}],
        }
    ]


def test_classify_and_extract(server, folders):
    texts = ["Call me Ishmael. " * 30, "Überschrift: §1 Geltung\r\n"]
    with server.client() as http:
        answer = http.post("/v1/classify", json={"input": texts, "passages": 2}).json()
        expected = DocumentClassifier.load(folders.classify, "cpu").predict(texts, passages=2)
        assert answer["data"] == [json.loads(json.dumps(vars(p))) for p in expected]
        assert answer["model"] == "longnet-classify"
        one = http.post("/v1/extract", json={"input": texts[0], "model": "longnet-extract"}).json()
        spans = EntityExtractor.load(folders.extract, "cpu").extract([texts[0]])[0]
        assert [(e["start"], e["end"], e["label"]) for e in one["data"][0]["entities"]] == spans
        for entity in one["data"][0]["entities"]:
            assert texts[0][entity["start"] : entity["end"]] == entity["text"]
        assert http.post("/v1/extract", json={"input": "x", "model": "longnet"}).status_code == 404
        for wrong in (
            {},
            {"input": ""},
            {"input": []},
            {"input": [1]},
            {"input": "x", "passages": -1},
            {"input": "\ud800"},
        ):
            assert http.post("/v1/classify", content=json.dumps(wrong)).status_code == 400, wrong


def test_what_is_not_loaded_is_not_found(start, folders):
    server = start(model=None, classify=folders.classify)
    with server.client() as http:
        assert [m["task"] for m in http.get("/v1/models").json()["data"]] == ["classify"]
        for path in ("/v1/completions", "/v1/sessions", "/v1/extract"):
            answer = http.post(path, json={"prompt": "x", "input": "x", "text": "x"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert http.post("/v1/classify", json={"input": "x"}).status_code == 200


def test_health_and_metrics(server):
    with server.client(None) as http:
        assert http.get("/health").json() == {"status": "ok"}
    with server.client() as http:
        http.post("/v1/completions", json={"prompt": "x", "max_tokens": 5})
        until(lambda: server.api.bodies.held == 0)  # given back just after the answer
        report = http.get("/metrics").json()
        assert report["responses"]["200"] >= 2
        assert report["seconds"]["first_token"]["p50"] > 0
        assert report["seconds"]["between_tokens"]["p99"] > 0
        assert report["tokens_written"] >= 5
        assert report["memory"]["resident_bytes"] > 1e6
        assert report["engine"]["slot_cache_bytes"] > 0
        assert report["upload_bytes"] == 0


@pytest.mark.parametrize("vanish", ["reading", "streaming", "session"])
def test_who_goes_away_takes_the_work_along(start, vanish):
    """S2: the client vanishes; work stops within one chunk and the slot is free."""
    server = start(slots=1, chunk=64)
    steps = []
    original = type(server.engine.model).forward

    def counted(self, input_ids=None, **options):
        steps.append(input_ids.shape)
        return original(self, input_ids=input_ids, **options)

    server.engine.model.forward = counted.__get__(server.engine.model)
    prompt = "word " * 60000
    with server.client() as http:
        if vanish == "session":
            request = http.stream("POST", "/v1/sessions?stream=1", content=prompt.encode())
        else:
            body = {
                "prompt": prompt if vanish == "reading" else "x",
                "max_tokens": 60000,
                "temperature": 0,
                "stream": vanish == "streaming",
            }
            request = http.stream("POST", "/v1/completions", json=body) if body["stream"] else None
        if request is None:  # no stream: nothing is answered before the end
            thread = threading.Thread(target=_give_up, args=(server, body))
            thread.start()
            until(lambda: len(steps) > 5)
            thread.join()
        else:
            with request as response:
                lines = response.iter_lines()
                for _ in range(6):
                    next(lines)
        until(lambda: not (server.engine.report()["reading"] or server.engine.report()["writing"]))
        at = len(steps)
        assert at < 60000 / 64
        time.sleep(0.1)
        assert len(steps) == at
        assert server.engine.report()["free_slots"] == 1
        assert server.engine.statistics.jobs["cancelled"] == 1
        until(lambda: server.api.bodies.held == 0)
        assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
    server.stop()


def _give_up(server, body):
    import httpx

    with server.client() as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=body, timeout=0.5)
