"""The audit record: lists of entries, the export of all, and the checkpoints that third parties verify it by."""

from __future__ import annotations

from typing import Any, Literal

from core.roles import Permission
from web.api.fields import Limit, NumericCursor, Place, ShortText
from web.api.pki import cached
from web.api.routing import ANYONE, NDJSON, AnswerModel, Answers, Call, Reply, RequestModel, Routes, Timestamp

ROUTES = Routes("Audit record")
PLAIN = "text/plain; charset=utf-8"


class AuditQuery(RequestModel):
    """Filters of the audit record."""

    actor: ShortText | None = None
    action: ShortText | None = None
    object: Place | None = None
    outcome: Literal["done", "refused"] | None = None
    limit: Limit = 50
    cursor: NumericCursor | None = None


class AuditEntryModel(AnswerModel):
    """One entry of the audit record."""

    id: int
    at: Timestamp
    actor: str
    action: str
    object: str
    outcome: str
    request_id: str
    address: str
    detail: dict[str, Any]


class AuditPage(AnswerModel):
    """Entries, newest first. Only a null `next_cursor` marks the last page.

    A page before it can be short, or even empty: with `actor`, `action` or `outcome` a request stops after it has
    looked at 1,000 entries.
    """

    entries: list[AuditEntryModel]
    next_cursor: str | None


@ROUTES.add("GET", "/audit", Permission.AUDIT)
def list_audit(call: Call, query: AuditQuery) -> AuditPage:
    """List the audit record, newest first."""
    filters = query.model_dump(exclude={"limit", "cursor"}, exclude_none=True)
    before = None if query.cursor is None else int(query.cursor)
    found, more_before = call.portal.operators.audit(
        call.actor.tenant_id, limit=query.limit, before=before, filters=filters
    )
    entries = [AuditEntryModel.of(entry) for entry in found]
    return AuditPage(entries=entries, next_cursor=None if more_before is None else str(more_before))


@ROUTES.add(
    "GET", "/audit/export", Permission.AUDIT, Answers("One line for each entry, oldest first", media_type=NDJSON)
)
def export_audit(call: Call) -> Reply:
    """Export the whole audit record with its hashes."""
    return Reply(content=call.portal.audit_log.export(call.actor.tenant_id), media_type=NDJSON)


@ROUTES.add(
    "GET",
    "/audit/checkpoint",
    ANYONE,
    Answers(
        "A signed note (c2sp.org/signed-note) with a checkpoint (c2sp.org/tlog-checkpoint)", media_type="text/plain"
    ),
    errors=(404,),
)
def audit_checkpoint(call: Call) -> Reply:
    """Return the newest checkpoint of the audit record."""
    return cached(call, call.portal.audit_log.newest().encode(), PLAIN, max_age=60)


@ROUTES.add(
    "GET",
    "/audit/key",
    ANYONE,
    Answers("The verifier key of a signed note: name, key id and Ed25519 key", media_type="text/plain"),
)
def audit_key(call: Call) -> Reply:
    """Return the public key of the checkpoints."""
    return cached(call, f"{call.portal.audit_log.verifier}\n".encode(), PLAIN, max_age=60)
