"""Determines the portal's URL, CA file and token, from options, the environment or the saved login."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import ssl
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from commands.errors import Misused
from commands.files import read_secret, reason, replace_file

DEFAULT_URL = "https://127.0.0.1:8443"
DEFAULT_TENANT = "default"
STDIN = "-"
MAX_LOGIN = 64 * 1024  # bytes of a login file that are read


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """The connection options; ``None`` if not given."""

    url: str | None = None
    ca_file: str | None = None
    token: str | None = None
    token_file: str | None = None
    tenant: str | None = None


@dataclass(frozen=True)
class ConnectionSettings:
    """How to connect; without ``ca_file`` the CAs of the system are trusted; ``token_source`` is for messages."""

    url: str
    ca_file: Path | None
    token: str | None
    token_source: str

    def __repr__(self) -> str:  # never the token
        return f"ConnectionSettings(url={self.url!r}, ca_file={self.ca_file!r}, token_source={self.token_source!r})"


@dataclass(frozen=True)
class Login:
    """What ``portal login`` has saved for a tenant."""

    url: str
    ca_file: str | None
    token: str
    tenant: str = DEFAULT_TENANT

    def __repr__(self) -> str:  # never the token
        return f"Login(url={self.url!r})"


def login_path(environment: Mapping[str, str]) -> Path:
    """Return the path of the saved login, in the XDG configuration folder."""
    base = environment.get("XDG_CONFIG_HOME", "")
    folder = Path(base) if base.startswith("/") else Path.home() / ".config"
    return folder / "device-onboarding-portal" / "login.json"


def resolve(given: ConnectionOptions, environment: Mapping[str, str], *, use_login: bool = True) -> ConnectionSettings:
    """Combine the sources: options override the environment, which overrides the saved login.

    A saved token is sent only to the portal that it was saved for. A ``tenant`` chooses among the saved logins. Raises
    ``Misused``.
    """
    if given.tenant is not None and use_login:
        return _of_tenant(given, given.tenant, environment)
    url, ca, token, source = _explicit(given, environment)
    login = None if (url and ca and token) or not use_login else read_login(login_path(environment))
    url = portal_url(url or (login.url if login else DEFAULT_URL))
    if login is not None and login.url == url:
        ca = ca or login.ca_file
        if not token:
            token, source = login.token, "the saved login"
    return ConnectionSettings(url, _ca_file(ca), _token(token, source), source)


def _of_tenant(given: ConnectionOptions, tenant: str, environment: Mapping[str, str]) -> ConnectionSettings:
    if given.token is not None or given.token_file is not None:
        raise Misused("Use either --tenant, which chooses a saved login, or a token, which is of one tenant.")
    known = read_logins(login_path(environment))
    login = next((login for login in known if login.tenant == tenant), None)
    if login is None or (given.url and portal_url(given.url) != login.url):
        names = ", ".join(login.tenant for login in known)
        raise Misused(
            f"There is no saved login of the tenant {tenant if tenant.isprintable() else ascii(tenant)}.",
            hints=[
                f"There are those of: {names}" if names else "There is none at all.",
                "To save one, run: portal login --token-file FILE, with a token of the tenant",
            ],
        )
    ca = given.ca_file or login.ca_file or environment.get("PORTAL_CA") or None
    return ConnectionSettings(login.url, _ca_file(ca), _token(login.token, "the saved login"), "the saved login")


def _explicit(given: ConnectionOptions, environment: Mapping[str, str]) -> tuple[str, str | None, str, str]:
    if given.token is not None and given.token_file is not None:
        raise Misused("Use either --token or --token-file.")
    if given.token_file is not None or given.token == STDIN:
        path = given.token_file or STDIN
        token, source = read_secret(path, "token"), "standard input" if path == STDIN else path
    elif given.token is not None:
        token, source = given.token, "--token"
    else:
        token, source = environment.get("PORTAL_TOKEN", ""), "PORTAL_TOKEN"
    url = given.url or environment.get("PORTAL_URL", "")
    return url, given.ca_file or environment.get("PORTAL_CA") or None, token, source if token else "nowhere"


def portal_url(text: str) -> str:
    """Return the URL without a final slash; raises ``Misused`` if it is invalid or would send a token unencrypted."""
    try:
        parts = urlsplit(text.strip())
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("https", "http") or parts.query or parts.fragment or "@" in parts.netloc:
        raise Misused("The portal's URL must look like https://portal.example.com:8443 (--url or PORTAL_URL).")
    if parts.scheme == "http" and not is_loopback(host):
        raise Misused("The portal's URL must begin with https://; http:// is allowed only for a loopback address.")
    return text.strip().rstrip("/")


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is a loopback address or localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _token(token: str, source: str) -> str | None:
    if token and not re.fullmatch(r"[!-~]{1,4096}", token):
        raise Misused(f"The token from {source} has invalid characters; check that it was copied completely.")
    return token or None


def _ca_file(path: str | None) -> Path | None:
    if path is None:
        return None
    ca_file = Path(path).expanduser().absolute()
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=ca_file)
    except ssl.SSLError:
        raise Misused(f"The CA file {ca_file} contains no PEM certificate.") from None
    except OSError as error:
        raise Misused(
            f"The CA file {ca_file} cannot be read: {reason(error)}.",
            hints=["It is ca.pem in the portal's data folder; set it with --ca-file or PORTAL_CA."],
        ) from None
    return ca_file


def read_login(path: Path) -> Login | None:
    """Return the login that was saved last, or ``None``; raises ``Misused`` if others can read it."""
    known = read_logins(path)
    return known[0] if known else None


def read_logins(path: Path) -> Sequence[Login]:
    """Return the saved logins, that which was saved last first, each of another tenant of one portal.

    Raises ``Misused`` if others can read them.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise Misused(f"The saved login {path} cannot be read: {reason(error)}.") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise Misused(
                f"The saved login {path} is readable by others, so they may know its token.",
                hints=["Revoke that token, then run: portal logout; portal login"],
            )
        if status.st_uid != os.geteuid():
            raise Misused(f"The saved login {path} belongs to another user; run portal login as yourself.")
        content = file.read(MAX_LOGIN)
    try:
        saved: dict[str, Any] = json.loads(content)
        return [_parse_login(one) for one in (saved, *saved.get("others", ()))]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Misused(f"The saved login {path} is damaged; run portal login again.") from None


