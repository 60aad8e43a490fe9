"""Logins in a browser, by authorization code with PKCE: what ties an answer to the browser that has begun the login."""

from __future__ import annotations

import base64
import hashlib
import itertools
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import urllib3

from config import Settings
from operations.wiring import Portal, open_portal
from store.audit import Actor
from tests.support.harness import Clock, state_of
from tests.support.identity_provider import CLIENT_ID, IdentityProvider, as_json, identity_provider
from workflows.oidc.login import BegunLogin, LoggedIn, SingleSignOn
from workflows.oidc.refusals import IdTokenRefused, IdTokenUsed, LoginRefused, NoRole, ProviderUnavailable

BROWSER = Actor("default", "anyone", "none", "request-1", "192.0.2.7")


@pytest.fixture
def idp(tmp_path: Path, clock: Clock) -> Iterator[IdentityProvider]:
    with identity_provider(tmp_path, lambda: clock().timestamp()) as serving:
        yield serving


@pytest.fixture
def portal(make_settings: Callable[..., Settings], clock: Clock, idp: IdentityProvider) -> Iterator[Portal]:
    built = open_portal(make_settings(**idp.environment()), clock)
    yield built
    built.close()


@pytest.fixture
def sign_on(portal: Portal) -> SingleSignOn:
    assert portal.sign_on is not None
    return portal.sign_on


def asked(begun: BegunLogin) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(begun.url).query).items()}


def at_provider(idp: IdentityProvider, begun: BegunLogin) -> dict[str, str]:
    """Log in there as the ``person``, and return the query with which the browser comes back."""
    pool = urllib3.PoolManager(ssl_context=ssl.create_default_context(cafile=idp.folder / "idp-root.pem"))
    answer = pool.request("GET", begun.url, redirect=False)
    back = urlsplit(answer.headers["Location"])
    pool.clear()
    assert f"{back.scheme}://{back.netloc}{back.path}" == asked(begun)["redirect_uri"]
    return {name: values[0] for name, values in parse_qs(back.query).items()}


def finish(sign_on: SingleSignOn, begun: BegunLogin | None, query: dict[str, str]) -> LoggedIn:
    return sign_on.finish(BROWSER, None if begun is None else begun.cookie, query)


def test_the_browser_is_sent_with_state_nonce_and_the_hash_of_a_verifier(
    sign_on: SingleSignOn, idp: IdentityProvider, portal: Portal
) -> None:
    begun = sign_on.begin("/ui/fleet", None)
    query = asked(begun)
    assert begun.url.startswith(f"{idp.issuer}/authorize?")
    assert (query["response_type"], query["client_id"], query["scope"]) == ("code", CLIENT_ID, "openid profile")
    assert query["redirect_uri"] == f"{portal.settings.public_url}/ui/login/oidc/callback"
    assert query["code_challenge_method"] == "S256"
    assert len({query["state"], query["nonce"], asked(sign_on.begin("/ui", None))["state"]}) == 3
    at_provider(idp, begun)


def test_a_login_ends_in_an_operator_token_and_where_it_was_begun(
    sign_on: SingleSignOn, idp: IdentityProvider, portal: Portal
) -> None:
    begun = sign_on.begin("/ui/fleet", None)
    made = finish(sign_on, begun, at_provider(idp, begun))
    assert (made.record.name, made.record.role, made.next_path) == ("Ada Lovelace", "admin", "/ui/fleet")
    assert portal.operators.authenticate(made.secret) == made.record
    (redeemed,) = idp.redeemed
    challenge = base64.urlsafe_b64encode(hashlib.sha256(redeemed["code_verifier"].encode()).digest())
    assert challenge.rstrip(b"=").decode() == asked(begun)["code_challenge"]
    assert "client_secret" not in redeemed
    assert redeemed["authorization"] == ""


def test_a_login_cannot_be_repeated(sign_on: SingleSignOn, idp: IdentityProvider) -> None:
    begun = sign_on.begin("/ui", None)
    finish(sign_on, begun, at_provider(idp, begun))
    with pytest.raises(IdTokenUsed):  # with another code for the same state, too
        finish(sign_on, begun, at_provider(idp, begun))


