"""Open the places of the CA keys that the settings name, and say which key is where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from config import Settings
from core.errors import CaKeyUnavailable
from core.states import IssuerKind, IssuerStatus
from pki.keys.files import passphrase
from pki.keys.stores import KeyStores, SharedKeys
from store.issuers import IssuerRecord


def open_keys(settings: Settings, *, make: bool = True, shared: SharedKeys | None = None) -> KeyStores:
    """Return the CA keys of an installation; with ``make`` a missing passphrase file is created.

    Asks no token. ``shared`` gives other nodes their keys. Raises ``CaKeyUnavailable`` if the passphrase of the files
    cannot be read.
    """
    return KeyStores(
        settings.ca_dir,
        passphrase(settings.ca_passphrase.get_secret_value(), settings.secrets_dir / "ca-passphrase", make=make),
        issuing=settings.ca_keys,
        root=settings.root_keys,
        timeout=settings.token_timeout,
        shared=shared,
    )


@dataclass(frozen=True, slots=True)
class ListedKey:
    """A CA's key: its role, how it came to its place (an ``Origin``, ``not here`` or
    ``unusable``), and the place, or what is wrong with it."""

    name: str
    role: str
    origin: str
    place: str


def listed_keys(issuers: Sequence[IssuerRecord], keys: KeyStores) -> Iterator[ListedKey]:
    """Yield the keys of all CAs, then those that have no certificate here; asks no token."""
    for record in issuers:
        retired = "retired " if record.status == IssuerStatus.RETIRED else ""
        yield _listed(record.name, retired + ("root" if record.kind == IssuerKind.ROOT else "issuing"), keys)
    for name in sorted(set(keys.names()) - {record.name for record in issuers}):
        yield _listed(name, "no certificate", keys)


def _listed(name: str, role: str, keys: KeyStores) -> ListedKey:
    if not keys.exists(name):
        return ListedKey(name, role, "not here", "")
    try:
        described = keys.describe(name)
    except CaKeyUnavailable as error:
        return ListedKey(name, role, "unusable", error.detail)
    return ListedKey(name, role, described.origin, described.place)
