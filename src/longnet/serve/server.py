"""From options to a running server: models are loaded, a socket bound, signals obeyed."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn

from longnet.integrations.tokenizer import tokenizer_of_model
from longnet.model import LongNetForCausalLM
from longnet.model.folder import load_whole
from longnet.serve.app import Api
from longnet.serve.config import ServeConfig, api_keys
from longnet.serve.engine import Engine
from longnet.serve.sessions import SessionStore, weights_name
from longnet.text import Tokenizer

log = logging.getLogger("longnet.serve")

# Connections at one time, keep-alive ones included; uvicorn answers 503 beyond.
CONNECTIONS = 1000
HEADER_BYTES = 65536


def serve(config: ServeConfig, on_ready: Callable[[str], None] = lambda address: None) -> int:
    """Serve until SIGTERM or SIGINT; what runs may end first. Gives the exit code: 1 if the model has died.

    Raises:
        ValueError: options out of range, folders that hold no model, no keys. OSError: the address is taken.
    """
    config.check()
    keys = api_keys(config)
    with contextlib.ExitStack() as stack:
        # Bound before the models are loaded, which may take a while, but not yet listened on.
        bound = stack.enter_context(bind(config.host, config.port))
        engine, api = build(config)
        stack.callback(engine.close)
        if api.sessions is not None:
            stack.callback(api.sessions.close)
        engine.start()
        if engine.model is not None:
            engine.warm_up()
        server = Server(api, keys)
        bound.listen(1024)
        host = f"[{config.host}]" if ":" in config.host else config.host
        on_ready(f"http://{host}:{bound.getsockname()[1]}")
        server.run(sockets=[bound])
    return 1 if engine.dead else 0


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, for asyncio switches Nagle's delay (40 ms a request) off only where it sees TCP.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    return bound


class Server(uvicorn.Server):
    """On a signal the engine takes no more work, and uvicorn waits for what runs. The process then ends by itself."""

    def __init__(self, api: Api, keys: Sequence[str]) -> None:
        self._engine, self._seconds = api.engine, api.config.drain_seconds
        options: dict[str, Any] = {
            "http": "h11", "loop": "asyncio", "ws": "none", "lifespan": "off", "access_log": False, "log_config": None,
            "server_header": False, "proxy_headers": False, "limit_concurrency": CONNECTIONS, "timeout_keep_alive": 5,
            "timeout_graceful_shutdown": int(self._seconds) + 10, "h11_max_incomplete_event_size": HEADER_BYTES,
        }  # fmt: skip
        super().__init__(uvicorn.Config(api.app(keys), **options))
        self._engine.on_death = lambda: setattr(self, "should_exit", True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.drain(self._seconds)
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may take signals
            return
        # Unlike uvicorn's own, it does not raise the signal again at the end: a drained server exits with 0.
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {each: signal.signal(each, self.handle_exit) for each in signals}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def build(config: ServeConfig) -> tuple[Engine, Api]:
    """Load what is to be served."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a machine with CUDA; got none; use --device cpu")
    classifier = extractor = model = sessions = tokenizer = None
    if config.classify is not None:
        from longnet.tasks.classification import DocumentClassifier

        classifier = DocumentClassifier.load(config.classify, device)
    if config.extract is not None:
        from longnet.tasks.knowledge import load_extractor

        extractor = load_extractor(config.extract, device)
    if config.model is not None:
        model, tokenizer = load(config.model, device, config.dtype)
        name = weights_name(config.model) if config.session_folder is not None else "this run's"
        sessions = SessionStore(
            config.session_folder,
            model.config,
            name,
            tokenizer.name,
            config.max_sessions,
            config.bytes("resident"),
        )
    engine = Engine(
        model, tokenizer, slots=config.slots, chunk=config.chunk or (8192 if device == "cuda" else 1024),
        max_waiting=config.max_waiting, max_backlog=config.max_backlog_tokens, max_wait=config.max_wait_seconds,
    )  # fmt: skip
    return engine, Api(config, engine, sessions, tokenizer, classifier, extractor)


def load(path: Path, device: str, dtype: str) -> tuple[LongNetForCausalLM, Tokenizer]:
    """A causal model and its tokenizer. Raises ValueError for anything else."""
    if dtype == "auto" and device == "cuda":
        dtype = "bfloat16"
    model = load_whole(LongNetForCausalLM, path, dtype=dtype).eval()
    tokenizer = tokenizer_of_model(path, model.config.vocab_size)
    torch.nn.Module.to(model, device)
    return model, tokenizer
