"""Logins by the identity provider: each ends in an operator token of eight hours."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlencode, urlsplit

import sqlalchemy as sa
from itsdangerous import BadSignature, URLSafeSerializer

from config import Settings
from core.errors import NotFound, TenantSuspended
from core.operator_groups import highest_by_tenant
from core.roles import Role
from store import audit, tenants
from store.audit import Actor
from store.database import Database
from store.scope import ALL_TENANTS
from store.tenants import TokenRecord
from workflows.oidc.claims import Expected, IdToken, verified
from workflows.oidc.people import groups_of, name_of, subject_of
from workflows.oidc.provider import IdentityProvider
from workflows.oidc.refusals import (
    IdTokenRefused,
    IdTokenUsed,
    LoginRefused,
    NoRole,
    TenantNeeded,
)
from workflows.operators import Operators, new_token
from workflows.tenants import TenantDirectory

TOKEN_LIFE = timedelta(hours=8)
LOGIN_SECONDS = 600  # in which somebody has to log in at the provider
CALLBACK = "/ui/login/oidc/callback"
_NOT_BEGUN = "This login was not begun in this browser, or too long ago; begin again."


@dataclass(frozen=True, slots=True)
class DeviceFlow:
    """What a program needs to log somebody in by the device flow (RFC 8628); ``ca`` is PEM, if not the system's."""

    issuer: str
    client_id: str
    scopes: str
    device_authorization_endpoint: str
    token_endpoint: str
    ca: str | None


@dataclass(frozen=True, slots=True)
class BegunLogin:
    """A login that was begun in a browser: where that goes next, and what it keeps in a cookie meanwhile."""

    url: str
    cookie: str


@dataclass(frozen=True, slots=True)
class LoggedIn:
    """An operator token that was made for a person: its secret, which is stored nowhere, and where to go next."""

    secret: str
    record: TokenRecord
    next_path: str = ""


