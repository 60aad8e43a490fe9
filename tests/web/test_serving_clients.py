"""Client certificates in the TLS layer: asked of every client, needed of none."""

from __future__ import annotations

import contextlib
import hashlib
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from tests.support.deployment import wait_until
from tests.support.pki import PEM, Authority, Credentials
from tests.support.serving_process import Server, facts, request, running

NONE = hashlib.sha256(b"").hexdigest()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as it:
        yield it


def fingerprint(credentials: Credentials) -> str:
    return hashlib.sha256(credentials.certificate.public_bytes(Encoding.DER)).hexdigest()


def context_of(server: Server, credentials: Credentials, name: str = "client") -> ssl.SSLContext:
    context = server.context()
    context.load_cert_chain(*credentials.write(server.folder, name))
    return context


def seen(server: Server, context: ssl.SSLContext) -> str:
    with contextlib.closing(server.secured(context)) as client:
        client.sendall(request())
        return str(facts(client)["certificate"])


def trust(server: Server, *authorities: Authority) -> None:
    """Put the CAs into the server's file, as the portal does it, and wait until it asks for them."""
    path = server.folder / "client-cas.pem"
    path.with_suffix(".new").write_bytes(b"".join(item.certificate.public_bytes(PEM) for item in authorities))
    path.with_suffix(".new").rename(path)


def test_a_client_may_show_a_certificate_of_a_ca_that_was_added_while_the_server_ran(server: Server) -> None:
    maker = Authority("A maker's CA")
    factory = maker.issue("sn-1")
    context = context_of(server, factory)
    assert seen(server, context) == NONE
    trust(server, maker)
    wait_until(lambda: seen(server, context) == fingerprint(factory))
    assert seen(server, server.context()) == NONE  # who has none sees no difference
    curl = ["curl", "-sS", "--cacert", str(server.folder / "cert.pem"), f"https://localhost:{server.port}/"]
    assert NONE in subprocess.run(curl, check=True, capture_output=True, text=True).stdout


def test_a_certificate_of_another_ca_ends_the_handshake_and_nothing_else(server: Server) -> None:
    maker, other = Authority("A maker's CA"), Authority("Another CA")
    trust(server, maker)
    known = maker.issue("sn-2")
    wait_until(lambda: not refused(server, maker) and seen(server, context_of(server, known)) == fingerprint(known))
    with pytest.raises((ssl.SSLError, ConnectionError)):
        seen(server, context_of(server, other.issue("sn-3"), "foreign"))
    assert seen(server, server.context()) == NONE
    trust(server, other)
    wait_until(lambda: not refused(server, other))


def refused(server: Server, authority: Authority) -> bool:
    try:
        seen(server, context_of(server, authority.issue("sn-4"), "again"))
    except (ssl.SSLError, ConnectionError):
        return True
    return False


def test_a_file_that_is_damaged_changes_nothing(server: Server) -> None:
    (Path(server.folder) / "client-cas.pem").write_bytes(b"no certificate")
    assert seen(server, server.context()) == NONE
