"""S1: whoever comes without a key, or with nonsense, gets a short typed answer and costs nothing."""

import contextlib
import gc
import json
import socket

import pytest

pytest.register_assert_rewrite("serving")
from longnet.integrations.tokenizer import BYTES  # noqa: E402
from longnet.serve.config import ServeConfig, api_keys  # noqa: E402
from longnet.serve.gate import OPEN  # noqa: E402
from longnet.serve.requests import completion_request  # noqa: E402
from serving import KEY, OTHER, resident, until  # noqa: E402

pytest_plugins = ("serving",)

HEADERS = [
    {}, {"Authorization": ""}, {"Authorization": "Bearer"}, {"Authorization": "Bearer "}, {"Authorization": f"Bearer {KEY[:-1]}"},
    {"Authorization": f"Bearer {KEY}x"}, {"Authorization": f"Bearer {KEY.upper()}"}, {"Authorization": f"Bearer {OTHER.lower()}"},
    {"Authorization": f"Basic {KEY}"}, {"Authorization": KEY}, {"X-Api-Key": KEY}, {"Authorization": f"Bearer  {KEY}"},
    {"Cookie": f"Authorization=Bearer {KEY}"},
]  # fmt: skip


def routes(server):
    """(method, path) of every route the application has, and what lies beside them."""
    application = server.api.app([KEY]).app.app
    found = [(method, route.path) for route in application.routes for method in sorted(route.methods)]
    assert len(found) > 12
    beside = [("OPTIONS", route.path) for route in application.routes]
    beside += [(method, path + "/") for method, path in found]
    beside += [
        ("GET", p)
        for p in (
            "/nowhere",
            "//health",
            "/health/",
            "/docs",
            "/openapi.json",
            "/v1",
            "/page.html",
        )
    ]
    beside += [("POST", "/health"), ("PUT", "/"), ("TRACE", "/"), ("DELETE", "/page.js")]
    return [(m, p.replace("{id}", "x").replace("{id:path}", "x")) for m, p in [*found, *beside]]


