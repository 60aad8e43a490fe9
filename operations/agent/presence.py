"""Tells the portal who is connected to the broker beside the agent, as the guard reports it: all once, then changes.

Without the portal changes are kept, of each client the last one; what is lost is told by everybody being told again.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from broker.control import PresenceReport, PresenceReports
from broker_provisioning import BrokerProvisioning
from core.errors import BrokerUnavailable, PortalError, StateConflict
from core.topics import is_device_id
from operations.agent.client import PortalClient
from operations.agent.folder import utc_seconds

log = logging.getLogger("portal.agent")

FOLLOW_SECONDS, AGAIN_SECONDS = 2.0, 10.0
OPEN_SECONDS, RECEIVE_SECONDS = 2.0, 10.0
WHOLE_SECONDS = 60.0  # until the guard has reported everybody
UNREAD_SECONDS = 30.0  # the broker keeps messages for so long for who reads none, and drops what is more
READ_SECONDS = 5.0  # between two looks at what it reports while much is told
MAX_CLIENTS = 4000  # in a message


class AgentPresence:
    """Follows the guard's reports and tells them; ``follow`` is called again and again in one thread."""

    def __init__(self, broker: BrokerProvisioning, client: Callable[[], PortalClient]) -> None:
        self._broker = broker
        self._client = client
        self._reports: PresenceReports | None = None
        self._session, self._number = "", 0
        self._asked_at = self._read_at = 0.0
        self._whole: list[tuple[str, int]] | None = None  # in the order of their ids; what of it is to be told
        self._after = ""  # up to which of them it was told
        self._changed: dict[str, tuple[bool, int]] = {}  # whether each is connected, and since when or until when
        self._told = False  # all of it, so that the portal knows who is connected
        self._problem = ""
        self.has_to_begin_again = threading.Event()  # set by who learns that the portal does not know what it was told

    @property
    def known_session(self) -> str | None:
        """The session in which the portal was told all, ``None`` if it was not."""
        return self._session if self._told and not self._changed else None

    def _begin_again(self) -> None:
        self.has_to_begin_again.clear()
        self._lost("The portal has to be told everybody again.")
        self._session = ""

    def close(self) -> None:
        """End the session with the broker."""
        reports, self._reports = self._reports, None
        if reports is not None:
            reports.close()

    def follow(self) -> float:
        """Take in what the guard reports, and tell it; return after how many seconds to do so again."""
        if self.has_to_begin_again.is_set():
            self._begin_again()
        self._read()
        try:
            self._tell()
        except StateConflict:  # it has lost what it was told, or another agent with this key has told something
            self._begin_again()
            return AGAIN_SECONDS
        except PortalError as error:
            self._say(error.detail)
            return AGAIN_SECONDS
        return FOLLOW_SECONDS

    def _say(self, problem: str) -> None:
        if problem and not self._problem:
            log.warning("the portal is not told which devices are connected", extra={"problem": problem})
        self._problem = problem

    # --- What the guard reports

    def _read(self) -> None:
        try:
            self._receive()
        except (BrokerUnavailable, OSError) as error:
            self._lost(str(error))

    def _receive(self) -> None:
        if self._reports is not None and time.monotonic() - self._read_at > UNREAD_SECONDS:
            self.close()  # some may be missing
        reports = self._reports or self._open()
        if reports is None:
            return
        deadline = time.monotonic() + RECEIVE_SECONDS
        while True:
            for report in reports.receive(deadline):
                self._take(report)
            if not reports.is_incomplete or time.monotonic() >= deadline:
                break
        self._read_at = time.monotonic()
        if reports.is_incomplete and self._read_at - self._asked_at > WHOLE_SECONDS:
            raise BrokerUnavailable("The broker does not report everybody: see its log, and max_queued_bytes.")

    def _open(self) -> PresenceReports | None:
        self._reports = self._broker.follow_presence(time.monotonic() + OPEN_SECONDS)
        self._asked_at = time.monotonic()
        return self._reports

    def _lost(self, problem: str) -> None:
        """Tell nothing any more of who is connected: the next whole set says it."""
        self.close()
        self._say(problem)
        self._whole, self._told = None, False
        self._changed.clear()

    def _take(self, report: PresenceReport) -> None:
        """Take in a report; only ids of devices and applications are any the portal knows."""
        connected = [(who, int(at.timestamp())) for who, at in report.connected.items() if is_device_id(who)]
        if report.is_whole:
            self._whole, self._after = sorted(connected), ""
            self._session, self._number, self._told = secrets.token_hex(16), 0, False
            self._changed.clear()
            return
        self._changed.update((who, (True, at)) for who, at in connected)
        gone = ((who, int(at.timestamp())) for who, at in report.disconnected.items() if is_device_id(who))
        self._changed.update((who, (False, at)) for who, at in gone)

    # --- What the portal is told

    def _tell(self) -> None:
        """Tell what the portal lacks; raise ``StateConflict`` if it lacks more than that, ``Unavailable``."""
        if not self._session:
            return
        while self._whole is not None:
            self._tell_part(self._whole)
            self._read_if_due()
        is_followed = self._reports is not None and not self._reports.is_incomplete
        if not is_followed:
            self._send({"known": False})
            self._session = ""  # until the guard has reported everybody again
            return
        while self._session and (self._changed or not self._told):
            batch = dict(itertools.islice(self._changed.items(), MAX_CLIENTS))
            known = len(batch) == len(self._changed)
            self._send({**_changes(batch), "known": known})
            self._changed = {who: one for who, one in self._changed.items() if batch.get(who) != one}
            self._told = known
            self._read_if_due()
        self._say("")

    def _read_if_due(self) -> None:
        if time.monotonic() - self._read_at > READ_SECONDS:
            self._read()

    def _tell_part(self, whole: list[tuple[str, int]]) -> None:
        start = bisect.bisect_right(whole, (self._after, 1 << 62)) if self._after else 0
        batch = whole[start : start + MAX_CLIENTS]
        upto = None if start + len(batch) >= len(whole) else batch[-1][0]
        told = {"part": {"after": self._after, "upto": upto}, "connected": batch, "known": False}
        done = self._send(told)
        if done is None:
            self._whole = None
        else:
            self._after = done

    def _send(self, told: Mapping[str, Any]) -> str | None:
        self._number += 1
        return self._client().presence(
            {"session": self._session, "number": self._number, "at": utc_seconds(), "part": None, **told}
        )


def _changes(batch: Mapping[str, tuple[bool, int]]) -> dict[str, list[tuple[str, int]]]:
    return {
        "connected": [(who, at) for who, (is_connected, at) in batch.items() if is_connected],
        "disconnected": [(who, at) for who, (is_connected, at) in batch.items() if not is_connected],
    }
