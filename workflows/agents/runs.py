"""Notices that two agents run with one key: what the one has proven says nothing of the broker beside the other.

Each start of an agent has an id of its own, which is kept on no disk. A restarted agent is a new run, and the one
before is never heard of again, but for what it had sent before it ended.
"""

from __future__ import annotations

import logging
from datetime import datetime

from sqlalchemy.engine import Connection

from store import agents, brokers
from store.agents import AgentRecord, Run

log = logging.getLogger("portal.agents")

OF_BEFORE = ""  # the id of every run of an agent of the version before, which tells none
MAX_RUNS = 8
# An agent has one question for changes and one report under way at most, which may arrive after it was restarted.
MAX_LATE = 2

ANOTHER_RUN = "Another run of this agent has begun, and counts instead of this one."
COPIED = (
    "Two agents run with its key, as from copies of one folder, so that neither is believed: stop the copy, then add"
    " the broker under another name, join with portal-server agent join --again, and remove it by its old name."
)


def take_run(tx: Connection, record: AgentRecord, run: str, *, at: datetime) -> str | None:
    """Take in that a run of an agent has asked for something; return why it is not to be answered, if it is not.

    Who calls has taken its turn (``brokers.take_turns``) before it read the record.
    """
    runs = [*record.runs]
    place = next((place for place, one in enumerate(runs) if one.id == run), None)
    if place == 0 or record.copied_since is not None:
        return None
    if place is not None:
        earlier = runs[place]
        if earlier.returns < MAX_LATE:
            runs[place] = earlier._replace(returns=earlier.returns + 1)
            agents.set_runs(tx, record.broker_id, runs)
            return ANOTHER_RUN
        if run != OF_BEFORE:
            agents.set_copied(tx, record.broker_id, runs[place - 1].since)
            brokers.forget_proof(tx, record.broker_id, COPIED, at=at)
            log.error("two agents run with one key", extra={"broker": record.name, "problem": COPIED})
            return None
        del runs[place]  # put back to the version before
    begun = Run(run, record.applied_generation)
    agents.set_runs(tx, record.broker_id, [begun, *runs][:MAX_RUNS])
    return None
