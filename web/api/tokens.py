"""Operator tokens."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import Field

from core.roles import Permission, Role
from store.tenants import TokenRecord
from web.api.fields import RoleName, ShortText, WholeNumber
from web.api.routing import AnswerModel, Answers, Call, RequestModel, Routes, Timestamp

ROUTES = Routes("Tokens")


class TokenRequest(RequestModel):
    """A token to create; without `expires_in_days` it is valid until it is revoked."""

    name: ShortText
    role: RoleName
    expires_in_days: Annotated[int, Field(ge=1, le=3650), WholeNumber] | None = None


class RevokeTokenQuery(RequestModel):
    """With `force` the last valid admin token is revoked, too; `enrolment_tokens=revoke`: with those it has made."""

    force: Literal["true"] | None = None
    enrolment_tokens: Literal["keep", "revoke"] = "keep"


class TokenModel(AnswerModel):
    """An operator token without its secret.

    `subject` is `iss#sub` of the person who has it from a login by the identity provider.
    """

    token_id: str
    name: str
    subject: str | None
    role: RoleName
    created_at: Timestamp
    expires_at: Timestamp | None
    revoked_at: Timestamp | None


class NewTokenModel(TokenModel):
    """A new token with its secret, which is shown only once."""

    token: str


class RevokedTokenModel(TokenModel):
    """A revoked token, with the number of enrolment tokens that it has made: now revoked, and still valid."""

    enrolment_tokens_revoked: int
    enrolment_tokens_left: int


class TokenList(AnswerModel):
    """Every token, newest first."""

    tokens: list[TokenModel]


@ROUTES.add("GET", "/tokens", Permission.TOKENS)
def list_tokens(call: Call) -> TokenList:
    """List operator tokens, newest first, without their secrets."""
    records = call.portal.operators.tokens(call.actor.tenant_id)
    return TokenList(tokens=[_token(record) for record in records])


@ROUTES.add(
    "POST",
    "/tokens",
    Permission.TOKENS,
    Answers("The token with its secret, which is shown only once", status=201),
    errors=(409,),
    idempotency_key=True,
)
def create_token(call: Call, body: TokenRequest) -> NewTokenModel:
    """Create an operator token; its secret is in this answer only."""
    life = None if body.expires_in_days is None else timedelta(days=body.expires_in_days)
    secret, record = call.portal.operators.create(call.actor, body.name, Role(body.role), life, call.idempotency_key)
    return NewTokenModel.of(record, token_id=record.id, token=secret)


@ROUTES.add(
    "DELETE",
    "/tokens/{token_id}",
    Permission.TOKENS,
    Answers("The token is revoked at once; a repeat gets the same answer"),
    errors=(409,),
)
def revoke_token(call: Call, token_id: str, query: RevokeTokenQuery) -> RevokedTokenModel:
    """Revoke an operator token."""
    operators = call.portal.operators
    record = operators.revoke(call.actor, token_id, force=query.force is not None)
    revoked = operators.revoke_enrolment_tokens_of(call.actor, token_id) if query.enrolment_tokens == "revoke" else 0
    left = operators.enrolment_tokens_of(call.actor.tenant_id, token_id)
    return RevokedTokenModel.of(
        record, token_id=record.id, enrolment_tokens_revoked=revoked, enrolment_tokens_left=left
    )


def _token(record: TokenRecord) -> TokenModel:
    return TokenModel.of(record, token_id=record.id)
