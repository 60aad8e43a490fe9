"""Loads programs of `bench/`, whose names do not end as those of modules do."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="session")
def program() -> Callable[[str], ModuleType]:
    """Load a program as a module, by its name."""

    def load(name: str) -> ModuleType:
        full_name = f"bench_{name}"
        if full_name not in sys.modules:
            spec = importlib.util.spec_from_loader(full_name, SourceFileLoader(full_name, str(BENCH / name)))
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[full_name] = module  # where its dataclasses look for it
            spec.loader.exec_module(module)
        return sys.modules[full_name]

    return load
