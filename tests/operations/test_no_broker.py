"""A portal without a broker beside it: agents' brokers alone are told, and nothing is enforced while none counts."""

from __future__ import annotations

import base64
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from app import create_app, portal_of
from config import Settings
from core.errors import StartupError
from core.roles import Role
from core.states import BrokerKind
from operations.doctor import authority
from operations.doctor.base import State
from operations.doctor.doctor import OF_BROKER, examine
from operations.jobs import FOLLOW_PRESENCE, JOBS
from operations.wiring import Portal, open_portal, prepare
from store import audit, brokers, generations
from store.scope import ALL_TENANTS
from tests.support.harness import Clock, api_as, derived_quickly, settings_for
from tests.workflows.test_admission import OPERATOR, request_of
from workflows.enforcement import note_applied
from workflows.other_brokers import NONE_COUNTS


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    with derived_quickly():
        yield settings_for(tmp_path / "data", PORTAL_BROKER_CONTROL="none", PORTAL_ENFORCE_TIMEOUT="0.2")


@pytest.fixture
def portal(settings: Settings, clock: Clock) -> Iterator[Portal]:
    built = open_portal(settings, clock)
    prepare(built)
    yield built
    built.close()


def names(portal: Portal) -> list[str]:
    with portal.database.snapshot(sees=ALL_TENANTS) as tx:
        return [one.name for one in brokers.list_brokers(tx)]


def add(portal: Portal, name: str = "edge", kind: BrokerKind = BrokerKind.AGENT) -> None:
    """A broker elsewhere, whose agent has joined and has proven nothing yet."""
    with portal.database.transaction(sees=ALL_TENANTS) as tx:
        brokers.add_broker(tx, name, kind, at=portal.clock(), joined=True)


def proves(portal: Portal, name: str = "edge") -> None:
    with portal.database.transaction(sees=ALL_TENANTS) as tx:
        newest = generations.get_broker_state(tx).generation
        note_applied(tx, brokers.get_broker(tx, name).id, newest, at=portal.clock())
    portal.reconciler.heard_of_another()


def register(portal: Portal, number: int = 1) -> str:
    return portal.registrations.register(OPERATOR, request_of(number, csr=False)).device_id


def test_it_has_no_broker_and_writes_nothing_for_one(portal: Portal) -> None:
    assert names(portal) == []
    assert not [path for path in portal.settings.broker_dir.rglob("*") if path.is_file()]
    for job in (*JOBS, *FOLLOW_PRESENCE):
        job.run(portal)
    assert not [path for path in portal.settings.broker_dir.rglob("*") if path.is_file()]


def test_while_no_broker_counts_nothing_is_enforced_though_devices_are_registered(portal: Portal) -> None:
    device_id = register(portal)
    for _ in range(2):
        answer = portal.revocations.revoke(OPERATOR, device_id, "unspecified")
        assert (answer.enforced, answer.problem) == (False, NONE_COUNTS)
    shown = portal.enforcements.of("default", device_id)
    assert shown is not None
    assert (shown.is_enforced, shown.problem) == (False, NONE_COUNTS)


def test_a_revocation_waits_for_all_brokers_elsewhere(portal: Portal) -> None:
    add(portal, "edge")
    add(portal, "site")
    device_id = register(portal)
    answer = portal.revocations.revoke(OPERATOR, device_id, "unspecified")
    assert (answer.enforced, answer.problem) == (False, "edge and site were not seen to enforce it yet.")
    proves(portal, "edge")
    answer = portal.revocations.revoke(OPERATOR, device_id, "unspecified")
    assert (answer.enforced, answer.problem) == (False, "site was not seen to enforce it yet.")
    proves(portal, "site")
    assert portal.revocations.revoke(OPERATOR, device_id, "unspecified").enforced


def test_a_download_waits_for_the_first_broker_and_for_none_if_none_counts(portal: Portal) -> None:
    with portal.database.transaction(sees=ALL_TENANTS) as tx:
        generation = generations.get_broker_state(tx).generation
    outcome = portal.reconciler.apply(generation, timeout=60.0)  # at once
    assert (outcome.covers(generation), outcome.problem) == (False, NONE_COUNTS)
    portal.reconciler.wait_until_granted(generation)  # which is no reason not to give it out
    add(portal, "edge")
    add(portal, "site")
    proves(portal, "edge")
    assert portal.reconciler.apply(generation, timeout=60.0).covers(generation)


