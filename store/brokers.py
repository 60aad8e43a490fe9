"""The brokers of the installation, the generation that each was seen to enforce, and the one that all of them do.

``broker_state`` has the newest generation, and the one that every broker enforces which counts: the least of theirs. It
is written anew here whenever a broker proves, joins, is declared away, comes back or is removed. Each of these takes
its turn before it writes a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from core.errors import NotFound, StateConflict
from core.states import BrokerEngine, BrokerKind
from store import webhooks
from store.broker_tables import Broker
from store.database import Database, UtcDateTime, columns_of
from store.generations import BrokerStateRecord
from store.prepared import Question
from store.scope import ALL_TENANTS
from store.tables import BrokerState

FIRST_NAME = "main"


@dataclass(frozen=True, slots=True)
class BrokerRecord:
    """A broker as it is recorded; see ``store.broker_tables.Broker``."""

    id: int
    name: str
    kind: BrokerKind
    engine: BrokerEngine
    node_id: int | None
    address: str | None
    created_at: datetime
    joined_at: datetime | None
    away_since: datetime | None
    applied_generation: int
    applied_at: datetime | None
    reported_at: datetime | None
    problem: str | None
    presence_at: datetime | None
    presence_known: bool

    @property
    def counts(self) -> bool:
        """Whether a change is enforced only once this broker enforces it."""
        return self.joined_at is not None and self.away_since is None


_COLUMNS = columns_of(BrokerRecord, Broker)
_COUNTS = (Broker.joined_at.is_not(None), Broker.away_since.is_(None))
_ALL = sa.select(*_COLUMNS).order_by(Broker.id)
_OWN = Question(
    sa.select(BrokerState.generation, Broker.applied_generation, Broker.applied_at, BrokerState.pending_since)
    .join_from(BrokerState, Broker, sa.true())
    .where(Broker.id == sa.bindparam("broker_id"))
)
_BEHIND = (
    sa.select(Broker.name)
    .where(*_COUNTS, Broker.applied_generation < sa.bindparam("generation"))
    .order_by(Broker.applied_generation, Broker.id)
)


def list_brokers(tx: Connection) -> Sequence[BrokerRecord]:
    """Return all brokers in the order in which they were added."""
    return [_record(row) for row in tx.execute(_ALL)]


def get_broker(tx: Connection, name: str) -> BrokerRecord:
    """Return a broker by its name; raises ``NotFound``."""
    row = tx.execute(_ALL.where(Broker.name == name)).one_or_none()
    if row is None:
        raise NotFound("No broker has this name; list them with GET /brokers.")
    return _record(row)


def of_node(tx: Connection, node_id: int | None = None) -> BrokerRecord | None:
    """Return the broker beside a node, ``None`` for the only node of an installation that has one."""
    own = Broker.node_id.is_(None) if node_id is None else Broker.node_id == node_id
    row = tx.execute(_ALL.where(Broker.kind == BrokerKind.NODE, own).limit(1)).one_or_none()
    return None if row is None else _record(row)


def _record(row: sa.Row[tuple[object, ...]]) -> BrokerRecord:
    fields = row._asdict()
    return BrokerRecord(**{**fields, "kind": BrokerKind(fields["kind"]), "engine": BrokerEngine(fields["engine"])})


def add_broker(
    tx: Connection,
    name: str,
    kind: BrokerKind,
    *,
    engine: BrokerEngine = BrokerEngine.MOSQUITTO,
    at: datetime,
    joined: bool,
    address: str | None = None,
    node_id: int | None = None,
) -> BrokerRecord:
    """Add a broker, which counts at once if it has ``joined``; raises ``StateConflict`` if the name is taken."""
    row = {"name": name, "kind": kind, "engine": engine, "address": address, "node_id": node_id, "created_at": at}
    try:
        with tx.begin_nested():
            tx.execute(sa.insert(Broker), {**row, "joined_at": at if joined else None})
    except IntegrityError:
        raise StateConflict(f"There is a broker {name} already; take another name.") from None
    if joined:
        take_turns(tx)
        _count_again(tx, at)
    return get_broker(tx, name)


def move_to_node(tx: Connection, broker_id: int, node_id: int | None) -> None:
    """Record beside which node a broker runs, ``None`` for that of an installation with one."""
    tx.execute(sa.update(Broker).where(Broker.id == broker_id).values(node_id=node_id))


def set_engine(tx: Connection, broker_id: int, engine: BrokerEngine) -> None:
    """Record what program a broker is."""
    tx.execute(sa.update(Broker).where(Broker.id == broker_id).values(engine=engine))


def join(tx: Connection, broker_id: int, *, at: datetime) -> None:
    """Let a broker count from now on: until it has proven that it has everything, nothing is enforced."""
    take_turns(tx)
    _update(tx, broker_id, at, joined_at=at)


def remove_broker(tx: Connection, record: BrokerRecord, *, at: datetime) -> None:
    """Forget a broker; raises ``StateConflict`` if it is the last one that counts."""
    _check_not_last(tx, record)
    forget_broker(tx, record, at=at)


def forget_broker(tx: Connection, record: BrokerRecord, *, at: datetime) -> None:
    """Forget a broker that runs no more, even the last one: nothing is enforced then until another one has joined."""
    tx.execute(sa.delete(Broker).where(Broker.id == record.id))
    _count_again(tx, at)


def declare_away(tx: Connection, record: BrokerRecord, *, at: datetime) -> None:
    """Let a broker not count until ``declare_back``; raises ``StateConflict`` if it is the last one that counts."""
    _check_not_last(tx, record)
    _update(tx, record.id, at, away_since=at)


def declare_back(tx: Connection, record: BrokerRecord, *, at: datetime) -> None:
    """Let a broker count again."""
    take_turns(tx)
    _update(tx, record.id, at, away_since=None)


def set_address(tx: Connection, broker_id: int, address: str | None) -> None:
    """Change what people read of where clients connect to."""
    tx.execute(sa.update(Broker).where(Broker.id == broker_id).values(address=address))


def _check_not_last(tx: Connection, record: BrokerRecord) -> None:
    take_turns(tx)
    others = tx.execute(sa.select(Broker.id).where(*_COUNTS, Broker.id != record.id).limit(1)).one_or_none()
    if record.counts and others is None:
        raise StateConflict(
            f"{record.name} is the only broker that counts, so that nothing would be enforced anywhere; add another"
            " one first."
        )


def _update(tx: Connection, broker_id: int, at: datetime, **values: object) -> None:
    tx.execute(sa.update(Broker).where(Broker.id == broker_id).values(**values))
    _count_again(tx, at)


# --- What each enforces ----------------------------------------------------------------------------------------------


def own_state(tx: Connection, broker_id: int) -> BrokerStateRecord:
    """Return the newest generation, and the one that a broker was seen to enforce; raises ``NotFound``."""
    return _own(_OWN.within(tx, {"broker_id": broker_id}))


def own_state_now(database: Database, broker_id: int) -> BrokerStateRecord:
    """Return what ``own_state`` does, by a read of its own."""
    return _own(database.answer(_OWN, {"broker_id": broker_id}, sees=ALL_TENANTS))


def _own(row: Sequence[Any] | None) -> BrokerStateRecord:
    if row is None:
        raise NotFound("This broker was removed from the installation; join it again.")
    return BrokerStateRecord(*row)


def behind(tx: Connection, generation: int) -> Sequence[str]:
    """Return the names of the brokers that count and were not seen to enforce a generation, the last one first."""
    return tx.execute(_BEHIND, {"generation": generation}).scalars().all()


def newest_applied(tx: Connection) -> int:
    """Return the newest generation that any broker which counts was seen to enforce, 0 if none counts."""
    return int(
        tx.execute(sa.select(sa.func.coalesce(sa.func.max(Broker.applied_generation), 0)).where(*_COUNTS)).scalar_one()
    )


_SET_APPLIED = (
    sa.update(Broker)
    .where(Broker.id == sa.bindparam("broker_id"), Broker.applied_generation < sa.bindparam("applied"))
    .values(
        applied_generation=sa.bindparam("applied"),
        applied_at=sa.bindparam("at", type_=UtcDateTime),
        reported_at=sa.bindparam("at", type_=UtcDateTime),
        problem=None,
    )
)


def set_applied_generation(tx: Connection, broker_id: int, generation: int, *, applied_at: datetime) -> None:
    """Record that a broker enforces ``generation``; a lower one than recorded changes nothing.

    Who calls has taken its turn (``take_turns``), before it read what is compared with what comes of it.
    """
    if tx.execute(_SET_APPLIED, {"broker_id": broker_id, "applied": generation, "at": applied_at}).rowcount:
        _count_again(tx, applied_at)


def forget_proofs_of_agents(tx: Connection, *, at: datetime) -> None:
    """Let the brokers of agents not be known to enforce anything: the database is an older one than they were told."""
    take_turns(tx)
    forgotten = {"applied_generation": 0, "presence_known": False}
    tx.execute(sa.update(Broker).where(Broker.kind == BrokerKind.AGENT).values(**forgotten))
    _count_again(tx, at)


def forget_proof(tx: Connection, broker_id: int, problem: str, *, at: datetime) -> None:
    """Let a broker not be known to enforce anything, because of a problem; who calls has taken its turn."""
    forgotten = {"applied_generation": 0, "presence_known": False, "reported_at": at, "problem": problem}
    _update(tx, broker_id, at, **forgotten)


def set_problem(tx: Connection, broker_id: int, problem: str | None, *, at: datetime) -> None:
    """Record that a broker was heard of, and what was wrong then."""
    cut = None if problem is None else problem[:1000]
    tx.execute(sa.update(Broker).where(Broker.id == broker_id).values(reported_at=at, problem=cut))


def note_presence(tx: Connection, broker_id: int, *, at: datetime | None) -> None:
    """Record that it is known now who is connected to a broker; with ``None`` that it is not any more."""
    values = {"presence_known": False} if at is None else {"presence_at": at, "presence_known": True}
    tx.execute(sa.update(Broker).where(Broker.id == broker_id).values(**values))


_LEAST = sa.func.coalesce(
    sa.select(sa.func.min(Broker.applied_generation)).where(*_COUNTS).scalar_subquery(),
    BrokerState.applied_generation,  # with none that counts: nothing was proven
)
_AT = sa.bindparam("at", type_=UtcDateTime)
_COUNT_AGAIN = sa.update(BrokerState).values(
    applied_generation=_LEAST,
    applied_at=sa.case((BrokerState.applied_generation != _LEAST, _AT), else_=BrokerState.applied_at),
    announced_generation=sa.case(
        (BrokerState.announced_generation < _LEAST, _LEAST), else_=BrokerState.announced_generation
    ),
    pending_since=sa.case(
        (BrokerState.generation <= _LEAST, None),
        # A change that came during the reconciliation has been pending since then, which is at the latest now.
        (BrokerState.applied_generation < _LEAST, _AT),
        else_=sa.func.coalesce(BrokerState.pending_since, _AT),
    ),
)


def announced_generation(tx: Connection) -> int:
    """Return the greatest generation that all brokers were ever seen to enforce."""
    return int(tx.execute(sa.select(BrokerState.announced_generation)).scalar_one())


def take_turns(tx: Connection) -> None:
    """Wait for those that write what brokers enforce: two that prove at once would each count the other as behind."""
    if tx.dialect.name != "sqlite":
        query = sa.select(webhooks.ANY).select_from(BrokerState).with_for_update(of=BrokerState)
        webhooks.note_subscriptions(tx, are_there=bool(tx.execute(query).scalar_one()))


def _count_again(tx: Connection, at: datetime) -> None:
    """Write down the generation that all brokers enforce which count; who calls has taken its turn."""
    tx.execute(_COUNT_AGAIN, {"at": at})
