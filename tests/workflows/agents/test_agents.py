"""Agents beside brokers elsewhere: how they join, which certificate counts, and which reports are believed."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from flask import Flask

from app import portal_of
from broker.guard.feed import NOTHING, Mark, Page, PageReader, split_lines
from config import Settings
from core.errors import (
    ClientCertificateRefused,
    CsrInvalid,
    IdempotencyConflict,
    InputInvalid,
    NotFound,
    StateConflict,
)
from operations.wiring import Portal
from pki.csr import new_request
from store import agents, brokers, generations
from store.agents import AgentRecord, Given
from store.scope import ALL_TENANTS
from tests.support.guarded import guarded_app
from tests.support.harness import Clock
from tests.workflows.test_admission import OPERATOR, request_of
from workflows.agents import feed as feeds
from workflows.agents.agents import AgentCertificate, NewAgent, Report


@pytest.fixture
def app(make_settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    settings = make_settings(
        PORTAL_BROKER_CONTROL="guard", PORTAL_AGENTS_BIND="127.0.0.1:8444", PORTAL_ENFORCE_TIMEOUT="0.2"
    )
    with guarded_app(settings, clock, monkeypatch) as built:
        yield built


@pytest.fixture
def portal(app: Flask) -> Portal:
    return portal_of(app)


def csr() -> str:
    return new_request(ec.generate_private_key(ec.SECP256R1()))


def add(portal: Portal, name: str = "edge", address: str = "edge.example.org") -> NewAgent:
    return portal.agents.add(OPERATOR, name, address)


def der(chain: str) -> bytes:
    """The first certificate of a chain."""
    return ssl.PEM_cert_to_DER_cert(chain[: chain.index("-----END") + len("-----END CERTIFICATE-----\n")])


def joined(portal: Portal, name: str = "edge") -> bytes:
    """The certificate of an agent that has joined."""
    return der(portal.agents.join(add(portal, name).code, csr()).chain)


def given_page(portal: Portal, certificate: bytes, mark: Mark = NOTHING) -> Page:
    """Give an agent its next page, as the listener does."""
    record = portal.agents.shown(certificate)
    start = portal.agent_feed.start_of(record, mark)
    page = portal.agent_feed.page(record, start)
    portal.agent_feed.given(record, start, page)
    return page


def report(portal: Portal, certificate: bytes, mark: Mark, run: str = "") -> None:
    portal.agents.report(portal.agents.shown(certificate), Report(mark.generation, mark.digest, None, run=run))


def state_of(portal: Portal, name: str = "edge") -> brokers.BrokerRecord:
    with portal.database.snapshot(sees=ALL_TENANTS) as tx:
        return brokers.get_broker(tx, name)


def register(portal: Portal, number: int = 1) -> str:
    return portal.registrations.register(OPERATOR, request_of(number, csr=False)).device_id


# --- Joining ---------------------------------------------------------------------------------------------------------


def test_a_broker_elsewhere_counts_once_its_agent_has_joined(portal: Portal) -> None:
    device = register(portal)
    added = add(portal)
    assert not state_of(portal).counts
    assert portal.revocations.suspend(OPERATOR, device).enforced
    portal.agents.join(added.code, csr())
    assert state_of(portal).counts
    answer = portal.revocations.revoke(OPERATOR, device, "unspecified")
    assert (answer.enforced, answer.problem) == (False, "edge was not seen to enforce it yet.")


def test_a_repeat_with_the_same_key_adds_no_second_broker_and_has_the_same_code(portal: Portal) -> None:
    key = "a-key-of-a-request"
    first = portal.agents.add(OPERATOR, "edge", "edge.example.org", key)
    assert portal.agents.add(OPERATOR, "edge", "edge.example.org", key) == first
    with pytest.raises(StateConflict):
        portal.agents.add(OPERATOR, "edge", "edge.example.org")
    with pytest.raises(IdempotencyConflict):
        portal.agents.add(OPERATOR, "edge-2", "edge.example.org", key)
    portal.agents.join(first.code, csr())


def test_a_repeat_after_the_broker_was_removed_finds_none(portal: Portal) -> None:
    portal.agents.add(OPERATOR, "edge", "edge.example.org", "a-key-of-a-request")
    portal.brokers.remove(OPERATOR, "edge", "edge")
    with pytest.raises(NotFound):
        portal.agents.add(OPERATOR, "edge", "edge.example.org", "a-key-of-a-request")


def test_an_agent_learns_whom_to_trust_and_where(portal: Portal) -> None:
    answer = portal.agents.join(add(portal).code, csr())
    assert answer.agents_url == "https://127.0.0.1:8444"
    assert answer.settings["mqtt_host"] == "edge.example.org"
    assert answer.settings["mqtt_port"] == "8883"
    root = x509.load_pem_x509_certificate(answer.portal_ca.encode())
    assert root.subject == root.issuer
    certificate = x509.load_der_x509_certificate(der(answer.chain))
    assert certificate.subject.rfc4514_string() == "CN=agent\\+edge"


def test_its_certificate_is_that_of_an_agent_and_on_the_crl_once_it_is_removed(portal: Portal) -> None:
    certificate, other = joined(portal), joined(portal, "another")
    record = portal.agents.shown(certificate)
    renewed = portal.agents.certify(record, {AgentCertificate.AGENT: csr(), AgentCertificate.SERVER: csr()})
    next_one = der(renewed.chains[AgentCertificate.AGENT])
    parsed = x509.load_der_x509_certificate(certificate)
    usages = parsed.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [*usages] == [ExtendedKeyUsageOID.CLIENT_AUTH]
    portal.brokers.remove(OPERATOR, "edge", "edge")
    _, _ = portal.reconciler.crls.sign_due()
    crl = x509.load_der_x509_crl(newest_crl(portal))
    revoked = [crl.get_revoked_certificate_by_serial_number(serial_of(one)) for one in (certificate, next_one, other)]
    assert [one is not None for one in revoked] == [True, True, False]


def newest_crl(portal: Portal) -> bytes:
    crl = portal.inventory.crl(portal.authority.first.issuing.id)
    assert crl is not None
    return crl.der


def serial_of(certificate: bytes) -> int:
    return x509.load_der_x509_certificate(certificate).serial_number


def test_agents_with_long_names_have_names_of_their_own_in_their_certificates(portal: Portal) -> None:
    names = ["a" * 62 + last for last in "xy"]
    subjects = {x509.load_der_x509_certificate(joined(portal, name)).subject for name in names}
    assert len(subjects) == 2


@pytest.mark.parametrize("address", ["an edge", "edge.example.org:0", "edge.example.org:x", "a" * 254, "edge\n", "*"])
def test_an_address_that_is_none_is_refused_when_it_is_changed(portal: Portal, address: str) -> None:
    add(portal)
    with pytest.raises(InputInvalid, match="HOST or HOST:PORT"):
        portal.brokers.set_address(OPERATOR, "edge", address)
    assert portal.brokers.set_address(OPERATOR, "edge", "other.example.org").record.address == "other.example.org:8883"
    assert portal.brokers.set_address(OPERATOR, "edge", None).record.address is None


def test_a_code_is_used_once(portal: Portal) -> None:
    code = add(portal).code
    portal.agents.join(code, csr())
    with pytest.raises(NotFound):
        portal.agents.join(code, csr())


def test_a_code_expires(portal: Portal, clock: Clock) -> None:
    added = add(portal)
    clock.advance(hours=1)
    with pytest.raises(NotFound):
        portal.agents.join(added.code, csr())


def test_a_request_that_is_none_does_not_use_up_the_code(portal: Portal) -> None:
    code = add(portal).code
    with pytest.raises(CsrInvalid):
        portal.agents.join(code, "no request")
    portal.agents.join(code, csr())


def test_an_unknown_code_is_refused_before_the_request_is_looked_at(portal: Portal) -> None:
    add(portal)
    with pytest.raises(NotFound):
        portal.agents.join("f" * 32, "no request")


def test_the_code_is_not_in_the_database(portal: Portal) -> None:
    code = add(portal).code
    with portal.database.snapshot(sees=ALL_TENANTS) as tx:
        rows = tx.exec_driver_sql("SELECT * FROM broker_agents").all()
        entries = tx.exec_driver_sql("SELECT * FROM audit_entries").all()
    assert rows
    assert code not in repr(rows) + repr(entries)


def test_a_name_is_taken_once(portal: Portal) -> None:
    add(portal)
    with pytest.raises(StateConflict):
        add(portal)


@pytest.mark.parametrize("address", ["", "host:0", "host:x", ":8883", "host:99999", "a host", "a/b:8883"])
def test_an_address_is_that_of_a_host(portal: Portal, address: str) -> None:
    with pytest.raises(InputInvalid):
        add(portal, address=address)


def test_without_a_listener_for_agents_none_is_added(
    make_settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    unheard = pytest.raises(StateConflict, match="PORTAL_AGENTS_BIND")
    with guarded_app(make_settings(PORTAL_BROKER_CONTROL="guard"), clock, monkeypatch) as built, unheard:
        add(portal_of(built))


# --- Certificates ----------------------------------------------------------------------------------------------------


def test_only_the_newest_certificate_of_an_agent_counts(portal: Portal) -> None:
    first = joined(portal)
    chains = portal.agents.certify(portal.agents.shown(first), {AgentCertificate.AGENT: csr()}).chains
    following = der(chains[AgentCertificate.AGENT])
    portal.agents.shown(first)  # until the next one is shown: its answer may have been lost
    portal.agents.shown(following)
    with pytest.raises(ClientCertificateRefused):
        portal.agents.shown(first)


def test_the_certificates_of_others_are_none_of_an_agent(portal: Portal) -> None:
    joined(portal)
    register(portal)
    with portal.database.snapshot(sees=ALL_TENANTS) as tx:
        issued = [bytes(row[0]) for row in tx.exec_driver_sql("SELECT der FROM certificates ORDER BY id").all()]
    refused = 0
    for each in issued:
        try:
            portal.agents.shown(each)
        except ClientCertificateRefused:
            refused += 1
    assert refused == len(issued) - 1
    with pytest.raises(ClientCertificateRefused):
        portal.agents.shown(b"")


def test_a_removed_agent_is_refused_at_once(portal: Portal) -> None:
    certificate = joined(portal)
    with portal.database.transaction(sees=ALL_TENANTS) as tx:
        brokers.remove_broker(tx, brokers.get_broker(tx, "edge"), at=portal.clock())
    with pytest.raises(ClientCertificateRefused):
        portal.agents.shown(certificate)


def test_the_names_in_the_brokers_certificate_are_the_portals_to_decide(portal: Portal) -> None:
    record = portal.agents.shown(joined(portal))
    chain = portal.agents.certify(record, {AgentCertificate.SERVER: csr()}).chains[AgentCertificate.SERVER]
    names = x509.load_der_x509_certificate(der(chain)).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.value.get_values_for_type(x509.DNSName) == ["edge.example.org"]


def test_an_address_that_became_none_is_told_and_breaks_nothing(portal: Portal) -> None:
    certificate = joined(portal)
    for address in (None, "somewhere nice", "host:port"):
        with portal.database.transaction(sees=ALL_TENANTS) as tx:
            brokers.set_address(tx, state_of(portal).id, address)
        record = portal.agents.shown(certificate)
        with pytest.raises(StateConflict, match="has no address"):
            portal.agents.certify(record, {AgentCertificate.SERVER: csr()})
        assert "mqtt_host" not in portal.agent_feed.trust(record)[1]["settings"]


def test_the_revoked_probe_certificate_is_on_the_crl_of_its_generation(portal: Portal) -> None:
    record = portal.agents.shown(joined(portal))
    kinds = {AgentCertificate.GOOD: csr(), AgentCertificate.REVOKED: csr()}
    issued = portal.agents.certify(record, kinds)
    _, trust = portal.agent_feed.trust(record)
    crls = trust["crl"].split("-----BEGIN")[1:]
    listed = {one.serial_number for crl in crls for one in x509.load_pem_x509_crl(f"-----BEGIN{crl}".encode())}
    serials = {kind: x509.load_der_x509_certificate(der(chain)).serial_number for kind, chain in issued.chains.items()}
    assert serials[AgentCertificate.REVOKED] in listed
    assert serials[AgentCertificate.GOOD] not in listed
    assert issued.generation > 0


# --- What is given, and reported -------------------------------------------------------------------------------------


def test_a_change_is_enforced_once_the_agent_has_reported_the_page_that_has_it(portal: Portal) -> None:
    certificate = joined(portal)
    device = register(portal)
    report(portal, certificate, given_page(portal, certificate).mark)
    assert not portal.revocations.revoke(OPERATOR, device, "unspecified").enforced
    page = given_page(portal, certificate, Mark(0, "0" * 64))
    assert f"deny {device}\n".encode() in page.content
    report(portal, certificate, page.mark)
    assert portal.revocations.revoke(OPERATOR, device, "unspecified").enforced


def test_a_page_has_what_has_changed_since_the_one_before(portal: Portal) -> None:
    certificate = joined(portal)
    first = given_page(portal, certificate)
    report(portal, certificate, first.mark)
    device = register(portal)
    portal.revocations.revoke(OPERATOR, device, "unspecified")
    page = given_page(portal, certificate, first.mark)
    assert page.since == first.generation
    lines = page.content.decode().splitlines()[1:]
    assert [line.split(" ")[0] for line in lines] == ["deny", "serial", "clear"]


@pytest.mark.parametrize(
    "said",
    [
        lambda page: Mark(page.generation + 1, page.digest),
        lambda page: Mark(page.generation, "0" * 64),
        lambda page: Mark(page.generation, hashlib.sha256(b"guessed").hexdigest()),
        lambda page: Mark(page.generation, ""),
        lambda page: Mark(page.generation - 1, page.digest),
    ],
)
def test_a_report_of_what_was_not_given_is_not_believed(portal: Portal, said: Callable[[Page], Mark]) -> None:
    certificate = joined(portal)
    page = given_page(portal, certificate)
    before = state_of(portal).applied_generation
    with pytest.raises(StateConflict):
        report(portal, certificate, said(page))
    assert state_of(portal).applied_generation == before


def test_the_page_of_another_agent_is_not_believed(portal: Portal) -> None:
    one, other = joined(portal, "one"), joined(portal, "other")
    page = given_page(portal, one)
    with pytest.raises(StateConflict):
        report(portal, other, page.mark)


def test_an_agent_that_shows_what_it_was_not_given_begins_again(portal: Portal) -> None:
    certificate = joined(portal)
    page = given_page(portal, certificate)
    for mark in (Mark(page.generation, "1" * 64), Mark(page.generation + 5, page.digest)):
        assert given_page(portal, certificate, mark).since == 0


def test_after_a_restore_nothing_is_known_of_what_agents_enforce_and_they_begin_again(portal: Portal) -> None:
    certificate = joined(portal)
    page = given_page(portal, certificate)
    report(portal, certificate, page.mark)
    record = portal.agents.shown(certificate)
    start = portal.agent_feed.start_of(record, page.mark)
    with portal.database.transaction(sees=ALL_TENANTS) as tx:
        agents.begin_again(tx)
        brokers.forget_proofs_of_agents(tx, at=portal.clock())
    assert state_of(portal).applied_generation == 0
    with portal.database.snapshot(sees=ALL_TENANTS) as tx:
        assert generations.get_broker_state(tx).applied_generation == 0
    with pytest.raises(StateConflict):  # one that was on its way meanwhile
        portal.agent_feed.given(record, start, portal.agent_feed.page(record, start))
    with pytest.raises(StateConflict):  # a report, too, by what was known of the agent before
        portal.agents.report(record, Report(page.generation, page.digest, None))
    assert state_of(portal).applied_generation == 0
    assert given_page(portal, certificate, page.mark).since == 0


def test_a_page_that_never_arrived_is_given_again(portal: Portal) -> None:
    certificate = joined(portal)
    first = given_page(portal, certificate)
    register(portal)
    given_page(portal, certificate, first.mark)  # lost on the way
    again = given_page(portal, certificate, first.mark)
    assert again.since == first.generation
    report(portal, certificate, again.mark)


def texts_of(page: Page) -> list[str]:
    reader = PageReader()
    return [text for line in split_lines([page.content]) if (text := reader.read(line)) is not None]


def test_many_changes_come_in_pages_of_whole_generations(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = joined(portal)
    devices = [register(portal, number) for number in range(7)]
    portal.revocations.revoke(OPERATOR, devices[3], "unspecified")
    mark, told, pages = NOTHING, list[str](), list[Page]()
    monkeypatch.setattr(feeds, "PAGE_DEVICES", 2)
    while not pages or not pages[-1].is_last:
        pages.append(given_page(portal, certificate, mark))
        mark = pages[-1].mark
        told += texts_of(pages[-1])
    assert len(pages) > 3
    monkeypatch.undo()
    assert sorted(told) == sorted(texts_of(given_page(portal, certificate)))
    assert [page.since for page in pages[1:]] == [page.generation for page in pages[:-1]]


def test_a_page_that_is_not_the_last_enforces_nothing(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = joined(portal)
    for number in range(5):
        register(portal, number)
    monkeypatch.setattr(feeds, "PAGE_DEVICES", 2)
    page = given_page(portal, certificate)
    assert not page.is_last
    with pytest.raises(StateConflict):
        report(portal, certificate, page.mark)


def test_a_page_of_long_lines_is_made_shorter(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = joined(portal)
    for number in range(6):
        register(portal, number)
    monkeypatch.setattr(feeds, "MAX_PAGE_BYTES", 300)
    page = given_page(portal, certificate)
    assert not page.is_last
    assert len(page.content) <= 300


def test_agents_at_the_same_place_get_the_same_page_once_it_was_made(portal: Portal) -> None:
    one, other = joined(portal, "one"), joined(portal, "other")
    assert given_page(portal, one) is given_page(portal, other)
    device = register(portal)
    again = given_page(portal, one)
    assert given_page(portal, other) is again
    assert device.encode() in again.content


# --- Runs ------------------------------------------------------------------------------------------------------------

FIRST, SECOND, THIRD = ("1" * 32, "2" * 32, "3" * 32)


def asks(portal: Portal, certificate: bytes, run: str) -> bool:
    """Have a run of an agent ask for changes; return whether it is answered."""
    try:
        portal.agents.take_run(portal.agents.shown(certificate), run)
    except StateConflict:
        return False
    return True


def is_copied(portal: Portal, certificate: bytes) -> bool:
    return portal.agents.shown(certificate).copied_since is not None


def test_what_a_run_had_sent_before_a_restart_is_not_believed_and_makes_no_copy(portal: Portal) -> None:
    certificate = joined(portal)
    mark = given_page(portal, certificate).mark
    for run in (FIRST, SECOND, THIRD):
        assert asks(portal, certificate, run)
        report(portal, certificate, mark, run)
    for late in (FIRST, SECOND):
        assert not asks(portal, certificate, late)
        with pytest.raises(StateConflict, match="Another run"):
            report(portal, certificate, mark, late)
    assert not is_copied(portal, certificate)
    report(portal, certificate, mark, THIRD)
    assert portal.brokers.show("edge").sentence is None


@pytest.mark.parametrize("others", [[SECOND], [SECOND, THIRD], ["", SECOND]])
def test_of_runs_that_go_on_beside_each_other_none_is_believed(
    portal: Portal, others: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    certificate = joined(portal)
    mark = given_page(portal, certificate).mark
    report(portal, certificate, mark, FIRST)
    assert portal.brokers.show("edge").sentence is None
    for _ in range(3):
        for run in (*others, FIRST):
            asks(portal, certificate, run)
    for run in (*others, FIRST):
        assert asks(portal, certificate, run)  # so that both brokers learn whom to deny
        for problem in (None, "The disk is full."):
            said = Report(mark.generation, mark.digest, problem, run=run)
            with pytest.raises(StateConflict, match="Two agents run with its key"):
                portal.agents.report(portal.agents.shown(certificate), said)
    state = portal.brokers.show("edge")
    assert (state.standing, state.record.applied_generation) == ("pending", 0)
    assert "agent join --again" in (state.sentence or "")
    assert "two agents run with one key" in caplog.messages
    assert not portal.revocations.revoke(OPERATOR, register(portal), "unspecified").enforced


def test_whoever_was_connected_before_a_copy_began_is_still_told_to_end(portal: Portal) -> None:
    certificate, device = joined(portal), register(portal)
    first = given_page(portal, certificate).mark
    report(portal, certificate, first, FIRST)
    assert asks(portal, certificate, SECOND)
    portal.revocations.revoke(OPERATOR, device, "unspecified")
    report(portal, certificate, given_page(portal, certificate, first).mark, SECOND)  # of the copy's broker alone
    for _ in range(3):
        asks(portal, certificate, FIRST)
    assert portal.agents.shown(certificate).copied_since == first.generation
    assert any(text.startswith("clear ") and device in text for text in texts_of(given_page(portal, certificate)))


def test_an_agent_that_was_put_back_to_the_version_before_is_no_copy(portal: Portal) -> None:
    certificate = joined(portal)
    mark = given_page(portal, certificate).mark
    for run in ("", FIRST):
        assert asks(portal, certificate, run)
    assert [asks(portal, certificate, "") for _ in range(3)] == [False, False, True]
    report(portal, certificate, mark)
    assert not is_copied(portal, certificate)


def test_an_agent_that_has_joined_again_after_it_was_copied_is_believed(portal: Portal) -> None:
    copied = joined(portal)
    for run in (FIRST, SECOND, FIRST, FIRST, FIRST):
        asks(portal, copied, run)
    assert is_copied(portal, copied)
    again = joined(portal, "edge-2")
    portal.brokers.remove(OPERATOR, "edge", "edge")
    report(portal, again, given_page(portal, again).mark, FIRST)
    assert portal.brokers.show("edge-2").sentence is None


def test_a_problem_is_shown_and_gone_with_the_next_report(portal: Portal) -> None:
    certificate = joined(portal)
    record = portal.agents.shown(certificate)
    portal.agents.report(record, Report(0, "", "The broker does not run."))
    assert state_of(portal).problem == "The broker does not run."
    report(portal, certificate, given_page(portal, certificate).mark)
    assert state_of(portal).problem is None


def test_who_waits_is_told_of_a_change_and_of_new_crls(portal: Portal, clock: Clock) -> None:
    certificate = joined(portal)
    record = portal.agents.shown(certificate)
    page = given_page(portal, certificate)
    start, feed = Given(page.generation, page.digest, is_last=True), portal.agent_feed
    seen = feed.names()
    assert not feed.wait(start, seen, 0, goes_on=lambda: True)
    assert not feed.wait(start, seen, 60, goes_on=lambda: False)
    register(portal)
    assert feed.wait(start, seen, 60, goes_on=lambda: True)
    clock.advance(days=5)
    feed.trust(record)
    start = Given(page.generation + 100, page.digest, is_last=True)
    assert not feed.wait(start, seen, 60, goes_on=lambda: True)


def test_an_agent_is_known_by_its_broker(portal: Portal) -> None:
    record = portal.agents.shown(joined(portal))
    assert isinstance(record, AgentRecord)
    assert (record.name, record.address) == ("edge", "edge.example.org:8883")
    assert record.joined_at is not None
    assert portal.clock() - record.joined_at < timedelta(minutes=1)
