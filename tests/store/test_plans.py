"""Queries that run often are answered from an index, whatever the number of rows: the databases' own plans say so."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.engine import Connection

from core.states import ClientKind, PresenceState
from operations.wiring import Portal
from store import (
    attestation,
    audit,
    certificates,
    devices,
    enrolment,
    generations,
    groups,
    issuers,
    presences,
    references,
    renewal,
    tenants,
)
from store.counts import counts_of
from store.devices import DeviceFilter
from store.overview import figures_of
from store.tables import Device
from tests.support.harness import ON_SQLITE
from tests.support.statements import noting

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
Query = Callable[[Connection], object]

OF_JOBS: dict[str, Query] = {
    "what changed in the ACL": lambda tx: list(generations.acl_changes(tx, since=7, defaults=True)),
    "the ACL beside a pattern": lambda tx: list(generations.acl_changes(tx, since=0, defaults=False)),
    "devices revoked since": lambda tx: generations.revoked_since(tx, 7),
    "devices to disconnect": lambda tx: generations.devices_to_disconnect(tx, since=7),
    "sessions to end": lambda tx: list(generations.sessions_to_end(tx, 7)),
    "devices denied since a time": lambda tx: generations.devices_denied_since(tx, NOW),
    "number of certificates on the CRL": lambda tx: issuers.count_revoked(tx, 2, now=NOW),
    "certificates on the CRL": lambda tx: issuers.revoked_ids(tx, 2, after=NOW),
    "certificates that leave the CRL": lambda tx: issuers.revoked_ids(tx, 2, after=NOW, until=NOW),
    "certificates new on the CRL": lambda tx: list(issuers.revoked_since(tx, 2, 7, now=NOW)),
    "ended overlaps": lambda tx: renewal.ended_overlaps(tx, now=NOW),
    "unfetched renewals": lambda tx: renewal.unfetched_renewals(tx, now=NOW),
    "nonces to forget": lambda tx: attestation.has_old_nonces(tx, before=NOW),
    "certificates on hold": lambda tx: list(issuers.held_certificates(tx, 2, now=NOW)),
}
LISTS = {
    "all": DeviceFilter(),
    "applications": DeviceFilter(kind=ClientKind.APPLICATION),
    "applications by status": DeviceFilter(kind=ClientKind.APPLICATION, status="revoked"),
    "status": DeviceFilter(status="revoked"),
    "type": DeviceFilter(type="pump"),
    "location": DeviceFilter(location="hall 1"),
    "expires_before": DeviceFilter(expires_before=NOW),
    "q": DeviceFilter(q="x"),
    "profile": DeviceFilter(profile="tls-server"),
    "the default profile": DeviceFilter(profile="default"),
    "profile and type": DeviceFilter(profile="tls-server", type="pump"),
    "type and q": DeviceFilter(type="pump", q="x"),
    "expires_before and type": DeviceFilter(type="pump", expires_before=NOW),
    "type and status": DeviceFilter(type="pump", status="active"),
    "name": DeviceFilter(name="pump-1"),
    "name and type": DeviceFilter(name="pump-1", type="pump"),
    "metadata": DeviceFilter(metadata="owner=ops"),
    "oldest": DeviceFilter(sort="created"),
    "oldest of a type": DeviceFilter(sort="created", type="pump"),
    "by name": DeviceFilter(sort="name"),
    "by name, back": DeviceFilter(sort="-name"),
    "by name of a type": DeviceFilter(sort="name", type="pump"),
    "by expiry": DeviceFilter(sort="expires"),
    "last_seen": DeviceFilter(sort="last_seen"),
    "-last_seen": DeviceFilter(sort="-last_seen"),
    "connected": DeviceFilter(connected=PresenceState.CONNECTED),
    "connected and type": DeviceFilter(connected=PresenceState.OFFLINE, sort="last_seen", type="pump"),
    "attested": DeviceFilter(attested="outdated"),
    "group": DeviceFilter(member_of="0" * 16),
    "group and type": DeviceFilter(member_of="0" * 16, type="pump"),
    "oldest of a group": DeviceFilter(member_of="0" * 16, sort="created"),
    "by name of a group": DeviceFilter(member_of="0" * 16, sort="name"),
    "last_seen of a group": DeviceFilter(member_of="0" * 16, sort="last_seen"),
    "attested and type": DeviceFilter(attested="outdated", type="pump"),
    "not attested": DeviceFilter(attested="none"),
    "all of them": DeviceFilter(status="active", type="pump", location="hall 1", expires_before=NOW),
}
LOOK_UPS: dict[str, Query] = {
    "a group": lambda tx: groups.find_group(tx, "default", "pilots"),
    "the groups of a device": lambda tx: groups.groups_of_device(tx, "default", "x"),
    "the groups of a page of devices": lambda tx: groups.group_names_of(tx, "default", ["x", "y"]),
    "a device by name": lambda tx: references.candidates(tx, "default", "pump-1"),
    "a device by the beginning of its id": lambda tx: references.candidates(tx, "default", "01939bfa"),
    "a device by its id": lambda tx: references.candidates(tx, "default", "0" * 8 + "-0000-0000-0000-" + "0" * 12),
    "first requests that wait": lambda tx: enrolment.waiting_enrolments(tx, "default", limit=5),
    "requests for another key that wait": lambda tx: enrolment.waiting_reenrolments(tx, "default", limit=5),
    "certificates issued to a device": lambda tx: certificates.count_issued(tx, "default", "x", since=NOW),
    "a token": lambda tx: tenants.find_token(tx, "0" * 64),
    "who is connected": lambda tx: presences.connected_at(tx, 1, limit=5, after="x", upto="y"),
    "the audit record since": lambda tx: audit.list_audit_entries(
        tx, "default", limit=5, before=3, period=audit.Period(since=NOW, until=NOW)
    ),
    "the audit record until": lambda tx: audit.list_audit_entries(
        tx, "default", limit=5, period=audit.Period(until=NOW)
    ),
    "a device's certificate": lambda tx: certificates.current_certificate(tx, "default", "x"),
}
OF_FEW = r"ix_devices_(?:own_topics|out)\b"  # the rows that are wanted, of all tenants, and no others
SMALL = {"acl_entries", "issuers", "tenants", "broker_state", "crls"}  # tables that may be read whole


@pytest.fixture
def plans_of(portal: Portal) -> Callable[[Query], list[str]]:
    """Return the database's plans for each statement that a query sends."""
    sent: list[tuple[str, Any]] = []

    def note(statement: str, rows: Sequence[Any]) -> None:
        if statement.startswith("SELECT"):
            sent.append((statement, rows[0]))

    def plans(query: Query) -> list[str]:
        with portal.database.snapshot() as tx:
            sent.clear()
            with noting(portal.database.engine, note):
                query(tx)
            if portal.database.is_sqlite:
                explained = [tx.exec_driver_sql("EXPLAIN QUERY PLAN " + text, given) for text, given in sent]
                return ["\n".join(row[3] for row in rows) for rows in explained]
            # Reading the small tables of a test whole is cheapest; this shows which other plan there is.
            for setting in ("seqscan", "bitmapscan", "sort", "hashjoin", "mergejoin"):
                tx.exec_driver_sql(f"SET LOCAL enable_{setting} = off")
            explained = [tx.exec_driver_sql("EXPLAIN " + text, given) for text, given in sent]
            return ["\n".join(row[0] for row in rows) for rows in explained]

    return plans


