"""What use cases that change many devices at once share: one generation for all, a refusal for each that cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy.engine import Connection

import db
from core.errors import DeviceNotFound, InputInvalid, PortalError, StateConflict
from core.failpoints import failpoint
from store import audit
from store.audit import Actor
from store.database import Database

AT_ONCE = 100  # devices in one transaction, for which all others that write wait
W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class ActionRefused:
    """A device to which an action cannot be done, and why."""

    device_id: str
    error: PortalError


class Changes:
    """What a transaction changes: all of it has one generation, and its audit entries are written at its end."""

    def __init__(self, tx: Connection, actor: Actor, now: datetime) -> None:
        self.tx, self.actor, self.now = tx, actor, now
        self._generation: int | None = None
        self._acts: list[audit.Act] = []

    @property
    def tenant_id(self) -> str:
        """The tenant whose devices are changed."""
        return self.actor.tenant_id

    def generation(self) -> int:
        """Return the generation of the changes; the first call advances that which the broker must reach."""
        if self._generation is None:
            self._generation = db.next_generation(self.tx, at=self.now)
        return self._generation

    def record(self, action: str, of: str, **detail: Any) -> None:
        """Add an entry for the audit record."""
        self._acts.append((self.actor, action, of, detail))

    def end(self) -> None:
        """Write the audit entries: from here to the end of the transaction, others that write some wait."""
        if self._acts:
            audit.record_all(self.tx, self._acts, at=self.now)


def write_in_batches(
    database: Database,
    actor: Actor,
    now: datetime,
    device_ids: Iterable[str],
    write: Callable[[Changes, str], W],
    *,
    before: Callable[[Changes, Sequence[str]], object] = lambda _changes, _ids: None,
) -> tuple[dict[str, W], dict[str, ActionRefused]]:
    """Do the same to many devices, some in each transaction; return what was written of each, and the refusals.

    ``write`` raises before it writes anything; ``before`` takes the locks that come before those of devices.
    """
    written: dict[str, W] = {}
    refused: dict[str, ActionRefused] = {}
    # In one order, so that two who name the same devices do not wait for each other.
    ordered = sorted(set(device_ids))
    for start in range(0, len(ordered), AT_ONCE):
        batch = ordered[start : start + AT_ONCE]
        with database.transaction() as tx:
            changes = Changes(tx, actor, now)
            before(changes, batch)
            for device_id in batch:
                try:
                    written[device_id] = write(changes, device_id)
                except (DeviceNotFound, StateConflict, InputInvalid) as error:
                    refused[device_id] = ActionRefused(device_id, error)
            changes.end()
        failpoint("actions.after_commit")
    return written, refused
