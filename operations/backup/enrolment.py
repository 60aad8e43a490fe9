"""Keeps out, in a database that was put back, the enrolment tokens and manufacturers that have ended since its copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import ManufacturerStatus
from store.tables import EnrolmentToken, Manufacturer


@dataclass(frozen=True, slots=True)
class Ended:
    """Something that the copy had as good: ``target`` and ``action`` are those of the audit entry."""

    tenant_id: str
    target: str
    action: str
    what: str
    at: datetime


def end_tokens(tx: Connection, replaced: Iterable[dict[str, Any]]) -> Iterator[Ended]:
    """Revoke what was revoked since, and count what was used since: a use that is forgotten would let one more in."""
    for row in replaced:
        ours = (EnrolmentToken.id == row["id"], EnrolmentToken.uses < row["uses"])
        tx.execute(sa.update(EnrolmentToken).where(*ours).values(uses=row["uses"]))
        if row["revoked_at"] is None:
            continue
        open_ones = (EnrolmentToken.id == row["id"], EnrolmentToken.revoked_at.is_(None))
        done = tx.execute(sa.update(EnrolmentToken).where(*open_ones).values(revoked_at=row["revoked_at"]))
        if done.rowcount:
            target = f"enrolment_token:{row['id']}"
            what = f"enrolment token {row['name']}"
            yield Ended(row["tenant_id"], target, "enrolment_token:revoke", what, row["revoked_at"])


def remove_manufacturers(tx: Connection, replaced: Iterable[dict[str, Any]]) -> Iterator[Ended]:
    """Remove what was removed since."""
    for row in replaced:
        if row["status"] != ManufacturerStatus.REMOVED:
            continue
        ours = (Manufacturer.id == row["id"], Manufacturer.status != ManufacturerStatus.REMOVED)
        values = {"status": ManufacturerStatus.REMOVED, "removed_at": row["removed_at"]}
        if tx.execute(sa.update(Manufacturer).where(*ours).values(values)).rowcount:
            target, what = f"manufacturer:{row['id']}", f"manufacturer {row['name']}"
            yield Ended(row["tenant_id"], target, "manufacturer:remove", what, row["removed_at"])
