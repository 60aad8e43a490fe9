"""Two tenants on one broker: what a device of either may do reaches it, whichever tenant changed last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

import db
from broker.guard.journal import issuer_hashes
from broker.guard.told import read_told
from config import Settings
from core.broker_control import ACL_FILE, JOURNAL_FILE, ControlKind
from core.errors import DatabaseUnavailable, DeviceNotFound, NotFound, StartupError
from core.roles import Role
from core.tenants import Quotas, TenantChoices, TenantStatus
from operations import jobs
from operations.doctor.broker import compare_tenants
from operations.wiring import Portal, open_portal, prepare
from store import generations, tenants
from store.audit import Actor
from store.tables import BrokerState, WebhookDelivery
from store.tenants import TenantRecord, TokenRecord
from tests.support.guard_stub import GuardStub, journal_lines
from tests.support.harness import ON_SQLITE, PER_DEVICE, Clock
from tests.support.tenants import add_issuer, add_tenant
from tests.workflows.test_admission import OPERATOR, request_of
from workflows.renewal import RenewalRequest

NEIGHBOUR = Actor("another", "a neighbour", "operator", "request-2", "192.0.2.2")


@pytest.fixture
def portal(make_settings: Callable[..., Settings], clock: Clock) -> Iterator[Portal]:
    """A portal with a second tenant, under the control of the guard, which answers it."""
    settings = make_settings(PORTAL_BROKER_CONTROL="guard")
    built = open_portal(settings, clock)
    with built.database.transaction() as tx:
        tenants.add_tenant(tx, NEIGHBOUR.tenant_id, created_at=clock())
    add_issuer(built, NEIGHBOUR.tenant_id)
    prepare(built)
    with GuardStub(settings.broker_socket, settings.broker_file(JOURNAL_FILE)):
        yield built
    built.close()


def last_line_of(portal: Portal, identity: str) -> str:
    lines = journal_lines(portal.settings.broker_file(JOURNAL_FILE))
    return [line for line in lines if identity in line.split(" ")[1:2]][-1]


def registered(portal: Portal, actor: Actor) -> str:
    return portal.registrations.register(actor, request_of(1, csr=True)).device_id


def test_the_devices_of_both_tenants_are_allowed_before_they_have_their_certificates(portal: Portal) -> None:
    for actor in (NEIGHBOUR, OPERATOR, NEIGHBOUR):
        device_id = registered(portal, actor)
        assert last_line_of(portal, device_id).split(" ")[:2] == ["allow", device_id]


@ON_SQLITE
@pytest.mark.parametrize(
    ("change", "more"), [("revoke", ["key_compromise"]), ("suspend", [])], ids=["revoke", "suspend"]
)
def test_what_a_tenant_takes_from_its_device_is_enforced_and_told_to_that_tenant_alone(
    portal: Portal, change: str, more: list[str]
) -> None:
    device_id, other = registered(portal, NEIGHBOUR), registered(portal, OPERATOR)
    for actor in (NEIGHBOUR, OPERATOR):
        portal.webhooks.create(actor, "all", "https://example.com", [])
    act = getattr(portal.revocations, change)
    with pytest.raises(DeviceNotFound):
        act(OPERATOR, device_id, *more)
    assert last_line_of(portal, device_id).startswith("allow ")
    assert act(NEIGHBOUR, device_id, *more).enforced
    assert last_line_of(portal, device_id).split(" ")[0] in ("deny", "mute")
    assert last_line_of(portal, other).startswith("allow ")
    with portal.database.snapshot() as tx:
        told = {row.tenant_id for row in tx.execute(sa.select(WebhookDelivery.tenant_id))}
    assert told == {NEIGHBOUR.tenant_id}


@ON_SQLITE
def test_a_certificate_that_was_superseded_in_another_tenant_is_revoked_and_its_session_ended(
    portal: Portal, clock: Clock
) -> None:
    device_id = registered(portal, NEIGHBOUR)
    portal.renewals.renew(NEIGHBOUR, device_id, RenewalRequest(csr=request_of(1, csr=True).csr, overlap_hours=1))
    with portal.database.snapshot() as tx:
        before = generations.get_broker_state(tx).generation
    clock.advance(hours=2)
    jobs.expire(portal)
    with portal.database.snapshot() as tx:
        assert generations.devices_to_disconnect(tx, since=before) == [device_id]
        state = generations.get_broker_state(tx)
    assert before < state.generation == state.applied_generation


@ON_SQLITE
def test_the_installation_has_one_generation(portal: Portal) -> None:
    with portal.database.snapshot() as tx:
        assert tx.execute(sa.select(sa.func.count()).select_from(BrokerState)).scalar_one() == 1


@ON_SQLITE
@PER_DEVICE
def test_the_access_list_of_a_broker_without_the_guard_grants_another_tenants_devices_nothing(
    make_settings: Callable[..., Settings],
) -> None:
    portal = open_portal(make_settings())
    add_tenant(portal, NEIGHBOUR.tenant_id)
    known = [portal.registrations.register(actor, request_of(1, csr=False)) for actor in (NEIGHBOUR, OPERATOR)]
    portal.reconciler.install()
    access_list = portal.settings.broker_file(ACL_FILE).read_text()
    assert [f"user {one.device_id}" in access_list for one in known] == [False, True]
    portal.close()


@ON_SQLITE
def test_the_journal_says_whose_a_device_is_and_a_suspension_of_all_of_a_tenants_in_one_line(portal: Portal) -> None:
    theirs, own = (registered(portal, actor) for actor in (NEIGHBOUR, OPERATOR))
    assert last_line_of(portal, theirs) == f"allow {theirs} in:{NEIGHBOUR.tenant_id}"
    assert last_line_of(portal, own) == f"allow {own}"
    for status, line in ((TenantStatus.SUSPENDED, "suspend another"), (TenantStatus.ACTIVE, "tenant another another")):
        with portal.database.transaction() as tx:
            generation = db.next_generation(tx, at=portal.clock())
            record = tenants.get_tenant(tx, NEIGHBOUR.tenant_id)
            tenants.update_tenant(tx, dataclasses.replace(record, status=status, generation=generation))
        assert portal.reconciler.apply(generation).covers(generation)
        assert journal_lines(portal.settings.broker_file(JOURNAL_FILE))[-2:] == [line, f"generation {generation}"]


@ON_SQLITE
@pytest.mark.parametrize("line", ["suspend another", "issuer {} in:another"])
def test_the_doctor_names_a_tenant_of_which_the_journal_says_otherwise(portal: Portal, line: str) -> None:
    registered(portal, NEIGHBOUR)
    path = portal.settings.broker_file(JOURNAL_FILE)
    own = issuer_hashes(portal.authority.first.issuing.issuer.certificate)[0]
    expected = {"suspend another": ["another"], "issuer {} in:another": ["default"]}[line]
    with portal.database.snapshot() as tx:
        generation = generations.get_broker_state(tx).generation
        assert compare_tenants(tx, read_told(path), generation) == []
        told = read_told(path)
        told.take(line.format(own))
        assert compare_tenants(tx, told, generation) == expected


def test_the_terms_of_a_tenant_are_its_own_choices_and_for_the_rest_the_settings(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        tenants.add_tenant(
            tx,
            "acme",
            created_at=portal.clock(),
            topic_prefix="acme",
            choices=TenantChoices(device_days=30),
            quotas=Quotas(devices=2),
        )
    terms, first = portal.tenant_terms.of("acme"), portal.tenant_terms.of(portal.first_tenant)
    assert (terms.topic_prefix, terms.application_prefixes, terms.device_days) == ("acme", ("acme",), 30)
    assert (terms.key_type, terms.link_hours, terms.quotas.devices) == (
        portal.settings.key_type,
        portal.settings.link_hours,
        2,
    )
    assert (first.topic_prefix, first.device_days) == (portal.settings.topic_prefix, portal.settings.device_days)


def test_a_tenant_that_was_suspended_by_another_process_is_so_within_a_second(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.tenants.SECONDS_BETWEEN_LOOKS", 0)
    with portal.database.transaction() as tx:
        record = tenants.get_tenant(tx, portal.first_tenant)
        tenants.update_tenant(tx, dataclasses.replace(record, status=TenantStatus.SUSPENDED, generation=7))
    assert portal.tenant_terms.of(portal.first_tenant).status is TenantStatus.SUSPENDED
    with portal.database.snapshot() as tx:
        assert [one.id for one in tenants.changed_tenants(tx, since=6)] == [portal.first_tenant]
        assert not tenants.changed_tenants(tx, since=7)


def test_two_tenants_cannot_have_one_topic_prefix(portal: Portal) -> None:
    with portal.database.transaction() as tx:
        tenants.add_tenant(tx, "acme", created_at=portal.clock(), topic_prefix="site")
    with pytest.raises(sa.exc.IntegrityError), portal.database.transaction() as tx:
        tenants.add_tenant(tx, "other", created_at=portal.clock(), topic_prefix="site")


def test_of_a_tenant_that_does_not_exist_there_are_no_terms(portal: Portal) -> None:
    with pytest.raises(NotFound, match="no tenant of this name"):
        portal.tenant_terms.of("nobody")


def test_a_token_of_the_role_above_the_tenants_is_found_with_it(portal: Portal) -> None:
    record = TokenRecord("t1", portal.first_tenant, "who runs it", Role.SYSTEM, portal.clock(), None, None)
    with portal.database.transaction() as tx:
        tenants.add_token(tx, record, secret="op_secret")
    with portal.database.snapshot() as tx:
        assert tenants.find_token(tx, "op_secret") == record


@ON_SQLITE
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"broker_control": ControlKind.FILES}, "PORTAL_BROKER_CONTROL=guard"),
        ({"topic_prefix": "sites"}, "PORTAL_TOPIC_PREFIX"),
        ({"topic_prefixes": ("mine", "sites/acme/hall")}, "sites/acme/hall"),
    ],
    ids=["without the guard", "topics of devices", "topics of applications"],
)
def test_a_start_with_settings_that_do_not_keep_the_tenants_apart_is_refused(
    make_settings: Callable[..., Settings], clock: Clock, changed: dict[str, object], said: str
) -> None:
    built = open_portal(make_settings(PORTAL_BROKER_CONTROL="guard"), clock)
    with built.database.transaction() as tx:
        tenants.add_tenant(tx, "acme", created_at=clock(), topic_prefix="sites/acme")
    built.close()
    with pytest.raises(StartupError, match=said):
        open_portal(built.settings.model_copy(update=changed), clock)
    open_portal(built.settings, clock).close()


def test_what_is_asked_of_a_tenant_reads_that_one_alone_and_once_a_second(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def noted(tx: Connection, tenant_id: str) -> TenantRecord:
        read.append(tenant_id)
        return get_tenant(tx, tenant_id)

    get_tenant = tenants.get_tenant
    monkeypatch.setattr(tenants, "get_tenant", noted)
    monkeypatch.setattr(tenants, "list_tenants", lambda _tx: pytest.fail("read all tenants"))
    portal.tenant_terms.refresh()
    for _ in range(3):
        assert portal.tenant_terms.of(NEIGHBOUR.tenant_id).id == NEIGHBOUR.tenant_id
    assert portal.tenant_terms.are_several
    assert portal.tenant_terms.longest_link_hours == portal.settings.link_hours
    assert read == [NEIGHBOUR.tenant_id]


def test_a_database_that_is_away_leaves_what_is_known_of_a_tenant(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = portal.tenant_terms.of(NEIGHBOUR.tenant_id)
    monkeypatch.setattr("workflows.tenants.SECONDS_BETWEEN_LOOKS", 0)

    def away(*_arguments: object) -> TenantRecord:
        raise DatabaseUnavailable("The database is away.")

    monkeypatch.setattr(tenants, "get_tenant", away)
    assert portal.tenant_terms.of(NEIGHBOUR.tenant_id) == known
    with pytest.raises(DatabaseUnavailable):
        portal.tenant_terms.of("not-read-yet")
