"""People are told once, and in one message, of all that they must act on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

import db
from config import Settings
from core.states import Approval, RepeatedSerial
from operations.wiring import Portal, open_portal
from pki.csr import read_csr
from pki.est import read_enrolment_request
from store import issuers, mail
from store.enrolment import EnrolmentProfile
from store.tables import Device, IssuerRow, Tenant
from tests.support.brokers import enforce_all
from tests.support.est import csr_der
from tests.support.harness import Clock
from tests.support.mail_server import MailServer, mail_server
from tests.workflows.test_registration import OPERATOR, PUMP, csr_pem
from workflows.enrolment.credentials import Waiting, by_token
from workflows.mail import matters
from workflows.mail.mail import Mail
from workflows.renewal import RenewalRequest


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MailServer]:
    with mail_server(tmp_path) as serving:
        yield serving


@pytest.fixture
def portal(make_settings: Callable[..., Settings], clock: Clock, server: MailServer) -> Iterator[Portal]:
    built = open_portal(make_settings(**server.environment()), clock)
    with built.database.transaction() as tx:  # what the start has left for a broker to do
        enforce_all(tx)
    yield built
    built.close()


@pytest.fixture
def people(portal: Portal, server: MailServer) -> Callable[[], list[str]]:
    """Has the job run in a portal whose broker is there; returns the texts of the messages that people got by it."""
    sender = Mail(portal.settings, portal.database, lambda: True, portal.clock, "default")

    def are_told() -> list[str]:
        before = len(server.messages)
        sender.send_due()
        return [str(message.get_content()) for message in server.messages[before:]]

    return are_told


People = Callable[[], list[str]]


def ask(portal: Portal, *, count: int) -> list[str]:
    """Have devices ask for their first certificate, which an operator has to approve; returns their ids."""
    profile = EnrolmentProfile(
        "pump", "hall 1", "1.0", "pump-{number}", ("ec-p256",), 9, Approval.OPERATOR, RepeatedSerial.OPERATOR
    )
    life = timedelta(days=1)
    secret, _ = portal.enrolment_tokens.create(OPERATOR, "batch", profile, device_id=None, count=count, life=life)
    token = portal.enrolment_tokens.find(secret)
    assert token is not None
    device_ids = []
    for number in range(count):
        request = read_enrolment_request(csr_der(None, f"serial-{number}"))
        outcome = portal.enrolment.enrol(OPERATOR, by_token(token, request), request)
        assert isinstance(outcome, Waiting)
        device_ids.append(outcome.device_id)
    return device_ids


def test_nobody_is_told_anything_while_there_is_nothing_to_do(
    people: People, portal: Portal, server: MailServer
) -> None:
    portal.registrations.register(OPERATOR, PUMP)
    assert people() == []
    assert server.connections == 0


def test_a_request_that_waits_is_told_once_also_by_a_process_that_was_started_since(
    people: People, portal: Portal, server: MailServer, clock: Clock
) -> None:
    (device_id,) = ask(portal, count=1)
    (text,) = people()
    assert "Devices that wait for approval: 1" in text
    assert device_id in text
    assert "portal approve ID" in text
    assert str(server.messages[0]["Subject"]) == "Onboarding portal 127.0.0.1: a device waits"
    for _ in range(3):
        clock.advance(hours=1)
        assert people() == []
    Mail(portal.settings, portal.database, lambda: True, clock, "default").send_due()
    assert len(server.messages) == 1


def test_what_comes_within_the_pause_is_told_together_after_it(people: People, portal: Portal, clock: Clock) -> None:
    ask(portal, count=1)
    assert len(people()) == 1
    second, third = ask(portal, count=2)
    clock.advance(minutes=14)
    assert people() == []
    clock.advance(minutes=2)
    (text,) = people()
    assert "Devices that wait for approval: 2" in text
    assert second in text
    assert third in text
    clock.advance(hours=1)
    assert people() == []


def test_a_request_that_was_decided_is_not_told(people: People, portal: Portal) -> None:
    (device_id,) = ask(portal, count=1)
    portal.approvals.approve(OPERATOR, device_id)
    assert people() == []


def test_a_certificate_is_told_once_when_a_sixth_of_its_life_is_left_and_a_month_at_most(
    people: People, portal: Portal, clock: Clock
) -> None:
    device = portal.registrations.register(OPERATOR, PUMP)
    clock.advance(days=334)  # of 365; a sixth of them are 60
    assert people() == []
    clock.advance(days=2)
    (text,) = people()
    assert "Certificates that end soon and were not renewed: 1" in text
    assert f"pump-1 ({device.device_id})" in text
    clock.advance(days=1)
    assert people() == []


def test_a_short_certificate_is_not_told_while_it_renews_itself(
    make_settings: Callable[..., Settings], clock: Clock
) -> None:
    portal = open_portal(make_settings(PORTAL_DEVICE_DAYS="12"), clock)
    portal.registrations.register(OPERATOR, PUMP)
    ends: dict[int, int] = {}
    for day in (9, 11):
        clock.advance(days=day - len(ends) * 9)
        with portal.database.snapshot() as tx:
            found = mail.ending_certificates(tx, "default", now=clock(), within=timedelta(days=30), limit=9)
        ends[day] = len(found)
    portal.close()
    assert ends == {9: 0, 11: 1}


def test_a_certificate_that_was_renewed_or_revoked_is_not_told(people: People, portal: Portal, clock: Clock) -> None:
    renewed = portal.registrations.register(OPERATOR, PUMP).device_id
    revoked = portal.registrations.register(OPERATOR, PUMP).device_id
    clock.advance(days=336)
    portal.renewals.renew(OPERATOR, renewed, RenewalRequest(csr=read_csr(csr_pem())))
    portal.revocations.revoke(OPERATOR, revoked, "unspecified")
    assert people() == []


def test_a_ca_that_ends_is_told(people: People, portal: Portal, clock: Clock) -> None:
    ends = clock() + timedelta(days=89)
    with portal.database.transaction() as tx:
        tx.execute(sa.update(IssuerRow).where(IssuerRow.kind == "issuing").values(not_after=ends))
        name = issuers.list_issuers(tx)[1].name
    (text,) = people()
    assert f"{name}, {ends:%Y-%m-%d}" in text
    assert "ca rollover" in text
    assert people() == []


def test_a_revocation_that_stays_pending_is_told_once_each_time(people: People, portal: Portal, clock: Clock) -> None:
    def pending() -> None:
        with portal.database.transaction() as tx:
            db.next_generation(tx, at=clock())

    pending()
    clock.advance(minutes=4)
    assert people() == []
    clock.advance(minutes=2)
    (text,) = people()
    assert "The broker does not have the newest changes" in text
    clock.advance(hours=1)
    assert people() == []
    with portal.database.transaction() as tx:
        enforce_all(tx)
    assert people() == []
    pending()
    clock.advance(minutes=6)
    assert len(people()) == 1


def test_a_broker_that_is_away_is_told_once_and_again_when_it_was_back(
    portal: Portal, server: MailServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = False
    sender = Mail(portal.settings, portal.database, lambda: answers, clock, "default")
    sender.send_due()
    assert server.messages == []  # it may only be restarting
    monkeypatch.setattr(matters, "AWAY_SECONDS", 0.0)
    for _ in range(2):
        sender.send_due()
        clock.advance(hours=1)
    Mail(portal.settings, portal.database, lambda: answers, clock, "default").send_due()
    assert [str(message["Subject"]) for message in server.messages] == [
        "Onboarding portal 127.0.0.1: the broker is away"
    ]
    answers = True
    sender.send_due()
    answers = False
    sender.send_due()
    assert len(server.messages) == 2


def test_all_kinds_go_into_one_message(people: People, portal: Portal, server: MailServer, clock: Clock) -> None:
    portal.registrations.register(OPERATOR, PUMP)
    clock.advance(days=336)
    ask(portal, count=25)
    (text,) = people()
    assert str(server.messages[0]["Subject"]).endswith(": 25 devices wait, a certificate ends")
    assert "and 5 more" in text


def test_a_message_that_was_not_taken_is_tried_again_with_growing_pauses_and_logged_once(
    people: People, portal: Portal, server: MailServer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    ask(portal, count=1)
    server.answer = "451 later"
    with caplog.at_level(logging.ERROR, "portal.mail"):
        for _ in range(3):
            assert people() == []
        assert server.connections == 1
        clock.advance(seconds=31)
        assert people() == []
        clock.advance(seconds=31)
        assert people() == []
        assert server.connections == 2
    assert len(caplog.records) == 1
    server.answer = "250 OK"
    clock.advance(hours=1)
    assert len(people()) == 1


def test_a_message_that_is_sent_again_after_a_crash_has_the_same_id_and_a_later_one_another(
    people: People, portal: Portal, server: MailServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(portal, count=1)
    with monkeypatch.context() as patch:
        patch.setattr(mail, "record_message", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            people()
    clock.advance(minutes=1)
    people()
    clock.advance(hours=1)
    ask(portal, count=1)
    people()
    ids = [str(message["Message-ID"]) for message in server.messages]
    assert ids[0] == ids[1] != ids[2]


def test_a_name_with_line_breaks_is_one_line_and_no_header(
    people: People, portal: Portal, server: MailServer, clock: Clock
) -> None:
    portal.registrations.register(OPERATOR, PUMP)
    evil = "pump\r\nBcc: eve@example.com\r\n\r\nrun this\x1b[2J\u202e"
    with portal.database.transaction() as tx:
        tx.execute(sa.update(Device).values(name=evil))
    clock.advance(days=336)
    (text,) = people()
    assert server.messages[0]["Bcc"] is None
    assert server.recipients == [["ada@example.com", "grace@example.com"]]
    assert any("pump" in line and "eve@example.com" in line and "run this" in line for line in text.splitlines())
    assert not {"\x1b", "\u202e"} & set(text)


def test_nothing_of_another_tenant_is_told(people: People, portal: Portal, clock: Clock) -> None:
    portal.registrations.register(OPERATOR, PUMP)
    ask(portal, count=1)
    clock.advance(days=336)
    with portal.database.transaction() as tx:
        tx.execute(sa.insert(Tenant), {"id": "acme", "created_at": clock(), "topic_prefix": "acme"})
        found = matters.unsaid(tx, "acme", now=clock(), broker_is_away=False)
        own = matters.unsaid(tx, "default", now=clock(), broker_is_away=False)
    assert found == []
    assert {one.kind for one in own} == {matters.Kind.REQUEST, matters.Kind.CERTIFICATE}


def test_no_message_has_a_link_a_password_or_a_token(people: People, portal: Portal, clock: Clock) -> None:
    device = portal.registrations.register(OPERATOR, PUMP)
    ask(portal, count=2)
    clock.advance(days=336)
    (text,) = people()
    assert "://" not in text
    assert str(device.bundle_password) not in text


def test_without_a_server_nothing_is_asked(make_settings: Callable[..., Settings], clock: Clock) -> None:
    portal = open_portal(make_settings(), clock)
    Mail(portal.settings, portal.database, lambda: pytest.fail("asked"), clock, "default").send_due()
    portal.close()
