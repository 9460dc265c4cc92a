"""The examples in docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import longnet

NEEDS = {"longnet.kernels": "triton", "longnet.cli": "tyro"}
WITHOUT = {"AttentionOutput"}  # a pair of tensors


def modules():
    for module in pkgutil.walk_packages(longnet.__path__, "longnet."):
        if module.name != "longnet.__main__":
            yield module.name


@pytest.mark.parametrize("name", list(modules()))
def test_examples_run(name):
    for prefix, package in NEEDS.items():
        if name.startswith(prefix):
            pytest.importorskip(package)
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize("name", [*sorted(set(longnet.__all__) - WITHOUT), "generate.generate"])
def test_every_public_name_has_an_example(name):
    part, _, inner = name.partition(".")
    public = getattr(importlib.import_module(f"longnet.{part}"), inner) if inner else getattr(longnet, name)
    assert ">>>" in inspect.getdoc(public), f"{name}: give it an example that runs"
