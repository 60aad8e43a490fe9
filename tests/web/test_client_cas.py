"""The CAs whose clients TLS accepts: more of them are added to the context that there is, and fewer make a new one."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from tests.support import mutual_tls
from tests.support.pki import PEM, Authority, Pki
from web import listeners
from web.listeners import ServerTls
from web.slow_clients import SlowClients


@pytest.fixture
def pki() -> Pki:
    return Pki()


@pytest.fixture
def tls(tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch) -> ServerTls:
    """A server that looks at its files whenever it is asked for its context, with one CA of clients."""
    monkeypatch.setattr(listeners, "LOOK_SECONDS", 0)
    certificate, key = pki.issuing.issue("localhost", server_names=["localhost"]).write(tmp_path, "server")
    write_cas(tmp_path, pki.issuing)
    return ServerTls(Path(certificate), Path(key), tmp_path / "client-cas.pem", 5.0, SlowClients(2))


def write_cas(folder: Path, *authorities: Authority) -> None:
    new = folder / "new.pem"
    new.write_bytes(b"".join(one.certificate.public_bytes(PEM) for one in authorities))
    new.rename(folder / "client-cas.pem")


def accepts(tls: ServerTls, folder: Path, pki: Pki, authority: Authority) -> bool:
    """Whether a handshake with a certificate of the authority succeeds."""
    certificate, key = authority.issue("x").write(folder, "client")
    client = ssl.create_default_context(cadata=pki.ca_bundle.decode())
    client.load_cert_chain(certificate, key)
    client.maximum_version = ssl.TLSVersion.TLSv1_2  # in which the handshake ends with the server's verdict
    context = tls.context()
    context.sslsocket_class = ssl.SSLSocket
    return mutual_tls.accepts(context, client)


def test_one_ca_more_is_accepted_by_the_context_that_there_is(tls: ServerTls, tmp_path: Path, pki: Pki) -> None:
    second, before = Authority("Second issuing", issuer=pki.root), tls.context()
    assert [accepts(tls, tmp_path, pki, one) for one in (pki.issuing, second)] == [True, False]
    write_cas(tmp_path, pki.issuing, second)
    assert [accepts(tls, tmp_path, pki, one) for one in (pki.issuing, second)] == [True, True]
    assert tls.context() is before


def test_a_ca_that_has_gone_is_accepted_no_more(tls: ServerTls, tmp_path: Path, pki: Pki) -> None:
    second = Authority("Second issuing", issuer=pki.root)
    write_cas(tmp_path, pki.issuing, second)
    assert accepts(tls, tmp_path, pki, pki.issuing)
    write_cas(tmp_path, second)
    assert [accepts(tls, tmp_path, pki, one) for one in (pki.issuing, second)] == [False, True]


def test_a_damaged_file_of_client_cas_changes_nothing(tls: ServerTls, tmp_path: Path, pki: Pki) -> None:
    content = (tmp_path / "client-cas.pem").read_bytes()
    (tmp_path / "client-cas.pem").write_bytes(
        content + b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    )
    assert accepts(tls, tmp_path, pki, pki.issuing)
