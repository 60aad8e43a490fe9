"""Logins of operators by the identity provider, for programs: the device flow (RFC 8628) ends here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core.errors import NotFound
from web.api.fields import RoleName, TenantName
from web.api.routing import ANYONE, AnswerModel, Answers, Call, RequestModel, Routes, Timestamp
from workflows.oidc.claims import MAX_TOKEN
from workflows.oidc.login import SingleSignOn

ROUTES = Routes("Single sign-on")
_IdToken = Annotated[str, Field(min_length=1, max_length=MAX_TOKEN)]


class DeviceFlowModel(AnswerModel):
    """Where a program logs an operator in; `ca` are the provider's CA certificates (PEM), null for the system's."""

    issuer: str
    client_id: str
    scopes: str
    device_authorization_endpoint: str
    token_endpoint: str
    ca: str | None


class LoginRequest(RequestModel):
    """The ID token of a login; `tenant` chooses, if the person's groups have roles in several."""

    id_token: _IdToken
    tenant: TenantName | None = None


class PersonsTokenModel(AnswerModel):
    """An operator token for a person, `iss#sub` by the identity provider; its secret is in this answer only."""

    token_id: str
    name: str
    subject: str
    role: RoleName
    tenant: TenantName
    created_at: Timestamp
    expires_at: Timestamp
    token: str


@ROUTES.add("GET", "/oidc/configuration", ANYONE, errors=(404, 503))
def oidc_configuration(call: Call) -> DeviceFlowModel:
    """Tell a program how to log an operator in by the identity provider."""
    return DeviceFlowModel.of(_sign_on(call).device_flow())


@ROUTES.add(
    "POST",
    "/oidc/tokens",
    ANYONE,
    Answers("The token with its secret, which is shown only once; it is valid for eight hours", status=201),
    errors=(401, 403, 404, 409, 429, 503),
)
def oidc_login(call: Call, body: LoginRequest) -> PersonsTokenModel:
    """Create an operator token for the person of an ID token, which is taken once."""
    made = _sign_on(call).exchange(call.actor, body.id_token, body.tenant)
    record = made.record
    return PersonsTokenModel.of(record, token_id=record.id, tenant=record.tenant_id, token=made.secret)


def _sign_on(call: Call) -> SingleSignOn:
    sign_on = call.portal.sign_on
    if sign_on is None:
        raise NotFound("This portal has no identity provider; log in with an operator token.")
    return sign_on
