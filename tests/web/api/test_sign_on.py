"""Logins by an identity provider, for programs: an ID token becomes an operator token."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from app import create_app, portal_of
from config import Settings
from core.errors import StartupError
from core.roles import Role
from operations import jobs
from operations.doctor.base import Installation, State
from operations.doctor.sign_on import identity_provider as identity_provider_check
from operations.jobs import ask_provider, prune_logins
from operations.wiring import open_portal
from store import tenants
from tests.support.harness import Api, Clock, api_as, problem_of, state_of
from tests.support.identity_provider import (
    CLI_CLIENT_ID,
    CLIENT_ID,
    CONFIGURATION,
    IdentityProvider,
    as_json,
    hmac_by_public_key,
    identity_provider,
    key_for,
    signed,
)


@pytest.fixture
def idp(tmp_path: Path, clock: Clock) -> Iterator[IdentityProvider]:
    with identity_provider(tmp_path, lambda: clock().timestamp()) as serving:
        yield serving


@pytest.fixture
def app(make_settings: Callable[..., Settings], clock: Clock, idp: IdentityProvider) -> Iterator[Flask]:
    settings = make_settings(**idp.environment(), PORTAL_BROKER_CONTROL="guard", PORTAL_LOGIN_FAILURES="1000")
    built = create_app(settings, background=False, clock=clock)
    yield built
    portal_of(built).close()


@pytest.fixture
def anyone(app: Flask) -> Api:
    return Api(app.test_client(), None)


def log_in(api: Api, id_token: str, tenant: str | None = None) -> Any:
    return api.post("/oidc/tokens", {"id_token": id_token} | ({} if tenant is None else {"tenant": tenant}))


# --- What works ---------------------------------------------------------------------------------------------------


def test_an_id_token_becomes_an_operator_token_of_eight_hours(anyone: Api, idp: IdentityProvider, clock: Clock) -> None:
    answer = log_in(anyone, idp.id_token())
    assert answer.status_code == 201
    made = answer.json
    assert (made["role"], made["tenant"], made["name"]) == ("admin", "default", "Ada Lovelace")
    assert made["subject"] == f"{idp.issuer}#ada"
    person = Api(anyone.client, made["token"])
    assert person.get("/whoami").json["operator"] == f"Ada Lovelace ({idp.issuer}#ada)"
    clock.advance(hours=7, minutes=59)
    assert person.get("/devices").status_code == 200
    clock.advance(minutes=2)
    problem_of(person.get("/devices"), 401, "unauthenticated")


def test_the_token_of_a_person_is_listed_revoked_and_in_the_audit_record(
    app: Flask, anyone: Api, idp: IdentityProvider
) -> None:
    person = Api(anyone.client, log_in(anyone, idp.id_token()).json["token"])
    device = person.register()
    admin = api_as(app, Role.ADMIN)
    actor = f"Ada Lovelace ({idp.issuer}#ada)"
    assert admin.get(f"/audit?object=device:{device['device_id']}").json["entries"][0]["actor"] == actor
    login = admin.get("/audit?action=token:create").json["entries"][0]
    assert (login["actor"], login["detail"]["subject"]) == (actor, f"{idp.issuer}#ada")
    listed = next(one for one in admin.get("/tokens").json["tokens"] if one["subject"])
    assert (listed["name"], listed["subject"]) == ("Ada Lovelace", f"{idp.issuer}#ada")
    assert admin.delete(f"/tokens/{listed['token_id']}").status_code == 200
    problem_of(person.get("/devices"), 401, "unauthenticated")


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_the_three_algorithms_are_accepted(anyone: Api, idp: IdentityProvider, algorithm: str) -> None:
    idp.keys = [key_for(algorithm)]
    assert log_in(anyone, idp.id_token()).status_code == 201


def test_of_several_roles_in_a_tenant_the_highest_counts(anyone: Api, idp: IdentityProvider) -> None:
    idp.person["groups"] = ["auditors", "fleet-admins", "unknown"]
    assert log_in(anyone, idp.id_token(), "default").json["role"] == "admin"


def test_of_several_tenants_one_has_to_be_chosen(app: Flask, anyone: Api, idp: IdentityProvider) -> None:
    api_as(app, Role.ADMIN, "acme")  # adds the tenant
    idp.person["groups"] = ["auditors"]
    token = idp.id_token()
    problem = problem_of(log_in(anyone, token), 409, "tenant_needed")
    assert "acme, default" in problem["detail"]
    made = log_in(anyone, token, "acme").json  # the ID token is not used up by the question
    assert (made["tenant"], made["role"]) == ("acme", "auditor")
    assert Api(anyone.client, made["token"]).get("/whoami").json["tenant"] == "acme"
    problem_of(log_in(anyone, token, "default"), 401, "id_token_used")  # nor good for two


def test_a_tenant_that_does_not_exist_is_no_choice(anyone: Api, idp: IdentityProvider) -> None:
    idp.person["groups"] = ["auditors"]
    assert log_in(anyone, idp.id_token()).json["tenant"] == "default"
    problem_of(log_in(anyone, idp.id_token(), "acme"), 403, "no_role")


def test_a_suspended_tenant_is_no_choice(app: Flask, anyone: Api, idp: IdentityProvider) -> None:
    api_as(app, Role.ADMIN, "acme")
    idp.person["groups"] = ["acme-ops"]
    assert log_in(anyone, idp.id_token()).status_code == 201
    assert api_as(app, Role.SYSTEM).post("/tenants/acme/suspend").status_code in (200, 202)
    problem_of(log_in(anyone, idp.id_token()), 403, "no_role")


def test_programs_are_told_how_to_log_in(anyone: Api, idp: IdentityProvider) -> None:
    told = anyone.get("/oidc/configuration").json
    assert told["client_id"] == CLI_CLIENT_ID
    assert told["device_authorization_endpoint"] == f"{idp.issuer}/device"
    assert told["ca"] == (idp.folder / "idp-root.pem").read_text()


def test_the_token_of_a_person_does_not_count_as_the_last_admins(
    app: Flask, anyone: Api, idp: IdentityProvider
) -> None:
    system = api_as(app, Role.SYSTEM)
    person = Api(anyone.client, log_in(anyone, idp.id_token()).json["token"])
    for token in system.get("/tokens").json["tokens"]:
        if token["subject"] is None and not token["name"].startswith("a test's"):
            assert system.delete(f"/tokens/{token['token_id']}").status_code == 200
    own = next(one for one in system.get("/tokens").json["tokens"] if one["name"].startswith("a test's"))
    problem_of(system.delete(f"/tokens/{own['token_id']}"), 409, "last_admin_token")
    of_person = next(one for one in system.get("/tokens").json["tokens"] if one["subject"])
    assert person.delete(f"/tokens/{of_person['token_id']}").status_code == 200


@pytest.mark.parametrize(
    ("person", "name"),
    [
        ({"name": "Ada\u202e\x1b[31m  Lovelace\n"}, "Ada[31m Lovelace"),
        ({"name": "x" * 300}, "x" * 64),
        ({"name": ["Ada"], "preferred_username": "ada@example.com"}, "ada@example.com"),
        ({"name": "\u200b"}, "ada"),
    ],
)
def test_a_name_is_shown_plainly(anyone: Api, idp: IdentityProvider, person: dict[str, Any], name: str) -> None:
    idp.person |= person
    assert log_in(anyone, idp.id_token()).json["name"] == name


def test_a_long_subject_fits_into_the_audit_record(app: Flask, anyone: Api, idp: IdentityProvider) -> None:
    idp.person["sub"] = "s" * 255
    person = Api(anyone.client, log_in(anyone, idp.id_token()).json["token"])
    operator = person.get("/whoami").json["operator"]
    assert len(operator) <= 128
    assert f"{idp.issuer}#sha256:" in operator


# --- ID tokens that are refused -----------------------------------------------------------------------------------


def _other_key(idp: IdentityProvider) -> str:
    return signed(idp.claims(), key_for("RS256", 1), kid=key_for("RS256").kid)


BAD: dict[str, Callable[[IdentityProvider], str]] = {
    "another issuer": lambda idp: idp.id_token(iss="https://evil.example.com"),
    "the issuer with a slash": lambda idp: idp.id_token(iss=idp.issuer + "/"),
    "another audience": lambda idp: idp.id_token(aud="somebody"),
    "the client of the console": lambda idp: idp.id_token(aud=CLIENT_ID),
    "two audiences": lambda idp: idp.id_token(aud=[CLI_CLIENT_ID, "evil"]),
    "two audiences, azp ours": lambda idp: idp.id_token(aud=[CLI_CLIENT_ID, "evil"], azp=CLI_CLIENT_ID),
    "no audience": lambda idp: idp.id_token(aud=[]),
    "another authorized party": lambda idp: idp.id_token(azp="evil"),
    "no algorithm": lambda idp: signed(idp.claims(), None),
    "HS256 with the public key": lambda idp: hmac_by_public_key(idp.claims()),
    "another key": _other_key,
    "an unknown key": lambda idp: signed(idp.claims(), key_for("RS256", 1)),
    "expired": lambda idp: idp.id_token(exp=int(idp.now()) - 61),
    "no expiry": lambda idp: idp.id_token(exp=None),
    "an expiry that is a text": lambda idp: idp.id_token(exp="4102444800"),
    "an expiry that is true": lambda idp: idp.id_token(exp=True),
    "issued in the future": lambda idp: idp.id_token(iat=int(idp.now()) + 120, exp=int(idp.now()) + 900),
    "not valid yet": lambda idp: idp.id_token(nbf=int(idp.now()) + 120),
    "issued long ago": lambda idp: idp.id_token(iat=int(idp.now()) - 3600, exp=int(idp.now()) + 3600),
    "no time of issue": lambda idp: idp.id_token(iat=None),
    "a nonce": lambda idp: idp.id_token(nonce="of another login"),
    "no subject": lambda idp: idp.id_token(sub=None),
    "an endless subject": lambda idp: idp.id_token(sub="x" * 256),
    "a subject with control characters": lambda idp: idp.id_token(sub="ada\n"),
    "an access token (RFC 9068)": lambda idp: signed(idp.claims(), idp.keys[0], typ="at+jwt"),
    "an access token by its scope": lambda idp: idp.id_token(scope="openid"),
    "an access token of Keycloak": lambda idp: idp.id_token(typ="Bearer"),
    "an access token of Cognito": lambda idp: idp.id_token(token_use="access"),
    "a logout token": lambda idp: idp.id_token(events={"http://schemas.openid.net/event/backchannel-logout": {}}),
    "a critical header": lambda idp: signed(idp.claims(), idp.keys[0], crit=["exp"], exp=1),
    "claims that are a list": lambda idp: signed(b"[1]", idp.keys[0]),
    "claims that are not JSON": lambda idp: signed(b"{", idp.keys[0]),
    "claims nested too deep": lambda idp: signed(b"[" * 9000, idp.keys[0]),
    "a changed claim": lambda idp: idp.id_token().replace(".", ".e", 1),
    "no JWT": lambda idp: "no JWT",
    "two dots": lambda idp: "..",
    "a header that is a list": lambda idp: "W10." + idp.id_token().partition(".")[2],
    "a JWE": lambda idp: "a.b.c.d.e",
    "not ASCII": lambda idp: idp.id_token() + "é",
    "an algorithm that is a list": lambda idp: "eyJhbGciOlsiUlMyNTYiXX0." + idp.id_token().partition(".")[2],
    "a key id that is a number": lambda idp: signed(idp.claims(), idp.keys[0]).replace(
        signed(idp.claims(), idp.keys[0]).partition(".")[0], "eyJhbGciOiJSUzI1NiIsImtpZCI6MX0"
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_id_token_is_refused_and_leaves_nothing(
    app: Flask, anyone: Api, idp: IdentityProvider, kind: str
) -> None:
    before = state_of(portal_of(app))
    problem_of(log_in(anyone, BAD[kind](idp)), 401, "id_token_refused")
    assert state_of(portal_of(app)) == before


def test_an_id_token_too_long_to_be_one_is_invalid_input(anyone: Api) -> None:
    problem_of(log_in(anyone, "x" * 20000), 422, "invalid_input")
    problem_of(anyone.post("/oidc/tokens", {"id_token": "a.b.c", "more": 1}), 422, "invalid_input")


def test_an_id_token_is_taken_once(anyone: Api, idp: IdentityProvider) -> None:
    token = idp.id_token()
    assert log_in(anyone, token).status_code == 201
    problem_of(log_in(anyone, token), 401, "id_token_used")


def test_of_two_requests_at_the_same_moment_one_gets_a_token(
    anyone: Api, idp: IdentityProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = idp.id_token()
    assert log_in(anyone, token).status_code == 201
    monkeypatch.setattr(tenants, "was_used", lambda *_: False)  # it was not yet there when the other one looked
    problem_of(log_in(anyone, token), 401, "id_token_used")


def test_a_group_may_rule_over_all_tenants(
    make_settings: Callable[..., Settings], clock: Clock, idp: IdentityProvider
) -> None:
    environment = idp.environment(PORTAL_OIDC_GROUPS='{"fleet-admins": ["operator", "system"]}')
    app = create_app(make_settings(**environment), background=False, clock=clock)
    anyone = Api(app.test_client(), None)
    made = log_in(anyone, idp.id_token()).json
    assert made["role"] == "system"
    assert Api(anyone.client, made["token"]).get("/tenants").status_code == 200
    portal_of(app).close()


def test_clocks_may_differ_by_a_minute(anyone: Api, idp: IdentityProvider) -> None:
    now = int(idp.now())
    assert log_in(anyone, idp.id_token(iat=now + 50, nbf=now + 50)).status_code == 201
    assert log_in(anyone, idp.id_token(exp=now - 50)).status_code == 201


@pytest.mark.parametrize(
    "groups",
    [None, [], ["unknown"], "unknown", 7, {"fleet-admins": True}, [["fleet-admins"]], ["FLEET-ADMINS"]],
)
def test_somebody_without_a_known_group_has_no_role(
    app: Flask, anyone: Api, idp: IdentityProvider, groups: object
) -> None:
    before = state_of(portal_of(app))
    problem_of(log_in(anyone, idp.id_token(groups=groups)), 403, "no_role")
    assert state_of(portal_of(app)) == before
    entry = api_as(app, Role.ADMIN).get("/audit?outcome=refused").json["entries"][0]
    assert (entry["action"], entry["actor"]) == ("login:device-flow", f"Ada Lovelace ({idp.issuer}#ada)")


def test_too_many_groups_to_be_listed_are_said_to_be_so(anyone: Api, idp: IdentityProvider) -> None:
    problem = problem_of(log_in(anyone, idp.id_token(groups=None, _claim_names={"groups": "src1"})), 403, "no_role")
    assert "too many" in problem["detail"]


def test_refused_id_tokens_are_throttled_as_wrong_tokens_are(
    make_settings: Callable[..., Settings], clock: Clock, idp: IdentityProvider
) -> None:
    app = create_app(make_settings(**idp.environment(), PORTAL_LOGIN_FAILURES="3"), background=False, clock=clock)
    anyone = Api(app.test_client(), None)
    statuses = [log_in(anyone, idp.id_token(aud="other")).status_code for _ in range(5)]
    assert statuses == [401, 401, 401, 429, 429]
    assert log_in(anyone, idp.id_token()).status_code == 201  # a valid one is never throttled
    portal_of(app).close()


# --- Providers that fail ------------------------------------------------------------------------------------------


def raw(content: bytes, status: int = 200, **headers: str) -> Callable[[Any], Any]:
    return lambda _: (status, {name.replace("_", "-"): value for name, value in headers.items()}, content)


def nothing_within(seconds: float) -> Callable[[Any], Any]:
    """Sends a byte of the head now and then."""

    def drip(handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: ")
        for _ in range(int(seconds * 10)):
            handler.wfile.write(b"a")
            time.sleep(0.1)

    return drip


FAILING: dict[str, dict[str, Callable[[Any], Any]]] = {
    "an error": {CONFIGURATION: raw(b"{}", 500)},
    "HTML": {CONFIGURATION: raw(b"<html>", Content_Type="text/html")},
    "a list": {CONFIGURATION: raw(b"[]")},
    "nested too deep": {CONFIGURATION: raw(b"[" * 100000)},
    "huge": {CONFIGURATION: raw(b'{"a": "' + b"x" * 300_000 + b'"}')},
    "a redirect to http": {CONFIGURATION: raw(b"", 302, Location="http://localhost:1/")},
    "a redirect elsewhere": {CONFIGURATION: raw(b"", 307, Location="https://localhost:1/")},
    "no keys": {"/jwks": raw(b'{"keys": []}')},
    "keys that are none": {"/jwks": raw(b'{"keys": [1, {"kty": "RSA"}, {"kty": "oct", "k": "AA"}, {"kty": ["RSA"]}]}')},
    "keys elsewhere": {"/jwks": raw(b"", 301, Location="https://localhost:1/")},
    "a huge set of keys": {"/jwks": raw(b" " * 300_000 + b"{}")},
}


@pytest.mark.parametrize("kind", FAILING)
def test_a_provider_that_answers_badly_makes_logins_unavailable_and_nothing_else(
    app: Flask, anyone: Api, idp: IdentityProvider, kind: str
) -> None:
    idp.answers = FAILING[kind]
    problem_of(log_in(anyone, idp.id_token()), 503, "identity_provider_unavailable")
    assert api_as(app, Role.ADMIN).get("/devices").status_code == 200


@pytest.mark.parametrize(
    "configuration",
    [
        {"issuer": "https://evil.example.com"},
        {"issuer": None},
        {"jwks_uri": "http://localhost/jwks"},
        {"token_endpoint": "https://user@localhost/token"},
        {"token_endpoint": 7},
        {"authorization_endpoint": "javascript:alert(1)"},
        {"device_authorization_endpoint": "http://localhost/"},
    ],
)
def test_a_configuration_that_cannot_be_trusted_is_refused(
    anyone: Api, idp: IdentityProvider, configuration: dict[str, Any]
) -> None:
    idp.configuration = configuration
    problem_of(anyone.get("/oidc/configuration"), 503, "identity_provider_unavailable")


def test_a_slow_provider_is_waited_for_once_and_not_long(
    make_settings: Callable[..., Settings], clock: Clock, idp: IdentityProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.oidc.transport.TOTAL_SECONDS", 0.5)
    app = create_app(make_settings(**idp.environment()), background=False, clock=clock)
    idp.answers = {CONFIGURATION: nothing_within(3)}
    anyone = Api(app.test_client(), None)
    started = time.monotonic()
    assert "within" in problem_of(anyone.get("/oidc/configuration"), 503, "identity_provider_unavailable")["detail"]
    for _ in range(5):
        problem_of(anyone.get("/oidc/configuration"), 503, "identity_provider_unavailable")
    assert time.monotonic() - started < 2
    assert idp.count(CONFIGURATION) == 1
    portal_of(app).close()


def test_a_provider_with_a_certificate_that_is_not_trusted_is_not_asked(
    make_settings: Callable[..., Settings], clock: Clock, idp: IdentityProvider
) -> None:
    environment = idp.environment(PORTAL_OIDC_CA_FILE="")
    app = create_app(make_settings(**environment), background=False, clock=clock)
    problem = problem_of(Api(app.test_client(), None).get("/oidc/configuration"), 503, "identity_provider_unavailable")
    assert "not trusted" in problem["detail"]
    assert idp.requests == []
    portal_of(app).close()


def test_a_portal_starts_and_works_without_its_provider(
    make_settings: Callable[..., Settings], clock: Clock, idp: IdentityProvider
) -> None:
    environment = idp.environment(PORTAL_OIDC_ISSUER="https://localhost:1/nobody")
    app = create_app(make_settings(**environment), background=False, clock=clock)
    problem_of(Api(app.test_client(), None).get("/oidc/configuration"), 503, "identity_provider_unavailable")
    assert api_as(app, Role.ADMIN).get("/devices").status_code == 200
    assert api_as(app, None).get("/readyz").status_code in (200, 503)
    portal_of(app).close()


def test_a_portal_without_a_provider_says_so(
    as_role: Callable[..., Api], make_settings: Callable[..., Settings]
) -> None:
    app = create_app(make_settings(), background=False)
    anyone = api_as(app, None)
    problem_of(anyone.get("/oidc/configuration"), 404, "not_found")
    problem_of(log_in(anyone, "a.b.c"), 404, "not_found")
    portal_of(app).close()


def test_changed_keys_are_found_and_unknown_ones_asked_for_once_a_minute(
    app: Flask, anyone: Api, idp: IdentityProvider
) -> None:
    sign_on = portal_of(app).sign_on
    assert sign_on is not None
    seconds = [0.0]
    sign_on.provider._monotonic = lambda: seconds[0]
    assert log_in(anyone, idp.id_token()).status_code == 201
    assert idp.count("/jwks") == 1
    idp.keys = [key_for("ES256", 1)]
    problem_of(log_in(anyone, idp.id_token()), 401, "id_token_refused")  # asked a moment ago
    seconds[0] += 61
    assert log_in(anyone, idp.id_token()).status_code == 201
    assert idp.count("/jwks") == 2
    for number in range(20):
        problem_of(log_in(anyone, signed(idp.claims(), key_for("RS256"), kid=f"k{number}")), 401, "id_token_refused")
    assert idp.count("/jwks") == 2
    problem_of(log_in(anyone, signed(idp.claims(), key_for("RS256"))), 401, "id_token_refused")  # the key that has gone


def test_a_key_without_a_name_is_taken_only_if_it_is_the_only_one(anyone: Api, idp: IdentityProvider) -> None:
    assert log_in(anyone, signed(idp.claims(), idp.keys[0], kid=None)).status_code == 201


def test_a_key_without_a_name_among_several_is_refused(anyone: Api, idp: IdentityProvider) -> None:
    idp.keys = [key_for("RS256"), key_for("RS256", 1)]
    problem_of(log_in(anyone, signed(idp.claims(), idp.keys[0], kid=None)), 401, "id_token_refused")


@pytest.mark.parametrize("change", [{"use": "enc"}, {"alg": "RS512"}, {"key_ops": ["encrypt"]}, {"n": "AQAB"}])
def test_a_key_that_is_for_something_else_verifies_nothing(
    anyone: Api, idp: IdentityProvider, change: dict[str, Any]
) -> None:
    keys = [key_for("RS256").as_dict(private=False) | change, key_for("ES256").as_dict(private=False)]
    idp.answers = {"/jwks": lambda _: as_json({"keys": keys})}
    problem_of(log_in(anyone, idp.id_token()), 401, "id_token_refused")


def test_groups_may_be_in_a_claim_within_another(
    make_settings: Callable[..., Settings], clock: Clock, idp: IdentityProvider
) -> None:
    environment = idp.environment(PORTAL_OIDC_GROUPS_CLAIM="realm_access.roles")
    app = create_app(make_settings(**environment), background=False, clock=clock)
    anyone = Api(app.test_client(), None)
    answer = log_in(anyone, idp.id_token(groups=None, realm_access={"roles": ["fleet-admins"]}))
    assert answer.status_code == 201, json.dumps(answer.json)
    portal_of(app).close()


@pytest.mark.parametrize(
    ("name", "content", "mode", "said"),
    [
        ("PORTAL_OIDC_CLIENT_SECRET_FILE", "secret", 0o644, "open to others"),
        ("PORTAL_OIDC_CLIENT_SECRET_FILE", "", 0o600, "in one line"),
        ("PORTAL_OIDC_CLIENT_SECRET_FILE", "a\nb", 0o600, "in one line"),
        ("PORTAL_OIDC_CLIENT_SECRET_FILE", None, 0o600, "cannot be read"),
        ("PORTAL_OIDC_CA_FILE", "no certificate", 0o600, "no CA certificates in PEM"),
        ("PORTAL_OIDC_CA_FILE", None, 0o600, "no CA certificates in PEM"),
    ],
)
def test_files_of_the_settings_are_checked_at_the_start(
    make_settings: Callable[..., Settings], tmp_path: Path, name: str, content: str | None, mode: int, said: str
) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    environment = {
        "PORTAL_OIDC_ISSUER": "https://localhost:1",
        "PORTAL_OIDC_CLIENT_ID": CLIENT_ID,
        "PORTAL_OIDC_GROUPS": '{"a": "admin"}',
    }
    with pytest.raises(StartupError, match=said):
        open_portal(make_settings(**environment, **{name: str(path)}))


# --- What operators see of it --------------------------------------------------------------------------------------


def test_readiness_names_a_provider_that_does_not_answer_and_stays_ready(
    app: Flask, anyone: Api, idp: IdentityProvider
) -> None:
    before = anyone.get("/readyz")
    assert "identity provider" not in before.text
    idp.answers = FAILING["an error"]
    anyone.get("/oidc/configuration")
    after = anyone.get("/readyz")
    assert after.status_code == before.status_code
    failed = next(check for check in after.json["checks"] if check["name"] == "identity provider")
    assert (failed["ok"], failed["code"]) == (False, "identity_provider_unavailable")
    assert "localhost" not in failed["problem"]  # which is for operators
    idp.answers = {}
    sign_on = portal_of(app).sign_on
    assert sign_on is not None
    later = time.monotonic() + 11
    sign_on.provider._monotonic = lambda: later
    assert anyone.get("/oidc/configuration").status_code == 200
    assert "identity provider" not in anyone.get("/readyz").text


def test_the_log_says_once_that_nobody_can_log_in_and_once_that_somebody_can(
    app: Flask, idp: IdentityProvider, caplog: pytest.LogCaptureFixture
) -> None:
    portal = portal_of(app)
    assert portal.sign_on is not None
    seconds = [0.0]
    portal.sign_on.provider._monotonic = lambda: seconds[0]
    idp.answers = FAILING["an error"]
    caplog.set_level("INFO", "portal.login")
    for _ in range(3):
        ask_provider(portal)
        seconds[0] += 300
    idp.answers = {}
    for _ in range(2):
        ask_provider(portal)
    assert [(record.levelname, record.message) for record in caplog.records if record.name == "portal.login"] == [
        ("ERROR", "nobody can log in by the identity provider"),
        ("INFO", "the identity provider answers again"),
    ]


def test_the_provider_is_asked_in_a_thread_of_its_own(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be slow, and holds up no job that revokes."""
    threads: dict[str, tuple[str, ...]] = {}

    def run(_: Any, stopping: Any, jobs: Any = jobs.JOBS, lock: str = jobs.LEADER_LOCK) -> None:
        threads[threading.current_thread().name] = (lock, *(job.name for job in jobs))

    monkeypatch.setattr(jobs, "run", run)
    before = set(threading.enumerate())
    jobs.start(portal_of(app)).set()
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
    assert threads["identity provider"] == (jobs.PROVIDER_LOCK, "identity provider")
    assert "identity provider" not in threads["jobs"]