class SingleSignOn:
    """Logs operators in by the identity provider of the settings."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        directory: TenantDirectory,
        operators: Operators,
        provider: IdentityProvider,
        cookie_keys: list[str],
        clock: Callable[[], datetime],
    ) -> None:
        self._settings, self._database, self._directory = settings, database, directory
        self._operators, self.provider, self._clock = operators, provider, clock
        self._cookies = URLSafeSerializer(cookie_keys, salt="login by the identity provider")

    @property
    def provider_name(self) -> str:
        """The host of the provider, by which people know it."""
        return urlsplit(self._settings.oidc_issuer).hostname or ""

    def device_flow(self) -> DeviceFlow:
        """Return what ``portal login --oidc`` needs; raises ``NotFound`` if it cannot be, ``ProviderUnavailable``."""
        settings = self._settings
        if not settings.oidc_cli_client_id:
            raise NotFound(
                "Programs cannot log in here by the identity provider: PORTAL_OIDC_CLI_CLIENT_ID is not set."
            )
        endpoints = self.provider.endpoints()
        if endpoints.device is None:
            raise NotFound("The identity provider has no device flow, by which programs log in.")
        ca_file = settings.oidc_ca_file
        return DeviceFlow(
            issuer=settings.oidc_issuer,
            client_id=settings.oidc_cli_client_id,
            scopes=settings.oidc_scopes,
            device_authorization_endpoint=endpoints.device,
            token_endpoint=endpoints.token,
            ca=None if ca_file is None else ca_file.read_text(encoding="utf-8"),
        )

    def exchange(self, client: Actor, id_token: str, tenant: str | None) -> LoggedIn:
        """Make an operator token for an ID token of the device flow; ``client`` is the one that has sent it.

        Raises ``IdTokenRefused``, ``NoRole``, ``TenantNeeded``, ``TooManyAttempts``, ``ProviderUnavailable``.
        """
        expected = Expected(self._settings.oidc_issuer, self._settings.oidc_cli_client_id, None)
        with _counted(self._operators, client, "login:device-flow"):
            if not expected.client_id:
                raise IdTokenRefused("Programs cannot log in here by the identity provider.")
            token = self._verified(id_token, expected)
            return self._log_in(client, token, tenant, token.digest, "")

    def begin(self, next_path: str, tenant: str | None) -> BegunLogin:
        """Begin a login in a browser, by authorization code with PKCE; raises ``ProviderUnavailable``."""
        endpoints, settings = self.provider.endpoints(), self._settings
        state, nonce, verifier = (secrets.token_urlsafe(48) for _ in range(3))
        challenge = hashlib.sha256(verifier.encode()).digest()
        query = {
            "response_type": "code",
            "client_id": settings.oidc_client_id,
            "redirect_uri": self.redirect_uri,
            "scope": settings.oidc_scopes,
            "state": state,
            "nonce": nonce,
            "code_challenge": _base64url(challenge),
            "code_challenge_method": "S256",
        }
        kept = {"state": state, "nonce": nonce, "verifier": verifier, "next": next_path, "tenant": tenant}
        cookie = self._cookies.dumps(kept | {"at": int(self._clock().timestamp())})
        separator = "&" if "?" in endpoints.authorization else "?"
        return BegunLogin(f"{endpoints.authorization}{separator}{urlencode(query)}", str(cookie))

    @property
    def redirect_uri(self) -> str:
        """The address to register at the provider, to which it sends the browser back."""
        return self._settings.public_url + CALLBACK

    def finish(self, client: Actor, cookie: str | None, query: Mapping[str, str]) -> LoggedIn:
        """Make an operator token for the browser that comes back with a code, and with the cookie of its login.

        Raises ``LoginRefused`` and as ``exchange`` does.
        """
        with _counted(self._operators, client, "login:browser"):
            kept = self._kept(cookie)
            code = self._code(kept, query)
            id_token = self.provider.redeem(code, kept["verifier"], self.redirect_uri)
            settings = self._settings
            token = self._verified(id_token, Expected(settings.oidc_issuer, settings.oidc_client_id, kept["nonce"]))
            once = hashlib.sha256(f"login {kept['state']}".encode()).hexdigest()
            return self._log_in(client, token, kept["tenant"], once, kept["next"])

    def next_path(self, cookie: str | None) -> str:
        """Return where a login that was begun in this browser leads to; nowhere if there was none."""
        try:
            return str(self._kept(cookie)["next"])
        except LoginRefused:
            return ""

    def _kept(self, cookie: str | None) -> dict[str, Any]:
        try:
            kept: dict[str, Any] = self._cookies.loads(cookie or "")
        except BadSignature:
            raise LoginRefused(_NOT_BEGUN) from None
        if not 0 <= self._clock().timestamp() - kept["at"] + 1 <= LOGIN_SECONDS:
            raise LoginRefused(_NOT_BEGUN)
        return kept

    def _code(self, kept: Mapping[str, Any], query: Mapping[str, str]) -> str:
        """Return the code of an answer to this login (RFC 6749 §4.1.2), of this provider (RFC 9207)."""
        if not hmac.compare_digest(query.get("state", "").encode(), kept["state"].encode()):
            raise LoginRefused(_NOT_BEGUN)
        issuer = query.get("iss")
        if issuer != self._settings.oidc_issuer and (issuer is not None or self.provider.endpoints().says_issuer):
            raise LoginRefused("The answer is not one of the identity provider; begin again.")
        if error := query.get("error"):
            said = error if re.fullmatch("[a-z_]{1,64}", error) else "an error"
            raise LoginRefused(f"The identity provider has ended the login ({said}); begin again.")
        code = query.get("code", "")
        if not re.fullmatch(r"[ -~]{1,4096}", code):
            raise LoginRefused("The answer of the identity provider has no code; begin again.")
        return code

    def _verified(self, id_token: str, expected: Expected) -> IdToken:
        return verified(id_token, self.provider.find_key, expected, self._clock())

    def _log_in(self, client: Actor, token: IdToken, tenant: str | None, once: str, next_path: str) -> LoggedIn:
        """Make the operator token; ``once`` is the hash under which no second login is possible."""
        name, subject = name_of(token.claims), subject_of(self._settings.oidc_issuer, token.subject)
        try:
            tenant_id, role = self._role_of(token, tenant)
        except NoRole as error:
            raise NoRole(error.detail, tenants.actor_name(name, subject)) from None
        now = self._clock()
        secret, record = new_token(tenant_id, name, role, now + TOKEN_LIFE, now=now, subject=subject)
        actor = Actor(tenant_id, record.actor_name, role, client.request_id, client.address, record.id)
        used = IdTokenUsed("This login has led to a token already; log in again.")
        try:
            with self._database.transaction(sees=ALL_TENANTS) as tx:
                if tenants.was_used(tx, once):
                    raise used
                tenants.add_token(tx, record, secret=secret, login_hash=once)
                facts = {"name": name, "role": role, "subject": subject}
                audit.record(tx, actor, "token:create", f"token:{record.id}", at=now, **facts)
        except sa.exc.IntegrityError:  # the other of two at the same moment was first
            raise used from None
        return LoggedIn(secret, record, next_path)

    def _role_of(self, token: IdToken, tenant: str | None) -> tuple[str, Role]:
        """Return tenant and role by the groups: of several roles the highest, of several tenants the chosen one."""
        settings = self._settings
        groups = groups_of(token.claims, settings.oidc_groups_claim)
        granted = highest_by_tenant(groups, settings.oidc_groups)
        if not granted:
            raise NoRole("None of your groups has a role here; PORTAL_OIDC_GROUPS says which have.")
        served = {name: role for name, role in granted.items() if self._is_served(name)}
        if tenant is not None and tenant not in served:
            raise NoRole(f"Your groups have no role in the tenant {tenant}, or it is not served.")
        if not served:
            raise NoRole("The tenants in which your groups have roles are not served.")
        if tenant is None and len(served) > 1:
            raise TenantNeeded(sorted(served))
        chosen = tenant or next(iter(served))
        return chosen, served[chosen]

    def _is_served(self, tenant_id: str) -> bool:
        try:
            self._directory.of(tenant_id).check_served()
        except (NotFound, TenantSuspended):
            return False
        return True


@contextlib.contextmanager
def _counted(operators: Operators, client: Actor, action: str) -> Iterator[None]:
    """Count a login that is refused in the body of a ``with`` as a failed one, and record it."""
    try:
        yield
    except (LoginRefused, IdTokenRefused, NoRole) as error:
        person = error.person if isinstance(error, NoRole) else ""
        operators.login_failed(replace(client, name=person or client.name), action, "access", error.code)
        raise


def _base64url(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
