"""The issuers as each process sees them: made, moved to, retired by another one meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from config import Settings
from core.errors import CaKeyUnavailable, StateConflict
from operations.wiring import Portal, open_portal
from pki.algorithms import KeyType
from store import certificates
from tests.support.harness import ON_SQLITE, Clock, key_path
from tests.workflows.test_registration import OPERATOR, PUMP
from workflows.authority import issuers as authority_issuers
from workflows.authority import rollover
from workflows.authority.issuers import Issuers

pytestmark = pytest.mark.both_stores


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority_issuers, "SECONDS_BETWEEN_LOOKS", 0.0)


def prepare_next(portal: Portal) -> str:
    name, _ = rollover.prepare_next(
        portal.database, portal.authority, portal.keys, portal.settings, OPERATOR, now=portal.clock()
    )
    return name


def names(issuers: Issuers) -> list[str]:
    return [recorded.issuer.name for recorded in issuers.with_crl()]


def issuer_of(portal: Portal, device_id: str) -> x509.Certificate:
    with portal.database.snapshot() as tx:
        record = certificates.current_certificate(tx, "default", device_id)
    assert record is not None
    certificate = x509.load_der_x509_certificate(record.der)
    for recorded in portal.authority.issuers:
        if recorded.id == record.issuer_id:
            certificate.verify_directly_issued_by(recorded.issuer.certificate)
            return recorded.issuer.certificate
    raise AssertionError("a certificate of no issuer")


@pytest.mark.usefixtures("no_waiting")
def test_another_process_trusts_a_new_ca_first_and_then_issues_by_it(
    make_settings: Callable[..., Settings], clock: Clock
) -> None:
    settings = make_settings()
    here, there = open_portal(settings, clock), open_portal(settings, clock)
    before = there.authority.first.issuing
    assert prepare_next(here) == "issuing-2"
    assert names(there.authority.current) == ["issuing-1", "issuing-2"]
    assert there.authority.first.issuing == before
    assert there.authority.first.ca_pem.count("BEGIN CERTIFICATE") == 3
    assert prepare_next(here) == "issuing-2"
    rollover.move_to(here.database, here.authority, OPERATOR, "issuing-2", now=clock())
    device = there.registrations.register(OPERATOR, PUMP)
    assert issuer_of(there, device.device_id).subject.rfc4514_string() == "CN=Device Onboarding Issuing CA 2"
    for portal in (here, there):
        portal.close()


@ON_SQLITE
def test_a_pass_knows_the_issuers_of_its_own_snapshot(portal: Portal) -> None:
    prepare_next(portal)
    portal.reconciler.install()
    files = portal.settings.broker_dir
    assert len(x509.load_pem_x509_certificates((files / "ca.pem").read_bytes())) == 3
    assert (files / "crl.pem").read_text().count("BEGIN X509 CRL") == 2


@ON_SQLITE
def test_a_new_ca_needs_the_roots_key_which_may_come_while_the_portal_runs(portal: Portal) -> None:
    key = key_path(portal.settings, "root")
    away = key.rename(key.with_name("elsewhere"))
    with pytest.raises(CaKeyUnavailable, match=r"bring the key back"):
        prepare_next(portal)
    away.rename(key)
    assert prepare_next(portal) == "issuing-2"


@ON_SQLITE
def test_a_key_that_was_left_behind_is_not_used_again(portal: Portal) -> None:
    portal.keys.create("issuing-2", KeyType.EC_P256)
    assert prepare_next(portal) == "issuing-3"


@ON_SQLITE
@pytest.mark.usefixtures("no_waiting")
def test_a_process_that_cannot_open_the_new_key_keeps_using_the_old_one(portal: Portal, clock: Clock) -> None:
    other = open_portal(portal.settings, clock)
    prepare_next(portal)
    key_path(portal.settings, "issuing-2").chmod(0o644)
    assert names(other.authority.current) == ["issuing-1"]
    with other.database.snapshot() as tx, pytest.raises(CaKeyUnavailable, match="chmod 600"):
        other.authority.seen_by(tx)
    other.close()


@pytest.mark.usefixtures("no_waiting")
def test_a_ca_retires_when_nobody_needs_it_and_its_crl_is_still_published(portal: Portal, clock: Clock) -> None:
    device = portal.registrations.register(OPERATOR, PUMP)
    portal.revocations.revoke(OPERATOR, portal.registrations.register(OPERATOR, PUMP).device_id, "unspecified")

    def retire() -> None:
        rollover.retire(portal.database, portal.authority, OPERATOR, "issuing-1", now=clock())

    with pytest.raises(StateConflict, match="make another CA first"):
        retire()
    rollover.move_to(portal.database, portal.authority, OPERATOR, prepare_next(portal), now=clock())
    with pytest.raises(StateConflict, match="an hour after that"):
        retire()
    clock.advance(hours=2)
    with pytest.raises(StateConflict, match="1 certificates of issuing-1 are still valid"):
        retire()
    portal.revocations.revoke(OPERATOR, device.device_id, "superseded")
    retire()
    assert names(portal.authority.current) == ["issuing-2"]
    assert [recorded.issuer.name for recorded in portal.authority.issuers] == ["root", "issuing-1", "issuing-2"]
    assert portal.inventory.crl(portal.authority.issuers[1].id) is not None
    portal.reconciler.install()
    assert (portal.settings.broker_dir / "crl.pem").read_text().count("BEGIN X509 CRL") == 1
    with pytest.raises(StateConflict, match="There is no issuing CA issuing-1 in use"):
        retire()


LONG = pytest.mark.long
KINDS = [
    ("ed25519", "ec-p384"),
    pytest.param("rsa-4096", "rsa-3072", marks=LONG),
    pytest.param("ec-p384", "ed25519", marks=LONG),
]


@ON_SQLITE
@pytest.mark.parametrize(("root", "issuing"), KINDS)
def test_the_cas_have_keys_of_the_kinds_that_the_settings_say(
    make_settings: Callable[..., Settings], tmp_path: Path, root: str, issuing: str
) -> None:
    settings = make_settings(
        PORTAL_DATA_DIR=str(tmp_path / "data"),
        PORTAL_ROOT_KEY_TYPE=root,
        PORTAL_ISSUING_KEY_TYPE=issuing,
        PORTAL_TOKEN_TIMEOUT="60",
    )
    portal = open_portal(settings)
    try:
        authority = portal.authority
        assert kind_of(authority.root.issuer.certificate.public_key()) == root
        assert kind_of(authority.first.issuing.issuer.certificate.public_key()) == issuing
        issuer_of(portal, portal.registrations.register(OPERATOR, PUMP).device_id)
        portal.reconciler.install()
        assert prepare_next(portal) == "issuing-2"
        with portal.database.snapshot() as tx:
            issuers = authority.seen_by(tx).with_crl()
        assert [kind_of(each.issuer.certificate.public_key()) for each in issuers] == [issuing, issuing]
    finally:
        portal.close()


def kind_of(key: object) -> str:
    if isinstance(key, rsa.RSAPublicKey):
        return f"rsa-{key.key_size}"
    return f"ec-p{key.key_size}" if isinstance(key, ec.EllipticCurvePublicKey) else "ed25519"
