"""The brokers of the installation: which there are, how each stands, and which of them count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy.engine import Connection

from core.errors import InputInvalid, StateConflict
from core.states import BrokerKind
from store import audit, brokers, generations
from store.audit import Actor
from store.brokers import BrokerRecord
from store.database import Database
from store.scope import ALL_TENANTS
from workflows.agents.agents import checked_address, revoke_agent
from workflows.agents.presence import forget_connections
from workflows.reconciliation import Reconciler

# An agent reports every ten seconds; before one is late it may have waited for the portal, and tried its broker.
SILENT_AFTER = timedelta(seconds=60)


class Standing(StrEnum):
    """How a broker stands to the newest generation."""

    ENFORCED = "enforced"
    PENDING = "pending"
    AWAY = "away"
    INVITED = "invited"


@dataclass(frozen=True, slots=True)
class BrokerState:
    """A broker, the generation that it has to reach, and when that was asked."""

    record: BrokerRecord
    generation: int
    at: datetime

    @property
    def standing(self) -> Standing:
        """Whether it has everything; not asked of one that does not count."""
        if self.record.joined_at is None:
            return Standing.INVITED
        if self.record.away_since is not None:
            return Standing.AWAY
        return Standing.ENFORCED if self.record.applied_generation >= self.generation else Standing.PENDING

    @property
    def problem(self) -> str | None:
        """Why it is behind, or that its agent is not heard of, which lets nothing be untrue that it has proven."""
        return self.record.problem or self._silence

    @property
    def _silence(self) -> str | None:
        record = self.record
        last = record.reported_at or record.joined_at
        if record.kind is not BrokerKind.AGENT or not record.counts or last is None or self.at - last <= SILENT_AFTER:
            return None
        return f"Its agent has not reported since {last:%Y-%m-%d %H:%M:%S} UTC; see that it runs, and its link."

    @property
    def is_silent(self) -> bool:
        """Whether it has proven all there is, but its agent is not heard of."""
        return self.standing is Standing.ENFORCED and self._silence is not None

    @property
    def code(self) -> str:
        """A stable name of how it stands, for ``/readyz``."""
        return "broker_silent" if self.is_silent else f"broker_{self.standing}"

    @property
    def sentence(self) -> str | None:
        """What is to be said of it, ``None`` if all is well."""
        record, standing = self.record, self.standing
        if standing is Standing.AWAY and record.away_since is not None:
            return f"{record.name} was declared away at {record.away_since:%Y-%m-%d %H:%M} UTC, and does not count."
        if standing is Standing.INVITED:
            return f"{record.name} does not count, as its agent has not joined; have it join, or remove the broker."
        if standing is Standing.ENFORCED:
            return None if self._silence is None else f"{record.name}: {self._silence}"
        proven = "nothing yet" if not record.applied_generation else f"generation {record.applied_generation}"
        heard = "" if record.reported_at is None else f", last heard of at {record.reported_at:%Y-%m-%d %H:%M:%S} UTC"
        why = "" if self.problem is None else f": {self.problem}"
        return f"{record.name} was seen to enforce {proven}, the newest is {self.generation}{heard}{why}"


def states_of(tx: Connection, now: datetime) -> Sequence[BrokerState]:
    """Return all brokers in the order in which they were added, as they stand now."""
    generation = generations.get_broker_state(tx).generation
    return [BrokerState(record, generation, now) for record in brokers.list_brokers(tx)]


@dataclass(frozen=True, slots=True)
class Brokers:
    """Shows brokers, and decides which of them count."""

    _database: Database
    _reconciler: Reconciler
    _clock: Callable[[], datetime]
    _first_tenant: str

    def list(self) -> Sequence[BrokerState]:
        """Return all brokers in the order in which they were added."""
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            return states_of(tx, self._clock())

    def show(self, name: str) -> BrokerState:
        """Return a broker; raises ``NotFound``."""
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            return self._state(tx, name)

    def set_address(self, actor: Actor, name: str, address: str | None) -> BrokerState:
        """Change where clients connect to, HOST or HOST:PORT; raises ``NotFound``, ``InputInvalid``."""
        address = None if address is None else checked_address(address)
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            record = brokers.get_broker(tx, name)
            if record.address != address:
                brokers.set_address(tx, record.id, address)
                self._record(tx, actor, "update", name, address=address)
            return self._state(tx, name)

    def declare_away(self, actor: Actor, name: str, reason: str) -> BrokerState:
        """Let a broker not count, though it may admit whom it does not know to be revoked; may be repeated.

        Raises ``NotFound``, and ``StateConflict`` for the last one that counts and for one that has not joined.
        """
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            record, now = brokers.get_broker(tx, name), self._clock()
            if record.joined_at is None:
                raise StateConflict(f"{name} has not joined, so that it does not count; remove it if it will not.")
            if record.away_since is None:
                brokers.declare_away(tx, record, at=now)
                self._record(tx, actor, "away", name, reason=reason)
            state = self._state(tx, name)
        self._reconciler.heard_of_another()
        return state

    def declare_back(self, actor: Actor, name: str) -> BrokerState:
        """Let a broker count again, as of which nothing is enforced that it lacks; may be repeated.

        Raises ``NotFound``.
        """
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            record = brokers.get_broker(tx, name)
            if record.away_since is not None:
                brokers.declare_back(tx, record, at=self._clock())
                self._record(tx, actor, "back", name)
            return self._state(tx, name)

    def remove(self, actor: Actor, name: str, confirm: str) -> BrokerState:
        """Forget the broker of an agent, which learns nothing any more, and return what was known of it.

        ``confirm`` repeats the name.
        Raises ``NotFound``, ``InputInvalid``, and ``StateConflict`` for one beside a node, and the last that counts.
        """
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            record = brokers.get_broker(tx, name)
        if confirm != name:
            raise InputInvalid("confirm must be the name of the broker.")
        if record.kind is BrokerKind.NODE:
            raise StateConflict(f"{name} runs beside a node of the portal; declare it away if it is to be stopped.")
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            state = self._state(tx, name)
            brokers.remove_broker(tx, state.record, at=self._clock())
            revoke_agent(tx, self._first_tenant, name, now=self._clock())
            self._record(tx, actor, "remove", name)
        self._reconciler.heard_of_another()
        self._reconciler.wake()  # for the CRL
        forget_connections(self._database, record.id, record.presence_at)
        return state

    def _record(self, tx: Connection, actor: Actor, act: str, name: str, **detail: Any) -> None:
        audit.record(tx, actor, f"broker:{act}", f"broker:{name}", at=self._clock(), **detail)

    def _state(self, tx: Connection, name: str) -> BrokerState:
        generation = generations.get_broker_state(tx).generation
        return BrokerState(brokers.get_broker(tx, name), generation, self._clock())
