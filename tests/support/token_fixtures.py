"""Tokens in software for the tests of one process."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator

import pytest

import ca
from pki.algorithms import KeyType, PrivateKey
from pki.keys.stores import KeyStores
from tests.support.ca_hierarchy import MakeKey
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


@pytest.fixture(scope="module", params=["file", "token"])
def make_ca_key(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeKey]:
    """Makes keys of CAs, in memory as those of files are used, or in a token."""
    if request.param == "file":
        yield ca.generate_keypair
        return
    uri = request.getfixturevalue("soft_tokens").create()
    stores = KeyStores(
        tmp_path_factory.mktemp("ca"), b"a passphrase for tests", issuing=[uri], root=[uri], timeout=60.0
    )
    numbers = itertools.count(1)

    def make(kind: KeyType) -> PrivateKey:
        return stores.create(f"ca-{next(numbers)}", kind)

    yield make
    stores.close()
