"""How the CAs of tenants and their keys are named; those of the first tenant have no tenant in their names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

from core.errors import StateConflict
from pki.issuers import COMMON_NAME_LIMIT
from pki.keys.stores import ROOT, KeyStores
from store.issuers import IssuerRecord
from store.tables import DEFAULT_TENANT

FIRST_ISSUING = "issuing-1"
MAX_ISSUERS = 100
_MAX_NAME = 63  # characters of the name of a key
_HASH_DIGITS = 16


def issuing_name(tenant_id: str, number: int) -> str:
    """Return the name of an issuing CA of a tenant, which is that of its key, too."""
    return _named(tenant_id, f"issuing-{number}")


def is_issuing_name(tenant_id: str, name: str) -> bool:
    """Return whether an issuing CA of this tenant may have the name."""
    found = re.fullmatch(r"(?:.*-)?issuing-([1-9][0-9]*)", name)
    return found is not None and name == issuing_name(tenant_id, int(found[1]))


def root_names(tenant_id: str) -> Iterator[str]:
    """Yield the names that a tenant's own root may have, the first one to be used first."""
    yield _named(tenant_id, ROOT)
    yield from (_named(tenant_id, f"{ROOT}-{number}") for number in range(2, MAX_ISSUERS))


def key_names(tenant_id: str) -> Iterator[str]:
    """Yield all names that CAs of a tenant, and their keys, may have."""
    yield from root_names(tenant_id)
    yield from (issuing_name(tenant_id, number) for number in range(1, MAX_ISSUERS))


def common_name(ca_name: str, tenant_id: str, role: str) -> str:
    """Return the common name of a CA, which holds the tenant's name; if that is too long, a part of it and its hash.

    ``role`` is such as ``Issuing CA 1``.
    """
    if tenant_id == DEFAULT_TENANT:
        return f"{ca_name} {role}"
    room = COMMON_NAME_LIMIT - len(f"{ca_name}  {role}")
    if len(tenant_id) <= room:
        return f"{ca_name} {tenant_id} {role}"
    return f"{_shortened(tenant_id, COMMON_NAME_LIMIT - len(f' {role}'))} {role}"


def next_number(issuers: Sequence[IssuerRecord], keys: KeyStores, tenant_id: str) -> int:
    """Return the number of the tenant's next issuing CA, which has neither a certificate nor a key yet.

    A key without a CA was left by a call that was cut off, by a tenant that was removed, whose keys are destroyed, or
    by a database that was restored since: it may have signed certificates that are not known here, so neither it nor
    its name is used again.
    """
    taken = {record.name for record in issuers}
    numbers = ((n, issuing_name(tenant_id, n)) for n in range(2 if tenant_id == DEFAULT_TENANT else 1, MAX_ISSUERS))
    free = (number for number, name in numbers if name not in taken and not keys.is_taken(name))
    if (found := next(free, None)) is None:
        raise StateConflict(f"There have been {MAX_ISSUERS} issuing CAs of {tenant_id}, and there can be no more.")
    return found


def _named(tenant_id: str, name: str) -> str:
    return name if tenant_id == DEFAULT_TENANT else f"{_shortened(tenant_id, _MAX_NAME - len(name) - 1)}-{name}"


def _shortened(tenant_id: str, room: int) -> str:
    if len(tenant_id) <= room:
        return tenant_id
    digest = hashlib.sha256(tenant_id.encode()).hexdigest()[:_HASH_DIGITS]
    return f"{tenant_id[: room - _HASH_DIGITS - 1].rstrip('-')}-{digest}"
