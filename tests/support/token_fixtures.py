"""Tokens in software for the tests of one process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.support.mosquitto import short_folder
from tests.support.tokens import SoftTokens, TokenServer


@pytest.fixture(scope="session")
def soft_tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftTokens]:
    """A folder of tokens, which every module that this process or a child of it loads then uses."""
    tokens = SoftTokens(tmp_path_factory.mktemp("tokens")).set_up()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", tokens.environment["SOFTHSM2_CONF"])
        yield tokens


@pytest.fixture
def token_server(soft_tokens: SoftTokens, monkeypatch: pytest.MonkeyPatch) -> Iterator[TokenServer]:
    """A server before the tokens, running; ``client_module`` reaches it."""
    folder = short_folder()
    server = TokenServer(soft_tokens, folder)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.start()
    yield server
    server.close()
    shutil.rmtree(folder)
