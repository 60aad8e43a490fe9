"""Brokers: each one that the installation tells what to enforce, with the newest state that it was seen to enforce."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from core.roles import Permission
from web.api.devices import ChangesRequest
from web.api.fields import BrokerAddress, BrokerName, ShortText
from web.api.routing import AnswerModel, Answers, Call, RequestModel, Routes, Timestamp
from workflows.brokers import BrokerState

ROUTES = Routes("Brokers")


class BrokerPatch(ChangesRequest):
    """`address`: what clients connect to, HOST or HOST:PORT; null for none."""

    address: BrokerAddress | None = None


class AwayRequest(RequestModel):
    """Why a broker is not to count, for the audit record."""

    reason: ShortText


class RemoveBrokerQuery(RequestModel):
    """`confirm` repeats the name of the broker."""

    confirm: Annotated[str, Field(max_length=63)]


class BrokerModel(AnswerModel):
    """A broker.

    `state`: `enforced` if it was seen to enforce `generation`, the newest, else `pending`; `away` if it was declared
    away, and `invited` if it has not joined: then it does not count. `told_by` is who tells it, a `node` of the portal
    or an `agent`. `problem` is why it is behind, as last heard at `reported_at`, or that its agent has not
    reported for a minute.
    """

    name: BrokerName
    state: Literal["enforced", "pending", "away", "invited"]
    told_by: Literal["node", "agent"]
    engine: Literal["mosquitto", "rabbitmq"]
    address: str | None
    generation: int
    enforced_generation: int
    enforced_at: Timestamp | None
    reported_at: Timestamp | None
    problem: str | None
    away_since: Timestamp | None
    joined_at: Timestamp | None
    created_at: Timestamp


class BrokerList(AnswerModel):
    """Every broker, in the order in which they were added."""

    brokers: list[BrokerModel]


@ROUTES.add("GET", "/brokers", Permission.BROKERS)
def list_brokers(call: Call) -> BrokerList:
    """List brokers."""
    return BrokerList(brokers=[_model(state) for state in call.portal.brokers.list()])


@ROUTES.add("GET", "/brokers/{broker}", Permission.BROKERS)
def show_broker(call: Call, broker: str) -> BrokerModel:
    """Show a broker."""
    return _model(call.portal.brokers.show(broker))


@ROUTES.add("PATCH", "/brokers/{broker}", Permission.BROKERS)
def update_broker(call: Call, broker: str, body: BrokerPatch) -> BrokerModel:
    """Change what is known of a broker."""
    if "address" not in body.model_fields_set:
        return _model(call.portal.brokers.show(broker))
    return _model(call.portal.brokers.set_address(call.actor, broker, body.address))


@ROUTES.add(
    "POST",
    "/brokers/{broker}/away",
    Permission.BROKERS,
    Answers("The broker does not count any more; a repeat gets the same answer"),
    errors=(409,),
)
def declare_away(call: Call, broker: str, body: AwayRequest) -> BrokerModel:
    """Declare a broker away: what is enforced is enforced without it, and it may still admit who was revoked."""
    return _model(call.portal.brokers.declare_away(call.actor, broker, body.reason))


@ROUTES.add(
    "POST",
    "/brokers/{broker}/back",
    Permission.BROKERS,
    Answers("The broker counts again; a repeat gets the same answer"),
)
def declare_back(call: Call, broker: str) -> BrokerModel:
    """Let a broker count again that was declared away: all is pending until it has everything."""
    return _model(call.portal.brokers.declare_back(call.actor, broker))


@ROUTES.add("DELETE", "/brokers/{broker}", Permission.BROKERS, Answers("The broker as it was"), errors=(409,))
def remove_broker(call: Call, broker: str, query: RemoveBrokerQuery) -> BrokerModel:
    """Remove the broker of an agent, which is told nothing any more."""
    return _model(call.portal.brokers.remove(call.actor, broker, query.confirm))


def _model(state: BrokerState) -> BrokerModel:
    record = state.record
    return BrokerModel(
        name=record.name,
        state=state.standing.value,
        told_by=record.kind.value,
        engine=record.engine.value,
        address=record.address,
        generation=state.generation,
        enforced_generation=record.applied_generation,
        enforced_at=record.applied_at,
        reported_at=record.reported_at,
        problem=state.problem,
        away_since=record.away_since,
        joined_at=record.joined_at,
        created_at=record.created_at,
    )
