"""What a tenant has chosen holds for its devices, and the installation's settings for those of the first tenant."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import pyzipper
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519

from config import Settings
from core.broker_control import JOURNAL_FILE
from core.errors import LinkExpired, TopicRefused
from core.states import ClientKind
from core.tenants import TenantChoices
from operations.wiring import Portal, open_portal, prepare
from store import tenants
from store.audit import Actor
from store.devices import DeviceFilter
from store.tables import Certificate, Delivery
from tests.support.guard_stub import GuardStub
from tests.support.harness import ON_SQLITE, Clock
from tests.support.tenants import add_issuer
from tests.workflows.test_admission import OPERATOR, Rows, request_of
from workflows.bulk.batch import Candidate, RowDone, RowFailed
from workflows.credentials import DeviceRequest
from workflows.registration import Registered
from workflows.renewal import RenewalRequest

pytestmark = ON_SQLITE
ACME = Actor("acme", "somebody of acme", "operator", "request-2", "192.0.2.2")
PASSWORD = "a long enough one"
PLAIN = DeviceRequest(name="pump-1", type="pump", location="hall 1", firmware="1.0", bundle_password=PASSWORD)


def set_choices(portal: Portal, choices: TenantChoices) -> None:
    with portal.database.transaction() as tx:
        tenants.update_tenant(tx, dataclasses.replace(tenants.get_tenant(tx, ACME.tenant_id), choices=choices))
    portal.tenant_terms.refresh()


@pytest.fixture
def portal(make_settings: Callable[..., Settings], clock: Clock) -> Iterator[Portal]:
    """A portal with a second tenant, whose topics begin with ``sites/acme``."""
    settings = make_settings(PORTAL_BROKER_CONTROL="guard")
    built = open_portal(settings, clock)
    with built.database.transaction() as tx:
        tenants.add_tenant(tx, ACME.tenant_id, created_at=clock(), topic_prefix="sites/acme")
    add_issuer(built, ACME.tenant_id)
    prepare(built)
    with GuardStub(settings.broker_socket, settings.broker_file(JOURNAL_FILE)):
        yield built
    built.close()


def topics_of(portal: Portal, actor: Actor, device_id: str) -> list[str]:
    return [topic.filter for topic in portal.inventory.device(actor.tenant_id, device_id).topics]


def token_of(registered: Registered) -> str:
    return str(registered.download_url).rpartition("/")[2]


def test_a_device_has_its_default_topics_below_the_prefix_of_its_tenant(portal: Portal) -> None:
    for actor, expected in ((ACME, "sites/acme/{id}/#"), (OPERATOR, "devices/{id}/#")):
        device_id = portal.registrations.register(actor, request_of(1, csr=True)).device_id
        assert topics_of(portal, actor, device_id) == [expected]


def test_a_device_with_own_topics_below_the_prefix_of_its_tenant_has_no_problem(portal: Portal) -> None:
    for actor, prefix in ((ACME, "sites/acme"), (OPERATOR, "devices")):
        request = dataclasses.replace(request_of(1, csr=True), topics=((f"{prefix}/{{id}}/up", "write"),))
        device_id = portal.registrations.register(actor, request).device_id
        assert portal.inventory.device(actor.tenant_id, device_id).problem is None
        listed = portal.inventory.devices(actor.tenant_id, DeviceFilter(), limit=9, cursor=None)
        assert listed.problems == {device_id: None}


def test_a_bundle_names_a_topic_of_its_tenant(portal: Portal) -> None:
    registered = portal.registrations.register(ACME, PLAIN)
    bundle = portal.deliveries.deliver(ACME, token_of(registered)).content
    with pyzipper.AESZipFile(io.BytesIO(bundle)) as archive:
        archive.setpassword(PASSWORD.encode())
        text = b"".join(archive.read(name) for name in archive.namelist()).decode(errors="replace")
    assert f"sites/acme/{registered.device_id}/hello" in text
    assert "devices/" not in text


@pytest.mark.parametrize(
    ("actor", "own", "foreign"),
    [(ACME, "sites/acme/{id}/up", "devices/{id}/up"), (OPERATOR, "devices/{id}/up", "sites/acme/{id}/up")],
    ids=["acme", "first"],
)
def test_a_device_gets_no_topics_below_the_prefix_of_another_tenant(
    portal: Portal, actor: Actor, own: str, foreign: str
) -> None:
    def with_topic(topic: str) -> DeviceRequest:
        return dataclasses.replace(request_of(1, csr=True), topics=[(topic, "readwrite")], external_id=topic)

    device_id = portal.registrations.register(actor, with_topic(own)).device_id
    assert topics_of(portal, actor, device_id) == [own]
    for refused in (
        lambda: portal.registrations.register(actor, with_topic(foreign)),
        lambda: portal.registrations.update(actor, device_id, {}, [(foreign, "readwrite")]),
        lambda: portal.approvals.expect(actor, dataclasses.replace(with_topic(foreign), csr=None)),
    ):
        with pytest.raises(TopicRefused):
            refused()
    rows = Rows([Candidate(1, with_topic(foreign)), Candidate(2, request_of(2, csr=True))])
    answers = [answer for answers in portal.bulk.register(actor, rows) for answer in answers]
    assert isinstance(answers[0], RowFailed)
    assert answers[0].code == TopicRefused.code
    assert isinstance(answers[1], RowDone)
    assert topics_of(portal, actor, device_id) == [own]


def test_an_application_gets_no_topics_below_the_prefix_of_another_tenant(portal: Portal) -> None:
    for actor, own, foreign in ((ACME, "sites/acme/#", "devices/#"), (OPERATOR, "devices/#", "sites/acme/#")):
        wanted = DeviceRequest(name="dashboard", kind=ClientKind.APPLICATION, topics=[(own, "read")])
        portal.registrations.register(actor, wanted)
        for topic in (foreign, "#", "+/#", "sites/#"):
            with pytest.raises(TopicRefused):
                portal.registrations.register(actor, dataclasses.replace(wanted, topics=[(topic, "read")]))


def test_the_choices_of_a_tenant_hold_for_the_credentials_of_its_devices_alone(portal: Portal) -> None:
    set_choices(portal, TenantChoices(device_days=30, key_type="ed25519", bundle_format="p12", link_hours=2))
    now = portal.clock()
    rows = [Candidate(1, dataclasses.replace(PLAIN, external_id="row-1"))]
    for actor, days, is_ed25519, packed, hours in ((ACME, 30, True, "p12", 2), (OPERATOR, 365, False, "zip", 24)):
        registered = portal.registrations.register(actor, PLAIN)
        portal.renewals.renew(actor, registered.device_id, RenewalRequest(bundle_password=PASSWORD))
        list(portal.bulk.register(actor, Rows(rows)))
        with portal.database.snapshot() as tx:
            of_tenant = Certificate.purpose == "device", Certificate.tenant_id == actor.tenant_id
            issued = [
                x509.load_der_x509_certificate(der) for der in tx.scalars(sa.select(Certificate.der).where(*of_tenant))
            ]
            bundles = tx.execute(
                sa.select(Delivery.format, Delivery.expires_at).where(Delivery.tenant_id == actor.tenant_id)
            ).all()
        assert len(issued) == len(bundles) == 3
        for certificate in issued:
            life = certificate.not_valid_after_utc - now
            assert timedelta(days=days) - timedelta(minutes=1) < life < timedelta(days=days, minutes=1)
            assert isinstance(certificate.public_key(), ed25519.Ed25519PublicKey) is is_ed25519
        for kind, expires_at in bundles:
            assert kind == packed
            assert abs(expires_at - now - timedelta(hours=hours)) < timedelta(minutes=1)


def test_a_link_is_good_for_as_long_as_its_tenant_has_chosen(portal: Portal, clock: Clock) -> None:
    set_choices(portal, TenantChoices(link_hours=100))
    theirs, own = portal.registrations.register(ACME, PLAIN), portal.registrations.register(OPERATOR, PLAIN)
    clock.advance(hours=99)
    assert portal.deliveries.deliver(ACME, token_of(theirs)).device_id == theirs.device_id
    with pytest.raises(LinkExpired):
        portal.deliveries.deliver(OPERATOR, token_of(own))
