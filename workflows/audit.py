"""The audit record: who did what, append-only, each entry with the hash of the one before it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.engine import Connection

from store import audit

_HASHED = ("number", "previous_hash", "actor", "action", "object", "outcome", "request_id", "address", "detail")


@dataclass(frozen=True, slots=True)
class Actor:
    """The client of a request.

    ``name`` is what the audit record shows: ``NAME (ID)`` of an operator's token, the credential of a
    device, ``anyone``, or ``portal`` for a job.
    """

    tenant_id: str
    name: str
    role: str
    request_id: str
    address: str


def record(
    tx: Connection,
    actor: Actor,
    action: str,
    object: str,  # noqa: A002 - the field's name in the record
    *,
    at: datetime,
    outcome: str = "done",
    **detail: Any,
) -> None:
    """Append an entry in the transaction that makes the change it is about.

    ``action`` is a tag such as ``device:register``; ``object`` names what it was done to, such as ``device:<id>``.
    ``detail`` never holds a secret: no key, password, token or link. Call it last in a transaction: from here to its
    end, other transactions that append wait for this one.
    """
    record_all(tx, actor, [(action, object, detail)], at=at, outcome=outcome)


def record_all(
    tx: Connection,
    actor: Actor,
    acts: Iterable[tuple[str, str, Mapping[str, Any]]],
    *,
    at: datetime,
    outcome: str = "done",
) -> None:
    """Append an entry for each of ``acts`` (action, object, detail), as ``record`` does for one."""
    number, previous_hash = audit.lock_audit_head(tx, actor.tenant_id)
    entries: list[dict[str, Any]] = []
    for action, object_, detail in acts:
        number += 1
        entry: dict[str, Any] = {
            "number": number,
            "previous_hash": previous_hash,
            "at": at,
            "actor": actor.name[:128],
            "action": action,
            "object": object_[:128],
            "outcome": outcome,
            "request_id": actor.request_id,
            "address": actor.address[:64],
            "detail": dict(detail),
        }
        entry["hash"] = previous_hash = entry_hash(actor.tenant_id, entry)
        entries.append(entry)
    if entries:
        audit.add_audit_entries(tx, actor.tenant_id, entries)


def entry_hash(tenant_id: str, entry: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hex, of an entry in canonical JSON, which contains the hash of the entry before it."""
    at = entry["at"].astimezone(UTC).isoformat(timespec="microseconds")
    values = [tenant_id, at, *(entry[name] for name in _HASHED)]
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class AuditVerdict:
    """The result of a check: how many entries are intact, the hash of the last one, and what is wrong after it."""

    entries: int
    head: str
    problem: str | None


def verify(tx: Connection, tenant_id: str) -> AuditVerdict:
    """Check the hashes from the first entry to the last; the result names the first altered, removed or moved one."""
    number, previous_hash = 0, "0" * 64
    with contextlib.closing(audit.audit_chain(tx, tenant_id)) as entries:
        for entry in entries:
            problem = None
            if entry["number"] != number + 1:
                problem = f"Entry {number + 1} is missing: after {number} comes {entry['number']}."
            elif entry["previous_hash"] != previous_hash:
                problem = f"Entry {number + 1} does not follow entry {number}: one of them was replaced or moved."
            elif entry["hash"] != entry_hash(tenant_id, entry):
                problem = f"Entry {number + 1} was altered: {entry['action']} of {entry['object']}."
            if problem is not None:
                return AuditVerdict(number, previous_hash, problem)
            number, previous_hash = entry["number"], entry["hash"]
    last_number, last_hash = audit.audit_head(tx, tenant_id)
    if last_number > number:
        return AuditVerdict(number, previous_hash, f"Entry {number + 1} is missing, at the end of the record.")
    if (last_number, last_hash) != (number, previous_hash):
        return AuditVerdict(number, previous_hash, f"Entry {number} is not the one that was recorded last.")
    return AuditVerdict(number, previous_hash, None)


def system_actor(tenant_id: str) -> Actor:
    """Return the portal itself as the actor, for what no client asked for."""
    return Actor(tenant_id=tenant_id, name="portal", role="system", request_id="", address="")
