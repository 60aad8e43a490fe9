"""Keeps the open connections of a worker by phase, so that the right one is given up under overload."""

from __future__ import annotations

from web.serving_connection import Connection, Phase

MEMORY_LIMIT = 64 * 1024 * 1024  # bytes held in one worker for clients that are slow to send or to take

# Whom to give up first where there are too many, with the seconds that each must have had.
VICTIMS = (
    (Phase.IDLE, 0.0),
    (Phase.LINGERING, 0.0),
    (Phase.HANDSHAKE, 1.0),
    (Phase.READING, 1.0),
    (Phase.SENDING, 5.0),
)
TIMED = tuple(phase for phase, _ in VICTIMS)  # the phases in which the client is waited for


class OpenConnections:
    """All open connections of a worker: at most ``limit`` of them, and ``MEMORY_LIMIT`` bytes held for them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._phases: dict[Phase, dict[Connection, None]] = {phase: {} for phase in Phase}

    def __len__(self) -> int:
        return sum(map(len, self._phases.values()))

    @property
    def full(self) -> bool:
        """Whether one must go before another may come."""
        return len(self) >= self._limit

    def of(self, *phases: Phase) -> list[Connection]:
        """The connections in these phases, in each the one that entered it first in front."""
        return [connection for phase in phases for connection in self._phases[phase]]

    def enter(self, connection: Connection, phase: Phase, now: float, timeout: float) -> None:
        """Move a connection, which may be new, to a phase that it has ``timeout`` seconds for."""
        self._phases[connection.phase].pop(connection, None)
        connection.phase = phase
        connection.since = now
        connection.deadline = now + timeout
        self._phases[phase][connection] = None

    def remove(self, connection: Connection) -> None:
        """Count a connection no more."""
        self._phases[connection.phase].pop(connection, None)
        self._held -= connection.held
        connection.held = 0

    def overdue(self, now: float) -> list[Connection]:
        """The connections whose deadline has passed."""
        return [connection for connection in self.of(*TIMED) if connection.deadline <= now]

    def victim(self, now: float) -> Connection | None:
        """The connection that has made least use of its time, if any has had enough."""
        for phase, patience in VICTIMS:
            oldest = next(iter(self._phases[phase]), None)
            if oldest is not None and now - oldest.since >= patience:
                return oldest
        return None

    def weigh(self, connection: Connection) -> Connection | None:
        """Count anew the bytes held for a connection; returns the heaviest of all if there are too many bytes."""
        size = connection.size
        self._held += size - connection.held
        connection.held = size
        if self._held <= MEMORY_LIMIT:
            return None
        waiting = (*self._phases[Phase.READING], *self._phases[Phase.SENDING])
        return max(waiting, key=lambda each: each.held, default=None)