def _parse_login(saved: Mapping[str, Any]) -> Login:
    """Return a login; raises ``KeyError`` or ``TypeError``."""
    url, ca_file, token, tenant = saved["url"], saved["ca_file"], saved["token"], saved.get("tenant", DEFAULT_TENANT)
    if not all(isinstance(value, str) for value in (url, token, tenant, ca_file or "")):
        raise TypeError("not a text")
    return Login(url, ca_file, token, tenant)


def _content_of(login: Login) -> dict[str, Any]:
    content = {"url": login.url, "ca_file": login.ca_file, "token": login.token}
    return content if login.tenant == DEFAULT_TENANT else content | {"tenant": login.tenant}


def save_login(path: Path, login: Login) -> None:
    """Write the login to a 0600 file in a 0700 folder; raises ``Misused``.

    Logins of other tenants of the same portal stay; those of another portal are replaced.
    """
    others: list[Login] = []
    with contextlib.suppress(Misused):  # what cannot be used is replaced
        others = [one for one in read_logins(path) if one.url == login.url and one.tenant != login.tenant]
    content = _content_of(login) | ({"others": [_content_of(one) for one in others]} if others else {})
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, json.dumps(content, indent=2).encode() + b"\n", mode=0o600)
    except OSError as error:
        raise Misused(f"The login cannot be saved to {path}: {reason(error)}.") from None


def remove_login(path: Path) -> bool:
    """Remove the saved login; return whether there was one."""
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise Misused(f"The saved login {path} cannot be removed: {reason(error)}.") from None
    return True
