"""``portal login --oidc``: the device flow at an identity provider, then a token from a small portal."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from commands import sign_on
from commands.logins import login_path
from tests.support.cli_session import Session
from tests.support.identity_provider import CLI_CLIENT_ID, IdentityProvider, as_json, identity_provider
from tests.support.portal_stub import TOKEN, PortalStub, Reply, problem
from tests.support.terminal import terminal

pytest_plugins = ("tests.support.cli_fixtures",)


@pytest.fixture(scope="module")
def _serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IdentityProvider]:
    with identity_provider(tmp_path_factory.mktemp("idp")) as serving:
        yield serving


@pytest.fixture
def idp(_serving: IdentityProvider, stub: PortalStub) -> IdentityProvider:
    _serving.requests, _serving.redeemed, _serving.device_answers, _serving.answers = [], [], [], {}
    told = {
        "issuer": _serving.issuer,
        "client_id": CLI_CLIENT_ID,
        "scopes": "openid profile",
        "device_authorization_endpoint": f"{_serving.issuer}/device",
        "token_endpoint": f"{_serving.issuer}/token",
        "ca": (_serving.folder / "idp-root.pem").read_text(),
    }
    stub.replies["GET", "/oidc/configuration"] = Reply(200, told)
    stub.replies["POST", "/oidc/tokens"] = Reply(201, {"token": TOKEN, "tenant": "default"})
    stub.replies["GET", "/whoami"] = Reply(200, {"tenant": "default", "role": "admin", "operator": "Ada"})
    return _serving


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the command has waited before each poll; no time passes but by that, in this thread alone."""
    waited: list[float] = []
    own, sleep, monotonic = threading.get_ident(), time.sleep, time.monotonic

    def is_own() -> bool:
        return threading.get_ident() == own

    monkeypatch.setattr(time, "sleep", lambda seconds: waited.append(seconds) if is_own() else sleep(seconds))
    monkeypatch.setattr(time, "monotonic", lambda: sum(waited) if is_own() else monotonic())
    return waited


def pending(error: str = "authorization_pending") -> tuple[int, dict[str, str], bytes]:
    status, headers, body = as_json({"error": error}, 400)
    return status, dict(headers), body


def test_address_and_code_are_shown_and_the_token_is_saved(
    session: Session, stub: PortalStub, idp: IdentityProvider, pauses: list[float]
) -> None:
    idp.device_answers = [pending(), pending()]
    result = session.run("login", "--oidc")
    assert result.exit_code == 0, result.output
    assert f"Open {idp.issuer}/activate in a browser" in " ".join(result.stderr.split())
    assert "WDJB-MJHT" in result.stderr
    path = login_path(session.environment)
    assert json.loads(path.read_text())["token"] == TOKEN
    assert path.stat().st_mode & 0o077 == 0
    assert pauses == [1.0, 1.0, 1.0]
    assert [one["client_id"] for one in idp.redeemed] == [CLI_CLIENT_ID] * 3
    assert len({one["code_verifier"] for one in idp.redeemed}) == 1
    (sent,) = stub.calls("POST", "/oidc/tokens")
    assert sent.body["id_token"].count(".") == 2
    assert "tenant" not in sent.body
    assert "Authorization" not in sent.headers  # whatever token the environment has


def test_the_provider_can_ask_for_longer_pauses(session: Session, idp: IdentityProvider, pauses: list[float]) -> None:
    idp.device_answers = [pending("slow_down"), pending(), pending("slow_down")]
    assert session.run("login", "--oidc").exit_code == 0
    assert pauses == [1.0, 6.0, 6.0, 11.0]


def test_a_poll_that_times_out_is_repeated_after_twice_the_pause(
    session: Session, idp: IdentityProvider, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    post, times = sign_on._post, iter([True])

    def slow(provider: Any, url: str, fields: Any) -> Any:
        if url.endswith("/token") and next(times, False):
            raise sign_on._TimedOut("not in time")
        return post(provider, url, fields)

    monkeypatch.setattr(sign_on, "_post", slow)
    assert session.run("login", "--oidc").exit_code == 0
    assert pauses == [1.0, 2.0]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("access_denied", "was refused at the identity provider"),
        ("authorization_declined", "was refused at the identity provider"),
        ("expired_token", "has expired before it was entered"),
        ("invalid_client", "has ended the login (invalid_client)"),
        ("\x1b[31m", "has ended the login (\\x1b[31m)"),
    ],
)
def test_a_login_that_the_provider_ends_is_one_sentence(
    session: Session, idp: IdentityProvider, pauses: list[float], error: str, said: str
) -> None:
    idp.device_answers = [pending(), pending(error)]
    result = session.run("login", "--oidc")
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())
    assert not login_path(session.environment).exists()


def test_a_code_that_nobody_enters_ends_by_itself(session: Session, idp: IdentityProvider, pauses: list[float]) -> None:
    idp.device_answers = [pending()] * 700
    result = session.run("login", "--oidc")
    assert result.exit_code == 1
    assert "has expired" in result.stderr
    assert sum(pauses) <= 600


