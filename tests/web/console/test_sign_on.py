"""Logging in to the console by the identity provider, as far as the server sees it."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import urllib3
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.roles import Role
from tests.support.browser import Browser, text_of
from tests.support.harness import Clock, api_as
from tests.support.identity_provider import CONFIGURATION, IdentityProvider, as_json, identity_provider

FROM_ELSEWHERE = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}


@pytest.fixture
def idp(tmp_path: Path, clock: Clock) -> Iterator[IdentityProvider]:
    with identity_provider(tmp_path, lambda: clock().timestamp()) as serving:
        yield serving


@pytest.fixture
def app(make_settings: Callable[..., Settings], clock: Clock, idp: IdentityProvider) -> Iterator[Flask]:
    environment = idp.environment(PORTAL_PUBLIC_URL="https://localhost", PORTAL_BROKER_CONTROL="guard")
    built = create_app(make_settings(**environment), background=False, clock=clock)
    yield built
    portal_of(built).close()


def begin(browser: Browser, query: str = "?next=/ui/devices%3Fstatus%3Dactive") -> Any:
    answer = browser.get(f"/ui/login/oidc{query}")
    assert answer.status_code == 303, answer.text
    return answer


def at_provider(idp: IdentityProvider, begun: Any) -> str:
    """Log in there, and return the path at the portal to which the browser is sent back."""
    pool = urllib3.PoolManager(ssl_context=ssl.create_default_context(cafile=idp.folder / "idp-root.pem"))
    back = urlsplit(pool.request("GET", begun.headers["Location"], redirect=False).headers["Location"])
    pool.clear()
    return f"{back.path}?{back.query}"


def test_the_login_page_offers_the_provider_and_keeps_where_to_go(app: Flask, idp: IdentityProvider) -> None:
    page = Browser(app).get("/ui/login?next=/ui/devices%3Fstatus%3Dactive").text
    assert "Log in with localhost" in text_of(page)
    assert 'href="/ui/login/oidc?next=/ui/devices%3Fstatus%3Dactive"' in page


def test_a_login_ends_in_a_session_and_leads_on_by_a_page_of_ours(app: Flask, idp: IdentityProvider) -> None:
    browser = Browser(app)
    begun = begin(browser)
    cookie = begun.headers["Set-Cookie"]
    assert cookie.startswith("__Host-portal_login=")
    assert {"Secure", "HttpOnly", "Path=/", "SameSite=Lax", "Max-Age=600"} <= set(cookie.split("; "))
    arrived = browser.get(at_provider(idp, begun), headers=FROM_ELSEWHERE)
    assert arrived.status_code == 200  # a redirect would bring no cookie that is SameSite=Strict
    assert 'content="0;url=/ui/devices?status=active"' in arrived.text
    session, login = arrived.headers.getlist("Set-Cookie")
    assert session.startswith("__Host-portal_session=")
    assert {"Secure", "HttpOnly", "Path=/", "SameSite=Strict"} <= set(session.split("; "))
    assert login.startswith("__Host-portal_login=;")
    assert "Ada Lovelace" in browser.get("/ui/devices").text
    refused = browser.get("/ui/login/oidc")
    assert refused.headers["Location"] == "/ui"  # is logged in


def test_the_session_ends_when_the_token_of_the_login_is_revoked(app: Flask, idp: IdentityProvider) -> None:
    browser = Browser(app)
    browser.get(at_provider(idp, begin(browser)), headers=FROM_ELSEWHERE)
    admin = api_as(app, Role.ADMIN)
    token = next(one for one in admin.get("/tokens").json["tokens"] if one["subject"])
    assert browser.get("/ui/devices").status_code == 200
    admin.delete(f"/tokens/{token['token_id']}")
    assert browser.get("/ui/devices").status_code == 303
    begun = admin.get("/audit?action=session:begin").json["entries"][0]
    assert begun["actor"] == f"Ada Lovelace ({idp.issuer}#ada)"


@pytest.mark.parametrize("wanted", ["//evil.example", "https://evil.example", "/ui/../x", "/ui/login", "javascript:1"])
def test_a_login_leads_nowhere_else(app: Flask, idp: IdentityProvider, wanted: str) -> None:
    browser = Browser(app)
    arrived = browser.get(at_provider(idp, begin(browser, f"?next={wanted}")), headers=FROM_ELSEWHERE)
    assert 'content="0;url=/ui"' in arrived.text
    assert "evil" not in arrived.text


def test_an_answer_that_another_browser_has_asked_for_logs_nobody_in(app: Flask, idp: IdentityProvider) -> None:
    attacker, victim = Browser(app), Browser(app)
    link = at_provider(idp, begin(attacker))
    for _ in range(2):
        answer = victim.get(link, headers=FROM_ELSEWHERE)
        assert answer.status_code == 401
        assert "not begun in this browser" in text_of(answer.text)
        assert victim.cookie is None
        begin(victim)  # nor with a login of its own under way
    assert attacker.get(link, headers=FROM_ELSEWHERE).status_code == 200


def test_a_login_is_not_repeated_with_the_same_answer(app: Flask, idp: IdentityProvider) -> None:
    browser = Browser(app)
    begun = begin(browser)
    link, kept = at_provider(idp, begun), browser.client.get_cookie("__Host-portal_login", domain="localhost")
    assert browser.get(link, headers=FROM_ELSEWHERE).status_code == 200
    thief = Browser(app)
    assert kept is not None
    thief.client.set_cookie("__Host-portal_login", kept.value, domain="localhost", secure=True)
    assert thief.get(link, headers=FROM_ELSEWHERE).status_code == 401
    assert thief.cookie is None
    assert thief.get(at_provider(idp, begun), headers=FROM_ELSEWHERE).status_code == 401  # a new code, the same state


def test_parameters_that_come_twice_count_as_none(app: Flask, idp: IdentityProvider) -> None:
    browser = Browser(app)
    link = at_provider(idp, begin(browser))
    assert browser.get(f"{link}&code=another", headers=FROM_ELSEWHERE).status_code == 401


def test_somebody_without_a_role_is_told_so_on_the_login_page(app: Flask, idp: IdentityProvider) -> None:
    idp.person["groups"] = ["others"]
    browser = Browser(app)
    answer = browser.get(at_provider(idp, begin(browser)), headers=FROM_ELSEWHERE)
    assert answer.status_code == 403
    assert "None of your groups has a role here" in text_of(answer.text)
    assert "Log in with localhost" in text_of(answer.text)
    assert browser.cookie is None


def test_of_several_tenants_one_is_chosen_on_a_page(app: Flask, idp: IdentityProvider) -> None:
    api_as(app, Role.ADMIN, "acme")
    idp.person["groups"] = ["auditors"]
    browser = Browser(app)
    answer = browser.get(at_provider(idp, begin(browser)), headers=FROM_ELSEWHERE)
    assert answer.status_code == 409
    link = 'href="/ui/login/oidc?tenant=acme&amp;next=/ui/devices%3Fstatus%3Dactive"'
    assert link in answer.text
    arrived = browser.get(at_provider(idp, begin(browser, "?tenant=acme")), headers=FROM_ELSEWHERE)
    assert arrived.status_code == 200
    acme = api_as(app, Role.ADMIN, "acme").get("/tokens").json["tokens"]
    assert [one["role"] for one in acme if one["subject"]] == ["auditor"]


def test_a_provider_that_is_down_is_told_on_the_login_page_where_tokens_still_work(
    app: Flask, idp: IdentityProvider
) -> None:
    idp.answers[CONFIGURATION] = lambda _: as_json({}, 500)
    browser = Browser(app)
    answer = browser.get("/ui/login/oidc")
    assert answer.status_code == 503
    assert "answered with status 500" in text_of(answer.text)
    assert browser.log_in(str(api_as(app, Role.ADMIN).token)).status_code == 303


def test_too_many_refused_logins_make_an_address_wait(
    make_settings: Callable[..., Settings], clock: Clock, idp: IdentityProvider
) -> None:
    app = create_app(make_settings(**idp.environment(), PORTAL_LOGIN_FAILURES="2"), background=False, clock=clock)
    browser = Browser(app)
    statuses = [browser.get("/ui/login/oidc/callback?code=x&state=y").status_code for _ in range(4)]
    assert statuses == [401, 401, 429, 429]
    portal_of(app).close()


def test_a_bad_query_begins_nothing(app: Flask) -> None:
    for query in ("?tenant=A%20B", "?more=1", "?tenant=a&tenant=b"):
        assert Browser(app).get(f"/ui/login/oidc{query}").status_code == 422


def test_a_portal_without_a_provider_does_not_offer_one(make_settings: Callable[..., Settings]) -> None:
    app = create_app(make_settings(), background=False)
    browser = Browser(app)
    assert "Log in with" not in text_of(browser.get("/ui/login").text)
    assert browser.get("/ui/login/oidc").status_code == 404
    assert browser.get("/ui/login/oidc/callback").status_code == 404
    portal_of(app).close()
