"""The identity provider: its configuration and keys (OpenID Connect Discovery 1.0), and codes for ID tokens."""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from config import Settings
from core.errors import SettingInvalid
from workflows.oidc.keys import VerificationKey, choose_key, read_keys
from workflows.oidc.refusals import IdTokenRefused, LoginRefused, ProviderUnavailable
from workflows.oidc.transport import Transport, is_https

if TYPE_CHECKING:
    from workflows.oidc.jose import PublicKey

log = logging.getLogger("portal.login")

KEPT_SECONDS = 600.0  # how long configuration and keys are used before they are read again
UNKNOWN_KEY_SECONDS = 60.0  # between two attempts to find a key that is not known
PAUSE_SECONDS = 10.0  # after an attempt that failed, in which nobody waits for another
WAIT_SECONDS = 2.0  # for an attempt that another request makes
REDEEMED_AT_ONCE = 2  # codes, of which anybody can send made-up ones: other threads serve other requests
MOST_WAITING = 2  # requests for one of those, or for what another one reads; all else is refused at once
MAX_SECRET = 4096
_BUSY = "The identity provider has not answered yet; try again in some seconds."


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the provider is asked for what; ``device`` is ``None`` if it has no device flow (RFC 8628 §4)."""

    authorization: str
    token: str
    device: str | None
    says_issuer: bool  # in its answers to the browser (RFC 9207)
    secret_in_body: bool


@dataclass(frozen=True, slots=True)
class _Known:
    endpoints: Endpoints
    keys: Sequence[VerificationKey]
    read_at: float


class IdentityProvider:
    """Asks the provider of ``PORTAL_OIDC_ISSUER``; what it has said is remembered for some minutes."""

    def __init__(
        self, settings: Settings, transport: Transport | None = None, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """Read the client's secret; raises ``StartupError`` if a file of the settings cannot be used."""
        self.issuer, self.client_id = settings.oidc_issuer, settings.oidc_client_id
        self._secret = _client_secret(settings)
        self._transport = transport or Transport(settings.oidc_ca_file)
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._redeeming = threading.BoundedSemaphore(REDEEMED_AT_ONCE)
        self._waiting = threading.BoundedSemaphore(MOST_WAITING)
        self._known: _Known | None = None
        self._failure: tuple[float, str] | None = None
        self._logged: str | None = None

    @property
    def has_secret(self) -> bool:
        """Whether the client of the console is a confidential one."""
        return bool(self._secret)

    @property
    def problem(self) -> str | None:
        """Why nobody can log in, if an attempt of this process to reach the provider has just failed; asks nobody."""
        failure = self._failure
        return None if failure is None or self._monotonic() - failure[0] > KEPT_SECONDS else failure[1]

    def look(self) -> None:
        """Read configuration and keys again, and log when that begins to fail, and when it works again."""
        before = self._logged
        try:
            self._read(0)
            self._logged = None
        except ProviderUnavailable as error:
            self._logged = error.detail
        if self._logged is not None and self._logged != before:
            log.error("nobody can log in by the identity provider", extra={"problem": self._logged})
        elif self._logged is None and before is not None:
            log.info("the identity provider answers again")

    def endpoints(self) -> Endpoints:
        """Return where to ask; raises ``ProviderUnavailable``."""
        return self._read(KEPT_SECONDS).endpoints

    def find_key(self, algorithm: str, key_id: str | None) -> PublicKey | None:
        """Return the key that a token names; for one that is not known the keys are read again, at most once a minute.

        Raises ``ProviderUnavailable``.
        """
        for seconds in (KEPT_SECONDS, UNKNOWN_KEY_SECONDS):
            key = choose_key(self._read(seconds).keys, algorithm, key_id)
            if key is not None:
                return key
        return None

    def redeem(self, code: str, verifier: str, redirect_uri: str) -> str:
        """Return the ID token for an authorization code and its PKCE verifier (RFC 7636 §4.5).

        Raises ``LoginRefused`` if the provider does not take the code, ``ProviderUnavailable``.
        """
        endpoints = self.endpoints()
        fields = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_uri,
            "code_verifier": verifier,
            "client_id": self.client_id,
        }
        headers: dict[str, str] = {}
        if self._secret and endpoints.secret_in_body:
            fields["client_secret"] = self._secret
        elif self._secret:
            pair = f"{quote(self.client_id, safe='')}:{quote(self._secret, safe='')}"  # RFC 6749 §2.3.1
            headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        with self._turn_at(self._redeeming):
            answer = self._transport.post(endpoints.token, fields, headers)
        if answer.status >= 500:
            raise ProviderUnavailable(f"The identity provider answered with status {answer.status}.")
        if answer.status != 200:
            if answer.content.get("error") == "invalid_client":
                raise ProviderUnavailable("The identity provider does not accept the client id and secret.")
            raise LoginRefused("The identity provider does not accept this login; begin again.")
        id_token = answer.content.get("id_token")
        if not isinstance(id_token, str):
            raise IdTokenRefused("The identity provider has sent no ID token; the scopes must contain openid.")
        return id_token

    def _read(self, seconds: float) -> _Known:
        """Return what was read in the last ``seconds``, else read it; one request does, others wait for a moment."""
        if (known := self._fresh(seconds)) is not None:
            return known
        with self._turn_at(self._lock):
            if (known := self._fresh(seconds)) is not None:
                return known
            if self._failure is not None and self._monotonic() - self._failure[0] < PAUSE_SECONDS:
                raise ProviderUnavailable(self._failure[1])
            try:
                known = self._discover()
            except ProviderUnavailable as error:
                self._failure = self._monotonic(), error.detail
                raise
            self._known, self._failure = known, None
            return known

    @contextmanager
    def _turn_at(self, lock: threading.Lock | threading.BoundedSemaphore) -> Iterator[None]:
        """Hold a lock in the body of the ``with``; raises ``ProviderUnavailable`` if it is held for long.

        Whoever waits occupies a thread, so that of many requests at once only some do.
        """
        if not lock.acquire(blocking=False):
            if not self._waiting.acquire(blocking=False):
                raise ProviderUnavailable(_BUSY)
            try:
                if not lock.acquire(timeout=WAIT_SECONDS):
                    raise ProviderUnavailable(_BUSY)
            finally:
                self._waiting.release()
        try:
            yield
        finally:
            lock.release()

    def _fresh(self, seconds: float) -> _Known | None:
        known = self._known
        return known if known is not None and self._monotonic() - known.read_at < seconds else None

    def _discover(self) -> _Known:
        said = self._transport.get(self.issuer.rstrip("/") + "/.well-known/openid-configuration")
        if said.get("issuer") != self.issuer:
            if "{" in str(said.get("issuer")):  # Entra, asked for "common" or "organizations"
                raise ProviderUnavailable(
                    "PORTAL_OIDC_ISSUER is that of all directories of the identity provider; set it to the issuer of"
                    " one directory, which has its id in place of common."
                )
            raise ProviderUnavailable(
                "The identity provider gives itself another name than PORTAL_OIDC_ISSUER; set that to its issuer,"
                " character by character."
            )
        endpoints = _endpoints(said)
        keys = read_keys(self._transport.get(_url(said, "jwks_uri")))
        if not keys:
            raise ProviderUnavailable("The identity provider lists no keys for RS256, ES256 or EdDSA.")
        return _Known(endpoints, keys, self._monotonic())


