"""Operator tokens and the audit record."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import Field

from core.roles import Permission, Role
from store.tenants import TokenRecord
from web.api.fields import Limit, NumericCursor, Place, RoleName, ShortText, WholeNumber
from web.api.routing import AnswerModel, Answers, Call, RequestModel, Routes, Timestamp

ROUTES = Routes("Tokens")


class TokenRequest(RequestModel):
    """A token to create; without `expires_in_days` it is valid until it is revoked."""

    name: ShortText
    role: RoleName
    expires_in_days: Annotated[int, Field(ge=1, le=3650), WholeNumber] | None = None


class TokenModel(AnswerModel):
    """An operator token without its secret."""

    token_id: str
    name: str
    role: RoleName
    created_at: Timestamp
    expires_at: Timestamp | None
    revoked_at: Timestamp | None


class NewTokenModel(TokenModel):
    """A new token with its secret, which is shown only once."""

    token: str


class TokenList(AnswerModel):
    """Every token, newest first."""

    tokens: list[TokenModel]


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


@ROUTES.add("GET", "/tokens", Permission.TOKENS)
def list_tokens(call: Call) -> TokenList:
    """List operator tokens, newest first, without their secrets."""
    records = call.portal.operators.tokens(call.actor.tenant_id)
    return TokenList(tokens=[_token(record) for record in records])


@ROUTES.add(
    "POST", "/tokens", Permission.TOKENS, Answers("The token with its secret, which is shown only once", status=201)
)
def create_token(call: Call, body: TokenRequest) -> NewTokenModel:
    """Create an operator token; its secret is in this answer only."""
    life = None if body.expires_in_days is None else timedelta(days=body.expires_in_days)
    secret, record = call.portal.operators.create(call.actor, body.name, Role(body.role), life)
    return NewTokenModel.of(record, token_id=record.id, token=secret)


@ROUTES.add(
    "DELETE",
    "/tokens/{token_id}",
    Permission.TOKENS,
    Answers("The token is revoked at once; a repeat gets the same answer"),
)
def revoke_token(call: Call, token_id: str) -> TokenModel:
    """Revoke an operator token."""
    return _token(call.portal.operators.revoke(call.actor, token_id))


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


def _token(record: TokenRecord) -> TokenModel:
    return TokenModel.of(record, token_id=record.id)
