"""When each step of a change was proven at each broker, by the reconciliation that had the change to prove."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from store.broker_tables import EnforcementSteps

KEPT = 512  # generations of a broker, as there is nothing to watch at older ones
_STEPS = ("denied", "refused", "cut", "enforced")


@dataclass(frozen=True, slots=True)
class Attempt:
    """What reconciliations of a broker have proven of the changes after generation ``since`` up to ``generation``.

    ``at`` is when the first of them read these, ``proven`` has the time of each step by its name, and ``problem`` is
    why the last one has failed.
    """

    broker_id: int
    since: int
    generation: int
    at: datetime
    proven: Mapping[str, datetime]
    problem: str


def write(tx: Connection, attempt: Attempt) -> None:
    """Record an attempt; a repeat of one that has failed keeps the times of what that has proven."""
    times = {f"{step}_at": attempt.proven.get(step) for step in _STEPS}
    row = {"broker_id": attempt.broker_id, "generation": attempt.generation, "since": attempt.since, "at": attempt.at}
    tx.execute(_write_on(tx.dialect.name), row | times | {"problem": attempt.problem[:1000]})


def _write_on(dialect: str) -> sa.Executable:
    made = _WRITE.get(dialect)
    if made is None:
        insert = (sqlite if dialect == "sqlite" else postgresql).insert(EnforcementSteps)
        new = insert.excluded
        repeats = sa.and_(EnforcementSteps.since == new.since, EnforcementSteps.enforced_at.is_(None))
        times = {name: getattr(EnforcementSteps, name) for name in ("at", *(f"{step}_at" for step in _STEPS))}
        kept = {
            name: sa.case((repeats, sa.func.coalesce(old, new[name])), else_=new[name]) for name, old in times.items()
        }
        made = _WRITE[dialect] = insert.on_conflict_do_update(
            index_elements=[EnforcementSteps.broker_id, EnforcementSteps.generation],
            set_={**kept, "since": new.since, "problem": new.problem},
        )
    return made


_WRITE: dict[str, sa.Executable] = {}


def prune(tx: Connection, broker_id: int, generation: int) -> None:
    """Delete what is ``KEPT`` generations older than this one."""
    older = EnforcementSteps.broker_id == broker_id, EnforcementSteps.generation <= generation - KEPT
    tx.execute(sa.delete(EnforcementSteps).where(*older))


_READ = (
    sa.select(EnforcementSteps)
    .where(
        EnforcementSteps.since < sa.bindparam("generation"), EnforcementSteps.generation >= sa.bindparam("generation")
    )
    .order_by(EnforcementSteps.generation, EnforcementSteps.broker_id)
)


def attempts(tx: Connection, generation: int) -> Sequence[Attempt]:
    """Return the attempts that had a generation's changes to prove, oldest first; without those that were pruned."""
    return [
        Attempt(
            row["broker_id"],
            row["since"],
            row["generation"],
            row["at"],
            {step: at for step in _STEPS if (at := row[f"{step}_at"]) is not None},
            row["problem"],
        )
        for row in tx.execute(_READ, {"generation": generation}).mappings()
    ]