def test_an_answer_without_the_cookie_of_its_login_is_refused(
    sign_on: SingleSignOn, idp: IdentityProvider, portal: Portal
) -> None:
    """Else somebody else's link would log a browser in as somebody else (RFC 6749 §10.12)."""
    attackers, victims = sign_on.begin("/ui", None), sign_on.begin("/ui", None)
    answer = at_provider(idp, attackers)
    before = state_of(portal)
    for cookie in (None, victims, BegunLogin("", "made up"), BegunLogin("", attackers.cookie[:-2] + "xx")):
        with pytest.raises(LoginRefused):
            finish(sign_on, cookie, answer)
    assert idp.redeemed == []
    assert state_of(portal) == before


def test_a_code_of_another_login_is_refused(sign_on: SingleSignOn, idp: IdentityProvider) -> None:
    """A code that was stolen and put into the thief's own login (RFC 9700 §4.5) does not fit the verifier."""
    victims, thiefs = sign_on.begin("/ui", None), sign_on.begin("/ui", None)
    stolen = at_provider(idp, victims)["code"]
    with pytest.raises(LoginRefused):
        finish(sign_on, thiefs, at_provider(idp, thiefs) | {"code": stolen})


def test_an_id_token_with_the_nonce_of_another_login_is_refused(sign_on: SingleSignOn, idp: IdentityProvider) -> None:
    for nonce in ("another", None, 7):
        begun = sign_on.begin("/ui", None)
        answer = at_provider(idp, begun)
        idp.person["nonce"] = nonce
        with pytest.raises(IdTokenRefused):
            finish(sign_on, begun, answer)


def test_an_id_token_for_the_command_line_is_refused(sign_on: SingleSignOn, idp: IdentityProvider) -> None:
    begun = sign_on.begin("/ui", None)
    answer = at_provider(idp, begun)
    idp.person["aud"] = "portal-cli"
    with pytest.raises(IdTokenRefused):
        finish(sign_on, begun, answer)


def test_a_login_that_took_too_long_is_refused(sign_on: SingleSignOn, idp: IdentityProvider, clock: Clock) -> None:
    begun = sign_on.begin("/ui", None)
    clock.advance(minutes=10, seconds=2)
    with pytest.raises(LoginRefused, match="too long ago"):
        finish(sign_on, begun, at_provider(idp, begun))


@pytest.mark.parametrize(
    "change",
    [
        {"state": ""},
        {"state": "x"},
        {"state": "é"},
        {"iss": "https://evil.example.com"},
        {"iss": ""},
        {"code": ""},
        {"code": "a\nb"},
        {"code": "x" * 5000},
        {"error": "access_denied"},
        {"error": "<script>"},
        {"code": "unknown"},
    ],
)
def test_an_answer_that_is_not_that_of_the_provider_is_refused(
    sign_on: SingleSignOn, idp: IdentityProvider, change: dict[str, str]
) -> None:
    begun = sign_on.begin("/ui", None)
    with pytest.raises(LoginRefused) as caught:
        finish(sign_on, begun, at_provider(idp, begun) | change)
    assert "<" not in caught.value.detail


def test_an_answer_must_name_its_issuer_if_the_provider_says_that_it_does(
    sign_on: SingleSignOn, idp: IdentityProvider
) -> None:
    begun = sign_on.begin("/ui", None)
    answer = at_provider(idp, begun)
    with pytest.raises(LoginRefused):
        finish(sign_on, begun, {name: value for name, value in answer.items() if name != "iss"})


def test_another_provider_need_not_name_its_issuer(sign_on: SingleSignOn, idp: IdentityProvider) -> None:
    idp.configuration = {"authorization_response_iss_parameter_supported": False}
    begun = sign_on.begin("/ui", None)
    answer = at_provider(idp, begun)
    assert finish(sign_on, begun, {name: value for name, value in answer.items() if name != "iss"}).secret


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (as_json({"error": "server_error"}, 503), ProviderUnavailable),
        (as_json({"error": "invalid_client"}, 401), ProviderUnavailable),
        ((302, {"Location": "http://localhost:1/"}, b""), ProviderUnavailable),
        ((200, {}, b"<html>"), ProviderUnavailable),
        (as_json({"access_token": "x"}), IdTokenRefused),
        (as_json({"id_token": 7}), IdTokenRefused),
        (as_json({"id_token": "x"}), IdTokenRefused),
    ],
)
def test_a_provider_that_gives_no_id_token_gives_no_login(
    sign_on: SingleSignOn, idp: IdentityProvider, answer: Any, error: type[Exception]
) -> None:
    begun = sign_on.begin("/ui", None)
    query = at_provider(idp, begun)
    idp.answers["/token"] = lambda _: answer
    with pytest.raises(error):
        finish(sign_on, begun, query)


