"""The command that serves models over HTTP: serve."""

from __future__ import annotations

import importlib.util
import logging
import sys

import tyro

from longnet.serve.config import ServeConfig


def serve(config: tyro.conf.FlagCreatePairsOff[tyro.conf.OmitArgPrefixes[ServeConfig]]) -> None:
    """Serve completions, sessions, classification and extraction over HTTP, as OpenAI's API where it has one."""
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f'expected {package}; install it with pip install "longnet-attention[serve]"')
    from longnet.serve.server import serve as run

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s: %(message)s")

    def ready(address: str) -> None:
        print(f"serving {config.name} on {address} (a page for people, and the API under /v1)", flush=True)

    sys.exit(run(config, ready))
