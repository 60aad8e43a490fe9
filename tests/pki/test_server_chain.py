"""The chain and key of a TLS server that somebody else has issued: what clients would refuse is refused."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from core.errors import ServerCertificateRefused
from pki.server_chain import check_pair
from tests.support.company import NOW, CompanyCa, company_root, key_pem, pem, server_below

SITE = "portal.example.com"
ROOT = company_root("Web Root")
BETWEEN = ROOT.below("Web CA")


@pytest.mark.parametrize("above", [(BETWEEN, ROOT), (ROOT, BETWEEN)])
@pytest.mark.parametrize("key", [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())])
def test_a_chain_is_served_without_its_root_which_clients_trust(above: tuple[CompanyCa, ...], key: Any) -> None:
    server = server_below(BETWEEN, SITE, key=key)
    pair = check_pair(pem(server, *above), key_pem(server.key), [SITE], [], now=NOW)
    assert pair.chain == pem(server, BETWEEN)
    assert pair.roots == pem(ROOT)


def test_a_root_that_the_portal_or_the_system_trusts_need_not_be_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = server_below(BETWEEN, SITE)
    chain, key = pem(server, BETWEEN), key_pem(server.key)
    assert check_pair(chain, key, [SITE], [ROOT.certificate], now=NOW).roots == pem(ROOT)
    (tmp_path / "system.pem").write_bytes(pem(company_root("Another"), ROOT))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "system.pem"))
    assert check_pair(chain, key, [SITE], [], now=NOW).roots == pem(ROOT)


def test_a_certificate_of_no_ca_is_not_given_to_clients_as_a_root() -> None:
    server, other = server_below(BETWEEN, SITE), company_root("Another", is_ca=False)
    pair = check_pair(pem(server, BETWEEN, ROOT, other), key_pem(server.key), [SITE], [], now=NOW)
    assert pair.roots == pem(ROOT)


def test_names_of_all_hosts_of_a_domain_and_addresses_count() -> None:
    server = server_below(BETWEEN, "*.example.com", "192.0.2.7")
    check_pair(pem(server, BETWEEN, ROOT), key_pem(server.key), [SITE, "*.example.com", "192.0.2.7"], [], now=NOW)


def spoilt() -> list[Any]:
    server, other, good = server_below(BETWEEN, SITE), server_below(BETWEEN, SITE), (BETWEEN, ROOT)
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505 - what is to be refused
    sealed = key_pem(server.key, b"a passphrase")
    its_own = server_below(CompanyCa(server.key, company_root("server", server.key).certificate), SITE, key=server.key)
    impostor = company_root("Web Root")
    elsewhere, below_server = server_below(BETWEEN, "other.example.com"), server_below(server, SITE)
    expired = server_below(BETWEEN, SITE, ends=timedelta(hours=-1))
    early = server_below(BETWEEN, SITE, starts=timedelta(days=1))
    for_clients = server_below(BETWEEN, SITE, purposes=[ExtendedKeyUsageOID.CLIENT_AUTH])
    return [
        pytest.param(server, good, key_pem(other.key), "the key is not that of CN=server", id="another key"),
        pytest.param(server, good, sealed, "the key is encrypted", id="encrypted key"),
        pytest.param(server, good, b"nothing", "cannot be read as a private key", id="no key"),
        pytest.param(server, (), None, "signed by CN=Web CA.*append the certificates up to the root", id="no chain"),
        pytest.param(server, (BETWEEN,), None, "signed by CN=Web Root", id="no root"),
        pytest.param(server, (BETWEEN, impostor), None, "signed by CN=Web Root", id="a root of the same name"),
        pytest.param(elsewhere, good, None, f"ask for {SITE} .*ostname mismatch", id="other name"),
        pytest.param(expired, good, None, "CN=server expired at", id="expired"),
        pytest.param(early, good, None, "is not valid before", id="not yet valid"),
        pytest.param(for_clients, good, None, "certificate purpose", id="for clients only"),
        pytest.param(server_below(BETWEEN, SITE, key=weak), good, None, "too small|key too weak", id="weak key"),
        pytest.param(its_own, (), None, "is signed by itself", id="signed by itself and no CA"),
        pytest.param(below_server, (server, *good), None, "invalid CA certificate", id="signed by no CA"),
    ]


@pytest.mark.parametrize(("server", "above", "key", "said"), spoilt())
def test_what_clients_would_refuse_is_refused(
    server: CompanyCa, above: tuple[CompanyCa, ...], key: bytes | None, said: str
) -> None:
    with pytest.raises(ServerCertificateRefused, match=said):
        check_pair(pem(server, *above), key or key_pem(server.key), [SITE], [], now=NOW)
