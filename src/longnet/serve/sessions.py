"""Sessions: documents that were read once, kept as saved caches, to be asked many times."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import secrets
import tempfile
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longnet.model.cache import LongNetCache

log = logging.getLogger("longnet.serve")


@dataclass
class Session:
    """`tokens` of a document; the cache has read all but the last one, `last`, which goes before what is asked."""

    id: str
    owner: str
    model: str
    tokenizer: str
    created: float
    last_used: float
    tokens: int
    last: int
    cache_bytes: int


class SessionStore:
    """Every session is a pair of files; the caches used last are also in memory. For one event loop.

    Args:
        folder: of the files; None makes one that goes with the store.
        config: of the model.
        model, tokenizer: names for the weights and of the tokenizer: sessions of others in the folder are left alone.
        limit: sessions kept; the one unused for longest goes first.
        resident: bytes of caches in memory; at least one is.
    """

    def __init__(
        self, folder: Path | None, config: Any, model: str, tokenizer: str, limit: int, resident: int
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="longnet-sessions-") if folder is None else None
        self.folder = Path(self._temporary.name) if self._temporary else Path(str(folder))
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.limit, self.resident = limit, resident
        self._sessions: OrderedDict[str, Session] = OrderedDict()  # the one used last at the end
        self._caches: OrderedDict[str, LongNetCache] = OrderedDict()
        self._find()

    def _find(self) -> None:
        """Sessions of an earlier run with the same weights and tokenizer."""
        found = []
        for path in self.folder.glob("*.json"):
            try:
                session = Session(**json.loads(path.read_text()))
                if (
                    session.id != path.stem
                    or session.model != self.model
                    or not self._file(path.stem).is_file()
                ):
                    continue
                if session.tokenizer == self.tokenizer:
                    found.append(session)
                else:  # what is asked would be written in other ids than the document was
                    log.warning(
                        "%s: expected a session with tokenizer %s; got %s; left alone",
                        path.name, self.tokenizer, session.tokenizer,
                    )  # fmt: skip
            except (OSError, ValueError, TypeError) as error:
                log.warning("%s: expected a session; got %r; left alone", path.name, error)
        for session in sorted(found, key=lambda s: s.last_used):
            self._sessions[session.id] = session

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    async def add(
        self, owner: str, tokens: int, last: int, kept: LongNetCache, host: LongNetCache
    ) -> Session:
        """Save a cache; `kept` is the one to go on with, `host` the same on the CPU. Raises OSError if the disk is full."""
        now = time.time()
        name = f"sess-{secrets.token_hex(16)}"
        session = Session(name, owner, self.model, self.tokenizer, now, now, tokens, last, kept.nbytes())
        try:
            await asyncio.to_thread(host.save, self._file(name))
            await asyncio.to_thread(self._write, session)
        except BaseException:
            self._unlink(name)
            raise
        self._sessions[name] = session
        self.keep(session, kept)
        while len(self._sessions) > self.limit:
            self._forget(next(iter(self._sessions)))
        return session

    def _write(self, session: Session) -> None:
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".session-")
        with os.fdopen(handle, "w") as file:
            json.dump(asdict(session), file)
        os.replace(temporary, self.folder / f"{session.id}.json")

    def get(self, name: str, owner: str) -> Session | None:
        """A session of this owner; of others' there is nothing to be seen."""
        session = self._sessions.get(name)
        return session if session is not None and session.owner == owner else None

    def all(self, owner: str) -> list[Session]:
        return [session for session in self._sessions.values() if session.owner == owner]

    async def cache(self, session: Session) -> LongNetCache:
        """What it has read; from memory, or from its file to the CPU. Raises ValueError or OSError for a damaged one."""
        session.last_used = time.time()
        self._sessions.move_to_end(session.id)
        if session.id in self._caches:
            self._caches.move_to_end(session.id)
            return self._caches[session.id]
        try:
            cache = await asyncio.to_thread(LongNetCache.load, self._file(session.id), self.config)
        except (ValueError, OSError):
            self._forget(session.id)
            raise
        self.keep(session, cache)
        return cache

    def keep(self, session: Session, cache: LongNetCache) -> None:
        """Hold a cache in memory, instead of those unused for longest."""
        if session.id not in self._sessions:
            return  # deleted meanwhile
        self._caches[session.id] = cache
        self._caches.move_to_end(session.id)
        while len(self._caches) > 1 and self.resident_bytes() > self.resident:
            self._caches.popitem(last=False)

    def resident_bytes(self) -> int:
        return sum(cache.nbytes() for cache in self._caches.values())

    def delete(self, session: Session) -> None:
        self._forget(session.id)

    def _forget(self, name: str) -> None:
        self._sessions.pop(name, None)
        self._caches.pop(name, None)
        self._unlink(name)

    def _unlink(self, name: str) -> None:
        for path in (self._file(name), self.folder / f"{name}.json"):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Write when sessions were used last; or remove everything, where the folder was made for this run."""
        if self._temporary is not None:
            self._temporary.cleanup()
            return
        for session in self._sessions.values():
            with contextlib.suppress(OSError):
                self._write(session)

    def report(self) -> dict[str, int]:
        caches = [session.cache_bytes for session in self._sessions.values()]
        return {
            "sessions": len(caches), "cache_bytes": sum(caches), "resident": len(self._caches),
            "resident_bytes": self.resident_bytes(),
        }  # fmt: skip


def weights_name(folder: Path) -> str:
    """sha256 over a model folder's weights and configuration."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
