"""The issuers' CRLs: what is on them as devices come, go and come back, and what a process has to read for that."""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography import x509
from sqlalchemy.engine import Connection

import ca
import db
from operations.wiring import Portal
from pki.issuers import CLOCK_SKEW
from store import issuers
from store.tables import Certificate
from tests.support.statements import noting
from workflows.authority.crl_publication import LEAST_PAUSE, MAX_SHARE
from workflows.authority.crls import RevokedEntries, next_crl

pytestmark = pytest.mark.both_stores

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
_SERIALS = itertools.count(0xC0FFEE0000)


def add_certificate(tx: Connection, issuer_id: int, *, days: int = 30, reason: str | None = None) -> str:
    """A probe certificate, revoked if a reason is given; returns its serial number."""
    serial_number = f"{next(_SERIALS):x}"
    db.add_certificate(
        tx, tenant_id="default", issuer_id=issuer_id, purpose="canary", serial_number=serial_number,
        fingerprint=uuid.uuid4().hex * 2, der=b"", not_before=NOW - timedelta(days=1),
        not_after=NOW + timedelta(days=days), issued_at=NOW, revoked_at=NOW if reason else None, reason=reason,
    )  # fmt: skip
    return serial_number


def hold(tx: Connection, serial_number: str, at: datetime | None) -> None:
    """Suspend a certificate at a time, or with ``None`` let it be used again."""
    values = {"status": "held", "revoked_at": at, "revocation_reason": "certificate_hold"}
    if at is None:
        values = {"status": "active", "revoked_at": None, "revocation_reason": None}
    tx.execute(sa.update(Certificate).where(Certificate.serial_number == serial_number).values(values))


class Process:
    """One of the processes that sign CRLs, with what it has in memory."""

    def __init__(self, portal: Portal) -> None:
        self.portal = portal
        self.entries = RevokedEntries()

    def sign(self, now: datetime = NOW) -> dict[str, x509.RevokedCertificate]:
        """Sign the issuing CA's next CRL; returns its entries, except the portal's revoked probe certificate."""
        issuing = self.portal.authority.first.issuing
        with self.portal.database.transaction() as tx:
            head = issuers.get_crl_head(tx, issuing.id)
            crl = next_crl(tx, issuing.id, issuing.issuer, head, self.entries, days=7, generation=1, now=now)
            assert issuers.put_crl(tx, crl)
        entries = {f"{entry.serial_number:x}": entry for entry in x509.load_der_x509_crl(crl.der)}
        return {serial: entry for serial, entry in entries.items() if serial.startswith("c0ffee")}


@pytest.fixture
def one(portal: Portal) -> Process:
    return Process(portal)


@pytest.fixture
def other(portal: Portal) -> Process:
    return Process(portal)


def test_what_was_revoked_is_on_every_crl_until_it_expires(portal: Portal, one: Process) -> None:
    with portal.database.transaction() as tx:
        short, long = (add_certificate(tx, 2, days=days, reason="superseded") for days in (1, 3))
        add_certificate(tx, 2)
        of_another_issuer = add_certificate(tx, 1, reason="superseded")
    assert one.sign().keys() == {short, long}
    assert one.sign(NOW + timedelta(days=2)).keys() == {long}
    assert one.sign(NOW + timedelta(days=4)).keys() == set()
    assert of_another_issuer not in one.sign()


def test_a_process_that_signed_nothing_for_a_while_catches_up(portal: Portal, one: Process, other: Process) -> None:
    with portal.database.transaction() as tx:
        first = add_certificate(tx, 2, reason="key_compromise")
    assert one.sign().keys() == {first}
    with portal.database.transaction() as tx:
        second = add_certificate(tx, 2, reason="superseded")
    assert other.sign().keys() == one.sign().keys() == {first, second}


def test_a_hold_leaves_the_crl_and_comes_back_with_its_own_date(portal: Portal, one: Process) -> None:
    with portal.database.transaction() as tx:
        serial = add_certificate(tx, 2)
        hold(tx, serial, NOW)
    assert one.sign()[serial].revocation_date_utc == NOW - CLOCK_SKEW
    with portal.database.transaction() as tx:
        hold(tx, serial, NOW + timedelta(hours=1))  # and was used again in between, when another process signed
    entry = one.sign()[serial]
    assert entry.revocation_date_utc == NOW + timedelta(hours=1) - CLOCK_SKEW
    assert entry.extensions.get_extension_for_class(x509.CRLReason).value.reason is x509.ReasonFlags.certificate_hold
    with portal.database.transaction() as tx:
        hold(tx, serial, None)
    assert serial not in one.sign()


