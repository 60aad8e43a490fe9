"""The saved logins: a file for each login profile, with the logins of the tenants of one portal.

A login profile is not a certificate profile: it is the name under which ``portal login`` saves the URL of a portal, its
CA file and a token.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands.errors import Misused
from commands.files import reason, replace_file

DEFAULT_TENANT = "default"
DEFAULT_PROFILE = "default"
MAX_LOGIN = 64 * 1024  # bytes of a login file that are read
_PROFILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Login:
    """What ``portal login`` has saved for a tenant."""

    url: str
    ca_file: str | None
    token: str
    tenant: str = DEFAULT_TENANT

    def __repr__(self) -> str:  # never the token
        return f"Login(url={self.url!r})"


def login_path(environment: Mapping[str, str], profile: str = DEFAULT_PROFILE) -> Path:
    """Return the path of a login profile, in the XDG configuration folder; raises ``Misused`` if it cannot be a name.

    The file of ``default`` is the only one that versions before had.
    """
    base = environment.get("XDG_CONFIG_HOME", "")
    folder = (Path(base) if base.startswith("/") else Path.home() / ".config") / "device-onboarding-portal"
    if profile == DEFAULT_PROFILE:
        return folder / "login.json"
    if _PROFILE.fullmatch(profile) is None:
        raise Misused("The name of a login profile is 1 to 63 letters, digits, dots, - and _, such as factory.")
    return folder / "profiles" / f"{profile}.json"


def saved_profiles(environment: Mapping[str, str]) -> list[str]:
    """Return the names of the login profiles that are saved, ``default`` first."""
    default = login_path(environment)
    with contextlib.suppress(OSError):
        names = sorted(path.stem for path in (default.parent / "profiles").glob("*.json"))
        others = [name for name in names if _PROFILE.fullmatch(name) and name != DEFAULT_PROFILE]
        return [*([DEFAULT_PROFILE] if os.path.lexists(default) else []), *others]
    return []


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
                hints=["Revoke that token, then delete the login: portal logout", "Save another token: portal login"],
            )
        if status.st_uid != os.geteuid():
            raise Misused(f"The saved login {path} belongs to another user.", hints=["Save one of yours: portal login"])
        content = file.read(MAX_LOGIN)
    try:
        saved: dict[str, Any] = json.loads(content)
        return [_parse_login(one) for one in (saved, *saved.get("others", ()))]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Misused(f"The saved login {path} is damaged.", hints=["Save it again: portal login"]) from None


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
        path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
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
