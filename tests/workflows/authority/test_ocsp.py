"""The responder over time: its certificates, the answers it keeps, what other processes do meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.x509.ocsp import OCSPCertStatus, OCSPResponseStatus
from flask import Flask

from app import create_app, portal_of
from config import Settings
from operations import authority as operations_authority
from pki import ocsp
from pki.issuers import CLOCK_SKEW
from tests.support.harness import ON_SQLITE, Api, Clock, api_as, key_path
from tests.support.ocsp import ask, failure_of, get, issuing_of, nonce, post, read
from tests.workflows.test_registration import OPERATOR
from workflows.authority import issuers
from workflows.authority import ocsp as ocsp_responder
from workflows.authority.ocsp import RESPONDER_DAYS

pytestmark = pytest.mark.both_stores

TRY_LATER, UNAUTHORIZED = OCSPResponseStatus.TRY_LATER, OCSPResponseStatus.UNAUTHORIZED


@pytest.fixture
def anyone(app: Flask) -> Api:
    return api_as(app, None)


# --- Certificates -------------------------------------------------------------------------------------------------


@ON_SQLITE
def test_an_answer_lives_a_day_and_no_longer_than_who_signed_it(
    make_settings: Callable[..., Settings], clock: Clock
) -> None:
    app = create_app(make_settings(PORTAL_OCSP_HOURS="96"), background=False, clock=clock)
    anyone, issuing = api_as(app, None), issuing_of(app)
    answer = read(post(anyone, ask(issuing, 1).der()))
    assert answer.next_update_utc == answer.this_update_utc + CLOCK_SKEW + timedelta(hours=96)
    assert clock() - CLOCK_SKEW - timedelta(minutes=1) < answer.this_update_utc <= clock() - CLOCK_SKEW
    assert answer.this_update_utc <= answer.produced_at_utc <= clock()
    clock.advance(days=RESPONDER_DAYS - 1)  # and nothing has renewed it
    answer = read(post(anyone, ask(issuing, 1).der()))
    assert answer.next_update_utc == answer.certificates[0].not_valid_after_utc
    portal_of(app).close()


def responder_of(answer: Any) -> x509.Certificate:
    return read(answer).certificates[0]


@ON_SQLITE
def test_the_responder_is_renewed_at_two_thirds_of_its_life_and_used_at_once(
    app: Flask, anyone: Api, clock: Clock
) -> None:
    portal, request = portal_of(app), ask(issuing_of(app), 1).der()
    first = responder_of(post(anyone, request))
    clock.advance(days=9)
    assert portal.responder.certificates.renew() == []
    clock.advance(days=1)
    assert portal.responder.certificates.renew() == ["root", "issuing-1"]
    second = responder_of(post(anyone, request))
    assert second.serial_number != first.serial_number
    assert second.not_valid_after_utc > first.not_valid_after_utc
    entry = portal.operators.audit("default", limit=1, before=None, filters={})[0][0]
    assert (entry.action, entry.detail) == ("certificate:issue", {"purpose": "ocsp", "issuer": "issuing-1"})
    path = portal.responder.certificates.path("issuing-1")
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


@ON_SQLITE
@pytest.mark.parametrize("damage", ["missing", "empty", "of another CA", "over"])
def test_without_a_responder_there_is_no_answer_yet_and_soon_one(
    app: Flask, anyone: Api, clock: Clock, damage: str
) -> None:
    portal, request = portal_of(app), ask(issuing_of(app), 1).der()
    path = portal.responder.certificates.path("issuing-1")
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "of another CA":
        path.write_bytes(portal.responder.certificates.path("root").read_bytes())
    else:
        clock.advance(days=RESPONDER_DAYS)
    assert failure_of(post(anyone, request)) is TRY_LATER
    assert "issuing-1" in portal.responder.certificates.renew()
    assert read(post(anyone, request)).response_status is OCSPResponseStatus.SUCCESSFUL


@ON_SQLITE
def test_a_clock_that_was_ahead_leaves_no_responder_of_the_future(app: Flask, anyone: Api, clock: Clock) -> None:
    certificates = portal_of(app).responder.certificates
    clock.advance(days=100)
    certificates.renew()
    clock.advance(days=-100)
    assert failure_of(post(anyone, ask(issuing_of(app), 1).der())) is TRY_LATER
    assert certificates.renew() == ["root", "issuing-1"]


@ON_SQLITE
def test_where_the_root_is_away_its_answers_end_with_its_responder(
    make_settings: Callable[..., Settings], clock: Clock
) -> None:
    settings = make_settings()
    key_path(settings, "root").unlink()
    app = create_app(settings, background=False, clock=clock)
    portal, anyone = portal_of(app), api_as(app, None)
    request = ask(portal.authority.root.issuer.certificate, issuing_of(app).serial_number).der()
    assert read(post(anyone, request)).certificate_status is OCSPCertStatus.GOOD
    clock.advance(days=RESPONDER_DAYS)
    assert portal.responder.certificates.renew() == ["issuing-1"]
    assert failure_of(post(anyone, request)) is UNAUTHORIZED
    portal.close()


@ON_SQLITE
def test_while_the_database_is_away_nothing_is_said_of_a_certificate(
    api: Api, app: Flask, anyone: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ask(issuing_of(app), int(api.register()["serial_number"], 16)).der()
    assert read(get(anyone, request)).certificate_status is OCSPCertStatus.GOOD

    def away() -> Any:
        raise sa.exc.OperationalError("SELECT", {}, Exception("gone"))

    monkeypatch.setattr(portal_of(app).database.engine, "connect", away)
    assert failure_of(get(anyone, request)) is TRY_LATER


@ON_SQLITE
def test_each_ca_is_answered_for_by_its_own_before_a_rollover_and_after_its_retirement(
    api: Api, app: Flask, anyone: Api, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(issuers, "SECONDS_BETWEEN_LOOKS", 0.0)
    portal, first = portal_of(app), issuing_of(app)
    older = api.register()
    operations_authority.roll_over(portal, OPERATOR, lambda _: None)
    newer, second = api.register(), issuing_of(app)
    assert second != first

    def said(issuer: x509.Certificate, number: str) -> str:
        answer = read(get(anyone, ask(issuer, int(number, 16)).der()))
        answer.certificates[0].verify_directly_issued_by(issuer)
        return answer.certificate_status.name

    assert (said(first, older["serial_number"]), said(second, newer["serial_number"])) == ("GOOD", "GOOD")
    assert (said(first, newer["serial_number"]), said(second, older["serial_number"])) == ("UNKNOWN", "UNKNOWN")
    api.post(f"/revoke/{older['device_id']}")
    clock.advance(hours=2)
    operations_authority.retire(portal, OPERATOR, "issuing-1")
    clock.advance(days=10)
    assert portal.responder.certificates.renew() == ["root", "issuing-1", "issuing-2"]
    assert said(first, older["serial_number"]) == "REVOKED"
    root = portal.authority.root.issuer.certificate
    assert [said(root, f"{ca.serial_number:x}") for ca in (first, second)] == ["GOOD", "GOOD"]


# --- Answers that are kept ----------------------------------------------------------------------------------------


def signatures(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with every answer that is signed from now on."""
    made: list[object] = []
    sign = ocsp.sign_response

    def counted(*arguments: Any, **options: Any) -> bytes:
        made.append(arguments)
        return sign(*arguments, **options)

    monkeypatch.setattr(ocsp, "sign_response", counted)
    return made


