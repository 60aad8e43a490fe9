"""Agents beside brokers elsewhere: adding one, and the request by which it joins."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core.roles import Permission
from web.api.fields import BrokerAddress, BrokerName
from web.api.routing import ANYONE, AnswerModel, Answers, Call, RequestModel, Routes, Timestamp

ROUTES = Routes("Brokers")


class BrokerRequest(RequestModel):
    """A broker elsewhere to add: `address` is what clients connect to, HOST or HOST:PORT."""

    name: BrokerName
    address: BrokerAddress


class NewBrokerModel(AnswerModel):
    """A broker that was added, with the code by which its agent joins once until `expires_at`; it is shown only once.

    `fingerprint` is the SHA-256 of the root certificate by which the agent verifies this portal, null if that is one of
    another issuer's; `url` is where it joins.
    """

    name: BrokerName
    address: str
    code: str
    expires_at: Timestamp
    url: str
    fingerprint: str | None


class JoinRequest(RequestModel):
    """An agent's code, and the request (PKCS#10, PEM) for the certificate by which it is known from then on."""

    code: Annotated[str, Field(min_length=1, max_length=128)]
    csr: Annotated[str, Field(min_length=1, max_length=16384)]


class JoinedModel(AnswerModel):
    """An agent's certificate with its chain, the roots by which it verifies the portal (PEM), and where it goes on.

    `settings` are those of the agent that the portal decides.
    """

    name: BrokerName
    chain: str
    portal_ca: str
    agents_url: str
    settings: dict[str, str]


@ROUTES.add(
    "POST",
    "/brokers",
    Permission.BROKERS,
    Answers("The broker with the code of its agent, which is shown only once", status=201),
    errors=(404, 409),
    idempotency_key=True,
)
def add_broker(call: Call, body: BrokerRequest) -> NewBrokerModel:
    """Add a broker elsewhere, which an agent beside it is to join."""
    added = call.portal.agents.add(call.actor, body.name, body.address, call.idempotency_key)
    return NewBrokerModel(
        name=added.broker.name,
        address=added.broker.address or "",
        code=added.code,
        expires_at=added.expires_at,
        url=call.portal.settings.public_url,
        fingerprint=call.portal.agents.root_fingerprint,
    )


@ROUTES.add(
    "POST", "/broker-agents/join", ANYONE, Answers("The agent has joined, and its broker counts"), errors=(404, 503)
)
def join(call: Call, body: JoinRequest) -> JoinedModel:
    """Join as the agent of a broker, by the code that was shown when the broker was added."""
    joined = call.portal.agents.join(body.code, body.csr)
    return JoinedModel.of(joined)
