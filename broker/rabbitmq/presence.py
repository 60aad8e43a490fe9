"""Who is connected to a RabbitMQ cluster: its list, read every few seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator

from broker.control import PresenceReport
from broker.rabbitmq.cluster import Cluster
from core.errors import BrokerUnavailable

READ_SECONDS = 5.0  # a node writes down who is connected as often


class RabbitmqReports:
    """Reports everybody each time; see ``broker.control.PresenceReports``."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._read_at: float | None = None

    @property
    def is_incomplete(self) -> bool:
        """Whether nothing was read yet."""
        return self._read_at is None

    def receive(self, deadline: float) -> Iterator[PresenceReport]:
        """Yield who is connected now, if that was not read just before."""
        if self._read_at is not None and time.monotonic() - self._read_at < READ_SECONDS:
            return
        try:
            connected = self._cluster.connected(deadline)
        except BrokerUnavailable as error:
            raise ConnectionError(error.detail) from error
        self._read_at = time.monotonic()
        yield PresenceReport(connected=connected, disconnected={}, is_whole=True)

    def close(self) -> None:
        """Do nothing: no connection lasts."""
