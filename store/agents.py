"""The agents beside brokers elsewhere: their codes, their certificates, and what they were given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from store.agent_tables import BrokerAgent
from store.broker_tables import Broker
from store.database import hash_of


@dataclass(frozen=True, slots=True)
class Given:
    """A page of changes that an agent was given; ``is_last`` if there were no more of its generation."""

    generation: int
    digest: str
    is_last: bool


class Run(NamedTuple):
    """A run of an agent: its id, what its broker enforced before it, how often it asked after another had begun."""

    id: str
    since: int
    returns: int = 0


@dataclass(frozen=True, slots=True)
class AgentRecord:
    """An agent with its broker; see ``store.agent_tables.BrokerAgent``."""

    broker_id: int
    name: str
    address: str
    applied_generation: int
    joined_at: datetime | None
    certificate: str | None
    next_certificate: str | None
    presence_session: str
    runs: tuple[Run, ...]
    copied_since: int | None
    held: Given
    given: Given

    def is_run_by(self, run: str) -> bool:
        """Whether this is its present run, and no other one has come back."""
        return self.copied_since is None and bool(self.runs) and self.runs[0].id == run

    def has_shown(self, generation: int, digest: str) -> Given | None:
        """Return the page of changes with this digest if the agent was given it, ``None`` if it was not."""
        for page in (self.given, self.held):
            if digest and (page.generation, page.digest) == (generation, digest):
                return page
        return None


_AGENT = sa.select(
    Broker.id,
    Broker.name,
    sa.func.coalesce(Broker.address, ""),
    Broker.applied_generation,
    Broker.joined_at,
    BrokerAgent.certificate,
    BrokerAgent.next_certificate,
    BrokerAgent.presence_session,
    BrokerAgent.runs,
    BrokerAgent.copied_since,
    BrokerAgent.held_generation,
    BrokerAgent.held_digest,
    BrokerAgent.held_is_last,
    BrokerAgent.given_generation,
    BrokerAgent.given_digest,
    BrokerAgent.given_is_last,
).join_from(Broker, BrokerAgent, BrokerAgent.broker_id == Broker.id)
_BY_CERTIFICATE = _AGENT.where(
    sa.or_(
        BrokerAgent.certificate == sa.bindparam("shown"),
        BrokerAgent.next_certificate == sa.bindparam("shown"),
    )
)
_BY_ID = _AGENT.where(Broker.id == sa.bindparam("broker_id"))


def _record(row: Sequence[Any]) -> AgentRecord:
    broker_id, name, address, applied, joined_at, certificate, following, session, runs, copied = row[:10]
    known, held, given = tuple(Run(*one) for one in runs), Given(*row[10:13]), Given(*row[13:])
    first = (broker_id, name, address, applied, joined_at, certificate, following, session)
    return AgentRecord(*first, known, copied, held, given)


def add_agent(tx: Connection, broker_id: int, *, code: str, expires_at: datetime) -> None:
    """Record an agent that is to join with a code."""
    row = {"broker_id": broker_id, "code_hash": hash_of(code), "code_expires_at": expires_at}
    tx.execute(sa.insert(BrokerAgent), row)


def knows_code(tx: Connection, code: str, *, now: datetime) -> bool:
    """Return whether an agent may join with a code."""
    query = sa.select(BrokerAgent.broker_id)
    query = query.where(BrokerAgent.code_hash == hash_of(code), BrokerAgent.code_expires_at > now)
    return tx.execute(query).first() is not None


def take_code(tx: Connection, code: str, *, now: datetime) -> AgentRecord | None:
    """Use up a code; return whose it was, ``None`` if it is unknown, used or expired."""
    used = (
        sa.update(BrokerAgent)
        .where(BrokerAgent.code_hash == hash_of(code), BrokerAgent.code_expires_at > now)
        .values(code_hash=None, code_expires_at=None)
        .returning(BrokerAgent.broker_id)
    )
    broker_id = tx.execute(used).scalar_one_or_none()
    return None if broker_id is None else _record(tx.execute(_BY_ID, {"broker_id": broker_id}).one())


def find_agent(tx: Connection, fingerprint: str) -> AgentRecord | None:
    """Return the agent by the fingerprint of its certificate, or of the next one."""
    row = tx.execute(_BY_CERTIFICATE, {"shown": fingerprint}).one_or_none()
    return None if row is None else _record(row)


def get_agent(tx: Connection, broker_id: int) -> AgentRecord | None:
    """Return the agent of a broker, ``None`` if there is none any more."""
    row = tx.execute(_BY_ID, {"broker_id": broker_id}).one_or_none()
    return None if row is None else _record(row)


def set_certificate(tx: Connection, broker_id: int, fingerprint: str) -> None:
    """Let this certificate be the only one that counts."""
    _update(tx, broker_id, certificate=fingerprint, next_certificate=None)


def set_next_certificate(tx: Connection, broker_id: int, fingerprint: str) -> None:
    """Let this certificate be the one that counts once it is shown."""
    _update(tx, broker_id, next_certificate=fingerprint)


def give(tx: Connection, broker_id: int, *, held: Given, given: Given) -> bool:
    """Record which page of changes an agent is given, and which one it has shown to have.

    Return whether that is so: ``begin_again`` may have come in between.
    """
    values = {
        "held_generation": held.generation,
        "held_digest": held.digest,
        "held_is_last": held.is_last,
        "given_generation": given.generation,
        "given_digest": given.digest,
        "given_is_last": given.is_last,
    }
    conditions = [BrokerAgent.broker_id == broker_id]
    if held.generation or held.is_last:  # it does not begin with nothing
        conditions.append(sa.or_(BrokerAgent.held_digest == held.digest, BrokerAgent.given_digest == held.digest))
    return tx.execute(sa.update(BrokerAgent).where(*conditions).values(**values)).rowcount == 1


def begin_again(tx: Connection) -> None:
    """Give all agents everything anew: the database is not what it was when they were told, with all changes since."""
    tx.execute(sa.update(BrokerAgent).values(held_digest="", given_digest="", presence_session=""))


def set_runs(tx: Connection, broker_id: int, runs: Sequence[Run]) -> None:
    """Record the newest runs of an agent, the present one first."""
    _update(tx, broker_id, runs=[list(one) for one in runs])


def set_copied(tx: Connection, broker_id: int, since: int) -> None:
    """Record that two agents run with one key, of which one alone has proven all up to a generation."""
    _update(tx, broker_id, copied_since=since)


def claim_presence(tx: Connection, broker_id: int, session: str, number: int, *, begins: bool) -> bool:
    """Record the newest message of an agent about its broker's clients; return whether none before it counts more.

    One that ``begins`` a session ends the one before.
    """
    is_newest = BrokerAgent.presence_number <= number
    follows = sa.and_(BrokerAgent.presence_session == session, is_newest)
    condition = sa.or_(BrokerAgent.presence_session != session, is_newest) if begins else follows
    values = {"presence_session": session, "presence_number": number}
    claimed = sa.update(BrokerAgent).where(BrokerAgent.broker_id == broker_id, condition).values(**values)
    return tx.execute(claimed).rowcount == 1


def heard_of_presence(tx: Connection, broker_id: int) -> datetime | None:
    """Return when it was last known who is connected to the broker of an agent."""
    at: datetime | None = tx.execute(sa.select(Broker.presence_at).where(Broker.id == broker_id)).scalar_one_or_none()
    return at


def _update(tx: Connection, broker_id: int, **values: object) -> None:
    tx.execute(sa.update(BrokerAgent).where(BrokerAgent.broker_id == broker_id).values(**values))
