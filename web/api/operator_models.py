"""The shapes of requests about operators with those of their answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from web.api.fields import Cursor, Input, Limit, Output, Place, RoleName, ShortText, Timestamp, WholeNumber


class TokenRequest(Input):
    """A token to make; without `expires_in_days` it lasts until it is revoked."""

    name: ShortText
    role: RoleName
    expires_in_days: Annotated[int, Field(ge=1, le=3650), WholeNumber] | None = None


class TokenModel(Output):
    """An operator token, without its secret."""

    token_id: str
    name: str
    role: RoleName
    created_at: Timestamp
    expires_at: Timestamp | None
    revoked_at: Timestamp | None


class NewTokenModel(TokenModel):
    """A new token, with the secret that is shown this once."""

    token: str


class TokenList(Output):
    """Every token, newest first."""

    tokens: list[TokenModel]


class AuditQuery(Input):
    """Which entries of the audit record to list."""

    actor: ShortText | None = None
    action: ShortText | None = None
    object: Place | None = None
    outcome: Literal["done", "refused"] | None = None
    limit: Limit = 50
    cursor: Cursor | None = None


class AuditEntryModel(Output):
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


class AuditPage(Output):
    """Entries, newest first; `next_cursor` is null on the last page, and nothing else shows that it is the last.

    A page is short, or empty, where `actor`, `action` or `outcome` had it look at a thousand entries for fewer.
    """

    entries: list[AuditEntryModel]
    next_cursor: str | None
