"""The server's commands for the CAs of a tenant: made late, rolled over, signed by a company, retired."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography import x509
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.errors import CaKeyUnavailable, IssuerUnusable, StateConflict
from operations import authority
from operations.wiring import Portal
from store import audit, issuers, tenants
from store.audit import Actor
from tests.operations.test_company_root import BETWEEN, ROOT
from tests.support.company import pem
from tests.support.harness import ON_SQLITE, Clock, key_path
from tests.support.tenants import add_issuer, add_tenant
from tests.workflows.test_admission import OPERATOR, request_of
from workflows.authority import issuers as authority_issuers

pytestmark = [ON_SQLITE, pytest.mark.both_stores]

ACME = audit.system_actor("acme")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority_issuers, "SECONDS_BETWEEN_LOOKS", 0.0)


def issuing(portal: Portal, tenant_id: str = "acme") -> str:
    return portal.authority.issuing_of(tenant_id).issuer.name


def register(portal: Portal, actor: Actor = ACME) -> str:
    return portal.registrations.register(actor, request_of(1, csr=True)).device_id


def roll_over(portal: Portal, actor: Actor = ACME, **options: bool) -> str:
    return authority.roll_over(portal, actor, lambda _: None, **options)


def without_ca(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        tenants.add_tenant(tx, "acme", created_at=portal.clock())


# --- Rollover --------------------------------------------------------------------------------------------------------


def test_a_tenants_rollover_changes_nothing_of_another(portal: Portal) -> None:
    add_tenant(portal, "acme")
    assert roll_over(portal) == "acme-issuing-2"
    assert (issuing(portal), issuing(portal, "default")) == ("acme-issuing-2", "issuing-1")
    assert portal.authority.servers.issuer.name == "issuing-1"
    assert roll_over(portal, OPERATOR) == "issuing-2"
    assert (issuing(portal), portal.authority.servers.issuer.name) == ("acme-issuing-2", "issuing-2")
    subject = portal.authority.issuing_of("acme").issuer.certificate.subject
    assert subject.rfc4514_string() == "CN=Device Onboarding acme Issuing CA 2"
    assert len(x509.load_pem_x509_certificates((portal.settings.data_dir / "ca.pem").read_bytes())) == 5


def test_a_tenant_that_could_not_have_a_ca_gets_it_by_a_rollover_once_the_roots_key_is_back(portal: Portal) -> None:
    path = key_path(portal.settings, "root")
    path.rename(path.with_suffix(".elsewhere"))
    without_ca(portal)
    with pytest.raises(CaKeyUnavailable, match="ca rollover --tenant acme"):
        roll_over(portal)
    path.with_suffix(".elsewhere").rename(path)
    assert roll_over(portal) == "acme-issuing-1"
    register(portal)
    assert portal.settings.broker_file("crl.pem").read_text().count("BEGIN X509 CRL") == 2


def test_the_ca_of_a_tenant_retires_by_itself_once_no_device_of_it_needs_it(portal: Portal, clock: Clock) -> None:
    add_tenant(portal, "acme")
    device_id = register(portal)
    register(portal, OPERATOR)
    roll_over(portal)
    clock.advance(hours=2)
    authority.retire_unneeded(portal)
    assert {one.issuer.name for one in portal.authority.with_crl()} == {"issuing-1", "acme-issuing-1", "acme-issuing-2"}
    portal.revocations.revoke(ACME, device_id, "key_compromise")
    authority.retire_unneeded(portal)
    assert {one.issuer.name for one in portal.authority.with_crl()} == {"issuing-1", "acme-issuing-2"}


def test_a_ca_is_retired_in_its_own_tenant_only(portal: Portal, clock: Clock) -> None:
    add_tenant(portal, "acme")
    roll_over(portal)
    clock.advance(hours=2)
    with pytest.raises(StateConflict, match="no issuing CA acme-issuing-1"):
        authority.retire(portal, OPERATOR, "acme-issuing-1")
    authority.retire(portal, ACME, "acme-issuing-1")


# --- Under a company's root ------------------------------------------------------------------------------------------


def requested(portal: Portal, actor: Actor = ACME) -> x509.CertificateSigningRequest:
    return x509.load_pem_x509_csr(authority.request_ca(portal, actor).pem.encode())


def install(portal: Portal, actor: Actor = ACME, name: str = "Devices of acme") -> str:
    chain = pem(BETWEEN.sign(requested(portal, actor).public_key(), name, path_length=0), BETWEEN, ROOT)
    return authority.install_ca(portal, actor, chain, lambda _: None)


def test_a_company_signs_the_ca_of_one_tenant_and_the_others_stay(portal: Portal) -> None:
    without_ca(portal)
    request = requested(portal)
    assert request.subject.rfc4514_string() == "CN=Device Onboarding acme Issuing CA 1"
    assert requested(portal) == request
    assert requested(portal, OPERATOR) != request
    assert install(portal) == "acme-issuing-1"
    register(portal)
    current = portal.authority.current
    assert current.anchor(current.issuing_of("acme")) == ROOT.certificate
    assert {one.subject.rfc4514_string() for one in current.of("acme").trusted} == {
        "CN=Devices of acme", "CN=Company CA", "CN=Company Root", "CN=Device Onboarding Root CA",
    }  # fmt: skip
    assert current.servers.issuer.name == "issuing-1"
    assert ROOT.certificate not in current.of("default").trusted


def test_the_first_ca_of_a_tenant_may_be_installed_before_it_issues(portal: Portal, clock: Clock) -> None:
    without_ca(portal)
    chain = pem(BETWEEN.sign(requested(portal).public_key(), "Devices of acme", path_length=0), BETWEEN, ROOT)
    authority.install_ca(portal, ACME, chain, lambda _: None, later=True)
    with pytest.raises(IssuerUnusable):
        register(portal)
    roll_over(portal, OPERATOR)
    clock.advance(hours=2)
    authority.retire_unneeded(portal)
    assert {one.issuer.name for one in portal.authority.with_crl()} == {"acme-issuing-1", "issuing-2"}
    assert roll_over(portal) == "acme-issuing-1"
    register(portal)


def test_the_own_root_stays_trusted_while_a_tenants_ca_is_below_it(portal: Portal, clock: Clock) -> None:
    add_tenant(portal, "acme")
    register(portal)
    install(portal, OPERATOR, "Devices")
    assert portal.authority.servers.issuer.name == "issuing-1", "acme's device knows the own root alone"
    clock.advance(hours=2)
    with pytest.raises(StateConflict, match="other tenants"):
        authority.retire(portal, OPERATOR, "issuing-1")
    assert not portal.authority.root.retired
    assert portal.authority.root.issuer.certificate in portal.authority.current.of("default").trusted


def test_with_a_companys_root_above_the_first_tenant_a_sentence_says_who_has_to_sign(portal: Portal) -> None:
    install(portal, OPERATOR, "Devices")
    without_ca(portal)
    problem = add_issuer(portal, "acme")
    assert problem is not None
    assert "CN=Company Root" in problem
    assert "ca request --tenant acme" in problem
    assert add_issuer(portal, "acme", own_root=True) is None
    register(portal)


# --- The commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def app(make_settings: Callable[..., Settings]) -> Iterator[Flask]:
    """One whose broker can keep tenants apart, and does not run."""
    app = create_app(make_settings(PORTAL_BROKER_CONTROL="guard"), background=False)
    yield app
    portal_of(app).close()


def run(app: Flask, *words: str) -> Any:
    with app.app_context():
        return app.test_cli_runner().invoke(args=["ca", *words])


def test_the_commands_show_the_cas_of_one_tenant(app: Flask) -> None:
    portal = portal_of(app)
    before = run(app, "list").output
    add_tenant(portal, "acme")
    assert run(app, "list").output == before
    shown = run(app, "list", "--tenant", "acme").output
    assert "acme-issuing-1" in shown
    assert "issues" in shown
    assert len(shown.splitlines()) == 2  # with the titles
    assert "acme-issuing-1" in run(app, "keys").output
    rolled = run(app, "rollover", "--tenant", "acme", "--again")
    assert rolled.exit_code == 0, rolled.output
    assert "Devices get certificates of acme-issuing-2" in rolled.output


@pytest.mark.parametrize("words", [["list"], ["rollover"], ["request"], ["retire", "issuing-1"], ["install", "x.pem"]])
def test_a_tenant_that_there_is_not_is_a_sentence_and_makes_no_key(app: Flask, words: list[str]) -> None:
    portal = portal_of(app)
    before = portal.keys.names()
    answer = run(app, *words, "--tenant", "nobody")
    assert answer.exit_code != 0
    assert "Traceback" not in answer.output
    assert portal.keys.names() == before
    with portal.database.snapshot() as tx:
        assert issuers.list_issuers(tx, tenant_id="nobody") == []
