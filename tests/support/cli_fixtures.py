"""A portal of the tests with a session at the command line, as fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import client
from tests.support.bundle_files import DEVICE_ID, Files
from tests.support.cli_session import Session, session_for
from tests.support.pki import Pki
from tests.support.portal_stub import PortalStub, device_files, running


@pytest.fixture(scope="module")
def cli_pki() -> Pki:
    return Pki()


@pytest.fixture
def stub(cli_pki: Pki, monkeypatch: pytest.MonkeyPatch) -> Iterator[PortalStub]:
    monkeypatch.setattr(client, "RETRY_PAUSES", (0.0, 0.0))
    with running(PortalStub(cli_pki)) as portal_stub:
        yield portal_stub


@pytest.fixture
def session(stub: PortalStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    return session_for(stub, tmp_path, monkeypatch)


@pytest.fixture
def files(cli_pki: Pki) -> Files:
    """The files of a device's bundle, by name."""
    return device_files(cli_pki, DEVICE_ID)