@pytest.mark.parametrize("seconds_ago", [0, 1, 3599])
def test_no_entry_is_dated_after_the_crl_that_lists_it(portal: Portal, seconds_ago: int) -> None:
    with portal.database.transaction() as tx:
        hold(tx, add_certificate(tx, 2), NOW - timedelta(seconds=seconds_ago, microseconds=1))
        crl = next_crl(
            tx, 2, portal.authority.first.issuing.issuer, None, RevokedEntries(), days=7, generation=1, now=NOW
        )
    read = x509.load_der_x509_crl(crl.der)
    [entry] = [entry for entry in read if f"{entry.serial_number:x}".startswith("c0ffee")]
    assert entry.revocation_date_utc <= read.last_update_utc
    assert read.last_update_utc == NOW - CLOCK_SKEW


def test_a_hold_that_ends_in_revocation_changes_its_entry(portal: Portal, one: Process) -> None:
    with portal.database.transaction() as tx:
        serial = add_certificate(tx, 2)
        hold(tx, serial, NOW)
    one.sign()
    with portal.database.transaction() as tx:
        values = {"status": "revoked", "revoked_at": NOW, "revocation_reason": "key_compromise"}
        tx.execute(sa.update(Certificate).where(Certificate.serial_number == serial).values(values))
    reason = one.sign()[serial].extensions.get_extension_for_class(x509.CRLReason).value.reason
    assert reason is x509.ReasonFlags.key_compromise


@contextmanager
def statements(portal: Portal) -> Iterator[list[str]]:
    seen: list[str] = []
    with noting(portal.database.engine, lambda statement, _rows: seen.append(statement)):
        yield seen


def test_an_entry_is_read_once_by_a_process(portal: Portal, one: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    with portal.database.transaction() as tx:
        for _ in range(1200):
            add_certificate(tx, 2, reason="superseded")
    assert len(one.sign()) == 1200
    encoded: list[str] = []
    real = ca.revoke_certificate

    def counted(serial_number: str, *rest: Any) -> x509.RevokedCertificate:
        if serial_number.startswith("c0ffee"):  # not the probe certificate, which a later generation than ours revoked
            encoded.append(serial_number)
        return real(serial_number, *rest)

    monkeypatch.setattr(ca, "revoke_certificate", counted)
    with portal.database.transaction() as tx:
        latest = add_certificate(tx, 2, reason="superseded")
    with statements(portal) as seen:
        assert len(one.sign()) == 1201
    assert encoded == [latest]
    assert not [statement for statement in seen if "crls.der" in statement]


def test_a_process_reads_what_is_revoked_before_it_has_to_sign(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    issuing = portal.authority.first.issuing.id
    with portal.database.transaction() as tx:
        add_certificate(tx, issuing, reason="superseded")
    monkeypatch.setattr(portal.reconciler.crls, "_revoked", RevokedEntries())
    stopping = threading.Event()
    stopping.set()
    portal.reconciler.crls.run_requested(stopping)
    read_ahead = portal.reconciler.crls._revoked
    monkeypatch.setattr(issuers, "revoked_certificates", lambda *_: pytest.fail("they were known"))
    with portal.database.snapshot() as tx:
        assert read_ahead.listed(tx, issuing, generation=1, now=portal.clock())
    assert not read_ahead.are_unread


def test_crls_that_nobody_waits_for_take_little_of_the_time(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    crls, now, last, pauses = portal.reconciler.crls, [0.0], [0.0], list[float]()

    class Stopping(threading.Event):
        def is_set(self) -> bool:
            return len(pauses) >= 5

        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout or 0.0)
            now[0] += timeout or 0.0
            if len(pauses) == 3:
                last[0] = now[0] - 1.0  # another process has published them
            return False

    def publish() -> None:
        now[0] += 0.2
        last[0] = now[0]
        crls.wake()

    monkeypatch.setattr(crls, "publish", publish)
    monkeypatch.setattr("workflows.authority.crl_publication.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(portal.broker.files, "seconds_since_crl", lambda: now[0] - last[0])
    crls.wake()
    crls.run_requested(Stopping())
    whole = 0.2 / MAX_SHARE
    assert pauses[:4] == pytest.approx([LEAST_PAUSE, LEAST_PAUSE, whole - LEAST_PAUSE, whole - 1.0])