def test_ctrl_c_gives_up_and_saves_nothing(
    session: Session, idp: IdentityProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    assert session.run("login", "--oidc").exit_code == 130
    assert not login_path(session.environment).exists()


def test_the_tenant_is_chosen_by_an_option(
    session: Session, stub: PortalStub, idp: IdentityProvider, pauses: list[float]
) -> None:
    stub.replies["POST", "/oidc/tokens"] = SEVERAL
    result = session.run("login", "--oidc")
    assert result.exit_code == 1
    assert "acme, default" in result.stderr
    assert "--tenant NAME" in result.stderr
    stub.replies["POST", "/oidc/tokens"] = Reply(201, {"token": TOKEN, "tenant": "acme"})
    stub.replies["GET", "/whoami"] = Reply(200, {"tenant": "acme", "role": "operator", "operator": "Ada"})
    assert session.json("--tenant", "acme", "login", "--oidc")["tenant"] == "acme"
    assert stub.calls("POST", "/oidc/tokens")[-1].body["tenant"] == "acme"
    assert json.loads(login_path(session.environment).read_text())["tenant"] == "acme"


SEVERAL = problem(409, "tenant_needed", "Your groups have roles in several tenants; choose one of: acme, default.")


def test_at_a_terminal_the_tenant_is_asked_for(session: Session, stub: PortalStub, idp: IdentityProvider) -> None:
    stub.replies["POST", "/oidc/tokens"] = [SEVERAL, Reply(201, {"token": TOKEN, "tenant": "acme"})]
    stub.replies["GET", "/whoami"] = Reply(200, {"tenant": "acme", "role": "operator", "operator": "Ada"})
    with terminal(session, "login", "--oidc", NO_COLOR="1", TERM="dumb") as seen:
        seen.expect("choose one of: acme, default")
        seen.expect("Tenant: ")
        seen.type("\n")  # is no answer
        seen.expect("Tenant: ")
        seen.type("acme\n")
        assert seen.end() == 0, seen.seen
    asked = stub.calls("POST", "/oidc/tokens")
    assert [one.body.get("tenant") for one in asked] == [None, "acme"]
    assert len({one.body["id_token"] for one in asked}) == 1  # nobody has to enter a code twice
    saved = json.loads(login_path(session.environment).read_text())
    assert (saved["token"], saved["tenant"]) == (TOKEN, "acme")


def test_at_a_terminal_a_tenant_without_a_role_ends_the_login(
    session: Session, stub: PortalStub, idp: IdentityProvider
) -> None:
    refused = problem(403, "no_role", "Your groups have no role in the tenant other, or it is not served.")
    stub.replies["POST", "/oidc/tokens"] = [SEVERAL, refused]
    with terminal(session, "login", "--oidc", NO_COLOR="1", TERM="dumb") as seen:
        seen.expect("Tenant: ")
        seen.type("other\n")
        assert seen.end() == 1, seen.seen
    assert "no role in the tenant other" in " ".join(seen.seen.split())
    assert not login_path(session.environment).exists()


def test_at_a_terminal_ctrl_d_at_the_question_saves_nothing(
    session: Session, stub: PortalStub, idp: IdentityProvider
) -> None:
    stub.replies["POST", "/oidc/tokens"] = SEVERAL
    with terminal(session, "login", "--oidc", NO_COLOR="1", TERM="dumb") as seen:
        seen.expect("Tenant: ")
        seen.type("\x04")
        assert seen.end() == 130, seen.seen
    assert "Traceback" not in seen.seen
    assert not login_path(session.environment).exists()


def test_a_portal_without_a_provider_says_so(session: Session, stub: PortalStub) -> None:
    stub.replies["GET", "/oidc/configuration"] = problem(404, "not_found", "This portal has no identity provider.")
    result = session.run("login", "--oidc")
    assert result.exit_code == 1
    assert "no identity provider" in result.stderr
    assert session.run("login", "--oidc", "--token-file", "token").exit_code == 2


def answers(path: str, answer: Any) -> Callable[[IdentityProvider], None]:
    return lambda idp: idp.answers.update({path: lambda _: answer})


@pytest.mark.parametrize(
    "misbehave",
    [
        answers("/device", (200, {}, b"<html>")),
        answers("/device", (200, {}, b"{}")),
        answers("/device", (302, {"Location": "http://localhost:1/"}, b"{}")),
        answers("/device", (200, {}, b'{"a": "' + b"x" * 300_000 + b'"}')),
        answers("/device", as_json({"device_code": 1, "user_code": [], "verification_uri": {}})),
        answers("/token", (200, {}, b"{}")),
        answers("/token", (200, {}, b"[" * 100_000)),
    ],
)
def test_a_provider_that_answers_badly_is_one_sentence(
    session: Session, idp: IdentityProvider, pauses: list[float], misbehave: Callable[[IdentityProvider], None]
) -> None:
    misbehave(idp)
    result = session.run("login", "--oidc")
    assert result.exit_code == 3, result.output
    assert not login_path(session.environment).exists()


def test_what_a_provider_shows_cannot_control_the_terminal(
    session: Session, idp: IdentityProvider, pauses: list[float]
) -> None:
    shown = {"device_code": "c", "user_code": "A\x1b]0;x\x07", "verification_uri": "https://x/\x1b[2J"}
    idp.answers["/device"] = lambda _: as_json(shown | {"verification_uri_complete": "javascript:alert(1)"})
    result = session.run("login", "--oidc")
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert "javascript" not in result.output


@pytest.mark.parametrize("change", [{"token_endpoint": "http://localhost/token"}, {"ca": None}])
def test_a_provider_that_is_not_trusted_gets_nothing(
    session: Session, stub: PortalStub, idp: IdentityProvider, pauses: list[float], change: dict[str, Any]
) -> None:
    reply = stub.replies["GET", "/oidc/configuration"]
    assert isinstance(reply, Reply)
    stub.replies["GET", "/oidc/configuration"] = Reply(200, reply.body | change)
    result = session.run("login", "--oidc")
    assert result.exit_code == 3
    assert idp.requests == []
    assert not Path(login_path(session.environment)).exists()
