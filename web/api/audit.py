"""The audit record: lists of entries, the export of all, and the checkpoints that third parties verify it by."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from core.roles import Permission
from store.audit import Period
from web.api.fields import Limit, NumericCursor, Place, ShortText, Time
from web.api.pki import by_token, cached
from web.api.routing import ANYONE, NDJSON, AnswerModel, Answers, Call, Reply, RequestModel, Routes, Timestamp, in_parts
from workflows.audit import AuditLog

ROUTES = Routes("Audit record")
PLAIN = "text/plain; charset=utf-8"


class AuditQuery(RequestModel):
    """Filters of the audit record."""

    actor: Annotated[Place, Field(description="As in the record, or the name of an operator's token")] | None = None
    action: ShortText | None = None
    object: Place | None = None
    outcome: Literal["done", "refused"] | None = None
    since: Time | None = None
    until: Annotated[Time, Field(description="Entries before this time")] | None = None
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

    A page before it can be short, or even empty: with `actor`, `action` or `outcome`, or an `object` and a time, a
    request stops after it has looked at 1,000 entries.
    """

    entries: list[AuditEntryModel]
    next_cursor: str | None


@ROUTES.add("GET", "/audit", Permission.AUDIT)
def list_audit(call: Call, query: AuditQuery) -> AuditPage:
    """List the audit record, newest first."""
    filters = query.model_dump(exclude={"limit", "cursor", "since", "until"}, exclude_none=True)
    before = None if query.cursor is None else int(query.cursor)
    found, more_before = call.portal.operators.audit(
        call.actor.tenant_id, limit=query.limit, before=before, filters=filters, period=Period(query.since, query.until)
    )
    entries = [AuditEntryModel.of(entry) for entry in found]
    return AuditPage(entries=entries, next_cursor=None if more_before is None else str(more_before))


@ROUTES.add(
    "GET", "/audit/export", Permission.AUDIT, Answers("One line for each entry, oldest first", media_type=NDJSON)
)
def export_audit(call: Call) -> Reply:
    """Export the whole audit record with its hashes."""
    portal, tenant_id = call.portal, call.actor.tenant_id
    return Reply(content=in_parts(portal, tenant_id, portal.audit_logs.of(tenant_id).export()), media_type=NDJSON)


_NOTE = Answers(
    "A signed note (c2sp.org/signed-note) with a checkpoint (c2sp.org/tlog-checkpoint)", media_type="text/plain"
)


@ROUTES.add("GET", "/audit/checkpoint", ANYONE, _NOTE, token_optional=True, errors=(401, 403, 404, 429))
def audit_checkpoint(call: Call) -> Reply:
    """Return the newest checkpoint of the audit record of an operator's tenant, without a token of the first one."""
    return by_token(cached(call, _log(call).newest().encode(), PLAIN, max_age=60))


@ROUTES.add(
    "GET",
    "/audit/key",
    ANYONE,
    Answers("The verifier key of a signed note: name, key id and Ed25519 key", media_type="text/plain"),
    token_optional=True,
    errors=(401, 403, 404, 429),
)
def audit_key(call: Call) -> Reply:
    """Return the public key of the checkpoints of an operator's tenant, without a token of the first one's."""
    return by_token(cached(call, f"{_log(call).verifier}\n".encode(), PLAIN, max_age=60))


@ROUTES.add("GET", "/audit/{log}/checkpoint", ANYONE, _NOTE, errors=(404,))
def audit_checkpoint_of(call: Call, log: str) -> Reply:
    """Return the newest checkpoint of a log: its name is the end of the origin, and says nothing of the tenant."""
    return cached(call, call.portal.audit_logs.newest_of(log).encode(), PLAIN, max_age=60)


def _log(call: Call) -> AuditLog:
    return call.portal.audit_logs.of(call.actor.tenant_id)
