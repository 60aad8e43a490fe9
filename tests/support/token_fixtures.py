"""Tokens in software for the tests of one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.tokens import SoftTokens


@pytest.fixture(scope="session")
def soft_tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftTokens]:
    """A folder of tokens, which every module that this process or a child of it loads then uses."""
    tokens = SoftTokens(tmp_path_factory.mktemp("tokens")).set_up()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", tokens.environment["SOFTHSM2_CONF"])
        yield tokens
