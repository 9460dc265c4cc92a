"""S2: four times what the server can take, faulty requests among good ones, SIGTERM under load; the command itself."""

import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.register_assert_rewrite("serving")
import httpx  # noqa: E402

from longnet import text  # noqa: E402
from serving import KEY  # noqa: E402

pytest_plugins = ("serving",)


def ask(server, body, key=KEY):
    with server.client(key) as client:
        began = time.monotonic()
        answer = client.post("/v1/completions", json=body)
        return answer, time.monotonic() - began


def test_four_times_the_capacity_is_429_and_the_admitted_are_quick(start):
    server = start(slots=2, max_waiting=4)
    body = {"prompt": "x" * 500, "max_tokens": 60, "temperature": 0}
    _, alone = ask(server, body)
    capacity = 2 + 4
    with concurrent.futures.ThreadPoolExecutor(4 * capacity) as pool:
        answers = list(pool.map(lambda _: ask(server, body), range(4 * capacity)))
    admitted = [(a, seconds) for a, seconds in answers if a.status_code == 200]
    refused = [a for a, _ in answers if a.status_code == 429]
    assert len(admitted) + len(refused) == 4 * capacity
    assert len(admitted) >= capacity
    assert len(refused) >= capacity
    assert all(1 <= int(a.headers["retry-after"]) <= 600 for a in refused)
    assert {a.json()["error"]["type"] for a in refused} == {"rate_limit_error"}
    assert len({a.json()["choices"][0]["text"] for a, _ in admitted}) == 1
    # Bounded: everyone admitted waits for at most the queue before it (with the threads of 24 clients in this process).
    assert max(seconds for _, seconds in admitted) < 5 + 4 * capacity * alone
    metrics = server.engine.statistics
    assert metrics.requests["429"] == len(refused)


def test_only_the_faulty_requests_fail_under_load(start, monkeypatch):
    server = start(slots=3, max_waiting=100)
    model = server.engine.model
    original = type(model).forward
    faults = {1: RuntimeError("secret detail"), 2: torch.OutOfMemoryError("CUDA out of memory"), 3: None}

    def faulty(input_ids=None, **options):
        bad = {byte: (input_ids == byte + text.FIRST_BYTE).any(-1) for byte in faults}
        for byte, error in faults.items():
            if error is not None and bad[byte].any() and input_ids.shape[1] > 1:
                raise error
        output = original(model, input_ids=input_ids, **options)
        if input_ids.shape[1] > 1:
            output.logits[bad[3]] = torch.nan
        return output

    good = {"prompt": "a good prompt", "max_tokens": 25, "temperature": 0}
    expected = ask(server, good)[0].json()["choices"][0]["text"]
    monkeypatch.setattr(model, "forward", faulty, raising=False)
    bodies = [good if i % 2 else {"prompt": "bad" + chr(1 + i // 2 % 3), "max_tokens": 25} for i in range(24)]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = [answer for answer, _ in pool.map(lambda body: ask(server, body), bodies)]
    for body, answer in zip(bodies, answers, strict=True):
        if body is good:
            assert answer.json()["choices"][0]["text"] == expected
        else:
            code = {1: "internal_error", 2: "out_of_memory", 3: "numerical_error"}[ord(body["prompt"][-1])]
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                503 if code == "out_of_memory" else 500,
                code,
            )
            assert "secret" not in answer.text
    assert server.engine.report()["free_slots"] == 3


class Command:
    """`longnet serve` as a user starts it."""

    def __init__(self, *arguments, keys=KEY, **options):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        environment.pop("LONGNET_API_KEYS", None)
        if keys:
            environment["LONGNET_API_KEYS"] = keys
        command = [sys.executable, "-m", "longnet", "serve", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
        )

    def address(self):
        line = self.process.stdout.readline()
        assert "serving" in line, line + self.process.stderr.read()
        return re.search(r"http://\S+", line)[0]

    def end(self, timeout=60):
        out, error = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, error


@pytest.fixture
def command():
    started = []

    def start(*arguments, **options):
        started.append(Command(*arguments, **options))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.communicate()


def test_sigterm_under_load_drains_and_exits_0(command, folders):
    served = command(
        "--model",
        folders.model,
        "--port",
        0,
        "--device",
        "cpu",
        "--slots",
        2,
        "--chunk",
        64,
        "--drain-seconds",
        60,
    )
    url = served.address()
    headers = {"Authorization": f"Bearer {KEY}"}
    options = {"headers": headers, "timeout": 60, "trust_env": False}
    assert httpx.get(url + "/v1/models").status_code == 401
    body = {"prompt": "x", "max_tokens": 400, "temperature": 0}
    whole = httpx.post(url + "/v1/completions", json=body, **options).json()["choices"][0]["text"]

    def stream(_):
        with httpx.stream(
            "POST", url + "/v1/completions", json={**body, "stream": True}, **options
        ) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        return response.status_code, lines

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stream, i) for i in range(4)]  # two are written, two wait
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            report = httpx.get(url + "/metrics", **options).json()["engine"]
            if report["writing"] == 2 and report["waiting"] == 2:
                break
        assert report["writing"] == 2
        served.process.send_signal(signal.SIGTERM)
        for status, lines in (s.result() for s in streams):
            assert status == 200
            assert lines[-1] == "data: [DONE]"
            chunks = [json.loads(line[6:]) for line in lines[:-1]]
            assert "".join(c["choices"][0]["text"] for c in chunks) == whole
    code, _, error = served.end()
    assert code == 0, error
    assert "Traceback" not in error
    assert KEY not in error


