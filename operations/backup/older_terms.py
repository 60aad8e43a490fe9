"""Says which terms a restored backup brings back as they were: those by which devices are admitted and certified."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection

from core.states import ManufacturerStatus
from operations.backup.revocations import Tables
from store import copy as store_copy

# What is counted, recorded or kept revoked by itself, and is no term.
_NO_TERMS = {"uses", "status", "proven_at", "nonce", "nonce_expires_at", "revoked_at", "removed_at", "updated_at"}
_NO_TERMS |= {"members", "description"}  # of groups
_MANUFACTURER, _TOKEN, _PROFILE, _GROUP = "manufacturer", "enrolment token", "certificate profile", "group"
_TABLES = {
    _MANUFACTURER: "manufacturers",
    _TOKEN: "enrolment_tokens",
    _PROFILE: "certificate_profiles",
    _GROUP: "device_groups",
}
_SHOWN = {
    "der": "certificate",
    "attestation_policy_id": "attestation",
    "profile_id": "profile",
    "uses_allowed": "count",
}
_BY_CERTIFICATE = {"fingerprint", "not_after"}  # which change with it


def older_terms(tx: Connection, replaced: Tables, *, now: datetime) -> Iterator[str]:
    """Yield a line for each manufacturer, token and profile whose terms were others in the replaced database.

    A removed profile that exists again is one. Those that admit nobody are left out.
    """
    policies = {row["id"]: row["version"] for row in replaced("attestation_policies")}
    older = {
        row["id"] for row in store_copy.rows(tx, "attestation_policies") if row["version"] != policies.get(row["id"])
    }
    for kind, table in _TABLES.items():
        since = {row["id"]: row for row in replaced(table)}
        for row in sorted(store_copy.rows(tx, table), key=lambda row: (row["name"], row["id"])):
            newer = since.get(row["id"])
            if newer is None or _admits_nobody(kind, newer, now):
                continue
            what = f"{kind} {row['name']} ({row['id']})"
            if kind == _PROFILE and row["removed_at"] is None and newer["removed_at"] is not None:
                yield f"{what}: it was removed since, and exists again"
            elif changed := sorted(_changed(row, newer, older)):
                yield f"{what}: {', '.join(changed)}"


def _admits_nobody(kind: str, row: dict[str, Any], now: datetime) -> bool:
    if kind == _MANUFACTURER:
        return bool(row["status"] == ManufacturerStatus.REMOVED)
    return kind == _TOKEN and (row["revoked_at"] is not None or row["expires_at"] <= now)


def _changed(row: dict[str, Any], newer: dict[str, Any], older_policies: Collection[str]) -> Iterator[str]:
    for name in row.keys() - _NO_TERMS - _BY_CERTIFICATE:
        of_policy = name == "attestation_policy_id" and row[name] in older_policies
        if of_policy or row[name] != newer.get(name):
            yield _SHOWN.get(name, name)
