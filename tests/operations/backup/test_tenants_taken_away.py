"""A restore brings no tenant back that was suspended or removed since the backup, whoever bears its name by now."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import db
from config import Settings
from core.broker_control import JOURNAL_FILE
from core.roles import Role
from core.states import DeviceStatus
from core.tenants import TenantStatus
from operations.wiring import Portal
from store import audit, keys, tenants
from store.audit import Actor
from store.enrolment import add_factory_key
from tests.support.backups import copied, listed, lose_the_database, opened, put_back
from tests.support.guard_stub import GuardStub
from tests.support.harness import ON_SQLITE, Clock
from tests.support.tenants import add_tenant
from tests.workflows.test_registration import PUMP
from workflows.operators import new_token

pytestmark = pytest.mark.both_stores

SYSTEM = Actor("default", "ruler", Role.SYSTEM, "request-1", "192.0.2.1")


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings(PORTAL_BROKER_CONTROL="guard", PORTAL_ENFORCE_TIMEOUT="1")


def add_acme(portal: Portal, clock: Clock) -> tuple[str, str]:
    """A tenant with a device and a token: the device's id and the token's secret."""
    add_tenant(portal, "acme")
    secret, record = new_token("acme", "ci", Role.ADMIN, None, now=clock())
    with portal.database.transaction() as tx:
        tenants.add_token(tx, record, secret=secret)
    return portal.registrations.register(audit.system_actor("acme"), PUMP).device_id, secret


def delete(portal: Portal, clock: Clock, settings: Settings) -> None:
    """Remove it and let its time of grace go by, with a broker, which must have been told before it goes."""
    with told(portal, settings):
        portal.tenant_removals.remove(SYSTEM, "acme", "acme")
        clock.advance(days=settings.tenant_grace_days + 1)
        portal.tenant_removals.run()


@contextlib.contextmanager
def told(portal: Portal, settings: Settings) -> Iterator[None]:
    """Have a broker that obeys."""
    settings.broker_socket.unlink(missing_ok=True)  # of the one before
    guard = GuardStub(settings.broker_socket, settings.broker_file(JOURNAL_FILE))
    with guard, pytest.MonkeyPatch.context() as patch:
        patch.setattr(portal.broker, "probe", lambda *_arguments, **_options: None)
        yield


def status_of(portal: Portal) -> TenantStatus:
    with portal.database.snapshot() as tx:
        return tenants.get_tenant(tx, "acme").status


def assert_ended(portal: Portal, device_id: str, secret: str) -> None:
    assert status_of(portal) is TenantStatus.REMOVED
    assert portal.operators.authenticate(secret) is None
    portal.tenant_removals.run()
    with portal.database.snapshot() as tx:
        assert db.get_device(tx, "acme", device_id).status is DeviceStatus.REVOKED
        assert not portal.authority.seen_by(tx).has_issuing("acme")


def test_a_tenant_suspended_since_the_copy_stays_suspended(settings: Settings, file: Path, clock: Clock) -> None:
    with opened(settings, clock) as portal:
        add_acme(portal, clock)
        copied(settings, file, clock)
        clock.advance(minutes=1)
        portal.tenants.suspend(SYSTEM, "acme")
    done = put_back(settings, file, clock)
    assert [kept.what for kept in done.kept] == ["tenant acme, suspended"]
    with opened(settings, clock) as portal:
        assert status_of(portal) is TenantStatus.SUSPENDED
        entries, _ = portal.operators.audit("acme", limit=1, before=None, filters={"action": "tenant:suspend"})
        assert entries


def test_a_tenant_resumed_since_the_copy_stays_as_the_copy_has_it(settings: Settings, file: Path, clock: Clock) -> None:
    with opened(settings, clock) as portal:
        add_acme(portal, clock)
        portal.tenants.suspend(SYSTEM, "acme")
        copied(settings, file, clock)
        portal.tenants.resume(SYSTEM, "acme")
    assert put_back(settings, file, clock).kept == []
    with opened(settings, clock) as portal:
        assert status_of(portal) is TenantStatus.SUSPENDED


def test_a_tenant_removed_since_the_copy_stays_removed(settings: Settings, file: Path, clock: Clock) -> None:
    with opened(settings, clock) as portal:
        device_id, secret = add_acme(portal, clock)
        copied(settings, file, clock)
        portal.tenant_removals.remove(SYSTEM, "acme", "acme")
    assert "tenant acme, removed" in [kept.what for kept in put_back(settings, file, clock).kept]
    with opened(settings, clock) as portal:
        assert_ended(portal, device_id, secret)


def test_a_tenant_whose_rows_were_deleted_since_the_copy_stays_removed(
    settings: Settings, file: Path, clock: Clock
) -> None:
    with opened(settings, clock) as portal:
        device_id, secret = add_acme(portal, clock)
        copied(settings, file, clock)
        delete(portal, clock, settings)
    done = put_back(settings, file, clock)
    assert "tenant acme, removed" in [kept.what for kept in done.kept]
    assert ("its CAs cannot sign" in " ".join(done.notes)) == bool(settings.ca_keys[0])
    with opened(settings, clock) as portal:
        with told(portal, settings):
            device = portal.registrations.register(SYSTEM, PUMP)
            assert portal.revocations.revoke(SYSTEM, device.device_id, "unspecified").enforced
            portal.reconciler.crls.publish(at_once=True)
            assert device.serial_number in listed(settings)
            assert_ended(portal, device_id, secret)
            clock.advance(days=settings.tenant_grace_days + 1)
            portal.tenant_removals.run()
        with portal.database.snapshot() as tx:
            assert tenants.tenant_ids(tx) == ["default"]


def test_another_tenant_that_has_the_name_by_now_does_not_bring_the_removed_one_back(
    settings: Settings, file: Path, clock: Clock
) -> None:
    with opened(settings, clock) as portal:
        device_id, secret = add_acme(portal, clock)
        copied(settings, file, clock)
        delete(portal, clock, settings)
        clock.advance(minutes=1)
        add_acme(portal, clock)
    assert "tenant acme, removed" in [kept.what for kept in put_back(settings, file, clock).kept]
    with opened(settings, clock) as portal:
        assert_ended(portal, device_id, secret)


@ON_SQLITE
def test_without_the_database_the_journal_says_who_was_suspended(settings: Settings, file: Path, clock: Clock) -> None:
    with opened(settings, clock) as portal:
        add_acme(portal, clock)
        copied(settings, file, clock)
        portal.tenants.suspend(SYSTEM, "acme")
        portal.reconciler.install()
    lose_the_database(settings)
    assert [kept.what for kept in put_back(settings, file, clock).kept] == ["tenant acme, suspended"]
    with opened(settings, clock) as portal:
        assert status_of(portal) is TenantStatus.SUSPENDED


def test_what_a_tenant_added_since_the_copy_has_blocked_does_not_stop_the_restore(
    settings: Settings, file: Path, clock: Clock
) -> None:
    with opened(settings, clock) as portal:
        copied(settings, file, clock)
        device_id, _ = add_acme(portal, clock)
        portal.revocations.revoke(audit.system_actor("acme"), device_id, "key_compromise")
        with portal.database.transaction() as tx:
            keys.block_keys(tx, "acme", None, ["ab" * 32], at=clock())
            add_factory_key(tx, "acme", "cd" * 32, None)
    put_back(settings, file, clock)
    with opened(settings, clock) as portal, portal.database.snapshot() as tx:
        assert tenants.tenant_ids(tx) == ["default"]
        claim = keys.KeyClaim("ab" * 32, "00000000-0000-4000-8000-000000000001")
        assert keys.refusals(tx, "default", [claim])  # it is known to others
