"""An agent takes in what the portal gives, has its broker obey it, and reports only that."""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from broker.guard.draft import GuardDraft
from broker.guard.feed import Mark, Page
from broker.guard.journal import NewJournal, read_access, read_position
from broker.restarts import BrokerRestarts
from broker_provisioning import BrokerProvisioning
from core.boot import boot_id, boot_seconds
from core.errors import (
    BrokerUnavailable,
    ClientCertificateRefused,
    ProjectionInvalid,
    StartupError,
    StateConflict,
    Unavailable,
)
from operations.agent import agent as agents
from operations.agent import certificates, folder, progress, proof
from operations.agent.agent import Agent
from operations.agent.client import PortalClient
from operations.agent.folder import AgentFolder, State, settings_of, utc_seconds
from operations.agent.joining import join
from operations.agent.presence import AgentPresence
from operations.wiring import Portal
from store import agents as store_agents
from store import brokers, generations
from store.agents import AgentRecord, Given
from store.scope import ALL_TENANTS
from tests.operations.agent.conftest import Place, register
from tests.support.deployment import wait_until
from tests.support.guard_stub import GuardStub, journal_lines
from tests.support.links import Link
from tests.support.ports import free_port
from tests.workflows.test_admission import OPERATOR
from workflows.agents import feed as feeds
from workflows.tenant_life import NewTenant


def applied(portal: Portal) -> int:
    with portal.database.snapshot(sees=ALL_TENANTS) as tx:
        return brokers.get_broker(tx, "edge").applied_generation


def newest(portal: Portal) -> int:
    with portal.database.snapshot(sees=ALL_TENANTS) as tx:
        return generations.get_broker_state(tx).generation


def test_it_takes_in_what_there_is_proves_it_and_reports(portal: Portal, place: Place, guard: GuardStub) -> None:
    devices = [register(portal, number) for number in range(3)]
    agent = place.agent()
    assert agent.follow(0)
    access = read_access(place.journal)
    assert [access[device] for device in devices] == [f"allow {device}" for device in devices]
    assert applied(portal) == read_position(place.journal).generation == agent.state.mark.generation
    assert not agent.follow(0)
    portal.revocations.revoke(OPERATOR, devices[0], "unspecified")
    assert agent.follow(0)
    assert read_access(place.journal)[devices[0]] == f"deny {devices[0]}"
    assert devices[0] in guard.clients  # its session was ended
    assert applied(portal) == agent.state.mark.generation


def test_a_broker_that_does_not_answer_is_reported_and_nothing_as_enforced(portal: Portal, place: Place) -> None:
    agent = place.agent()
    with pytest.raises(BrokerUnavailable):
        agent.follow(0)
    assert applied(portal) == 0
    with portal.database.snapshot(sees=ALL_TENANTS) as tx:
        assert "does not answer" in (brokers.get_broker(tx, "edge").problem or "")
    with GuardStub(place.journal.with_name("portal.sock"), place.journal):
        agent.look()
    assert applied(portal) == read_position(place.journal).generation


def test_who_must_be_cut_is_cut_once_the_broker_is_back(portal: Portal, place: Place, guard: GuardStub) -> None:
    device, agent = register(portal), place.agent(PORTAL_ENFORCE_TIMEOUT="0.5")
    agent.follow(0)
    guard.stopped = True
    portal.revocations.revoke(OPERATOR, device, "unspecified")
    before = applied(portal)
    with pytest.raises(BrokerUnavailable):
        agent.follow(0)
    assert (applied(portal), device in guard.clients) == (before, False)
    guard.stopped = False
    again = place.agent()  # it was killed meanwhile
    again.follow(0)
    assert device in guard.clients
    assert applied(portal) > before