def raw(server, method, path, headers):
    """The status of a request that no client library has tidied up."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: x",
        "Connection: close",
        *(f"{k}: {v}" for k, v in headers.items()),
    ]
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return int(answer.split()[1]), answer


def test_without_the_key_nothing_opens(server):
    """Every route and its neighbours, by every wrong key: 401, or the four open doors."""
    doors = {("GET", "/"), ("HEAD", "/"), ("GET", "/page.js"), ("GET", "/health"), ("HEAD", "/health")}
    assert doors == OPEN
    opened = set()
    for method, path in routes(server):
        for headers in HEADERS if (method, path) not in doors else [{}]:
            status, answer = raw(server, method, path, headers)
            assert status == (200 if (method, path) in doors else 401), (method, path, headers, answer)
            assert KEY.encode() not in answer
            if status == 200:
                opened.add((method, path))
            elif method != "HEAD":
                body = json.loads(answer.partition(b"\r\n\r\n")[2])
                assert body["error"]["code"] == "invalid_api_key"
                assert b"WWW-Authenticate: Bearer" in answer.replace(b"www-authenticate", b"WWW-Authenticate")
    assert opened == doors


def test_with_a_key_what_is_not_there_is_404_or_405(server):
    for method, path in routes(server):
        status, _ = raw(
            server,
            method,
            path.replace("TRACE", "GET"),
            {"Authorization": f"bearer {KEY}", "Content-Length": "0"},
        )
        assert status in (200, 400, 404, 405), (method, path)


def test_without_keys_only_this_machine_and_no_other_page(start):
    server = start(keys=())

    def status(**headers):
        with server.client(None) as client:
            return client.get("/v1/models", headers=headers).status_code

    assert status() == 200
    assert status(Host=f"localhost:{server.port}") == 200
    assert status(Host="[::1]:8000") == 200
    assert status(Origin=server.url) == 200
    for headers in (
        {"Host": "evil.example"}, {"Host": "127.0.0.1.evil.example"}, {"Host": ""}, {"Host": "127.0.0.1@evil.example"},
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"},
    ):  # fmt: skip
        assert status(**headers) == 403, headers


BAD = [
    b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe{}", b"{}garbage", b'{"a":' * 20000, b"[" * 100000, b'{"prompt": NaN}',
    b'{"temperature": Infinity}', b'{"seed": ' + b"9" * 5000 + b"}", b'{"temperature": 1e999}',
    *(
        json.dumps(body).encode()
        for body in (
            {"prompt": 1}, {"prompt": {"a": 1}}, {"prompt": [1, "a"]}, {"prompt": ["a", "b"]}, {"prompt": [[1], [2]]},
            {"prompt": [-1]}, {"prompt": [260]}, {"prompt": [True]}, {"prompt": [1.5]}, {"prompt": "\ud800"},
            {"temperature": -0.1}, {"temperature": 3}, {"temperature": "1"}, {"temperature": True}, {"temperature": 10**400},
            {"top_p": 0}, {"top_p": 1.1}, {"max_tokens": 0}, {"max_tokens": 10**9}, {"max_tokens": 1.0}, {"max_tokens": "9"},
            {"n": 10**9}, {"n": 0}, {"n": "1"}, {"best_of": 3}, {"echo": True}, {"logprobs": 5}, {"suffix": "x"},
            {"stop": ""}, {"stop": ["a"] * 5}, {"stop": [1]}, {"stop": "x" * 300}, {"seed": 2**63}, {"seed": 0.5},
            {"stream": 1}, {"stream_options": []}, {"stream_options": {"x": 1}}, {"model": 3}, {"session_id": 7},
            {"user": {}}, {"no_such_field": 1}, {"presence_penalty": 1}, {"logit_bias": {"1": 2}},
        )
    ),
    json.dumps({f"field {i}": "x" * 700 for i in range(5000)}).encode(),  # 5,000 errors
    json.dumps({"x" * 10**6: 1}).encode(),
]  # fmt: skip


def test_nonsense_is_400_and_short(server, folders, caplog):
    with server.client() as client:
        for body in BAD:
            for path in ("/v1/completions", "/v1/classify", "/v1/extract"):
                answer = client.post(path, content=body)
                assert answer.status_code == 400, (path, body[:80], answer.text[:300])
                assert len(answer.content) < 4000
                error = answer.json()["error"]
                assert error["type"] == "invalid_request_error"
                assert error["message"]
                for secret in (str(folders.root), "Traceback", KEY, ".py", "line "):
                    assert secret not in answer.text or secret == "line ", answer.text
        for body in (
            b"",
            b'{"text": 5}',
            b'{"text": ""}',
            b'{"text": "x", "more": 1}',
            b"{",
            b'{"text": "\\ud800"}',
        ):
            answer = client.post("/v1/sessions", content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400, body
        many = client.post("/v1/completions", content=BAD[-2]).json()["error"]["message"]
        assert "and 4990 more" in many
    for secret in (KEY, OTHER, str(folders.root), "Traceback"):
        assert secret not in caplog.text
    until(lambda: server.api.bodies.held == 0)


def test_too_much_is_413_while_it_comes_and_memory_stays(start, folders):
    server = start(
        max_prompt_mb=1, max_document_mb=2, max_task_mb=0.5, classify=folders.classify, chunk=65536
    )
    with server.client() as client:
        client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
    gc.collect()
    before = resident()
    for path, limit in (("/v1/completions", 2**20), ("/v1/sessions", 2**21), ("/v1/classify", 2**19)):
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        # A prompt of 10^9 tokens: refused by what it announces, before a byte of it is read.
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall((head + "Content-Length: 1000000000\r\n\r\n").encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
            assert b" 413 " in answer.split(b"\r\n")[0], answer
            assert str(limit).encode() in answer
        # The same, announcing nothing: refused while it is read.
        sent = 0
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall((head + "Transfer-Encoding: chunked\r\n\r\n").encode())
            block = b"10000\r\n" + b"x" * 65536 + b"\r\n"
            try:
                while sent < 10**9:
                    connection.sendall(block)
                    sent += 65536
            except OSError:
                pass  # the server has hung up
        assert sent < limit + 2**24  # what lies in the sockets' buffers comes on top
    with server.client() as client:
        for _ in range(20):
            answer = client.post("/v1/completions", content=b" " * (2**20 + 1))
            assert answer.status_code == 413, answer.text
            assert answer.json()["error"]["code"] == "body_too_large"
    gc.collect()
    until(lambda: server.api.bodies.held == 0)
    assert resident() - before < 50e6


def test_who_sends_far_too_much_still_reads_why(start):
    server = start(max_prompt_mb=1)
    for size in (5 * 2**20, 40 * 2**20):
        for body in (b"x" * size, iter([b"x" * 2**20] * (size >> 20))):
            with server.client() as client:
                answer = client.post("/v1/completions", content=body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_a_long_header_is_refused(server):
    with contextlib.suppress(ConnectionError):  # the server hangs up without reading the rest
        assert raw(server, "GET", "/health", {"X-Long": "x" * 10**6})[0] == 400
    assert raw(server, "GET", "/health", {"X-Long": "x" * 10**4})[0] == 200


def test_a_body_that_never_ends_is_408(start):
    server = start(body_seconds=0.2)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 10\r\n\r\nabc"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head.encode())
        assert b" 408 " in connection.recv(65536).split(b"\r\n")[0]
    until(lambda: server.api.bodies.held == 0)


def test_uploads_of_all_clients_are_bounded(start):
    server = start(max_uploads_mb=1)
    head = f"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 1000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as slow:
        slow.sendall(head.encode() + b"x" * 900000)
        until(lambda: server.api.bodies.held == 900000)
        with server.client() as client:
            answer = client.post("/v1/sessions", content=b"x" * 300000)
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) > 0
    until(lambda: server.api.bodies.held == 0)


def test_security_headers_are_everywhere(server):
    with server.client() as client:
        for path in ("/", "/health", "/v1/models", "/nowhere"):
            headers = client.get(path).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert "default-src 'self'" in headers["content-security-policy"]
            assert "server" not in headers


def test_a_mistake_of_ours_is_500_without_details(server, monkeypatch):
    def wrong(*_):
        raise KeyError("/secret/path")

    monkeypatch.setattr("longnet.serve.app.completion_request", wrong)
    with server.client() as client:
        answer = client.post("/v1/completions", json={})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    until(lambda: server.api.bodies.held == 0)


# Options.


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("LONGNET_API_KEYS", raising=False)
    file = tmp_path / "keys"
    file.write_text(f"# mine\n{KEY}\n\n  {OTHER}\r\n")
    assert api_keys(ServeConfig(model=tmp_path, api_key_file=file)) == [KEY, OTHER]
    monkeypatch.setenv("LONGNET_API_KEYS", f"{OTHER} {KEY}")
    assert api_keys(ServeConfig(model=tmp_path)) == [OTHER, KEY]
    with pytest.raises(ValueError, match="both"):
        api_keys(ServeConfig(model=tmp_path, no_auth=True))
    monkeypatch.setenv("LONGNET_API_KEYS", "short")
    with pytest.raises(ValueError, match="16 printable") as error:
        api_keys(ServeConfig(model=tmp_path))
    assert "short" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"model": None}, {"port": -1}, {"port": 70000}, {"slots": 0}, {"chunk": 0}, {"max_prompt_mb": 0}, {"max_tokens": 0},
        {"max_prompt_tokens": 0}, {"max_backlog_tokens": 0},
        {"name": "a b"}, {"no_auth": True, "host": "0.0.0.0"}, {"no_auth": True, "host": "example.org"}, {"drain_seconds": -1},
        {"max_wait_seconds": float("nan")}, {"no_auth": True, "host": "::"},
    ],
)  # fmt: skip
def test_options(tmp_path, options):
    with pytest.raises(ValueError, match="expected"):
        ServeConfig(**{"model": tmp_path, **options}).check()


def test_neutral_fields_of_clients_are_taken():
    body = {"n": 1, "best_of": 1, "echo": False, "logprobs": None, "suffix": None, "logit_bias": {}, "presence_penalty": 0,
            "frequency_penalty": 0.0, "user": "me", "stop": None, "seed": None}  # fmt: skip
    assert completion_request(json.dumps(body).encode(), 10**5, BYTES).max_tokens == 16