def test_readiness_names_what_is_behind_and_fails_while_no_broker_counts(portal: Portal) -> None:
    def problems() -> dict[str, str]:
        return {one.name: one.problem for one in portal.readiness.checks() if one.problem is not None}

    assert problems() == {"broker": NONE_COUNTS}
    add(portal)
    assert problems() == {}
    [edge] = portal.readiness.brokers()
    assert edge.problem is not None
    assert edge.problem.startswith("edge was seen to enforce nothing yet")
    proves(portal)
    assert [one.problem for one in portal.readiness.brokers()] == [None]


def test_metrics_have_no_broker_of_its_own(portal: Portal) -> None:
    add(portal)
    gauges = {gauge.name: gauge for gauge in portal.monitoring.gauges()}
    assert "portal_broker_up" not in gauges
    assert [labels for labels, _ in gauges["portal_broker_generation_enforced"].samples] == [["edge"]]
    servers = gauges["portal_server_certificate_life_left_seconds"].samples
    assert [labels for labels, _ in servers] == [["portal"]]


def test_the_doctor_speaks_of_the_brokers_elsewhere_alone(portal: Portal, clock: Clock) -> None:
    def examined() -> dict[str, tuple[State, str]]:
        return {one.name: (one.state, one.detail) for one in examine(portal.settings, portal.clock)}

    found = examined()
    assert not found.keys() & OF_BROKER
    assert found["generation"] == (State.PROBLEM, NONE_COUNTS)
    add(portal)
    assert found["CRL"][0] is State.OK
    assert "at edge" in examined()["generation"][1]
    proves(portal)
    assert examined()["generation"][0] is State.OK
    clock.advance(seconds=61)
    state, said = examined()["generation"]
    assert (state, "edge: Its agent has not reported since" in said) == (State.WARNING, True)


def test_the_doctor_asks_ocsp_about_the_portals_own_certificate(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def served(_: object, path: str) -> bytes:
        return portal.responder.answer(base64.b64decode(unquote(path.removeprefix("/ocsp/")))).der

    monkeypatch.setattr(authority, "served", served)
    checks = (("OCSP served", authority.ocsp_served),)
    [found] = examine(portal.settings, portal.clock, checks=checks)
    assert (found.state, found.detail.endswith("says that the portal's certificate is good.")) == (State.OK, True)
    portal.responder.certificates.path("issuing-1").unlink()
    [found] = examine(portal.settings, portal.clock, checks=checks)
    assert (found.state, "about the portal's certificate, the portal answers" in found.detail) == (State.PROBLEM, True)


def test_applications_tenants_and_the_console_go_without_a_broker(settings: Settings, clock: Clock) -> None:
    app = create_app(settings, background=False, clock=clock)
    portal = portal_of(app)
    prepare(portal)
    add(portal)
    api = api_as(app, Role.SYSTEM)
    body = {"name": "reader", "topics": [{"filter": "devices/#", "access": "read"}]}
    assert api.post("/applications", json=body).status_code == 201
    assert api.post("/tenants", json={"name": "acme"}).status_code == 201
    portal.close()


# --- A portal that had a broker --------------------------------------------------------------------------------------


def test_the_broker_that_it_had_counts_no_more_once_it_is_stopped(settings: Settings, clock: Clock) -> None:
    guarded = settings_for(settings.data_dir, PORTAL_BROKER_CONTROL="guard", PORTAL_ENFORCE_TIMEOUT="0.2")
    portal = open_portal(guarded, clock)
    prepare(portal)
    assert names(portal) == ["main"]
    add(portal)
    proves(portal, "main")
    proves(portal, "edge")
    portal.close()
    with socket.socket(socket.AF_UNIX) as broker:
        broker.bind(str(guarded.broker_socket))
        broker.listen()
        with pytest.raises(StartupError, match="still runs"):
            open_portal(settings, clock)
    portal = open_portal(settings, clock)
    assert names(portal) == ["edge"]
    with portal.database.snapshot() as tx:
        [entry] = audit.list_audit_entries(tx, "default", limit=1, filters={"action": "broker:remove"})
    assert entry.detail["because"] == "PORTAL_BROKER_CONTROL=none"
    portal.close()
    portal = open_portal(guarded, clock)  # and back
    assert names(portal) == ["edge", "main"]
    assert not portal.revocations.revoke(OPERATOR, register(portal), "unspecified").enforced
    portal.close()