def read_whole(plan: str) -> set[str]:
    """The tables that a plan reads from one end to the other; an index of few rows may be read so."""
    scanned = rf"SCAN (?!CONSTANT)(\w+)\b(?! USING INDEX {OF_FEW})|Seq Scan on (\w+)"
    return {one or other for one, other in re.findall(scanned, plan)}


@pytest.mark.parametrize("name", OF_JOBS)
def test_a_reconciliation_reads_no_table_whole(plans_of: Callable[[Query], list[str]], name: str) -> None:
    plans = plans_of(OF_JOBS[name])
    assert plans
    for plan in plans:
        assert read_whole(plan) <= SMALL, plan


@ON_SQLITE  # PostgreSQL chooses by what there is, and here is nothing
@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("what changed in the ACL", "ix_devices_generation"),
        ("devices to disconnect", "ix_devices_out"),
        ("certificates new on the CRL", "ix_certificates_generation"),
    ],
)
def test_what_is_new_is_read_from_the_index_of_generations(
    plans_of: Callable[[Query], list[str]], name: str, index: str
) -> None:
    assert any(index in plan for plan in plans_of(OF_JOBS[name]))


@ON_SQLITE
@pytest.mark.parametrize("tenant", [None, "default"], ids=["all tenants", "one"])
def test_what_is_counted_for_monitoring_is_read_from_indexes(
    plans_of: Callable[[Query], list[str]], tenant: str | None
) -> None:
    plans = plans_of(lambda tx: counts_of(tx, now=NOW, within=[timedelta(days=7)], tenant_id=tenant))
    assert any("ix_certificates_end (tenant_id=? AND not_after>? AND not_after<?)" in plan for plan in plans)
    assert any("COVERING INDEX ix_devices_status (tenant_id=?)" in plan for plan in plans)
    for plan in plans:
        assert read_whole(plan) <= SMALL | {"audit_heads", "deliveries", "webhook_deliveries"}, plan


