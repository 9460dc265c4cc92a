"""What `longnet serve` may be told, and how far a request may go."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

KEYS_VARIABLE = "LONGNET_API_KEYS"


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Models, address and limits."""

    model: Path | None = None
    """Folder of a causal model (OUTPUT/model of `longnet train`): completions and sessions."""
    classify: Path | None = None
    """Folder made by `longnet classify train`: /v1/classify."""
    extract: Path | None = None
    """Folder made by `longnet extract train`: /v1/extract."""
    name: str = "longnet"
    """Name of the model towards clients."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key_file: Path | None = None
    """File with one API key a line; the variable LONGNET_API_KEYS (keys separated by spaces) also counts."""
    no_auth: bool = False
    """Serve without keys; only on a loopback address."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and caches; auto: bfloat16 on CUDA, else as saved."""
    slots: int = 8
    """Texts that are written at one time."""
    chunk: int | None = None
    """Tokens read at one time: how long one text may hold up the others. Default 8192 on CUDA, 1024 elsewhere."""
    max_prompt_mb: float = 16.0
    """Largest body of a completion in MiB; larger ones are refused with 413."""
    max_prompt_tokens: int = 1 << 24
    """Longest prompt of a completion in tokens; longer ones are refused with 400."""
    max_document_mb: float = 256.0
    """Largest document of a session in MiB."""
    max_task_mb: float = 4.0
    """Largest body of a classify or extract request in MiB."""
    max_uploads_mb: float = 1024.0
    """Bytes of all bodies that are held at one time, in MiB; beyond, 429. Ids take 2 bytes each besides, or 4."""
    max_tokens: int = 65536
    """Most tokens that a completion may ask for."""
    max_waiting: int = 64
    """Requests that wait for a place; beyond, 429 with Retry-After."""
    max_backlog_tokens: int = 1 << 29
    """Tokens that wait to be read, of all requests; beyond, 429 with Retry-After."""
    max_wait_seconds: float = 120.0
    """A request that found no place in this time gets 503."""
    body_seconds: float = 300.0
    """A request whose body is not there in this time gets 408."""
    drain_seconds: float = 30.0
    """After SIGTERM: time for what runs to end."""
    session_folder: Path | None = None
    """Where sessions are saved, to be there after a restart; without it, a folder that goes with the server."""
    max_sessions: int = 100
    """Sessions kept; beyond, the one unused for longest is deleted."""
    resident_mb: float = 4096.0
    """Memory for sessions that need not be loaded from their file, in MiB."""

    def check(self) -> None:
        """Raises ValueError for values out of range, and for what would be unsafe."""
        if self.model is None and self.classify is None and self.extract is None:
            raise ValueError("expected at least one of --model, --classify, --extract; got none")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port: expected 0 .. 65535; got {self.port}")
        if not re.fullmatch(r"[\w.:/-]{1,100}", self.name):
            raise ValueError(f"name: expected up to 100 letters, digits and . _ : / -; got {self.name!r}")
        counts = (
            "slots",
            "max_prompt_tokens",
            "max_tokens",
            "max_waiting",
            "max_backlog_tokens",
            "max_sessions",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1; got {getattr(self, name)}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk: expected an integer >= 1; got {self.chunk}")
        for name in (*(n for n in vars(self) if n.endswith("_mb")), "max_wait_seconds", "body_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0; got {getattr(self, name)}")
        if not self.drain_seconds >= 0:
            raise ValueError(f"drain_seconds: expected a number >= 0; got {self.drain_seconds}")
        if self.no_auth and not is_loopback(self.host):
            raise ValueError(
                f"no_auth: expected a loopback address such as 127.0.0.1; got {self.host}; give --api-key-file to be reached"
                " from elsewhere"
            )

    def bytes(self, name: str) -> int:
        """An option in MiB, as bytes."""
        return int(getattr(self, f"{name}_mb") * 2**20)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def api_keys(config: ServeConfig) -> list[str]:
    """The keys of the file and the environment. Raises ValueError without any, unless no_auth was given."""
    keys = os.environ.get(KEYS_VARIABLE, "").split()
    if config.api_key_file is not None:
        try:
            lines = config.api_key_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"api_key_file: expected a text file; got {config.api_key_file}: {error}"
            ) from None
        keys += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if config.no_auth:
        if keys:
            raise ValueError("expected API keys or --no-auth; got both")
        return []
    if not keys:
        raise ValueError(
            f"expected API keys in --api-key-file or ${KEYS_VARIABLE}; got none; --no-auth serves without, to this machine only"
        )
    for key in keys:
        if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(
                "API keys: expected at least 16 printable ASCII characters each, without spaces; got one of"
                f' {len(key)}; make one with python -c "import secrets; print(secrets.token_urlsafe(32))"'
            )
    return keys