def test_very_many_sessions_are_ended_by_several_attempts_while_there_are_more_changes(
    portal: Portal, place: Place, guard: GuardStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices, calls = [register(portal, number) for number in range(4)], list[int]()
    agent = place.agent()
    agent.follow(0)
    before, disconnect = applied(portal), agent._broker.disconnect

    def fails_once(device_ids: Sequence[str], deadline: float, **options: Any) -> None:
        calls.append(len(device_ids))
        if len(calls) == 2:
            raise BrokerUnavailable("The broker does not answer.")
        disconnect(device_ids, deadline, **options)

    monkeypatch.setattr(proof, "MAX_SESSIONS", 1)
    monkeypatch.setattr(agent._broker, "disconnect", fails_once)
    for device in devices[:3]:
        portal.revocations.revoke(OPERATOR, device, "unspecified")
    with pytest.raises(BrokerUnavailable):
        agent.follow(0)
    assert applied(portal) == before
    assert [guard.clients.count(device) for device in devices] == [1, 0, 0, 0]
    portal.revocations.revoke(OPERATOR, devices[3], "unspecified")
    agent.follow(0)
    assert [guard.clients.count(device) for device in devices] == [1] * 4
    assert max(calls) == 1
    assert applied(portal) == newest(portal)


def test_a_page_that_is_longer_than_a_page_may_be_is_not_begun(
    portal: Portal, place: Place, guard: GuardStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(portal)
    agent = place.agent()
    monkeypatch.setattr("operations.agent.client.MAX_ANSWER", 50)
    with pytest.raises(ProjectionInvalid, match="longer than 50 bytes"):
        agent.follow(0)
    assert not place.journal.exists()


def test_a_page_that_is_cut_is_not_taken_in(
    portal: Portal, place: Place, guard: GuardStub, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = place.agent()
    agent.follow(0)
    before = place.journal.read_bytes()
    for number in range(5):
        register(portal, number)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(portal.agent_feed, "given", _lost)
        with pytest.raises((ProjectionInvalid, Unavailable)):
            agent.follow(0)
    assert place.journal.read_bytes() == before
    assert agent.follow(0)
    assert applied(portal) == newest(portal)


def _lost(*_arguments: object) -> None:
    raise ConnectionResetError


def test_a_new_journal_goes_on_where_the_link_was_lost(
    portal: Portal, place: Place, guard: GuardStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = [register(portal, number) for number in range(9)]
    monkeypatch.setattr(feeds, "PAGE_DEVICES", 2)
    agent, pages = place.agent(), list[int]()
    make = portal.agent_feed.page

    def counted(record: AgentRecord, start: Given, ends: int) -> Page:
        pages.append(start.generation)
        return make(record, start, ends)

    monkeypatch.setattr(portal.agent_feed, "page", counted)
    agent.follow(0)
    agent.follow(0)
    assert not place.journal.exists()  # it is not whole
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(portal.agent_feed, "given", _lost)
        with pytest.raises((ProjectionInvalid, Unavailable)):
            agent.follow(0)
    while agent.follow(0):
        pass
    assert pages.count(0) == 1  # it did not begin again
    assert len(pages) - len(set(pages)) == 1  # only the lost page was asked for twice
    access = read_access(place.journal)
    assert all(access[device] == f"allow {device}" for device in devices)
    assert applied(portal) == newest(portal)


def test_a_new_journal_for_which_the_disk_had_no_space_is_begun_again(
    portal: Portal, place: Place, guard: GuardStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "PAGE_DEVICES", 1)
    devices = [register(portal, number) for number in range(3)]
    agent = place.agent()
    assert agent.follow(0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("broker.guard.journal.NewJournal.add", no_space)
        with pytest.raises(BrokerUnavailable, match="No space left"):
            agent.follow(0)
    while agent.follow(0):
        pass
    access = read_access(place.journal)
    assert [access[device] for device in devices] == [f"allow {device}" for device in devices]
    assert applied(portal) == newest(portal)


def no_space(journal: NewJournal, _text: str) -> NoReturn:
    journal.discard()
    raise BrokerUnavailable.unwritable(Path("guard.journal"), OSError(errno.ENOSPC, "No space left on device"))


def test_an_agent_that_is_stopped_while_a_page_arrives_begins_no_journal(
    portal: Portal, place: Place, guard: GuardStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(portal)
    agent = place.agent()
    ask = PortalClient.changes

    @contextlib.contextmanager
    def stopped_meanwhile(client: PortalClient, *arguments: Any, **options: Any) -> Iterator[Iterator[bytes]]:
        with ask(client, *arguments, **options) as lines:
            agent.close()
            yield lines

    monkeypatch.setattr(PortalClient, "changes", stopped_meanwhile)
    agent.follow(0)
    assert not place.journal.exists()
    assert [*place.journal.parent.glob(".*.tmp")] == []


def test_an_agent_without_its_state_begins_again(portal: Portal, place: Place, guard: GuardStub) -> None:
    device, agent = register(portal), place.agent()
    agent.follow(0)
    epoch = read_position(place.journal).epoch
    Path(place.environment["PORTAL_DATA_DIR"], "agent", "state.json").unlink()
    again = place.agent()
    again.follow(0)
    assert read_position(place.journal).epoch > epoch
    assert read_access(place.journal)[device] == f"allow {device}"


def test_damaged_files_are_written_again(portal: Portal, place: Place, guard: GuardStub) -> None:
    device, agent = register(portal), place.agent()
    agent.follow(0)
    place.journal.write_bytes(b"damaged")
    agent.look()
    assert agent.follow(0)
    assert read_access(place.journal)[device] == f"allow {device}"
    assert applied(portal) == newest(portal)


def test_a_tenant_in_the_place_of_a_removed_one_makes_it_begin_again(
    portal: Portal, place: Place, guard: GuardStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = place.agent()
    agent.follow(0)
    epoch = read_position(place.journal).epoch

    def refuses(_draft: GuardDraft, _tenant: object) -> None:
        raise ProjectionInvalid("The journal has another tenant there.")

    portal.tenants.add(OPERATOR, NewTenant("acme"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(GuardDraft, "tell_tenant", refuses)
        with pytest.raises(ProjectionInvalid):
            agent.follow(0)
    assert agent.follow(0)
    assert read_position(place.journal).epoch > epoch
    assert "tenant acme acme" in journal_lines(place.journal)


def test_a_removed_agent_keeps_denying(portal: Portal, place: Place, guard: GuardStub) -> None:
    device, agent = register(portal), place.agent()
    portal.revocations.revoke(OPERATOR, device, "unspecified")
    agent.follow(0)
    with portal.database.transaction(sees=ALL_TENANTS) as tx:
        brokers.remove_broker(tx, brokers.get_broker(tx, "edge"), at=portal.clock())
    with pytest.raises(ClientCertificateRefused):
        agent.follow(0)
    assert read_access(place.journal)[device] == f"deny {device}"


def test_without_the_portal_for_long_everybody_is_denied_until_it_is_heard_again(
    portal: Portal, place: Place, guard: GuardStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = register(portal)
    agent = place.agent(PORTAL_AGENT_DENY_ALL_AFTER="60")
    agent.follow(0)
    agent.look()
    assert read_access(place.journal)
    now = boot_seconds()
    monkeypatch.setattr(progress, "boot_seconds", lambda: now + 61)
    agent.look()
    assert read_access(place.journal) == {}
    assert any(line.startswith("issuer ") for line in journal_lines(place.journal))  # else the guard decides nothing
    assert guard.epoch == read_position(place.journal).epoch
    assert agent.follow(0)
    assert not agent.state.denies_all
    assert read_access(place.journal)[device] == f"allow {device}"
    agent.look()
    assert read_access(place.journal)[device] == f"allow {device}"


def test_a_clock_that_was_set_back_before_a_restart_makes_old_knowledge_no_newer(
    portal: Portal, place: Place, guard: GuardStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, limit = register(portal), {"PORTAL_AGENT_DENY_ALL_AFTER": "3600"}
    agent = place.agent(**limit)
    agent.follow(0)
    now = utc_seconds()

    def starts(*, boot: str, seconds: float) -> Agent:
        """The agent after a restart, in a boot, with a clock that is some seconds off."""
        monkeypatch.setattr(folder, "boot_id", lambda: boot)
        for module in (agents, progress, folder, certificates):
            monkeypatch.setattr(module, "utc_seconds", lambda: now + seconds)
        return place.start(**limit)

    this = boot_id()
    for again in (starts(boot=this, seconds=-86400), starts(boot="another", seconds=60)):
        again.look()  # within the boot the time of day says nothing
        assert read_access(place.journal)[device] == f"allow {device}"
    again = starts(boot="another", seconds=-60)
    assert again.state.age(now - 60) == math.inf
    again.look()
    assert read_access(place.journal) == {}
    assert again.follow(0)
    assert read_access(place.journal)[device] == f"allow {device}"
    again.look()
    assert not again.state.denies_all


def test_a_full_disk_is_told_and_ends_nothing(
    portal: Portal, place: Place, guard: GuardStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def problem() -> str:
        with portal.database.snapshot(sees=ALL_TENANTS) as tx:
            return brokers.get_broker(tx, "edge").problem or ""

    monkeypatch.setattr(agents, "SIGN_SECONDS", 0.0)
    monkeypatch.setattr(agents, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(agents, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(AgentPresence, "follow", lambda _self: 0.05)  # the stub serves one session at a time
    agent, stopping = place.agent(PORTAL_ENFORCE_TIMEOUT="0.5"), threading.Event()
    agent.follow(0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(folder, "replace_file", full)
        register(portal)
        agent.follow(0)  # the journal took it, and how far the agent has come can be found out again
        assert applied(portal) == newest(portal)
        patched.setattr(GuardDraft, "install", full)
        running = threading.Thread(target=agent.run, args=(stopping,))
        running.start()
        register(portal, 2)
        wait_until(lambda: "No space left" in problem())
        guard.stopped = True
    register(portal, 3)
    wait_until(lambda: "guard" in problem())
    guard.stopped = False
    wait_until(lambda: applied(portal) == newest(portal))
    stopping.set()
    running.join(30)


def test_a_broker_that_shows_an_older_certificate_is_restarted(
    portal: Portal, place: Place, guard: GuardStub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    restarted = tmp_path / "restarted"
    agent = place.agent(PORTAL_BROKER_RESTART=f"touch {restarted}")
    agent.follow(0)
    certificate = x509.load_pem_x509_certificate(place.journal.with_name("server.pem").read_bytes())
    shown = [certificate.public_bytes(Encoding.DER)]
    monkeypatch.setattr(BrokerProvisioning, "server_certificate", lambda *_arguments: shown[0])
    monkeypatch.setattr(BrokerRestarts, "seconds_until_due", lambda _self: 0.0)
    agent.look()
    assert not restarted.exists()
    shown[0] = b"the one before"
    again = place.agent(PORTAL_BROKER_RESTART=f"touch {restarted}")
    again.look()
    assert restarted.exists()


def test_a_broker_that_was_given_a_new_certificate_is_restarted_as_soon_as_it_may_be(
    portal: Portal, place: Place, guard: GuardStub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    restarted, server = tmp_path / "restarted", place.journal.with_name("server.pem")
    agent = place.agent(PORTAL_BROKER_RESTART=f"touch {restarted}")
    agent.follow(0)
    shown = x509.load_pem_x509_certificate(server.read_bytes()).public_bytes(Encoding.DER)
    monkeypatch.setattr(BrokerProvisioning, "server_certificate", lambda *_arguments: shown)
    seconds = [1e-9, 0.0]  # it was started a moment ago
    monkeypatch.setattr(BrokerRestarts, "seconds_until_due", lambda _self: seconds.pop(0))
    agent.look()
    server.unlink()
    agent.renew_certificates()
    agent.look()
    assert not restarted.exists()
    agent.look()
    assert restarted.exists()


def test_a_broker_whose_address_was_changed_is_restarted_to_show_its_new_name(
    portal: Portal, place: Place, guard: GuardStub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    restarted, refused = tmp_path / "restarted", "The broker's certificate is refused: Hostname mismatch."
    agent = place.agent(PORTAL_BROKER_RESTART=f"touch {restarted}")
    agent.follow(0)

    def probe(*_arguments: object, **_options: object) -> None:
        if not restarted.exists():
            raise BrokerUnavailable(refused)

    monkeypatch.setattr(BrokerProvisioning, "probe", probe)
    monkeypatch.setattr(BrokerProvisioning, "server_certificate", lambda *_arguments: b"the one before")
    monkeypatch.setattr(BrokerRestarts, "seconds_until_due", lambda _self: 0.0)
    again = place.agent(PORTAL_BROKER_RESTART=f"touch {restarted}")
    with pytest.raises(BrokerUnavailable, match=refused):
        again.look()
    again.look()
    assert restarted.exists()


def test_what_was_to_be_proven_before_a_restart_of_the_broker_is_proven_after_it(
    portal: Portal, place: Place, guard: GuardStub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    restarted = tmp_path / "restarted"
    device, agent = register(portal), place.agent(PORTAL_BROKER_RESTART=f"touch {restarted}")
    agent.follow(0)
    portal.revocations.revoke(OPERATOR, device, "unspecified")
    monkeypatch.setattr(BrokerProvisioning, "server_certificate", lambda *_arguments: b"the one before")
    monkeypatch.setattr(BrokerRestarts, "seconds_until_due", lambda _self: 0.0)

    def does_not_obey(*_arguments: object, **_options: object) -> NoReturn:
        raise BrokerUnavailable("The broker's certificate is refused.")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(BrokerProvisioning, "bring_into_force", does_not_obey)
        for attempt in (lambda: agent.follow(0), agent.look):
            with pytest.raises(BrokerUnavailable):
                attempt()
    assert restarted.exists()
    agent.look()
    assert device in guard.clients  # its session was ended
    assert applied(portal) == newest(portal)


def test_a_portal_that_is_not_reached_is_a_sentence(place: Place, link: Link) -> None:
    agent = place.agent()
    link.__exit__(None, None, None)
    with pytest.raises(Unavailable, match=r"not reached: .*; check that the portal runs with PORTAL_AGENTS_BIND,"):
        agent.follow(0)


def test_who_joins_a_portal_that_is_not_reached_is_told_what_to_check(tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(Unavailable, match=rf"not reached: .*; check that https://localhost:{port} of --url is"):
        join(AgentFolder(tmp_path / "agent"), f"https://localhost:{port}", "0" * 64, "code")


def test_its_certificates_are_renewed_and_the_one_before_counts_no_more(
    portal: Portal, place: Place, guard: GuardStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = place.agent()
    agent.follow(0)
    pair = Path(place.environment["PORTAL_DATA_DIR"], "agent", "agent.pem")
    before = pair.read_bytes()
    now = utc_seconds()
    monkeypatch.setattr(certificates, "utc_seconds", lambda: now + 70 * 86400)
    agent.renew_certificates()
    assert pair.read_bytes() != before
    assert agent.follow(0)  # the next revoked probe certificate is a change
    pair.write_bytes(before)
    with pytest.raises(ClientCertificateRefused):
        place.start().follow(0)


def test_an_agent_whose_certificate_has_expired_says_what_to_do_and_its_broker_goes_on(
    portal: Portal, place: Place, guard: GuardStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, agent = register(portal), place.agent()
    portal.revocations.revoke(OPERATOR, device, "unspecified")
    agent.follow(0)
    now = utc_seconds()
    monkeypatch.setattr(agents, "utc_seconds", lambda: now + 91 * 86400)
    with pytest.raises(ClientCertificateRefused, match=r"has expired on .* join --again"):
        agent.follow(0)
    assert read_access(place.journal)[device] == f"deny {device}"


def test_who_has_not_joined_is_told_so(tmp_path: Path) -> None:
    settings, folder = settings_of({"PORTAL_DATA_DIR": str(tmp_path)})
    with pytest.raises(StartupError, match="has not joined"):
        Agent(settings, folder)


def test_what_an_agent_keeps_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = AgentFolder(tmp_path)
    assert folder.state() == State()
    state = State(Mark(7, "a" * 64), 1700000000.5, "boot", 7.5, denies_all=True, problem="gone")
    folder.keep_state(state)
    assert folder.state() == state
    (tmp_path / "state.json").write_text("{")
    assert folder.state() == State()


def test_an_older_database_is_not_believed_until_a_restore_has_said_that_it_is_meant(
    portal: Portal, place: Place, guard: GuardStub
) -> None:
    device, denied = register(portal), register(portal, 2)
    agent = place.agent()
    portal.revocations.revoke(OPERATOR, denied, "unspecified")
    while agent.follow(0):
        pass
    set_back(portal, 3)
    with pytest.raises(ProjectionInvalid, match="the database is older than they are"):
        agent.follow(0)
    assert applied(portal) == 0
    assert read_access(place.journal)[denied] == f"deny {denied}"
    set_back(portal, int(portal.clock().timestamp() * 1000))
    again = place.agent()
    while again.follow(0):
        pass
    again.look()
    assert read_access(place.journal)[device] == f"allow {device}"
    assert applied(portal) == again.state.mark.generation == newest(portal)


def test_agents_from_copies_of_one_folder_are_noticed_and_a_restart_is_none(
    portal: Portal, place: Place, guard: GuardStub, tmp_path: Path
) -> None:
    agent = place.agent()
    agent.follow(0)
    restarted = place.agent()
    restarted.look()
    assert state(portal).problem is None
    shutil.copytree(place.journal.parents[1], tmp_path / "copy", ignore=shutil.ignore_patterns("portal.sock"))
    copy = place.agent(PORTAL_DATA_DIR=str(tmp_path / "copy"))
    assert not copy.follow(0)  # it has all there is
    for _ in range(2):
        with pytest.raises(StateConflict, match="Another run"):
            restarted.follow(0)
    assert state(portal).problem is None
    restarted.follow(0)
    assert (state(portal).applied_generation, "agent join --again" in (state(portal).problem or "")) == (0, True)
    once_more = place.agent()
    with pytest.raises(StateConflict, match="Two agents"):
        once_more.look()
    assert applied(portal) == 0


def state(portal: Portal) -> brokers.BrokerRecord:
    with portal.database.snapshot(sees=ALL_TENANTS) as tx:
        return brokers.get_broker(tx, "edge")


def set_back(portal: Portal, generation: int) -> None:
    """Have the database as if it had been put back, with this generation."""
    with portal.database.transaction(sees=ALL_TENANTS) as tx:
        told = {"generation": generation}
        tx.execute(sa.text("UPDATE broker_state SET generation = :generation, applied_generation = 0"), told)
        tx.execute(sa.text("UPDATE devices SET generation = 3 WHERE generation > 3"))
        store_agents.begin_again(tx)
        brokers.forget_proofs_of_agents(tx, at=portal.clock())
