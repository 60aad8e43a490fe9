"""The use cases, against a real database, CA and files; the broker does not run."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

import db
from config import Settings
from core.errors import (
    DeviceNotFound,
    IdempotencyConflict,
    InputInvalid,
    KeyCompromised,
    LinkExpired,
    LinkRevoked,
    LinkUnknown,
    LinkUsed,
    StateConflict,
    TopicRefused,
)
from core.states import DeliveryStatus, DeviceStatus
from operations.wiring import Portal, open_portal
from pki.algorithms import certificate_key_fingerprint
from pki.csr import read_csr
from store import certificates, issuers, keys, tenants
from store.audit import Actor
from store.tables import Certificate, Delivery
from tests.support.harness import ON_SQLITE, PER_DEVICE, Clock, settings_for
from workflows.credentials import DeviceRequest
from workflows.registration import Registered
from workflows.renewal import RenewalRequest

OPERATOR = Actor("default", "an operator", "operator", "request-1", "192.0.2.1")
PUMP = DeviceRequest(name="pump-1", type="pump", location="hall 1", firmware="1.0", metadata={"rack": 7})


def csr_pem() -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "somebody else")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def with_fields(**fields: object) -> DeviceRequest:
    values = {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0", "metadata": {}} | fields
    if isinstance(values.get("csr"), str):
        values["csr"] = read_csr(str(values["csr"]))
    return DeviceRequest(**values)  # type: ignore[arg-type]  # each test says which


def token_of(registered: Registered) -> str:
    assert registered.download_url is not None
    return registered.download_url.rpartition("/")[2]


def count(portal: Portal, table: type[Certificate | Delivery]) -> int:
    with portal.database.snapshot() as tx:
        return tx.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


def test_a_registration_records_device_certificate_bundle_and_audit_entry_together(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    with portal.database.snapshot() as tx:
        device = db.get_device(tx, "default", registered.device_id)
        certificate = certificates.current_certificate(tx, "default", registered.device_id)
        bundle = tx.execute(sa.select(Delivery.bundle).where(Delivery.device_id == registered.device_id)).scalar_one()
    assert (device.status, device.name, device.metadata) == (DeviceStatus.ACTIVE, "pump-1", {"rack": 7})
    assert certificate is not None
    assert certificate.fingerprint == registered.fingerprint
    assert bundle is not None
    assert [entry.action for entry in portal.operators.audit("default", limit=1, before=None, filters={})[0]] == [
        "device:register"
    ]


def test_the_device_key_is_nowhere_in_the_clear(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    with portal.database.snapshot() as tx:
        bundle = tx.execute(sa.select(Delivery.bundle).where(Delivery.device_id == registered.device_id)).scalar_one()
    assert bundle is not None
    assert b"PRIVATE KEY" not in bundle


def test_a_csr_gets_a_certificate_for_its_key_under_the_portals_subject(portal: Portal) -> None:
    pem = csr_pem()
    registered = portal.registrations.register(OPERATOR, with_fields(csr=pem))
    assert registered.certificate is not None
    assert registered.bundle_password is None
    certificate = x509.load_pem_x509_certificate(registered.certificate.encode())
    assert certificate.public_key() == x509.load_pem_x509_csr(pem.encode()).public_key()
    assert certificate.subject.rfc4514_string() == f"CN={registered.device_id}"


@pytest.mark.parametrize("also", [{"key_type": "ed25519"}, {"bundle_password": "a long enough one"}])
def test_a_csr_goes_with_no_key_type_and_no_bundle_password(portal: Portal, also: dict[str, str]) -> None:
    with pytest.raises(InputInvalid):
        portal.registrations.register(OPERATOR, with_fields(csr=csr_pem(), **also))


@pytest.mark.parametrize(
    "pattern", ["#", "devices/+/x", "devices/#", "$SYS/#", f"devices/{'0' * 8}-0000-4000-8000-{'0' * 12}/#"]
)
def test_a_topic_that_reaches_another_device_is_refused_and_nothing_is_recorded(portal: Portal, pattern: str) -> None:
    before = count(portal, Certificate)
    with pytest.raises(TopicRefused):
        portal.registrations.register(OPERATOR, with_fields(topics=[(pattern, "read")]))
    assert count(portal, Certificate) == before


def test_one_idempotency_key_makes_one_device_and_the_same_answer(portal: Portal) -> None:
    first = portal.registrations.register(OPERATOR, PUMP, "a-key-of-16-chars")
    assert portal.registrations.register(OPERATOR, PUMP, "a-key-of-16-chars") == first


def test_an_idempotency_key_with_another_body_is_a_conflict(portal: Portal) -> None:
    portal.registrations.register(OPERATOR, PUMP, "a-key-of-16-chars")
    with pytest.raises(IdempotencyConflict):
        portal.registrations.register(OPERATOR, with_fields(name="pump-2"), "a-key-of-16-chars")


def test_another_operators_idempotency_key_opens_no_answer_and_the_attempt_is_recorded(portal: Portal) -> None:
    first = portal.registrations.register(OPERATOR, PUMP, "a-key-of-16-chars")
    thief = dataclasses.replace(OPERATOR, name="another operator (0123456789abcdef)", address="192.0.2.9")
    with pytest.raises(IdempotencyConflict, match="another operator token"):
        portal.registrations.register(thief, PUMP, "a-key-of-16-chars")
    with pytest.raises(IdempotencyConflict, match="another operator token"):
        portal.renewals.renew(thief, first.device_id, RenewalRequest(), "a-key-of-16-chars")
    found = portal.operators.audit("default", limit=2, before=None, filters={})[0]
    device = f"device:{first.device_id}"
    assert {(entry.action, entry.object, entry.outcome, entry.actor, entry.address) for entry in found} == {
        ("answer:repeat", device, "refused", thief.name, "192.0.2.9")
    }


def test_another_operators_idempotency_key_opens_no_answer_of_a_renewal(portal: Portal) -> None:
    device_id = portal.registrations.register(OPERATOR, PUMP).device_id
    renewed = portal.renewals.renew(OPERATOR, device_id, RenewalRequest(), "a-key-of-16-chars")
    thief = dataclasses.replace(OPERATOR, name="another operator (0123456789abcdef)")
    with pytest.raises(IdempotencyConflict, match="another operator token"):
        portal.renewals.renew(thief, device_id, RenewalRequest(), "a-key-of-16-chars")
    assert portal.renewals.renew(OPERATOR, device_id, RenewalRequest(), "a-key-of-16-chars") == renewed


def test_each_repeat_of_an_answer_is_recorded(portal: Portal) -> None:
    first = portal.registrations.register(OPERATOR, PUMP, "a-key-of-16-chars")
    for _ in range(2):
        portal.registrations.register(OPERATOR, PUMP, "a-key-of-16-chars")
    found = portal.operators.audit("default", limit=3, before=None, filters={})[0]
    assert [entry.action for entry in found] == ["answer:repeat", "answer:repeat", "device:register"]
    assert {entry.object for entry in found} == {f"device:{first.device_id}"}


def test_a_revoked_devices_kept_answers_are_gone_and_its_keys_make_no_second_device(portal: Portal) -> None:
    device_id = portal.registrations.register(OPERATOR, PUMP, "a-key-of-16-chars").device_id
    portal.renewals.renew(OPERATOR, device_id, RenewalRequest(), "another-of-16-chars")
    portal.revocations.revoke(OPERATOR, device_id, "key_compromise")
    with portal.database.snapshot() as tx:
        assert set(tx.execute(sa.text("SELECT sealed_answer FROM idempotency_keys")).scalars()) == {b""}
    with pytest.raises(IdempotencyConflict, match="revoked since"):
        portal.registrations.register(OPERATOR, PUMP, "a-key-of-16-chars")
    with pytest.raises(IdempotencyConflict, match="revoked since"):
        portal.renewals.renew(OPERATOR, device_id, RenewalRequest(), "another-of-16-chars")


def test_an_idempotency_key_is_free_again_after_24_hours(portal: Portal, clock: Clock) -> None:
    first = portal.registrations.register(OPERATOR, PUMP, "a-key-of-16-chars")
    clock.advance(hours=24, seconds=1)
    assert portal.registrations.register(OPERATOR, PUMP, "a-key-of-16-chars").device_id != first.device_id


def test_registrations_at_once_under_one_idempotency_key_make_one_device(portal: Portal) -> None:
    start = threading.Barrier(8)

    def register(_: int) -> Registered:
        start.wait()
        return portal.registrations.register(OPERATOR, PUMP, "a-key-of-16-chars")

    with ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(register, range(8)))
    assert len(answers) == 1


def test_the_kept_answer_does_not_open_without_the_idempotency_key(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP, "a-key-of-16-chars")
    with portal.database.snapshot() as tx:
        row = tx.execute(sa.text("SELECT key_hash, sealed_answer FROM idempotency_keys")).one()
    assert registered.bundle_password is not None
    assert registered.bundle_password.encode() not in row.sealed_answer
    assert "a-key-of-16-chars" not in row.key_hash


def test_a_bundle_is_handed_out_once_and_then_gone(portal: Portal) -> None:
    token = token_of(portal.registrations.register(OPERATOR, PUMP))
    bundle = portal.deliveries.deliver(OPERATOR, token)
    assert bundle.content.startswith(b"PK")
    with pytest.raises(LinkUsed):
        portal.deliveries.deliver(OPERATOR, token)
    with portal.database.snapshot() as tx:
        assert tx.execute(sa.select(Delivery.bundle)).scalars().all() == [None]


def test_of_many_fetches_at_once_exactly_one_gets_the_bundle(portal: Portal) -> None:
    token = token_of(portal.registrations.register(OPERATOR, PUMP))
    start = threading.Barrier(8)

    def fetch(_: int) -> bool:
        start.wait()
        try:
            portal.deliveries.deliver(OPERATOR, token)
        except LinkUsed:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(fetch, range(8))) == 1


def test_a_bundle_is_gone_from_the_database_before_it_is_handed_out(portal: Portal) -> None:
    token = token_of(portal.registrations.register(OPERATOR, PUMP))
    assert portal.deliveries.deliver(OPERATOR, token).content
    with portal.database.snapshot() as tx:
        row = tx.execute(sa.select(Delivery)).one()
    assert (row.status, row.bundle) == ("delivered", None)


def test_a_fetch_that_an_older_version_did_not_see_the_end_of_may_be_repeated(portal: Portal, clock: Clock) -> None:
    token = token_of(portal.registrations.register(OPERATOR, PUMP))
    with portal.database.transaction() as tx:
        lease = clock() + timedelta(seconds=30)
        tx.execute(sa.update(Delivery).values(status=DeliveryStatus.FETCHING, lease_until=lease))
    with pytest.raises(LinkUsed):
        portal.deliveries.deliver(OPERATOR, token)
    clock.advance(seconds=31)
    assert portal.deliveries.deliver(OPERATOR, token).content.startswith(b"PK")
    with pytest.raises(LinkUsed):
        portal.deliveries.deliver(OPERATOR, token)


def test_the_link_of_a_revoked_device_gives_nothing(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    portal.revocations.revoke(OPERATOR, registered.device_id, "key_compromise")
    with pytest.raises(LinkRevoked):
        portal.deliveries.deliver(OPERATOR, token_of(registered))


def test_looking_at_a_link_spends_nothing(portal: Portal) -> None:
    token = token_of(portal.registrations.register(OPERATOR, PUMP))
    portal.deliveries.check_download(token)
    portal.deliveries.check_download(token)
    assert portal.deliveries.deliver(OPERATOR, token).content


def test_a_link_ends_with_its_time(portal: Portal, clock: Clock) -> None:
    token = token_of(portal.registrations.register(OPERATOR, PUMP))
    clock.advance(hours=24, seconds=1)
    with pytest.raises(LinkExpired):
        portal.deliveries.deliver(OPERATOR, token)


@pytest.mark.parametrize(
    "alter", [lambda t: t[:-1], lambda t: "A" + t[1:], lambda t: t + ".x", lambda _: "", lambda _: "é" * 40]
)
def test_an_altered_link_is_unknown(portal: Portal, alter: Callable[[str], str]) -> None:
    token = token_of(portal.registrations.register(OPERATOR, PUMP))
    with pytest.raises(LinkUnknown):
        portal.deliveries.deliver(OPERATOR, alter(token))


def test_a_link_signed_with_an_older_key_still_works_after_rotation(
    make_settings: Callable[..., Settings], clock: Clock
) -> None:
    settings = make_settings()
    before = open_portal(settings, clock)
    token = token_of(before.registrations.register(OPERATOR, PUMP))
    before.close()
    keys = settings.secrets_dir / "link-keys"
    keys.write_text(keys.read_text() + "a-newer-key-of-many-characters\n")
    after = open_portal(settings, clock)
    assert after.deliveries.deliver(OPERATOR, token).content
    assert token_of(after.registrations.register(OPERATOR, PUMP)) != token
    after.close()


def test_a_revocation_is_recorded_though_the_broker_does_not_run(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    revoked = portal.revocations.revoke(OPERATOR, registered.device_id, "key_compromise")
    assert not revoked.enforced
    assert revoked.problem is not None
    with portal.database.snapshot() as tx:
        assert db.get_device(tx, "default", registered.device_id).status is DeviceStatus.REVOKED
        statuses = tx.execute(
            sa.select(Certificate.status).where(Certificate.device_id == registered.device_id)
        ).scalars()
        assert list(statuses) == ["revoked"]


@PER_DEVICE
def test_a_revoked_device_is_in_the_crl_and_not_in_the_acl_that_the_broker_will_read(portal: Portal) -> None:
    stays, goes = (portal.registrations.register(OPERATOR, PUMP) for _ in range(2))
    portal.revocations.revoke(OPERATOR, goes.device_id, "key_compromise")
    acl = portal.settings.broker_file("acl").read_text()
    assert stays.device_id in acl
    assert goes.device_id not in acl
    crl = x509.load_pem_x509_crl(portal.settings.broker_file("crl.pem").read_bytes())
    entry = crl.get_revoked_certificate_by_serial_number(int(goes.serial_number, 16))
    assert entry is not None
    assert entry.extensions.get_extension_for_class(x509.CRLReason).value.reason is x509.ReasonFlags.key_compromise
    assert crl.get_revoked_certificate_by_serial_number(int(stays.serial_number, 16)) is None


def test_revoking_twice_answers_the_same(portal: Portal, clock: Clock) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    first = portal.revocations.revoke(OPERATOR, registered.device_id, "key_compromise")
    clock.advance(minutes=5)
    assert portal.revocations.revoke(OPERATOR, registered.device_id, "superseded") == first


def test_the_crl_has_a_worse_reason_with_the_first_time_and_the_keys_are_blocked(portal: Portal, clock: Clock) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)

    def listed() -> tuple[int, datetime, x509.ReasonFlags | None]:
        crl = x509.load_pem_x509_crl(portal.settings.broker_file("crl.pem").read_bytes())
        entry = crl.get_revoked_certificate_by_serial_number(int(registered.serial_number, 16))
        assert entry is not None
        found = [one.value for one in entry.extensions if isinstance(one.value, x509.CRLReason)]
        number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        return number, entry.revocation_date_utc, found[0].reason if found else None

    portal.revocations.revoke(OPERATOR, registered.device_id, "unspecified")
    number, at, reason = listed()
    assert reason is None
    clock.advance(minutes=5)
    portal.revocations.revoke(OPERATOR, registered.device_id, "key_compromise")
    later = listed()
    assert later[0] > number
    assert later[1:] == (at, x509.ReasonFlags.key_compromise)
    with portal.database.snapshot() as tx:
        [row] = certificates.device_certificates(tx, "default", registered.device_id)
        with pytest.raises(KeyCompromised):
            keys.check_key(tx, "default", certificate_key_fingerprint(row.der), "another")


def test_a_revocation_destroys_the_bundle_and_its_link(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    portal.revocations.revoke(OPERATOR, registered.device_id, "unspecified")
    with pytest.raises(LinkRevoked):
        portal.deliveries.deliver(OPERATOR, token_of(registered))


def test_a_revoked_device_cannot_be_changed(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    portal.revocations.revoke(OPERATOR, registered.device_id, "unspecified")
    with pytest.raises(StateConflict):
        portal.registrations.update(OPERATOR, registered.device_id, {"name": "back again"})


def test_a_device_of_another_tenant_is_not_there(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, PUMP)
    stranger = Actor("another", "an operator", "operator", "request-2", "192.0.2.2")
    with portal.database.transaction() as tx:
        tenants.add_tenant(tx, "another", created_at=portal.clock())
    with pytest.raises(DeviceNotFound):
        portal.revocations.revoke(stranger, registered.device_id, "unspecified")
    with pytest.raises(DeviceNotFound):
        portal.inventory.device("another", registered.device_id)


def test_crl_numbers_and_this_update_rise_with_each_revocation(portal: Portal) -> None:
    seen = []
    for _ in range(3):
        registered = portal.registrations.register(OPERATOR, PUMP)
        portal.revocations.revoke(OPERATOR, registered.device_id, "unspecified")
        with portal.database.snapshot() as tx:
            crl = issuers.get_crl(tx, portal.authority.first.issuing.id)
        assert crl is not None
        seen.append((crl.number, crl.this_update))
    assert seen == sorted(set(seen))
    assert all(later[1] - earlier[1] >= timedelta(seconds=1) for earlier, later in itertools.pairwise(seen))


@ON_SQLITE
@pytest.mark.parametrize("acl_style", ["", "per-device"], indirect=True)
def test_an_upgraded_portal_keeps_the_style_of_its_files(portal: Portal, clock: Clock, acl_style: str) -> None:
    narrower = with_fields(topics=[("devices/{id}/up/#", "write")])
    portal.reconciler.install()
    with contextlib.closing(open_portal(settings_for(portal.settings.data_dir), clock)) as again:
        record = json.loads(again.settings.broker_file("projection.json").read_text())
        assert record["style"] == again.settings.acl_style == (acl_style or "pattern")
        if acl_style:
            again.registrations.register(OPERATOR, narrower)
            return
        with pytest.raises(TopicRefused, match="PORTAL_ACL_STYLE=per-device"):
            again.registrations.register(OPERATOR, narrower)


@PER_DEVICE
def test_topics_of_its_own_reach_the_acl_and_null_gives_the_default_back(portal: Portal) -> None:
    registered = portal.registrations.register(OPERATOR, with_fields(topics=[("devices/{id}/up/#", "write")]))
    portal.reconciler.install()
    acl = portal.settings.broker_file("acl")
    assert f"topic write devices/{registered.device_id}/up/#\n" in acl.read_text()
    portal.registrations.update(OPERATOR, registered.device_id, {}, topics=None)
    assert f"topic readwrite devices/{registered.device_id}/#\n" in acl.read_text()
