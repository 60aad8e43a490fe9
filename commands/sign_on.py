"""Logs an operator in by an identity provider, with the device flow (RFC 8628)."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from commands.context import require
from commands.errors import CliError, Refused, Unreachable
from commands.output import Output, clean

if TYPE_CHECKING:
    from commands.client import Client

GRANT = "urn:ietf:params:oauth:grant-type:device_code"
CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 20.0
MAX_ANSWER = 256 * 1024  # bytes
INTERVAL, SLOWER = 5.0, 5.0  # seconds between two polls, and by how many more if the provider asks for it
MAX_INTERVAL, MAX_WAIT = 60.0, 3600.0
EXPIRED = "The code has expired before it was entered."


@dataclass(frozen=True)
class Provider:
    """What the portal says of the identity provider; ``ca_file`` has the CAs to trust, if not the system's."""

    client_id: str
    scopes: str
    device_endpoint: str
    token_endpoint: str
    ca_file: str | None


@dataclass(frozen=True)
class DeviceCode:
    """A login that waits for somebody; ``until`` is by the monotonic clock, ``verifier`` that of PKCE (RFC 7636)."""

    code: str
    verifier: str
    interval: float
    until: float


def log_in(client: Client, out: Output, tenant: str | None) -> str:
    """Return an operator token for whoever enters the code that is shown.

    Raises ``CliError`` if the login is refused or takes too long, ``Unreachable`` if the provider does not answer.
    """
    told = client.call("GET", "/oidc/configuration", anonymous=True).json()
    with _provider(told) as provider:
        id_token = _poll(provider, _begin(provider, out))
    return _exchange(client, out, id_token, tenant)


@contextlib.contextmanager
def _provider(told: Mapping[str, Any]) -> Iterator[Provider]:
    endpoints = ("device_authorization_endpoint", "token_endpoint")
    require(dict(told), "client_id", "scopes", *endpoints)
    for name in endpoints:
        if urlsplit(told[name]).scheme != "https":
            raise Unreachable(f"The {name} that the portal names does not begin with https://.")
    with contextlib.ExitStack() as stack:
        ca_file = None
        if isinstance(told.get("ca"), str):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            ca_file = str(Path(folder, "ca.pem"))
            Path(ca_file).write_text(told["ca"], encoding="utf-8")
        device, token = (str(told[name]) for name in endpoints)
        yield Provider(told["client_id"], told["scopes"], device, token, ca_file)


def _begin(provider: Provider, out: Output) -> DeviceCode:
    """Ask for a code, and show it (RFC 8628 sections 3.1 to 3.3).

    Keycloak wants PKCE here, too, of a client that has to use it; a provider that does not know it ignores it.
    """
    verifier = secrets.token_urlsafe(48)
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    fields = {
        "client_id": provider.client_id,
        "scope": provider.scopes,
        "code_challenge": challenge,
        "code_challenge_method": "S256",
    }
    status, answer = _post(provider, provider.device_endpoint, fields)
    if status != 200:
        raise CliError(f"The identity provider gives no code ({_error_of(status, answer)}).")
    names = ("device_code", "user_code", "verification_uri")
    if not all(isinstance(answer.get(name), str) for name in names):
        raise Unreachable("The identity provider's answer has no code, or no address to enter it at.")
    where, code = clean(answer["verification_uri"]), clean(answer["user_code"])
    out.note(f"Open {where} in a browser, log in, and enter the code {code}")
    if _is_web(whole := answer.get("verification_uri_complete")):
        out.note(f"Or open this, which has the code in it: {clean(whole)}")
    wait = _number(answer.get("expires_in"), MAX_WAIT, otherwise=600.0)
    out.note("Waiting for you; Ctrl-C gives up.")
    interval = _number(answer.get("interval"), MAX_INTERVAL, otherwise=INTERVAL)
    return DeviceCode(answer["device_code"], verifier, interval, time.monotonic() + wait)


def _poll(provider: Provider, waiting: DeviceCode) -> str:
    """Return the ID token as soon as there is one (RFC 8628 sections 3.4 and 3.5)."""
    fields = {
        "grant_type": GRANT,
        "device_code": waiting.code,
        "client_id": provider.client_id,
        "code_verifier": waiting.verifier,
    }
    interval = waiting.interval
    while time.monotonic() + interval <= waiting.until:
        time.sleep(interval)
        try:
            status, answer = _post(provider, provider.token_endpoint, fields)
        except _TimedOut:
            interval = min(interval * 2, MAX_INTERVAL)
            continue
        if status == 200:
            require(dict(answer), "id_token")
            return str(answer["id_token"])
        match answer.get("error"):
            case "authorization_pending":
                pass
            case "slow_down":
                interval = min(interval + SLOWER, MAX_INTERVAL)
            case "expired_token":
                break
            case "access_denied" | "authorization_declined":  # the second one is Entra's
                raise CliError("The login was refused at the identity provider. Nothing was saved.")
            case _:
                raise CliError(f"The identity provider has ended the login ({_error_of(status, answer)}).")
    raise CliError(EXPIRED, hints=["To get another one, run the command again."])


def _exchange(client: Client, out: Output, id_token: str, tenant: str | None) -> str:
    """Return the portal's operator token for the ID token; ask for the tenant if there are several."""
    while True:
        body = {"id_token": id_token} | ({} if tenant is None else {"tenant": tenant})
        try:
            answer = client.call("POST", "/oidc/tokens", body=body, anonymous=True).json()
        except Refused as error:
            if error.code != "tenant_needed":
                raise
            if not sys.stdin.isatty():
                raise CliError(error.sentence, hints=["Choose it with --tenant NAME."]) from None
            out.note(error.sentence)
            tenant = str(click.prompt("Tenant", err=True))
            continue
        require(answer, "token")
        return str(answer["token"])


class _TimedOut(Unreachable):
    """The identity provider has not answered in time; a poll is repeated."""


def _post(provider: Provider, url: str, fields: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
    import requests  # imported by what makes a call

    origin = f"https://{urlsplit(url).netloc}"
    try:
        with requests.post(
            url,
            data=fields,
            headers={"Accept": "application/json"},
            auth=lambda request: request,  # keeps requests from reading ~/.netrc
            verify=provider.ca_file or True,
            timeout=(CONNECT_SECONDS, ANSWER_SECONDS),
            allow_redirects=False,
            stream=True,
        ) as response:
            content = bytearray()
            for chunk in response.iter_content(65536):
                content += chunk
                if len(content) > MAX_ANSWER:
                    break
    except requests.exceptions.SSLError:
        raise Unreachable(f"The certificate of {origin} is not trusted.") from None
    except requests.Timeout:
        raise _TimedOut(f"The identity provider at {origin} does not answer.") from None
    except (requests.RequestException, OSError) as error:
        raise Unreachable(f"There is no connection to {origin} ({type(error).__name__}).") from None
    try:
        answer = json.loads(content) if len(content) <= MAX_ANSWER else None
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or 300 <= response.status_code < 400:
        raise Unreachable(f"The answer of {origin} is not one of an identity provider (status {response.status_code}).")
    return response.status_code, answer


def _error_of(status: int, answer: Mapping[str, Any]) -> str:
    return clean(answer.get("error") or f"status {status}")[:64]


def _is_web(url: object) -> bool:
    return isinstance(url, str) and url.startswith("https://")


def _number(value: object, most: float, *, otherwise: float) -> float:
    """Return a number of seconds from an answer, or another one if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        return otherwise
    return min(float(value), most)
