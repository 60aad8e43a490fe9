"""Portals whose CA keys are in files, or in a token: for the modules of tests that import these fixtures."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from config import Settings
from tests.support.harness import first_start, settings_for
from tests.support.mosquitto import short_folder
from tests.support.token_fixtures import soft_tokens
from tests.support.tokens import SoftTokens

__all__ = ["key_path", "key_store", "prepared", "soft_tokens"]


def key_path(settings: Settings, name: str) -> Path:
    """The file of a CA's key, or that which says where in a token it is."""
    (path,) = (path for path in settings.ca_dir.glob(f"{name}.*") if path.name.endswith((".key.pem", ".token.json")))
    return path


@pytest.fixture(scope="session", params=["file", pytest.param("token", marks=pytest.mark.long)])
def key_store(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def prepared(prepared: Any, key_store: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """What every portal of a test is a copy of; those with one token have names of their own for the keys they make."""
    if key_store == "file":
        yield prepared
        return
    tokens: SoftTokens = request.getfixturevalue("soft_tokens")
    folder, uri = short_folder(in_memory=True), tokens.create()

    def environment() -> dict[str, str]:
        return {"PORTAL_CA_KEYS": str(replace(uri, object=secrets.token_hex(8))), "PORTAL_TOKEN_TIMEOUT": "60"}

    first_start(settings_for(folder, **environment()))
    yield replace(prepared, folder=folder, databases=None, environment=environment)
    shutil.rmtree(folder)