def test_drain_ends_in_time_with_an_error_in_the_stream(start):
    server = start(drain_seconds=0.3)
    body = {
        "prompt": "x",
        "max_tokens": 60000,
        "temperature": 0,
        "stream": True,
    }  # greedy: no chance of an end id
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        for _ in range(4):
            next(lines)
        server.server.handle_exit(signal.SIGTERM, None)
        asked = time.monotonic()
        rest = [line for line in lines if line.startswith("data: ")]
    assert json.loads(rest[-2][6:])["error"]["code"] == "draining"
    assert rest[-1] == "data: [DONE]"
    server._thread.join(20)
    assert not server._thread.is_alive()
    assert time.monotonic() - asked < 15


def test_a_broken_device_ends_the_server_with_1(start, monkeypatch):
    server = start()

    def broken(*_, **__):
        raise torch.AcceleratorError("an illegal memory access")

    monkeypatch.setattr(server.engine.model, "forward", broken, raising=False)
    answer, _ = ask(server, {"prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
    server._thread.join(20)
    assert not server._thread.is_alive()  # so that whoever watches the process starts it again
    assert server.engine.dead


@pytest.mark.parametrize(
    ("arguments", "keys", "part"),
    [
        ((), KEY, "--model"),
        (("--model", "nowhere"), KEY, "config.json"),
        (("--model", "MODEL"), "", "--no-auth"),
        (("--model", "MODEL"), "tooshort", "16 printable"),
        (("--model", "MODEL", "--no-auth"), KEY, "both"),
        (("--model", "MODEL", "--no-auth", "--host", "0.0.0.0"), "", "loopback"),
        (("--model", "MODEL", "--api-key-file", "nowhere"), "", "api_key_file"),
        (("--classify", "MODEL"), KEY, "longnet classify train"),
        (("--extract", "CLASSIFY"), KEY, "longnet extract train"),
        (("--model", "MODEL", "--port", "99999"), KEY, "port"),
        (("--model", "MODEL", "--slots", "0"), KEY, "slots"),
        (("--model", "MODEL", "--host", "192.0.2.1"), KEY, "Cannot assign"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line_and_exit_code_2(folders, monkeypatch, capsys, arguments, keys, part):
    from longnet.cli import main

    places = {"MODEL": folders.model, "CLASSIFY": folders.classify}
    monkeypatch.setenv("LONGNET_API_KEYS", keys)
    monkeypatch.setattr(
        sys, "argv", ["longnet", "serve", "--device", "cpu", *(str(places.get(a, a)) for a in arguments)]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("longnet: ")]
    assert len(lines) == 1, error
    assert part in lines[0]
    assert not keys or keys not in error


def test_a_taken_port_and_bad_input_as_a_user_sees_them(command, folders, longnet, monkeypatch):
    served = command("--model", folders.model, "--port", 0, "--device", "cpu")
    url = served.address()
    port = url.rpartition(":")[2]
    monkeypatch.setenv("LONGNET_API_KEYS", KEY)
    code, out, error = longnet("serve", "--model", folders.model, "--port", port, "--device", "cpu")
    assert code == 2
    assert "in use" in error
    assert "Traceback" not in out + error
    options = {"headers": {"Authorization": f"Bearer {KEY}"}, "trust_env": False}
    assert httpx.post(url + "/v1/completions", content=b"{", **options).status_code == 400
    assert httpx.post(url + "/v1/completions", json={"temperature": -1}, **options).status_code == 400
    assert (
        httpx.post(url + "/v1/completions", json={"prompt": "x", "max_tokens": 3}, **options).status_code
        == 200
    )
    served.process.send_signal(signal.SIGINT)
    code, out, error = served.end()
    assert code == 0
    assert "Traceback" not in out + error
