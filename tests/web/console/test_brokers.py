"""Brokers in the console: how each stands, declared away and back, for the role system alone."""

from __future__ import annotations

import pytest
from flask import Flask

from app import portal_of
from core.roles import Role
from core.states import BrokerKind
from store import brokers
from tests.support.brokers import enforce_all
from tests.support.browser import Browser, logged_in_as, text_of
from tests.support.harness import ON_SQLITE, Clock

pytestmark = ON_SQLITE
BROKERS = "/ui/access/brokers"
SCRIPT = '"><script>alert(1)</script>'


@pytest.fixture
def system(app: Flask) -> Browser:
    """The role above the tenants, of a portal with the first broker and with edge-1, which has proven nothing."""
    portal = portal_of(app)
    with portal.database.transaction() as tx:
        enforce_all(tx)
        brokers.add_broker(tx, "edge-1", BrokerKind.AGENT, at=portal.clock(), joined=True)
    return logged_in_as(app, Role.SYSTEM)


def counted(app: Flask) -> dict[str, bool]:
    return {one.record.name: one.record.counts for one in portal_of(app).brokers.list()}


def test_one_is_declared_away_and_back_on_the_page_that_lists_them(app: Flask, system: Browser) -> None:
    assert "Behind" in text_of(system.get(BROKERS).text)
    assert system.post(f"{BROKERS}/edge-1/away", {"reason": SCRIPT}).headers["Location"] == BROKERS
    page = system.get(BROKERS).text
    assert "Declare edge-1 back" in page
    assert SCRIPT not in page
    assert counted(app) == {"main": True, "edge-1": False}
    assert system.post(f"{BROKERS}/edge-1/back").headers["Location"] == BROKERS
    assert counted(app) == {"main": True, "edge-1": True}


def test_an_agent_that_is_not_heard_of_is_named(app: Flask, system: Browser, clock: Clock) -> None:
    with portal_of(app).database.transaction() as tx:
        enforce_all(tx)
    assert "has not reported since" not in text_of(system.get(BROKERS).text)
    clock.advance(seconds=61)
    assert "Its agent has not reported since" in text_of(system.get(BROKERS).text)


def test_the_last_one_that_counts_is_not_offered_to_be_declared_away(app: Flask, system: Browser) -> None:
    assert "Declare main away" in system.get(BROKERS).text
    system.post(f"{BROKERS}/edge-1/away", {"reason": "closed"})
    page = system.get(BROKERS).text
    assert "Declare main away" not in page
    assert "Declare edge-1 back" in page


def test_no_reason_none_that_is_there_and_the_last_that_counts_are_refused(app: Flask, system: Browser) -> None:
    for reason in ("", " ", "x" * 65, "a\u202eb"):
        assert system.post(f"{BROKERS}/edge-1/away", {"reason": reason}).status_code == 422, reason
    assert system.post(f"{BROKERS}/edge-9/away", {"reason": "closed"}).status_code == 404
    assert counted(app) == {"main": True, "edge-1": True}
    system.post(f"{BROKERS}/edge-1/away", {"reason": "closed"})
    last = system.post(f"{BROKERS}/main/away", {"reason": "closed"})
    assert last.status_code == 409
    assert "only broker that counts" in text_of(last.text)
    assert counted(app) == {"main": True, "edge-1": False}


def test_a_change_needs_the_form_s_token(app: Flask, system: Browser) -> None:
    assert system.post(f"{BROKERS}/edge-1/away", {"reason": "closed"}, token=None).status_code == 403
    assert counted(app) == {"main": True, "edge-1": True}


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.SYSTEM])
def test_others_see_and_change_none(app: Flask, system: Browser, role: Role) -> None:
    other = logged_in_as(app, role)
    assert BROKERS not in other.get("/ui/access/tokens").text
    assert other.get(BROKERS).status_code == 403
    for way in ("away", "back"):
        assert other.post(f"{BROKERS}/edge-1/{way}", {"reason": "closed"}).status_code == 403
    assert counted(app) == {"main": True, "edge-1": True}
