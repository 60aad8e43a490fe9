"""What the guard tells of who is connected: its whole set once, then each change."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from broker.control import PresenceReport
from broker.session import Session

WHOLE_TOPIC, CHANGES_TOPIC = "portal/guard/clients", "portal/guard/presence"
MORE_TOPIC = "portal/guard/more"  # by which the next part of the whole set is asked for
_IDENTITY = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LATEST = 253402300799  # the end of the year 9999, in Unix time
_Times = Mapping[str, datetime]


class ReportReader:
    """Reads messages of the guard, in their order; ``has_whole`` once the whole set was read.

    ``wants_more`` while the guard waits to be asked for the next part of it.

    Whatever is not as ``mosquitto/guard/README.md`` has it raises ``ConnectionError``: who asks again gets a whole set.
    """

    def __init__(self) -> None:
        self.has_whole = False
        self.wants_more = False
        self._whole: dict[str, datetime] | None = None  # as much of it as was read

    def read(self, topic: str, payload: bytes) -> Iterator[PresenceReport]:
        """Yield the reports that a message ends: each of its lines is a JSON object."""
        if topic not in (WHOLE_TOPIC, CHANGES_TOPIC):
            raise ConnectionError(f"the broker sent a message to {topic}, which is not one of the guard's")
        for line in payload.splitlines():
            try:
                said = json.loads(line)
                if not isinstance(said, dict):
                    raise TypeError("not a JSON object")
                if topic == WHOLE_TOPIC:
                    yield from self._of_whole(said)
                else:
                    yield self._of_changes(said)
            except (ValueError, TypeError, RecursionError) as error:
                raise ConnectionError("the guard sent a message that cannot be read") from error

    def _of_whole(self, said: dict[str, Any]) -> Iterator[PresenceReport]:
        if said.get("begin") is True and self._whole is None and not self.has_whole:
            self._whole = {}
        elif said.keys() == {"connected"} and self._whole is not None:
            self._whole.update(_times(said["connected"]))
        elif said == {"more": True} and self._whole is not None:
            self.wants_more = True
        elif said == {"end": True} and self._whole is not None:
            whole, self._whole, self.has_whole = self._whole, None, True
            yield PresenceReport(connected=whole, disconnected={}, is_whole=True)
        else:
            raise ValueError("not in its place")

    def _of_changes(self, said: dict[str, Any]) -> PresenceReport:
        if not self.has_whole or not said.keys() <= {"connected", "disconnected"}:
            raise ValueError("not in its place")
        connected, disconnected = (_times(said.get(word, [])) for word in ("connected", "disconnected"))
        return PresenceReport(connected=connected, disconnected=disconnected, is_whole=False)


@dataclass(eq=False)
class GuardReports:
    """An internal session to which the guard reports; see ``broker.control.PresenceReports``."""

    _session: Session
    _reader: ReportReader = field(default_factory=ReportReader)

    def receive(self, deadline: float) -> Iterator[PresenceReport]:
        """Yield what was reported since; see ``broker.control.PresenceReports``."""
        self._session.extend(deadline)
        for topic, payload in self._session.receive_messages():
            yield from self._reader.read(topic, payload)
        if self._reader.wants_more:
            self._reader.wants_more = False
            self._session.send_publish(MORE_TOPIC)

    @property
    def is_incomplete(self) -> bool:
        """Whether a part of the whole set is still on its way."""
        return not self._reader.has_whole

    def close(self) -> None:
        """End the session."""
        self._session.close()


def _times(said: Any) -> dict[str, datetime]:
    """Return the identities of a list of pairs, each with its time; raise ``ValueError`` or ``TypeError``."""
    if not isinstance(said, list):
        raise TypeError("not a list")
    times: dict[str, datetime] = {}
    for identity, seconds in said:
        if not _IDENTITY.fullmatch(identity) or type(seconds) is not int or not 0 <= seconds <= _LATEST:
            raise ValueError("not an identity with a time")
        times[identity] = datetime.fromtimestamp(seconds, UTC)
    return times
