"""What Prometheus reads of several tenants: by tenant up to a number of them, then sums; and what one of them reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest

from config import Settings
from core.metrics import Gauge
from operations.wiring import Portal, open_portal
from store import tenants
from store.audit import Actor
from tests.support.harness import Clock
from tests.support.statements import noting
from tests.support.tenants import add_tenant
from tests.workflows.test_registration import OPERATOR, PUMP

OTHER = dataclasses.replace(OPERATOR, tenant_id="other")


@pytest.fixture
def portal(make_settings: Callable[..., Settings], clock: Clock) -> Iterator[Portal]:
    """Two devices and a webhook with an event of the first tenant, three of the other, one of them revoked."""
    portal = open_portal(make_settings(PORTAL_METRICS_TENANTS="2", PORTAL_BROKER_CONTROL="files"), clock)
    add_tenant(portal, "other")
    portal.webhooks.create(OTHER, "all", "https://example.com", [])
    ids = {actor: [register(portal, actor) for _ in range(count)] for actor, count in ((OPERATOR, 2), (OTHER, 3))}
    portal.revocations.revoke(OTHER, ids[OTHER][0], "superseded")
    yield portal
    portal.close()


def register(portal: Portal, actor: Actor) -> str:
    return portal.registrations.register(actor, dataclasses.replace(PUMP, validity_days=5)).device_id


def values(gauges: list[Gauge], name: str) -> dict[tuple[str, ...], float]:
    [gauge] = [gauge for gauge in gauges if gauge.name == name]
    return {tuple(labels): value for labels, value in gauge.samples if value}


def test_of_several_tenants_each_figure_is_told_by_tenant(portal: Portal) -> None:
    gauges = portal.monitoring.gauges()
    assert values(gauges, "portal_devices") == {
        ("active", "default"): 2,
        ("active", "other"): 2,
        ("revoked", "other"): 1,
    }
    assert values(gauges, "portal_certificates_expiring")["7d", "other"] == 2
    assert values(gauges, "portal_bundles_undelivered") == {("default",): 2, ("other",): 2}
    assert set(values(gauges, "portal_events_waiting")) == {("other",)}
    assert values(gauges, "portal_audit_entries").keys() == {("default",), ("other",)}


def test_of_more_tenants_than_the_setting_they_are_sums(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        tenants.add_tenant(tx, "third", created_at=portal.clock())
    gauges = portal.monitoring.gauges()
    assert values(gauges, "portal_devices") == {("active",): 4, ("revoked",): 1}
    assert values(gauges, "portal_bundles_undelivered") == {(): 4}
    assert not [gauge for gauge in gauges if "tenant" in gauge.labels]


def test_a_tenants_own_figures_have_nothing_of_another_or_of_the_installation(portal: Portal) -> None:
    gauges = portal.monitoring.gauges_of("default")
    assert values(gauges, "portal_devices") == {("active",): 2}
    assert values(gauges, "portal_events_waiting") == {}
    assert "portal_generation" not in {gauge.name for gauge in gauges}
    assert not [gauge for gauge in gauges if "tenant" in gauge.labels]


def test_the_number_of_statements_does_not_grow_with_the_tenants(
    portal: Portal, statements: Callable[[Callable[[], object]], int]
) -> None:
    portal.monitoring.gauges()  # what is remembered for a second is read once more than later
    before = statements(portal.monitoring.gauges)
    with portal.database.transaction() as tx:
        for number in range(20):
            tenants.add_tenant(tx, f"t{number}", created_at=portal.clock())
    assert statements(portal.monitoring.gauges) == before


@pytest.fixture
def statements(portal: Portal) -> Callable[[Callable[[], object]], int]:
    """Return how many statements a call sends."""

    def sent(call: Callable[[], object]) -> int:
        seen: list[str] = []

        with noting(portal.database.engine, lambda statement, _rows: seen.append(statement)):
            call()
        return len(seen)

    return sent
