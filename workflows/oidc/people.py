"""Who a person is, and in which tenants with which role, by what the identity provider says of them."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping
from typing import Any

from store.tenants import MAX_SUBJECT
from workflows.oidc.refusals import NoRole

MAX_NAME = 64
MAX_GROUPS = 10_000
_NAMES = ("name", "preferred_username", "email", "sub")
_ABBREVIATED = "sha256:"


def subject_of(issuer: str, subject: str) -> str:
    """Return ``iss#sub``, which is one person's for ever (OpenID Connect Core 1.0 §5.7).

    In place of a subject that is too long for the audit record there are 64 bits of its SHA-256.
    """
    whole = f"{issuer}#{subject}"
    if len(whole) <= MAX_SUBJECT:
        return whole
    return f"{issuer}#{_ABBREVIATED}{hashlib.sha256(subject.encode()).hexdigest()[:16]}"


def name_of(claims: Mapping[str, Any]) -> str:
    """Return the name to show, of at most 64 characters, with nothing in it that a terminal or page would act on."""
    for claim in _NAMES:
        if isinstance(value := claims.get(claim), str) and (name := _plain(value)):
            return name
    return "somebody"


def groups_of(claims: Mapping[str, Any], claim: str) -> frozenset[str]:
    """Return the groups in a claim, or in one within objects, whose names are joined by dots; raises ``NoRole``."""
    found = _within(claims, claim.split("."))
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list) or len(found) > MAX_GROUPS:
        elsewhere = claims.get("_claim_names")  # OpenID Connect Core 1.0 §5.6.2; Entra does so beyond 200 groups
        if (isinstance(elsewhere, Mapping) and claim in elsewhere) or claims.get("hasgroups") is True:
            raise NoRole(
                "The identity provider does not list your groups, since they are too many; have it list fewer."
            )
        raise NoRole("The identity provider does not say which groups you are in; an admin of it has to add them.")
    return frozenset(group for group in found if isinstance(group, str))


def _within(found: object, names: list[str]) -> object:
    """Return what objects have under these names, of which each may have dots in it, as a client id of Keycloak."""
    if not names:
        return found
    for number in range(len(names), 0, -1):
        if isinstance(found, Mapping) and (name := ".".join(names[:number])) in found:
            return _within(found[name], names[number:])
    return None


def _plain(text: str) -> str:
    shown = "".join(" " if character.isspace() else character for character in text[: 4 * MAX_NAME])
    shown = "".join(character for character in shown if not unicodedata.category(character).startswith("C"))
    return " ".join(shown.split())[:MAX_NAME].strip()
