"""Who is connected to the brokers of agents: parts of the whole set, and changes, as each agent tells them.

An agent is believed of its own broker only, of clients that brokers admit, and of times between its joining and now. So
one that lies can make devices look connected there, and none look disconnected that is connected elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy.engine import Connection

from core.errors import StateConflict
from core.states import PresenceState
from store import agents, brokers
from store.agents import AgentRecord
from store.database import Database
from store.presences import Sighting, admitted, connected_at
from store.scope import ALL_TENANTS
from workflows.presence import PAGE, gone, pages, record_in_batches

CLOCKS_AGREE = timedelta(seconds=5)
_CONFLICT = "Tell everybody who is connected first: these changes follow nothing that this agent has told."


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a whole set of clients: all of those after ``after``, in the order of their ids, up to ``upto``.

    The first one is after nothing, the last one has no end.
    """

    after: str
    upto: str | None


@dataclass(frozen=True, slots=True)
class ToldPresence:
    """What an agent tells: ids with the time since when each is connected, or when it left, in Unix time.

    ``session`` names the whole set that it belongs to, ``number`` grows with each message, ``at`` is the time by the
    agent's clock. With a ``part`` nobody else in that is connected. ``is_known`` says that nothing more is to be told.
    """

    session: str
    number: int
    at: float
    part: Part | None
    connected: Mapping[str, int]
    disconnected: Mapping[str, int]
    is_known: bool


class AgentPresences:
    """Takes in who is connected to the brokers of agents."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._clock = clock

    def take(self, record: AgentRecord, told: ToldPresence) -> str | None:
        """Write what an agent tells; return up to which id that was done, ``None`` for all.

        Raise ``StateConflict`` if it does not follow what this agent has told before.
        """
        seen, end = self._times(record, told), None
        if told.part is not None:
            end = told.part.upto
            with self._database.snapshot(sees=ALL_TENANTS) as tx:
                heard = agents.heard_of_presence(tx, record.broker_id)
                page = connected_at(tx, record.broker_id, limit=PAGE, after=told.part.after, upto=end)
            if len(page) == PAGE:
                end = page[-1].identity
            seen = {identity: one for identity, one in seen.items() if end is None or identity <= end}
            seen = gone(page, seen, heard) | seen

        def allowed(tx: Connection, batch: Mapping[str, Sighting]) -> Mapping[str, Sighting]:
            self._claim(tx, record, told)
            connected = [identity for identity, one in batch.items() if one.state is PresenceState.CONNECTED]
            refused = {*connected} - admitted(tx, connected)
            return {identity: one for identity, one in batch.items() if identity not in refused}

        record_in_batches(self._database, record.broker_id, seen, allowed)
        with self._database.transaction(durable=False, sees=ALL_TENANTS) as tx:
            self._claim(tx, record, told)
            is_known = told.is_known and end is None
            brokers.note_presence(tx, record.broker_id, at=self._clock() if is_known else None)
        return end

    def _claim(self, tx: Connection, record: AgentRecord, told: ToldPresence) -> None:
        """Raise ``StateConflict`` unless this is the newest message, which it is for all others from now on."""
        begins = told.part is not None and not told.part.after
        if not agents.claim_presence(tx, record.broker_id, told.session, told.number, begins=begins):
            raise StateConflict(_CONFLICT)

    def _times(self, record: AgentRecord, told: ToldPresence) -> dict[str, Sighting]:
        """Return what is told with times by the portal's clock: a clock that is wrong there moves nothing."""
        now = self._clock()
        first = min(now, record.joined_at or now)
        offset = timedelta(seconds=now.timestamp() - told.at)
        if abs(offset) <= CLOCKS_AGREE:
            offset = timedelta()

        def at(seconds: int) -> datetime:
            try:
                time = datetime.fromtimestamp(seconds, UTC) + offset
            except OverflowError:
                return now
            return max(first, min(time, now))

        states = (PresenceState.OFFLINE, told.disconnected), (PresenceState.CONNECTED, told.connected)
        return {identity: Sighting(state, at(seconds)) for state, ids in states for identity, seconds in ids.items()}


def forget_connections(database: Database, broker_id: int, at: datetime | None) -> None:
    """Let nobody be connected to a broker that was removed, which was heard last ``at`` a time, if it was."""
    for page in pages(database, broker_id):
        record_in_batches(database, broker_id, gone(page, (), at))
