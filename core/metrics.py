"""Counts what the portal's processes do, and renders it in the text format of Prometheus."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

log = logging.getLogger("portal.metrics")

MEDIA_TYPE = CONTENT_TYPE_PLAIN_0_0_4
MAX_PROCESSES = 1024
# The size of each of a process's two files, allocated at its start: a write to a mapped file on a full disk would kill
# the process. All labels have few values, so this is several times what they need.
FILE_BYTES = 1 << 20
KINDS = ("counter", "histogram")
METHODS = frozenset({"GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "OPTIONS"})
REQUEST_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
ENFORCE_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10)


@dataclass(frozen=True, slots=True)
class Gauge:
    """A value measured when it is requested, for each combination of ``labels``."""

    name: str
    text: str
    labels: Sequence[str]
    samples: Sequence[tuple[Sequence[str], float]]


class Counts:
    """The counters of one process, continued from the previous process in the same slot."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter, histogram = self._counter, self._histogram
        self.requests = counter("portal_http_requests", "Responses, by route template.", "route", "method", "status")
        self.request_seconds = histogram(
            "portal_http_request_seconds", "Time from a complete request to its response.", REQUEST_SECONDS, "route"
        )
        self.refusals = counter("portal_refusals", "Requests refused, by error code.", "code")
        self.registrations = counter("portal_registrations", "Devices registered, by who generated the key.", "key")
        self.renewals = counter(
            "portal_renewals", "Further certificates for devices, by who requested them: operator, device.", "by"
        )
        self.attestations = counter(
            "portal_attestations", "Evidence of devices, by verdict: passed, failed (admitted), refused.", "verdict"
        )
        self.bulk_rows = counter("portal_bulk_rows", "Rows of bulk uploads, by outcome.", "outcome")
        self.revocations = counter("portal_revocations", "Devices revoked.")
        self.enforce_seconds = histogram(
            "portal_enforce_seconds",
            "Time from the request to revoke a device until the broker was seen to refuse it.",
            ENFORCE_SECONDS,
        )
        self.passes = counter("portal_broker_passes", "Reconciliations with the broker, by outcome.", "outcome")
        self.connects = counter("portal_device_connects", "Devices that the broker reported as connected.")
        self.disconnects = counter("portal_device_disconnects", "Devices that the broker reported as disconnected.")
        self.ocsp = counter(
            "portal_ocsp_answers", "OCSP answers for certificates, and errors; kept says if cached.", "answer", "kept"
        )
        self.events = counter(
            "portal_events_sent", "Attempts to send an event: delivered, failed for now, or dead.", "outcome"
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)


disable_created_metrics()
counts = Counts()  # read it at each use, since ``share`` replaces it
_shared_in: Path | None = None


# --- Several processes --------------------------------------------------------------------------------------------


def share(folder: Path) -> None:
    """Count in files of ``folder`` from now on, where the counts of all processes are added up.

    Called once in each serving process, before it counts anything. The files belong to a slot, not to a process: a
    process that replaces another continues its counts, so that they never fall and files do not accumulate. If the
    files cannot be created, this process counts for itself, and the log says so.
    """
    global counts, _shared_in
    try:
        slot = _claim(folder)
        for kind in KINDS:
            _allocate(_file(folder, kind, slot))
    except OSError as error:
        log.error("the counts of this process are missing from /metrics", extra={"problem": str(error)})
        return
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)  # which the class below reads
    shared: Any = values.MultiProcessValue(lambda: slot)
    values.ValueClass = shared
    counts, _shared_in = Counts(), folder


def forget(folder: Path) -> None:
    """Remove the files of ended processes; called at a start, so that every series begins at zero."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        for lock in folder.glob("*.lock"):
            slot = int(lock.stem)
            held = _try_lock(folder, slot)
            if held is not None:
                for kind in KINDS:
                    _file(folder, kind, slot).unlink(missing_ok=True)
                os.close(held)
    except OSError as error:
        log.error("the counts of ended processes are still in /metrics", extra={"problem": str(error)})


def _file(folder: Path, kind: str, slot: int) -> Path:
    return folder / f"{kind}_{slot}.db"  # prometheus_client looks for these names


def _claim(folder: Path) -> int:
    """Lock the first free slot until this process ends."""
    for slot in range(MAX_PROCESSES):
        if _try_lock(folder, slot) is not None:
            return slot
    raise OSError(f"{folder} has slots for {MAX_PROCESSES} processes only")


def _try_lock(folder: Path, slot: int) -> int | None:
    descriptor = os.open(folder / f"{slot}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _allocate(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, FILE_BYTES)
    finally:
        os.close(descriptor)


# --- What Prometheus reads ----------------------------------------------------------------------------------------


class _Gauges(Collector):
    def __init__(self, gauges: Iterable[Gauge]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        """Yield each gauge with its samples."""
        for gauge in self._gauges:
            family = GaugeMetricFamily(gauge.name, gauge.text, labels=gauge.labels)
            for label_values, value in gauge.samples:
                family.add_metric(label_values, value)
            yield family


def exposition_of(gauges: Iterable[Gauge]) -> bytes:
    """Return the ``gauges`` alone in the same format, without any counts: those are of all tenants together."""
    registry = CollectorRegistry()
    registry.register(_Gauges(gauges))
    return generate_latest(registry)


def exposition(gauges: Iterable[Gauge]) -> bytes:
    """Return the counts of all processes and the ``gauges`` in version 0.0.4 of Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Gauges(gauges))
    if _shared_in is None:
        return generate_latest(counts.registry) + generate_latest(registry)
    MultiProcessCollector(registry, path=str(_shared_in))
    return generate_latest(registry)
