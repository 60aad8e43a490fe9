"""Restarts the broker for what it takes in at its start only: announced, seldom, and one restart for all that waits.

A restart keeps sessions and queues, those of devices that are asleep, too; a reload (SIGHUP) of Mosquitto 2.0 does not.
It disconnects whoever is connected, and each of them costs the broker a handshake when it comes back.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from broker.control import RestartReason
from broker.process import run_command, started_at
from config import Settings
from core.errors import BrokerUnavailable

log = logging.getLogger("portal.broker")

RESTART_SECONDS = 60.0  # for the command
ANSWER_SECONDS = 10.0  # after it, until the broker answers
ASK_AGAIN_SECONDS = 3600.0  # after this time the log asks again for a restart that the portal cannot make
# Restarts take at most a twentieth of the broker's time: a device that comes back costs it 1.75 ms.
LEAST_SPACING, SPACING_OF_A_DEVICE = 2.0, 20 * 0.00175
_LONGEST_SPACING = 3600.0
_PAUSE = 0.02


@dataclass(eq=False, repr=False)
class BrokerRestarts:
    """Restarts one broker by the command in ``PORTAL_BROKER_RESTART``, or says that somebody has to.

    ``_waits`` says by a deadline why it has to be, see ``BrokerProvisioning.waits``; ``devices`` counts those that may
    be connected. The caller holds the lock of the reconciliations.
    """

    _settings: Settings
    _waits: Callable[[float], RestartReason | None]
    devices: Callable[[], int]
    _in_vain: int = 0  # restarts in a row after which the same was waited for
    _asked: tuple[RestartReason | None, float] = (None, -math.inf)

    def seconds_until_due(self) -> float:
        """Return how long a restart has to wait, so that there are few: ``inf`` if the portal has no command for it."""
        if not self._settings.broker_restart:
            return math.inf
        spacing = LEAST_SPACING + SPACING_OF_A_DEVICE * self.devices()
        spacing = min(_LONGEST_SPACING, spacing * 2**self._in_vain)
        running = time.time() - started_at(self._settings)
        return max(0.0, spacing - running) if running >= 0 else 0.0

    def restart(self, reason: RestartReason) -> None:
        """Restart the broker, and see that it has all then; raise ``BrokerUnavailable`` if it does not."""
        started = started_at(self._settings)
        run_command("PORTAL_BROKER_RESTART", self._settings.broker_restart, time.monotonic() + RESTART_SECONDS)
        if reason is RestartReason.CERTIFICATE:
            return  # the next probe sees it
        still = self._waits_after(started)
        self._in_vain = 0 if still is None else self._in_vain + 1
        if still is not None:
            raise BrokerUnavailable(f"The broker was restarted, but {still}; see its log, and what doctor says.")

    def _waits_after(self, started: float) -> str | None:
        """Wait until the broker answers that was started after ``started``; return what is still wrong."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            if started_at(self._settings) != started:
                with contextlib.suppress(BrokerUnavailable):  # it has not come so far
                    return self._waits(deadline)
            time.sleep(_PAUSE)
        return "it does not answer"

    def ask_for(self, reason: RestartReason) -> bool:
        """Ask in the log for a restart that the portal has no command for; the same is asked for once an hour.

        Return whether it was asked for now.
        """
        asked, at = self._asked
        due = asked is not reason or time.monotonic() - at >= ASK_AGAIN_SECONDS
        if due:
            self._asked = reason, time.monotonic()
            log.error(
                "restart the broker at a quiet time, or set PORTAL_BROKER_RESTART",
                extra={"because": str(reason)},
            )
        return due
