"""Determines the portal's URL, CA file and token, from options, the environment or the saved login."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from commands.errors import Misused
from commands.files import read_secret, reason
from commands.logins import DEFAULT_PROFILE, Login, login_path, read_login, read_logins, saved_profiles

DEFAULT_URL = "https://127.0.0.1:8443"
STDIN = "-"
SAVED_LOGIN = "the saved login"  # where a token comes from
OVERRIDDEN = ("PORTAL_URL", "PORTAL_TOKEN")  # what a login profile of the environment must not be mixed with


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """The connection options; ``None`` if not given."""

    url: str | None = None
    ca_file: str | None = None
    token: str | None = None
    token_file: str | None = None
    tenant: str | None = None
    login_profile: str | None = None


@dataclass(frozen=True)
class ConnectionSettings:
    """How to connect; without ``ca_file`` the CAs of the system are trusted; ``token_source`` is for messages."""

    url: str
    ca_file: Path | None
    token: str | None
    token_source: str

    def is_of(self, login: Login) -> bool:
        """Return whether a saved login is what is used: its portal, and its token."""
        return self.token_source == SAVED_LOGIN and (self.url, self.token) == (login.url, login.token)

    def __repr__(self) -> str:  # never the token
        return f"ConnectionSettings(url={self.url!r}, ca_file={self.ca_file!r}, token_source={self.token_source!r})"


def resolve(given: ConnectionOptions, environment: Mapping[str, str], *, use_login: bool = True) -> ConnectionSettings:
    """Combine the sources: options override the environment, which overrides the saved login.

    A saved token is sent only to the portal that it was saved for. A ``login_profile`` and a ``tenant`` choose among
    the saved logins, whatever the environment says. Raises ``Misused``.
    """
    if use_login and (given.tenant is not None or given.login_profile is not None):
        return _chosen(given, environment)
    if use_login and environment.get("PORTAL_PROFILE"):
        _refuse_mixture(environment)
        _saved_as(chosen_profile(given, environment), environment)
    url, ca, token, source = _explicit(given, environment)
    path = login_path(environment, chosen_profile(given, environment)) if use_login else None
    login = None if path is None or (url and ca and token) else read_login(path)
    url = portal_url(url or (login.url if login else DEFAULT_URL))
    if login is not None and login.url == url:
        ca = ca or login.ca_file
        if not token:
            token, source = login.token, SAVED_LOGIN
    return ConnectionSettings(url, _ca_file(ca), _token(token, source), source)


def chosen_profile(given: ConnectionOptions, environment: Mapping[str, str]) -> str:
    """Return the name of the login profile that an option or ``PORTAL_PROFILE`` chooses, else ``default``."""
    return given.login_profile or environment.get("PORTAL_PROFILE") or DEFAULT_PROFILE


def _refuse_mixture(environment: Mapping[str, str]) -> None:
    """Raise ``Misused`` if the environment names two portals: a command must not go to the one that was not meant."""
    if also := [name for name in OVERRIDDEN if environment.get(name)]:
        raise Misused(
            f"PORTAL_PROFILE and {also[0]} are both set, so it is not clear which portal is meant.",
            hints=[f"To use the login profile, run: unset {' '.join(OVERRIDDEN)}", "Else run: unset PORTAL_PROFILE"],
        )


def _saved_as(profile: str, environment: Mapping[str, str]) -> list[Login]:
    """Return the logins of a profile; raises ``Misused`` if there is none."""
    if known := list(read_logins(login_path(environment, profile))):
        return known
    names = ", ".join(saved_profiles(environment))
    option = "" if profile == DEFAULT_PROFILE else f" --profile {profile}"
    raise Misused(
        f"There is no login profile {profile}." if option else "There is no saved login.",
        hints=[
            f"There are: {names}" if names else "There is none at all.",
            f"To save it, run: portal login{option} --url URL --ca-file FILE --token-file FILE",
            *([f"A certificate profile stands after the command, as in: list{option}"] if option else []),
        ],
    )


def _chosen(given: ConnectionOptions, environment: Mapping[str, str]) -> ConnectionSettings:
    """Return the settings of a saved login; nothing of the environment but a CA file, if none was saved."""
    option = "--tenant" if given.login_profile is None else "--profile"
    if given.token is not None or given.token_file is not None:
        raise Misused(f"Use either {option}, which chooses a saved login, or a token, which is of one tenant.")
    profile = chosen_profile(given, environment)
    if given.login_profile is None:
        login = _of_tenant(given, read_logins(login_path(environment, profile)))
    elif given.tenant is not None:
        login = _of_tenant(given, _saved_as(profile, environment))
    else:
        login = _saved_as(profile, environment)[0]
        if given.url and portal_url(given.url) != login.url:
            raise Misused(f"The login profile {profile} is one of {login.url}; use either --profile or --url.")
    ca = given.ca_file or login.ca_file or environment.get("PORTAL_CA") or None
    return ConnectionSettings(login.url, _ca_file(ca), _token(login.token, SAVED_LOGIN), SAVED_LOGIN)


def _of_tenant(given: ConnectionOptions, known: Sequence[Login]) -> Login:
    """Return the login of a tenant among those of one profile; raises ``Misused``."""
    tenant = given.tenant or ""
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
    return login


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
    import ipaddress

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
    import ssl  # with the calls that need a portal, not with the help

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