@ON_SQLITE
def test_an_answer_is_signed_once_and_again_after_half_its_life(
    api: Api, app: Flask, anyone: Api, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ask(issuing_of(app), int(api.register()["serial_number"], 16)).der()
    made = signatures(monkeypatch)
    first = get(anyone, request).data
    assert {get(anyone, request).data, post(anyone, request).data, get(anyone, request).data} == {first}
    assert len(made) == 1
    clock.advance(hours=11)
    assert get(anyone, request).data == first
    clock.advance(hours=2)
    assert get(anyone, request).data != first
    clock.advance(hours=-13)  # a kept answer from the future is none
    assert read(get(anyone, request)).this_update_utc <= clock()
    assert len(made) == 3


@ON_SQLITE
def test_what_is_unknown_or_has_a_nonce_is_not_kept(
    api: Api, app: Flask, anyone: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = signatures(monkeypatch)
    known = int(api.register()["serial_number"], 16)
    with_nonce = dataclasses.replace(ask(issuing_of(app), known), extensions=[nonce(b"n")])
    for request in (ask(issuing_of(app), 1), ask(issuing_of(app), known, 1), with_nonce):
        made.clear()
        for _ in range(3):
            get(anyone, request.der())
        assert len(made) == 3


def test_a_revocation_by_another_process_shows_in_the_next_answer(
    api: Api, app: Flask, anyone: Api, clock: Clock
) -> None:
    device = api.register()
    request = ask(issuing_of(app), int(device["serial_number"], 16)).der()
    other = create_app(portal_of(app).settings, background=False, clock=clock)
    stranger = api_as(other, None)
    for asked in (anyone, stranger, anyone, stranger):
        assert read(get(asked, request)).certificate_status is OCSPCertStatus.GOOD
    api.post(f"/revoke/{device['device_id']}")
    for asked in (stranger, anyone):
        assert read(get(asked, request)).certificate_status is OCSPCertStatus.REVOKED
    portal_of(other).close()


def test_a_renewal_of_the_responder_by_another_process_is_noticed(
    api: Api, app: Flask, anyone: Api, clock: Clock
) -> None:
    request = ask(issuing_of(app), int(api.register()["serial_number"], 16)).der()
    other = create_app(portal_of(app).settings, background=False, clock=clock)
    before = responder_of(get(anyone, request))
    clock.advance(days=10)
    portal_of(other).responder.certificates.renew()
    assert responder_of(get(anyone, request)).serial_number != before.serial_number
    portal_of(other).close()


def test_the_answers_used_last_are_kept_and_no_more_than_there_is_room_for() -> None:
    kept = ocsp_responder.AnswerCache(3)
    for number in range(10):
        kept.put(bytes([number]), mock.sentinel.answer)
        assert kept.get(b"\x00") is mock.sentinel.answer
    assert [number for number in range(10) if kept.get(bytes([number]))] == [0, 8, 9]
