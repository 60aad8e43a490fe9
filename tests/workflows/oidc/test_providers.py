"""Keycloak and Entra ID: a login by what each publishes and issues, in the form that its documentation gives.

What is theirs is recorded here by hand; the names of the company, its people and ids are made up, and the keys are the
tests' own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from config import Settings
from operations.wiring import open_portal
from store.audit import Actor
from tests.support.harness import ON_SQLITE, Clock
from tests.support.identity_provider import key_for, signed
from workflows.oidc import provider as oidc_provider
from workflows.oidc.login import LoggedIn, SingleSignOn
from workflows.oidc.refusals import IdTokenRefused, NoRole, ProviderUnavailable
from workflows.oidc.transport import Answer

pytestmark = ON_SQLITE
BROWSER = Actor("default", "anyone", "none", "request-1", "192.0.2.7")
CLIENT = "onboarding-portal"

# --- Keycloak ------------------------------------------------------------------------------------------------------

REALM = "https://sso.example.com/realms/factory"
OF_REALM = f"{REALM}/protocol/openid-connect"
KEYCLOAK = {
    "issuer": REALM,
    "authorization_endpoint": f"{OF_REALM}/auth",
    "token_endpoint": f"{OF_REALM}/token",
    "introspection_endpoint": f"{OF_REALM}/token/introspect",
    "userinfo_endpoint": f"{OF_REALM}/userinfo",
    "end_session_endpoint": f"{OF_REALM}/logout",
    "jwks_uri": f"{OF_REALM}/certs",
    "check_session_iframe": f"{OF_REALM}/login-status-iframe.html",
    "grant_types_supported": ["authorization_code", "refresh_token", "urn:ietf:params:oauth:grant-type:device_code"],
    "acr_values_supported": ["0", "1"],
    "response_types_supported": ["code", "none", "id_token", "token", "id_token token", "code id_token"],
    "subject_types_supported": ["public", "pairwise"],
    "id_token_signing_alg_values_supported": ["PS384", "RS384", "EdDSA", "ES384", "HS256", "ES256", "RS256", "ES512"],
    "token_endpoint_auth_methods_supported": ["private_key_jwt", "client_secret_basic", "client_secret_post"],
    "claims_supported": ["aud", "sub", "iss", "auth_time", "name", "preferred_username", "email", "acr", "azp"],
    "scopes_supported": ["openid", "profile", "email", "roles", "web-origins", "acr", "basic"],
    "code_challenge_methods_supported": ["plain", "S256"],
    "device_authorization_endpoint": f"{OF_REALM}/auth/device",
    "authorization_response_iss_parameter_supported": True,
}
KEYCLOAK_SAYS = {"session_state": "5f2b7d0a-6c19-4a55-8f0e-0d9c5a3c7b11", "iss": REALM}  # beside state and code


def keycloak_keys() -> dict[str, Any]:
    """Two keys, of which one is for encryption."""
    more = {"alg": "RS256", "x5c": ["MIIC"], "x5t": "abc", "x5t#S256": "def"}
    encrypts = {"use": "enc", "alg": "RSA-OAEP"}
    return {"keys": [public(1) | encrypts, public(0) | more]}


def keycloak_claims(now: int, **more: Any) -> dict[str, Any]:
    """What the scopes openid and profile, and a mapper of groups with their full path, put into an ID token."""
    return {
        "exp": now + 300,
        "iat": now,
        "auth_time": now - 5,
        "jti": "2d7a9a5b-0d6d-4f4a-9f3e-3b0b9f2f7c55",
        "iss": REALM,
        "aud": CLIENT,
        "sub": "36fa0f91-f94d-4a0c-afed-6b7d952e47da",
        "typ": "ID",
        "azp": CLIENT,
        "sid": KEYCLOAK_SAYS["session_state"],
        "at_hash": "s1Zw8lJvAXkqP7p3z1S0wA",
        "acr": "1",
        "email_verified": True,
        "name": "Ada Lovelace",
        "groups": ["/ops/admins", "/staff"],
        "preferred_username": "ada",
        "given_name": "Ada",
        "family_name": "Lovelace",
        **more,
    }


# --- Entra ID ------------------------------------------------------------------------------------------------------

DIRECTORY = "8b7f3f06-4f2a-4c63-9d2b-1f6a5e0c7d11"
ENTRA_ISSUER = f"https://login.microsoftonline.com/{DIRECTORY}/v2.0"
APPLICATION = "6731de76-14a6-49ae-97bc-6eba6914391e"
ADMINS = "1c9a4bb0-2f7d-4a57-9d39-5b3c1a7e2f10"
OF_DIRECTORY = f"https://login.microsoftonline.com/{DIRECTORY}"
ENTRA = {
    "token_endpoint": f"{OF_DIRECTORY}/oauth2/v2.0/token",
    "token_endpoint_auth_methods_supported": ["client_secret_post", "private_key_jwt", "client_secret_basic"],
    "jwks_uri": f"{OF_DIRECTORY}/discovery/v2.0/keys",
    "response_modes_supported": ["query", "fragment", "form_post"],
    "subject_types_supported": ["pairwise"],
    "id_token_signing_alg_values_supported": ["RS256"],
    "response_types_supported": ["code", "id_token", "code id_token", "id_token token"],
    "scopes_supported": ["openid", "profile", "email", "offline_access"],
    "issuer": ENTRA_ISSUER,
    "request_uri_parameter_supported": False,
    "userinfo_endpoint": "https://graph.microsoft.com/oidc/userinfo",
    "authorization_endpoint": f"{OF_DIRECTORY}/oauth2/v2.0/authorize",
    "device_authorization_endpoint": f"{OF_DIRECTORY}/oauth2/v2.0/devicecode",
    "http_logout_supported": True,
    "frontchannel_logout_supported": True,
    "end_session_endpoint": f"{OF_DIRECTORY}/oauth2/v2.0/logout",
    "claims_supported": ["sub", "iss", "aud", "exp", "iat", "nonce", "preferred_username", "name", "tid", "ver"],
    "kerberos_endpoint": f"{OF_DIRECTORY}/kerberos",
    "tenant_region_scope": None,
    "cloud_instance_name": "microsoftonline.com",
    "cloud_graph_host_name": "graph.windows.net",
    "msgraph_host": "graph.microsoft.com",
    "rbac_url": "https://pas.windows.net",
}
ENTRA_SAYS = {"session_state": "00a2b1c3-4d5e-6f70-8192-a3b4c5d6e7f8"}  # it does not name its issuer
TOO_MANY = {  # in place of groups, beyond 200 of them
    "groups": None,
    "_claim_names": {"groups": "src1"},
    "_claim_sources": {"src1": {"endpoint": "https://graph.microsoft.com/v1.0/users/x/getMemberObjects"}},
}


def entra_keys() -> dict[str, Any]:
    """Keys that do not name their algorithm."""
    more = {"x5c": ["MIIC"], "cloud_instance_name": "microsoftonline.com", "issuer": ENTRA_ISSUER}
    keys = [public(number) | more for number in (1, 0)]
    return {"keys": [{name: value for name, value in key.items() if name != "alg"} for key in keys]}


def entra_claims(now: int, **more: Any) -> dict[str, Any]:
    """What a token of version 2.0 has; its times begin five minutes before it is issued."""
    return {
        "aud": APPLICATION,
        "iss": ENTRA_ISSUER,
        "iat": now - 300,
        "nbf": now - 300,
        "exp": now + 3600,
        "aio": "AWQAm/8TAAAAkQ",
        "groups": [ADMINS, "7e1d0f7c-8a1b-4f0e-b0a4-2d7f5a9c3e21"],
        "name": "Ada Lovelace",
        "oid": "3c1f8f0e-2a35-4c0b-9a4c-7d5e6f708192",
        "preferred_username": "ada@example.com",
        "rh": "0.AAAAAA",
        "sid": ENTRA_SAYS["session_state"],
        "sub": "AAAAAAAAAAAAAAAAAAAAAIkzqFVrSaSaFHy782bbtaQ",
        "tid": DIRECTORY,
        "uti": "fqiBqXLPj0eQa82S-IYFAA",
        "ver": "2.0",
        **more,
    }


# --- A provider that answers what is recorded ----------------------------------------------------------------------


def public(number: int) -> dict[str, Any]:
    return dict(key_for("RS256", number).as_dict(private=False))


@dataclass
class Recorded:
    """Stands where the network is: ``documents`` by URL, and ``id_token`` for a code."""

    documents: Mapping[str, Any]
    id_token: str = ""
    redeemed: list[dict[str, str]] = field(default_factory=list)

    def get(self, url: str) -> Any:
        return json.loads(json.dumps(self.documents[url]))

    def post(self, url: str, fields: Mapping[str, str], headers: Mapping[str, str]) -> Answer:
        self.redeemed.append({"url": url, **fields, **headers})
        return Answer(200, {"token_type": "Bearer", "expires_in": 300, "access_token": "x", "id_token": self.id_token})


@dataclass(frozen=True)
class Recording:
    """A provider, and how a portal is set up for it."""

    configuration: Mapping[str, Any]
    keys: Callable[[], dict[str, Any]]
    claims: Callable[..., dict[str, Any]]
    says: Mapping[str, str]
    client: str
    groups: Mapping[str, str]

    @property
    def issuer(self) -> str:
        return str(self.configuration["issuer"])


RECORDINGS = {
    "keycloak": Recording(KEYCLOAK, keycloak_keys, keycloak_claims, KEYCLOAK_SAYS, CLIENT, {"/ops/admins": "admin"}),
    "entra": Recording(ENTRA, entra_keys, entra_claims, ENTRA_SAYS, APPLICATION, {ADMINS: "admin"}),
}


@dataclass
class Login:
    """Logs Ada in, with changes to what her ID token says."""

    sign_on: SingleSignOn
    recorded: Recorded
    recording: Recording
    clock: Clock

    def browser(self, **changes: Any) -> LoggedIn:
        begun = self.sign_on.begin("/ui", None)
        asked = {name: values[0] for name, values in parse_qs(urlsplit(begun.url).query).items()}
        self.recorded.id_token = self.id_token(nonce=asked["nonce"], **changes)
        answer = {"state": asked["state"], "code": "0.AAAA-_.code", **self.recording.says}
        return self.sign_on.finish(BROWSER, begun.cookie, answer)

    def device(self, **changes: Any) -> LoggedIn:
        return self.sign_on.exchange(BROWSER, self.id_token(**changes), None)

    def id_token(self, **changes: Any) -> str:
        claims = self.recording.claims(int(self.clock().timestamp())) | changes
        key = key_for("RS256", 0)
        return signed({name: value for name, value in claims.items() if value is not None}, key, typ="JWT")


@pytest.fixture
def login(
    make_settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Login]]:
    """Makes a portal for a provider; ``settings`` are further ones."""
    with _opened(make_settings, clock, monkeypatch) as make:
        yield make


@contextmanager
def _opened(
    make_settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Login]]:
    opened = []

    def make(name: str, **settings: str) -> Login:
        recording = RECORDINGS[name]
        configuration, keys = recording.configuration, recording.keys()
        found = {f"{recording.issuer}/.well-known/openid-configuration": configuration, configuration["jwks_uri"]: keys}
        recorded = Recorded(found)
        monkeypatch.setattr(oidc_provider, "Transport", lambda _ca_file: recorded)
        own = {
            "PORTAL_OIDC_ISSUER": recording.issuer,
            "PORTAL_OIDC_CLIENT_ID": recording.client,
            "PORTAL_OIDC_GROUPS": json.dumps(recording.groups),
        }
        portal = open_portal(make_settings(**own | settings), clock)
        opened.append(portal)
        assert portal.sign_on is not None
        return Login(portal.sign_on, recorded, recording, clock)

    yield make
    for portal in opened:
        portal.close()


# --- Both ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_login_in_a_browser_and_one_at_a_terminal_end_in_the_role_of_the_group(
    login: Callable[..., Login], name: str
) -> None:
    ada = login(name)
    for made in (ada.browser(), ada.device()):
        assert (made.record.name, made.record.role, made.record.tenant_id) == ("Ada Lovelace", "admin", "default")
        assert made.record.subject is not None
        assert made.record.subject.startswith(f"{ada.recording.issuer}#")
    assert ada.recorded.redeemed[0]["url"] == ada.recording.configuration["token_endpoint"]


@pytest.mark.parametrize("name", RECORDINGS)
def test_programs_are_led_to_the_device_flow_of_the_provider(login: Callable[..., Login], name: str) -> None:
    flow, said = login(name).sign_on.device_flow(), RECORDINGS[name].configuration
    assert flow.device_authorization_endpoint == said["device_authorization_endpoint"]
    assert flow.token_endpoint == said["token_endpoint"]


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_token_for_another_application_of_the_same_provider_logs_nobody_in(
    login: Callable[..., Login], name: str
) -> None:
    ada = login(name)
    for change in ({"aud": "grafana"}, {"aud": "grafana", "azp": "grafana"}, {"azp": "grafana"}):
        with pytest.raises(IdTokenRefused):
            ada.browser(**change)
        with pytest.raises(IdTokenRefused):
            ada.device(**change)


# --- Keycloak ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("audience", [[CLIENT, "account"], ["account", CLIENT]])
def test_an_audience_that_a_mapper_of_keycloak_adds_to_id_tokens_is_refused(
    login: Callable[..., Login], audience: list[str]
) -> None:
    with pytest.raises(IdTokenRefused, match="not for this one alone"):
        login("keycloak").browser(aud=audience)


def test_groups_of_keycloak_of_one_name_are_told_apart_by_their_path(login: Callable[..., Login]) -> None:
    ada = login("keycloak")
    for groups in (["/lab/admins"], ["/ops/admins/interns"], ["admins"], ["/OPS/admins"]):
        with pytest.raises(NoRole):
            ada.browser(groups=groups)


@pytest.mark.parametrize("client", ["portal", "portal.example.com"])
def test_roles_of_keycloak_are_groups_too(login: Callable[..., Login], client: str) -> None:
    claims = {"groups": None, "resource_access": {client: {"roles": ["fleet-admin"]}, "account": {"roles": ["x"]}}}
    groups = json.dumps({"fleet-admin": "admin"})
    settings = {"PORTAL_OIDC_GROUPS_CLAIM": f"resource_access.{client}.roles", "PORTAL_OIDC_GROUPS": groups}
    assert login("keycloak", **settings).browser(**claims).record.role == "admin"


def test_other_tokens_of_keycloak_log_nobody_in(login: Callable[..., Login]) -> None:
    ada = login("keycloak")
    for kind in ({"typ": "Bearer", "scope": "openid profile"}, {"typ": "Refresh"}, {"typ": "Logout", "events": {}}):
        with pytest.raises(IdTokenRefused):
            ada.device(**kind)


# --- Entra ID ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [TOO_MANY, {"groups": None, "hasgroups": True}], ids=["_claim_names", "hasgroups"])
def test_groups_that_entra_leaves_out_since_they_are_too_many_give_no_role_and_are_said_to_be_so(
    login: Callable[..., Login], said: dict[str, Any]
) -> None:
    ada = login("entra")
    for way in (ada.browser, ada.device):
        with pytest.raises(NoRole, match="too many"):
            way(**said)


def test_a_name_of_a_group_that_somebody_else_has_made_in_entra_is_not_its_id(login: Callable[..., Login]) -> None:
    with pytest.raises(NoRole):
        login("entra").browser(groups=["fleet-admins", ADMINS.upper()])


def test_roles_of_an_application_of_entra_are_groups_too(login: Callable[..., Login]) -> None:
    groups = json.dumps({"Fleet.Admin": "admin"})
    ada = login("entra", PORTAL_OIDC_GROUPS_CLAIM="roles", PORTAL_OIDC_GROUPS=groups)
    assert ada.browser(groups=None, roles=["Fleet.Admin"]).record.role == "admin"
    with pytest.raises(NoRole):
        ada.browser(groups=None, roles=None)  # who has none has no claim


def test_somebody_of_another_directory_of_entra_is_refused(login: Callable[..., Login]) -> None:
    other = "9188040d-6c67-4c5b-b112-36a304b66dad"
    with pytest.raises(IdTokenRefused, match="another issuer"):
        login("entra").browser(iss=f"https://login.microsoftonline.com/{other}/v2.0", tid=other)


def test_the_issuer_of_all_directories_of_entra_is_no_provider(
    login: Callable[..., Login], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ENTRA_ISSUER.replace(DIRECTORY, "common")
    of_all = json.loads(json.dumps(ENTRA).replace(DIRECTORY, "common"))
    of_all["issuer"] = "https://login.microsoftonline.com/{tenantid}/v2.0"
    ada = login("entra", PORTAL_OIDC_ISSUER=common)
    ada.recorded.documents = {f"{common}/.well-known/openid-configuration": of_all}
    with pytest.raises(ProviderUnavailable, match="of one directory"):
        ada.sign_on.begin("/ui", None)


def test_a_client_of_entra_with_a_secret_serves_both_ways(login: Callable[..., Login], tmp_path: Any) -> None:
    secret = tmp_path / "secret"
    secret.write_text("Abc8Q~0.x_y-z~\n")
    secret.chmod(0o600)
    settings = {"PORTAL_OIDC_CLIENT_SECRET_FILE": str(secret), "PORTAL_OIDC_CLI_CLIENT_ID": APPLICATION}
    ada = login("entra", **settings)
    assert ada.browser().record.role == "admin"
    assert ada.device().record.role == "admin"
    assert ada.recorded.redeemed[0]["Authorization"].startswith("Basic ")