@pytest.mark.parametrize("methods", [None, ["client_secret_post"], ["client_secret_post", "client_secret_basic"]])
def test_a_client_with_a_secret_sends_it_as_the_provider_wants(
    make_settings: Callable[..., Settings], clock: Clock, idp: IdentityProvider, methods: list[str] | None
) -> None:
    secret = idp.folder / "client-secret"
    secret.write_text("a secret/with +signs\n")
    secret.chmod(0o600)
    idp.configuration = {"token_endpoint_auth_methods_supported": methods} if methods else {}
    portal = open_portal(make_settings(**idp.environment(PORTAL_OIDC_CLIENT_SECRET_FILE=str(secret))), clock)
    assert portal.sign_on is not None
    begun = portal.sign_on.begin("/ui", None)
    assert "secret" not in begun.url
    portal.sign_on.finish(BROWSER, begun.cookie, at_provider(idp, begun))
    portal.close()
    (redeemed,) = idp.redeemed
    if methods == ["client_secret_post"]:
        assert redeemed["client_secret"] == "a secret/with +signs"
        assert redeemed["authorization"] == ""
    else:
        pair = base64.b64decode(redeemed["authorization"].removeprefix("Basic ")).decode()
        assert pair == f"{CLIENT_ID}:a%20secret%2Fwith%20%2Bsigns"
        assert "client_secret" not in redeemed


def test_a_chosen_tenant_is_remembered_over_the_login(sign_on: SingleSignOn, idp: IdentityProvider) -> None:
    idp.person["groups"] = ["auditors"]
    begun = sign_on.begin("/ui", "default")
    assert finish(sign_on, begun, at_provider(idp, begun)).record.tenant_id == "default"
    begun = sign_on.begin("/ui", "acme")
    with pytest.raises(NoRole):
        finish(sign_on, begun, at_provider(idp, begun))


def test_a_provider_that_hangs_holds_up_two_logins_and_no_more(
    sign_on: SingleSignOn, idp: IdentityProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.oidc.provider.WAIT_SECONDS", 0.1)
    logins = [sign_on.begin("/ui", None) for _ in range(3)]
    queries = [at_provider(idp, begun) for begun in logins]
    arrived, go_on = threading.Semaphore(0), threading.Event()

    def hang(_: Any) -> Any:
        arrived.release()
        go_on.wait(10)
        return as_json({"error": "server_error"}, 503)

    idp.answers["/token"] = hang
    with ThreadPoolExecutor() as threads:
        held_up = [threads.submit(finish, sign_on, *one) for one in zip(logins[:2], queries[:2], strict=True)]
        assert arrived.acquire(timeout=10)
        assert arrived.acquire(timeout=10)
        with pytest.raises(ProviderUnavailable, match="has not answered yet"):
            finish(sign_on, logins[2], queries[2])
        go_on.set()
    assert all(isinstance(one.exception(), ProviderUnavailable) for one in held_up)
    del idp.answers["/token"]
    assert finish(sign_on, logins[2], queries[2]).secret


def test_of_many_logins_while_a_provider_hangs_two_are_held_up_two_wait_and_all_others_are_refused_at_once(
    sign_on: SingleSignOn, idp: IdentityProvider
) -> None:
    """Each that waits occupies a thread, and anybody can begin logins and send made-up codes."""
    logins, made_up = [sign_on.begin("/ui", None) for _ in range(12)], {"code": "made-up", "iss": idp.issuer}
    arrived, go_on = threading.Semaphore(0), threading.Event()

    def hang(_: Any) -> Any:
        arrived.release()
        go_on.wait(10)
        return as_json({"error": "server_error"}, 503)

    idp.answers["/token"] = hang
    with ThreadPoolExecutor(len(logins)) as threads:
        answers = [
            threads.submit(finish, sign_on, begun, made_up | {"state": asked(begun)["state"]}) for begun in logins
        ]
        assert arrived.acquire(timeout=10)
        assert arrived.acquire(timeout=10)
        for _ in itertools.islice(as_completed(answers, timeout=1.5), len(logins) - 4):
            pass
        assert sum(not one.done() for one in answers) == 4
        go_on.set()
    assert all(isinstance(one.exception(), ProviderUnavailable) for one in answers)
