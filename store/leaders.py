"""Signs of life of the processes that run jobs for all nodes, by the clock of the database."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection

from store.node_tables import Leader

_NOW = sa.func.clock_timestamp()
_SIGN = postgresql.insert(Leader).values(name=sa.bindparam("name"), seen_at=_NOW)
_SIGN = _SIGN.on_conflict_do_update(index_elements=[Leader.name], set_={"seen_at": _NOW})
_SILENT_FOR = sa.select(sa.extract("epoch", _NOW - Leader.seen_at)).where(Leader.name == sa.bindparam("name"))


def sign_of_life(tx: Connection, name: str) -> None:
    """Record that the process which leads by this name is alive; PostgreSQL only."""
    tx.execute(_SIGN, {"name": name})


def is_silent(tx: Connection, name: str, seconds: float) -> bool:
    """Return whether there was a sign of life, and none for so many seconds."""
    silent_for = tx.execute(_SILENT_FOR, {"name": name}).scalar_one_or_none()
    return silent_for is not None and silent_for > seconds
