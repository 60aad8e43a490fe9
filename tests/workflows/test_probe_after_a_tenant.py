"""The certificate whose refusal shows that a RabbitMQ has a CRL is always of a CA that it knows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import sqlalchemy as sa
from cryptography import x509

from broker.crl import read_crl, split_crls
from broker.folder import CA_FILE, CRL_FILE
from config import Settings
from operations.own_certificates import probe_certificates
from operations.wiring import Portal, open_portal, prepare, utc_now
from store.scope import ALL_TENANTS
from store.tables import Tenant
from tests.support.harness import ON_SQLITE
from tests.support.ports import free_port
from tests.workflows.test_admission import OPERATOR, request_of
from workflows.tenant_life import NewTenant

pytestmark = ON_SQLITE


@pytest.fixture
def portal(make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> Iterator[Portal]:
    """A portal whose cluster obeys, of which no node runs."""
    node = {"name": "rabbit@a", "mqtt": f"127.0.0.1:{free_port()}", "management": f"http://127.0.0.1:{free_port()}"}
    settings = make_settings(
        PORTAL_BROKER_CONTROL="rabbitmq",
        PORTAL_RABBITMQ_NODES=json.dumps([node]),
        PORTAL_RABBITMQ_TENANT_PORTS='{"acme": 8884}',
        PORTAL_RABBITMQ_PASSWORD_FILE="/nowhere",
        PORTAL_RABBITMQ_BIND=f"127.0.0.1:{free_port()}",
        PORTAL_RABBITMQ_URL="https://localhost:8445",
        PORTAL_ENFORCE_TIMEOUT="0.3",
    )
    made = open_portal(settings)
    prepare(made)
    monkeypatch.setattr(made.broker, "bring_into_force", lambda *_, **__: None)
    monkeypatch.setattr(made.broker.control, "forget_tenant", lambda *_: None)
    yield made
    made.close()


def probe_is_revoked_by(portal: Portal) -> str:
    """The CA whose CRL, as the nodes have it, lists the probe certificate that must be refused."""
    folder = portal.settings.broker_dir
    probe = x509.load_pem_x509_certificate(probe_certificates(portal.settings).revoked.certificate.read_bytes())
    known = {ca.subject for ca in x509.load_pem_x509_certificates((folder / CA_FILE).read_bytes())}
    assert probe.issuer in known
    crls = [read_crl(block).crl for block in split_crls((folder / CRL_FILE).read_bytes())]
    [own] = [crl for crl in crls if crl.issuer == probe.issuer]
    assert own.get_revoked_certificate_by_serial_number(probe.serial_number) is not None
    return probe.issuer.rfc4514_string()


def test_after_the_last_revocation_was_that_of_a_tenant_which_was_removed(portal: Portal) -> None:
    portal.tenants.add(OPERATOR, NewTenant("acme"))
    admin = dataclasses.replace(OPERATOR, tenant_id="acme")
    device_id = portal.registrations.register(admin, request_of(1, csr=True)).device_id
    assert portal.revocations.revoke(admin, device_id, "key_compromise").enforced
    assert "acme" in probe_is_revoked_by(portal)
    portal.tenant_removals.remove(OPERATOR, "acme", "acme")
    with portal.database.transaction(sees=ALL_TENANTS) as tx:  # long ago, so that its rows are deleted now
        tx.execute(sa.update(Tenant).where(Tenant.id == "acme").values(changed_at=utc_now() - timedelta(days=99)))
    portal.tenant_removals.run()
    newest = portal.reconciler.own_state().generation
    assert portal.reconciler.apply(newest).covers(newest)
    assert "acme" not in probe_is_revoked_by(portal)
