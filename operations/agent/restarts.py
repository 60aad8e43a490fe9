"""Restarts the broker beside an agent if something waits for that, or asks for it in the log."""

from __future__ import annotations

import contextlib
import logging
import math
import time

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from broker.control import RestartReason
from broker.guard.folder import GuardFiles
from broker.restarts import BrokerRestarts
from broker_provisioning import BrokerProvisioning
from config import Settings
from core.errors import BrokerUnavailable
from operations.agent.folder import AgentFolder, server_files

log = logging.getLogger("portal.agent")

LOOK_SECONDS = 60.0  # between two looks whether it has to be restarted
LINE_BYTES = 55  # of a device in the journal


class AgentRestarts:
    """Looks now and then whether the broker has to be restarted."""

    def __init__(self, settings: Settings, folder: AgentFolder, broker: BrokerProvisioning, files: GuardFiles) -> None:
        self._settings = settings
        self._folder = folder
        self._broker = broker
        self._files = files
        self._restarts = BrokerRestarts(
            settings, lambda deadline: self._broker.waits(folder.probes, deadline), self._devices
        )
        self._look_at = 0.0

    def restart_if_due(self) -> bool:
        """Restart the broker by the command in the settings if it is time, and return whether it was."""
        now = time.monotonic()
        if now < self._look_at:
            return False
        self._look_at = now + LOOK_SECONDS
        if (reason := self._reason()) is None:
            return False
        seconds = self._restarts.seconds_until_due()
        if seconds == math.inf:
            self._restarts.ask_for(reason)
        elif seconds > 0:
            self._look_at = now + seconds
        else:
            log.warning("the broker is restarted", extra={"because": str(reason)})
            self._restarts.restart(reason)
            return True
        return False

    def look_soon(self) -> None:
        """Look at the next occasion: the broker was given something that it may take in at its start only."""
        self._look_at = 0.0

    def _reason(self) -> RestartReason | None:
        """Return why the broker has to be restarted: also if it shows an older certificate than it was given."""
        deadline, probes = time.monotonic() + self._settings.enforce_timeout, self._folder.probes
        with contextlib.suppress(BrokerUnavailable, OSError, ValueError):  # one that does not run
            if (reason := self._broker.waits(probes, deadline)) is not None:
                return reason
            newest = x509.load_pem_x509_certificate(server_files(self._settings)[0].read_bytes())
            if self._broker.server_certificate(probes, deadline) != newest.public_bytes(Encoding.DER):
                return RestartReason.CERTIFICATE
        return None

    def _devices(self) -> int:
        """Return about how many devices the journal has, as many as may be connected."""
        position = self._files.position()
        return 0 if position is None else position.size // LINE_BYTES
