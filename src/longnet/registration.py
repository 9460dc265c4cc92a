"""Makes LongNet known to transformers without importing it: at once if it is there already, else when it is imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Importing them registers models with the Auto classes and attentions with the attention interface.
_ROOMS = ("longnet.model", "longnet.integrations")


def register_with_transformers() -> None:
    """Called once, by `import longnet`."""
    if "transformers" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    try:
        for room in _ROOMS:
            importlib.import_module(room)
    except Exception as error:
        # Somebody else is importing transformers: that must not fail because of us.
        warnings.warn(f"LongNet's models are not registered with transformers: {error!r}", stacklevel=2)


class _Finder(MetaPathFinder):
    """Finds transformers as everybody does, and registers once its import has finished. Gone after the first time."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
