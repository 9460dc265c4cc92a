"""A real server on a real socket, with tiny untrained models: started once a file, in a thread of this process."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for package in ("starlette", "uvicorn", "httpx"):
    pytest.importorskip(package)

import httpx  # noqa: E402

from longnet import LongNetConfig, LongNetForSequenceClassification, LongNetForTokenClassification  # noqa: E402
from longnet.serve.config import ServeConfig  # noqa: E402
from longnet.serve.server import Server, bind, build  # noqa: E402
from longnet.tasks.classification import DocumentClassifier  # noqa: E402
from longnet.tasks.extraction import EntityExtractor  # noqa: E402

KEY, OTHER = "first-key-0123456789abcdef", "Second-key-0123456789ABCDEF"
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "segment_lengths": [8, 32, 128], "dilation_rates": [1, 2, 4]}  # fmt: skip


def tiny(**changes):
    """A causal model whose greedy text depends on what it has read."""
    from longnet import LongNetForCausalLM

    torch.manual_seed(0)
    model = LongNetForCausalLM(LongNetConfig(**{**SHAPE, "num_key_value_heads": 2, **changes})).eval()
    for layer in model.model.layers:  # an untrained model repeats one byte whatever it reads
        layer.attention.o_proj.weight.data *= 40
    model.lm_head.weight.data *= 20
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a causal model, a classifier, an extractor."""
    root = tmp_path_factory.mktemp("models")
    tiny().save_pretrained(root / "model")
    torch.manual_seed(1)
    config = LongNetConfig(**SHAPE, bidirectional=True, id2label={0: "fiction", 1: "law"})
    DocumentClassifier(LongNetForSequenceClassification(config).eval(), ["fiction", "law"], False, None).save(
        root / "classify"
    )
    config = LongNetConfig(**SHAPE, bidirectional=True, id2label={0: "START-PER", 1: "END-PER"})
    tagger = LongNetForTokenClassification(config).eval()
    extractor = EntityExtractor(tagger, ["PER"], 20)
    extractor.save(root / "extract")
    return SimpleNamespace(
        model=root / "model", classify=root / "classify", extract=root / "extract", root=root
    )


class Running:
    """A server in a thread."""

    def __init__(self, config: ServeConfig, keys) -> None:
        self.engine, self.api = build(config)
        self.server = Server(self.api, keys)
        self.socket = bind("127.0.0.1", 0)
        self.socket.listen()
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.engine.start()
        self._thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self._thread.start()

    def client(self, key=KEY, **options):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, **options)

    def stop(self):
        self.server.should_exit = True
        self._thread.join(30)
        self.engine.close()
        if self.api.sessions is not None:
            self.api.sessions.close()


@pytest.fixture(scope="module")
def start(folders):
    """start(**options) -> Running; all are stopped at the end of the file."""
    running = []

    def make(keys=(KEY, OTHER), **options):
        defaults = {"model": folders.model, "device": "cpu", "slots": 3, "chunk": 64, "no_auth": not keys}
        running.append(Running(ServeConfig(**{**defaults, **options}), keys))
        return running[-1]

    yield make
    for server in running:
        server.stop()


@pytest.fixture(scope="module")
def server(start, folders):
    return start(classify=folders.classify, extract=folders.extract)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def until(condition, seconds=20):
    """Wait for something that another thread does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