def test_the_doctor_looks_at_the_provider_and_at_the_tenants_of_its_groups(
    app: Flask, idp: IdentityProvider, clock: Clock
) -> None:
    installation = Installation(portal_of(app).settings, clock)
    found = identity_provider_check(installation)
    assert (found.state, "acme" in found.detail) == (State.WARNING, True)
    api_as(app, Role.ADMIN, "acme")
    assert identity_provider_check(installation).state is State.OK
    idp.configuration = {"issuer": "https://other"}
    found = identity_provider_check(installation)
    assert (found.state, "PORTAL_OIDC_ISSUER" in found.detail) == (State.PROBLEM, True)
    installation.close()


def test_tokens_of_people_are_deleted_a_month_after_they_have_ended(
    app: Flask, anyone: Api, idp: IdentityProvider, clock: Clock
) -> None:
    person = Api(anyone.client, log_in(anyone, idp.id_token()).json["token"])
    made = person.post("/enrolment-tokens", {"name": "line", "type": "pump"})
    assert made.status_code == 201, made.text
    idp.person["sub"] = "grace"
    log_in(anyone, idp.id_token())
    admin = api_as(app, Role.ADMIN)

    def subjects() -> set[str]:
        return {token["subject"] for token in admin.get("/tokens").json["tokens"] if token["subject"]}

    clock.advance(days=29)
    prune_logins(portal_of(app))
    assert len(subjects()) == 2
    clock.advance(days=3)
    prune_logins(portal_of(app))
    assert subjects() == {f"{idp.issuer}#ada"}  # to which an enrolment token refers