def _endpoints(said: Mapping[str, Any]) -> Endpoints:
    methods = said.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
    known = methods if isinstance(methods, list) else []
    return Endpoints(
        authorization=_url(said, "authorization_endpoint"),
        token=_url(said, "token_endpoint"),
        device=_url(said, "device_authorization_endpoint") if "device_authorization_endpoint" in said else None,
        says_issuer=said.get("authorization_response_iss_parameter_supported") is True,
        secret_in_body="client_secret_post" in known and "client_secret_basic" not in known,
    )


def _url(said: Mapping[str, Any], name: str) -> str:
    url = said.get(name)
    if not is_https(url):
        raise ProviderUnavailable(f"The configuration of the identity provider has no https URL as {name}.")
    return str(url)


def _client_secret(settings: Settings) -> str:
    path = settings.oidc_client_secret_file
    if path is None:
        return ""
    name = "PORTAL_OIDC_CLIENT_SECRET_FILE"
    try:
        if path.stat().st_mode & 0o027:  # a group may read it, as it may read systemd's credentials
            raise SettingInvalid(f"{name} names a file that is open to others; chmod 600 {path}.")
        secret = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text"
        raise SettingInvalid(f"{name} names {path}, which cannot be read ({reason}).") from None
    if not 0 < len(secret) <= MAX_SECRET or not secret.isprintable():
        raise SettingInvalid(f"{name} names {path}, which must have the client's secret in one line.")
    return secret
