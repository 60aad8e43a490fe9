"""A backup from before a rollover: what it does not know is trusted no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509

from config import Settings
from operations import authority
from operations.backup.backup import back_up
from operations.backup.restore import restore
from operations.wiring import open_portal, prepare
from store import audit
from tests.support.harness import ON_SQLITE, Clock, csr_pem
from tests.support.tenants import add_tenant
from tests.workflows.test_registration import OPERATOR, with_fields

pytestmark = pytest.mark.both_stores


@ON_SQLITE
def test_a_ca_that_the_copy_does_not_know_is_gone_and_its_key_never_used_again(
    make_settings: Callable[..., Settings], clock: Clock, tmp_path: Path
) -> None:
    settings = make_settings()
    portal = open_portal(settings, clock)
    older = portal.registrations.register(OPERATOR, with_fields(csr=csr_pem()))
    back_up(settings, tmp_path / "copy", now=clock())
    assert authority.roll_over(portal, OPERATOR, lambda _: None) == "issuing-2"
    newer = portal.registrations.register(OPERATOR, with_fields(csr=csr_pem()))
    assert newer.chain is not None
    portal.close()
    restore(settings, tmp_path / "copy", replace=True, keep_links=False, now=clock())

    portal = open_portal(settings, clock)
    prepare(portal)
    trusted = x509.load_pem_x509_certificates(settings.broker_file("ca.pem").read_bytes())
    names = [certificate.subject.rfc4514_string() for certificate in trusted]
    assert names == ["CN=Device Onboarding Issuing CA 1", "CN=Device Onboarding Root CA"]
    assert x509.load_pem_x509_certificates(newer.chain.encode())[1] not in trusted
    for path in (settings.tls_dir / "server.pem", settings.broker_file("server.pem")):
        assert x509.load_pem_x509_certificates(path.read_bytes())[1] == trusted[0]
    assert portal.inventory.device("default", older.device_id).certificate is not None
    assert authority.roll_over(portal, OPERATOR, lambda _: None) == "issuing-3"
    portal.close()


@ON_SQLITE
def test_the_cas_of_tenants_are_restored_with_their_keys_and_one_that_the_copy_lacks_begins_with_another_key(
    make_settings: Callable[..., Settings], clock: Clock, tmp_path: Path
) -> None:
    settings = make_settings(PORTAL_BROKER_CONTROL="guard")
    portal = open_portal(settings, clock)
    add_tenant(portal, "acme")
    back_up(settings, tmp_path / "copy", now=clock())
    add_tenant(portal, "globex")
    known, lost = (
        portal.registrations.register(audit.system_actor(tenant_id), with_fields(csr=csr_pem()))
        for tenant_id in ("acme", "globex")
    )
    portal.close()
    restore(settings, tmp_path / "copy", replace=True, keep_links=False, now=clock())

    portal = open_portal(settings, clock)
    again = portal.registrations.register(audit.system_actor("acme"), with_fields(csr=csr_pem()))
    assert known.chain is not None
    assert again.chain is not None
    assert (
        x509.load_pem_x509_certificates(again.chain.encode())[1:]
        == x509.load_pem_x509_certificates(known.chain.encode())[1:]
    )
    crl = portal.inventory.crl(portal.authority.issuing_of("acme").id)
    assert crl is not None
    assert int(known.serial_number, 16) in {entry.serial_number for entry in x509.load_der_x509_crl(crl.der)}
    add_tenant(portal, "globex")
    assert portal.authority.issuing_of("globex").issuer.name == "globex-issuing-2"
    assert lost.chain is not None
    assert x509.load_pem_x509_certificates(lost.chain.encode())[1].subject not in [
        one.issuer.certificate.subject for one in portal.authority.issuers
    ]
    portal.close()
