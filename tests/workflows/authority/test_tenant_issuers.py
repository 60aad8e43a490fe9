"""The issuing CA of each tenant: who signs for whom, what is handed out, and what a thousand of them cost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509

import db
from commands.bundle import open_bundle
from config import Settings
from core.errors import IssuerUnusable, TokenKeyUnavailable
from core.states import IssuerStatus
from operations.wiring import Portal, open_portal
from pki.algorithms import PrivateKey
from pki.issuers import COMMON_NAME_LIMIT, Issuer
from store import audit, certificates, issuers, tenants
from store.audit import Actor
from store.issuers import CrlRecord
from tests.support.harness import ON_SQLITE, Clock, key_path
from tests.support.tenants import add_issuer, add_tenant
from tests.workflows.authority.test_crls import statements
from tests.workflows.test_admission import OPERATOR, request_of
from workflows.authority import crl_publication
from workflows.authority.crls import next_crl
from workflows.authority.issuers import RecordedIssuer
from workflows.authority.names import common_name, is_issuing_name, issuing_name, root_names
from workflows.registration import Registered

pytestmark = pytest.mark.both_stores

ACME = Actor("acme", "an operator", "operator", "request-2", "192.0.2.2")
GLOBEX = Actor("globex", "an operator", "operator", "request-3", "192.0.2.3")


def register(portal: Portal, actor: Actor, *, csr: bool = True) -> Registered:
    return portal.registrations.register(actor, request_of(1, csr=csr))


def signer_of(portal: Portal, actor: Actor, device_id: str) -> RecordedIssuer:
    """The CA that has signed the certificate of a device, by its signature."""
    with portal.database.snapshot() as tx:
        record = certificates.current_certificate(tx, actor.tenant_id, device_id)
    assert record is not None
    certificate = x509.load_der_x509_certificate(record.der)
    recorded = portal.authority.current.by_id[record.issuer_id]
    certificate.verify_directly_issued_by(recorded.issuer.certificate)
    return recorded


# --- Who signs -------------------------------------------------------------------------------------------------------


def test_each_tenants_devices_have_certificates_of_its_own_ca(portal: Portal) -> None:
    for actor in (ACME, GLOBEX):
        add_tenant(portal, actor.tenant_id)
    for actor, name in ((OPERATOR, "issuing-1"), (ACME, "acme-issuing-1"), (GLOBEX, "globex-issuing-1")):
        signer = signer_of(portal, actor, register(portal, actor).device_id)
        assert (signer.issuer.name, signer.tenant_id) == (name, actor.tenant_id)
        signer.issuer.certificate.verify_directly_issued_by(portal.authority.root.issuer.certificate)
    assert portal.authority.servers.issuer.name == "issuing-1"


def test_a_tenant_without_a_ca_gets_no_certificate_of_another_ones(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        tenants.add_tenant(tx, "acme", created_at=portal.clock())
    with pytest.raises(IssuerUnusable, match="acme has no CA"):
        register(portal, ACME)
    with pytest.raises(IssuerUnusable):
        portal.authority.of("nobody")
    add_issuer(portal, "acme")
    register(portal, ACME)


@ON_SQLITE
def test_a_tenants_ca_signs_end_entities_only_and_its_name_has_the_tenants(portal: Portal) -> None:
    add_tenant(portal, "acme")
    certificate = portal.authority.issuing_of("acme").issuer.certificate
    assert certificate.subject.rfc4514_string() == "CN=Device Onboarding acme Issuing CA 1"
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.path_length) == (True, 0)
    purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    first = portal.authority.first.issuing.issuer.certificate
    assert purposes == first.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value


@ON_SQLITE
def test_a_root_of_its_own_is_above_a_tenants_ca_if_that_is_asked_for(portal: Portal) -> None:
    add_tenant(portal, "acme", own_root=True)
    current = portal.authority.current
    issuing = current.issuing_of("acme")
    root = current.own_root(issuing)
    assert root is not None
    assert root.issuer.name == "acme-root"
    assert root.issuer.certificate.subject.rfc4514_string() == "CN=Device Onboarding acme Root CA"
    issuing.issuer.certificate.verify_directly_issued_by(root.issuer.certificate)
    assert current.root.issuer.name == "root"
    assert current.of("acme").anchors == (root.issuer.certificate, current.root.issuer.certificate)
    assert signer_of(portal, ACME, register(portal, ACME).device_id) == issuing


# --- What is handed out ----------------------------------------------------------------------------------------------


@ON_SQLITE
def test_a_bundle_has_the_chain_of_its_tenant_and_the_root_of_the_servers_and_no_other_name(portal: Portal) -> None:
    for tenant_id in ("acme", "globex"):
        add_tenant(portal, tenant_id)
    known = register(portal, ACME, csr=False)
    with portal.database.snapshot() as tx:
        content = tx.exec_driver_sql("SELECT bundle FROM deliveries").scalar_one()
    opened = open_bundle(content, "a long enough one")
    trusted = x509.load_pem_x509_certificates(opened.files["ca.pem"])
    current = portal.authority.current
    assert trusted == [current.issuing_of("acme").issuer.certificate, current.root.issuer.certificate]
    assert x509.load_pem_x509_certificates(opened.files["chain.pem"])[1:] == trusted[:1]
    assert signer_of(portal, ACME, known.device_id).tenant_id == "acme"


def test_what_the_first_tenants_devices_trust_says_nothing_of_the_others(portal: Portal) -> None:
    before = portal.authority.first.ca_pem
    add_tenant(portal, "acme", own_root=True)
    with portal.database.snapshot() as tx:
        portal.authority.seen_by(tx)
    assert portal.authority.first.ca_pem == before
    assert portal.authority.current.broker_ca.count(b"BEGIN CERTIFICATE") == 4


# --- How it is made --------------------------------------------------------------------------------------------------


def test_a_ca_that_was_cut_off_before_it_was_recorded_is_made_with_another_key(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    with portal.database.transaction() as tx:
        tenants.add_tenant(tx, "acme", created_at=portal.clock())
    with monkeypatch.context() as patch:
        patch.setattr(issuers, "add_issuer", _cut_off)
        with pytest.raises(KeyboardInterrupt):
            add_issuer(portal, "acme")
    assert portal.keys.exists("acme-issuing-1")
    assert not portal.authority.current.has_issuing("acme")
    assert [add_issuer(portal, "acme"), add_issuer(portal, "acme")] == [None, None]
    with portal.database.snapshot() as tx:
        assert [one.name for one in issuers.list_issuers(tx, tenant_id="acme")] == ["acme-issuing-2"]


def _cut_off(*_: object, **__: object) -> int:
    raise KeyboardInterrupt


def test_without_the_roots_key_a_sentence_says_what_to_do(portal: Portal) -> None:
    path = key_path(portal.settings, "root")
    path.rename(path.with_suffix(".elsewhere"))
    with portal.database.transaction() as tx:
        tenants.add_tenant(tx, "acme", created_at=portal.clock())
    problem = add_issuer(portal, "acme")
    assert problem is not None
    assert "ca rollover --tenant acme" in problem
    assert "ca request --tenant acme" in problem
    assert [name for name in portal.keys.names() if name.startswith("acme")] == []
    path.with_suffix(".elsewhere").rename(path)
    assert add_issuer(portal, "acme") is None


def test_a_new_ca_has_a_crl_from_the_start_and_its_tenant_has_the_audit_entry(portal: Portal) -> None:
    add_tenant(portal, "acme")
    issuing = portal.authority.issuing_of("acme")
    with portal.database.snapshot() as tx:
        crl = issuers.get_crl(tx, issuing.id)
        entries = audit.list_audit_entries(tx, "acme", limit=10, filters={"action": "ca:create"})
    assert crl is not None
    assert x509.load_der_x509_crl(crl.der).issuer == issuing.issuer.certificate.subject
    assert len(entries) == 1


# --- Names -----------------------------------------------------------------------------------------------------------

LONG = "a" * 62


@pytest.mark.parametrize("tenant_id", ["a", "issuing", "root", "issuing-1", "acme-issuing-1", LONG + "b", LONG + "c"])
def test_names_of_keys_are_short_enough_and_say_whose_they_are(tenant_id: str) -> None:
    name = issuing_name(tenant_id, 12)
    assert len(name) <= 63
    assert is_issuing_name(tenant_id, name)
    for other in ("default", "a", "issuing", "root", "issuing-1", "acme", LONG + "b", LONG + "c"):
        assert is_issuing_name(other, name) is (other == tenant_id)
        if other != tenant_id:
            assert common_name("Portal", other, "CA 1") != common_name("Portal", tenant_id, "CA 1")
            assert {*root_names(other)}.isdisjoint({*root_names(tenant_id)})


@pytest.mark.parametrize("ca_name", ["Portal", "A name that is about as long as it may be for a CA"])
def test_a_common_name_is_never_too_long_and_never_the_same(ca_name: str) -> None:
    names = {common_name(ca_name, tenant_id, "Issuing CA 99") for tenant_id in (LONG + "b", LONG + "c", "b", "default")}
    assert len(names) == 4
    assert all(len(name) <= COMMON_NAME_LIMIT for name in names)


# --- Keys ------------------------------------------------------------------------------------------------------------


@ON_SQLITE
def test_a_lost_key_of_one_tenant_is_reported_and_stops_no_other(
    make_settings: Callable[..., Settings], clock: Clock
) -> None:
    settings = make_settings(PORTAL_BROKER_CONTROL="guard")
    portal = open_portal(settings, clock)
    for tenant_id in ("acme", "globex"):
        add_tenant(portal, tenant_id, own_root=tenant_id == "acme")
    portal.close()
    key_path(settings, "acme-issuing-1").unlink()
    portal = open_portal(settings, clock)
    register(portal, GLOBEX)
    register(portal, OPERATOR)
    with pytest.raises(IssuerUnusable):
        register(portal, ACME)
    assert not [check.problem for check in portal.readiness.checks() if check.name == "ca" and check.problem]
    assert "acme-issuing-1" in (portal.tenant_readiness.failed()["acme"].problem or "")
    with portal.database.transaction() as tx:
        generation = db.next_generation(tx, at=clock())
        for issuer in portal.authority.with_crl():
            issuers.touch_issuer(tx, issuer.id, generation=generation)
    assert len(portal.reconciler.crls.sign_due()[1]) == 2
    clock.advance(days=settings.crl_days + 1)
    portal.reconciler.install()
    for path, count in ((settings.broker_file("ca.pem"), 3), (settings.broker_file("crl.pem"), 2)):
        assert path.read_text().count("-----BEGIN") == count, "the CA without a current CRL is left out"
    assert portal.broker.files.damage() == []
    portal.close()


@ON_SQLITE
def test_a_key_that_its_token_has_lost_stops_the_crl_of_no_other_tenant_but_the_first_ones_does(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tenant_id in ("acme", "globex"):
        add_tenant(portal, tenant_id)
    with portal.database.transaction() as tx:
        generation = db.next_generation(tx, at=portal.clock())
        for issuer in portal.authority.with_crl():
            issuers.touch_issuer(tx, issuer.id, generation=generation)
    lost = set[str]()

    def signs(tx: Any, issuer_id: int, issuer: Issuer, *arguments: Any, **options: Any) -> CrlRecord:
        if issuer.name in lost:
            raise TokenKeyUnavailable(f"The token does not have the key {issuer.name}.")
        return next_crl(tx, issuer_id, issuer, *arguments, **options)

    monkeypatch.setattr(crl_publication, "next_crl", signs)
    lost |= {"issuing-1"}
    with pytest.raises(TokenKeyUnavailable):
        portal.reconciler.crls.sign_due()
    lost ^= {"issuing-1", "acme-issuing-1"}
    signed = {portal.authority.current.by_id[crl.issuer_id].issuer.name for crl in portal.reconciler.crls.sign_due()[1]}
    assert signed == {"issuing-1", "globex-issuing-1"}


@ON_SQLITE
def test_the_key_of_another_tenant_is_opened_when_it_first_signs(
    make_settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(PORTAL_BROKER_CONTROL="guard")
    portal = open_portal(settings, clock)
    add_tenant(portal, "acme")
    portal.close()
    portal = open_portal(settings, clock)
    loaded: list[str] = []
    real = portal.keys.load

    def load(name: str) -> PrivateKey:
        loaded.append(name)
        return real(name)

    monkeypatch.setattr(portal.keys, "load", load)
    assert loaded == []
    for _ in range(2):
        register(portal, ACME)
    assert loaded == ["acme-issuing-1"]
    portal.close()


# --- What is read ----------------------------------------------------------------------------------------------------


def test_whether_the_cas_have_changed_is_one_value(portal: Portal) -> None:
    with portal.database.snapshot() as tx, statements(portal) as seen:
        portal.authority.seen_by(tx)
    assert [statement for statement in seen if "FROM issuers" in statement] == []
    assert len(seen) == 1


def test_a_change_that_was_rolled_back_is_not_seen_and_the_next_one_is(portal: Portal) -> None:
    before = portal.authority.current
    with contextlib.suppress(KeyboardInterrupt), portal.database.transaction() as tx:
        issuers.set_status(tx, portal.authority.root.id, IssuerStatus.RETIRED)
        assert portal.authority.seen_by(tx).root.retired
        raise KeyboardInterrupt
    with portal.database.snapshot() as tx:
        assert not portal.authority.seen_by(tx).root.retired
    with portal.database.transaction() as tx:
        issuers.let_sign_servers(tx, before.servers.id, at=portal.clock())
    with portal.database.snapshot() as tx:
        assert not portal.authority.seen_by(tx).root.retired