def figures(tx: Connection) -> object:
    return figures_of(tx, "default", weeks=[(NOW, NOW + timedelta(weeks=1))], since=NOW, applied=7)


def test_the_overview_reads_no_table_whole(plans_of: Callable[[Query], list[str]]) -> None:
    for plan in plans_of(figures):
        few = {f"anon_{number}" for number in range(1, 30)} | {"webhook_deliveries"}  # up to a limit; the dead ones
        assert read_whole(plan) <= SMALL | few, plan


@ON_SQLITE
def test_the_overview_counts_by_indexes_what_grows_with_the_fleet(
    plans_of: Callable[[Query], list[str]],
) -> None:
    plan = "\n".join(plans_of(figures))
    assert "INDEX ix_certificates_end (tenant_id=? AND not_after>? AND not_after<?)" in plan
    assert "INDEX ix_devices_out (generation>?)" in plan
    assert "INDEX ix_webhook_deliveries_dead" in plan
    assert "COVERING INDEX ix_presences_seen (tenant_id=? AND state=?)" in plan
    assert "ix_audit_entries_at (tenant_id=? AND at>?)" in plan


@ON_SQLITE
def test_changed_policies_are_read_from_their_index(plans_of: Callable[[Query], list[str]]) -> None:
    [plan] = plans_of(lambda tx: attestation.results_of_older_policies(tx, limit=5))
    assert "SCAN attestation_policies USING COVERING INDEX ix_attestation_policies_changed" in plan
    assert "SEARCH attestations USING INDEX ix_attestations_policy" in plan


@pytest.mark.parametrize("name", LOOK_UPS)
def test_a_look_up_reads_no_table_whole(plans_of: Callable[[Query], list[str]], name: str) -> None:
    for plan in plans_of(LOOK_UPS[name]):
        assert read_whole(plan) <= SMALL, plan


@pytest.mark.parametrize("later", [False, True], ids=["first page", "later page"])
@pytest.mark.parametrize("name", LISTS)
def test_a_page_is_read_from_an_index_in_its_order(
    plans_of: Callable[[Query], list[str]], name: str, later: bool
) -> None:
    state: tuple[object, ...] = (PresenceState.OFFLINE,) if name.endswith("last_seen") else ()
    state = (PresenceState.OFFLINE,) if name.startswith("last_seen") else state
    state = ("pump-1",) if name.startswith("by name") else state
    after = (*state, NOW, "0" * 36) if later else None
    plans = plans_of(lambda tx: devices.list_devices(tx, "default", LISTS[name], limit=50, after=after))
    assert plans
    for plan in plans:
        assert not read_whole(plan), plan
        assert "TEMP B-TREE" not in plan, plan
        assert "Sort" not in plan, plan


@pytest.mark.parametrize("name", ["q", "type and status", "expires_before and type"])
def test_a_page_that_is_narrowed_twice_is_read_between_two_places(
    plans_of: Callable[[Query], list[str]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(devices, "_reach", lambda *_: (Device.type, (NOW, "f" * 36)))
    after = (NOW - timedelta(days=1) if "expires" in name else NOW + timedelta(days=1), "0" * 36)
    [plan] = plans_of(lambda tx: devices.list_devices(tx, "default", LISTS[name], limit=50, after=after))
    read = re.search(r"INDEX ix_\w+ \((.*)\)|Index Cond: \((.*)\)", plan)
    assert read is not None, plan
    assert plan.count("ROW(") >= 2 or plan.count("(?,?)") == 2, plan


def test_the_few_applications_are_counted_by_their_own_index(plans_of: Callable[[Query], list[str]]) -> None:
    plans = plans_of(lambda tx: counts_of(tx, now=NOW, within=[timedelta(days=7)]))
    assert sum("ix_devices_applications" in plan for plan in plans) == 3  # by status, certificates, connections
