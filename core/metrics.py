"""Counts what the portal's processes do, in the form that Prometheus reads."""

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
MOST_PROCESSES = 1024
# Room in each of a process's two files, allocated at its start: a write to a mapped file that finds no room on the
# disk would kill the process. All labels have few values, so that this is several times what they can take.
FILE_BYTES = 1 << 20
KINDS = ("counter", "histogram")
METHODS = frozenset({"GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "OPTIONS"})
REQUEST_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
ENFORCE_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10)


@dataclass(frozen=True, slots=True)
class Gauge:
    """A figure that is true at the moment it is asked for: a value for each combination of ``labels``."""

    name: str
    text: str
    labels: Sequence[str]
    samples: Sequence[tuple[Sequence[str], float]]


class _Counts:
    """What one process has done, or the process before it in the same slot."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "portal_http_requests", "Requests answered, by the route's template.", "route", "method", "status"
        )
        self.request_seconds = Histogram(
            "portal_http_request_seconds",
            "Time from a whole request to the beginning of its answer.",
            ["route"],
            registry=self.registry,
            buckets=REQUEST_SECONDS,
        )
        self.refusals = self._counter("portal_refusals", "Requests refused, by the code of the error.", "code")
        self.registrations = self._counter(
            "portal_registrations", "Devices registered, by where their key was made.", "key"
        )
        self.renewals = self._counter(
            "portal_renewals", "Certificates given to devices that had one, by who asked: operator, device.", "by"
        )
        self.bulk_rows = self._counter("portal_bulk_rows", "Rows of uploads answered, by what came of them.", "outcome")
        self.revocations = self._counter("portal_revocations", "Devices revoked.")
        self.enforce_seconds = Histogram(
            "portal_enforce_seconds",
            "Time from the request to revoke a device until the broker was seen to refuse it.",
            registry=self.registry,
            buckets=ENFORCE_SECONDS,
        )
        self.passes = self._counter(
            "portal_broker_passes",
            "Passes that bring the broker to the newest generation, by how they ended.",
            "outcome",
        )
        self.ocsp = self._counter(
            "portal_ocsp_answers",
            "Certificates answered for by OCSP, and requests that could not be, by answer and whether it was kept.",
            "answer",
            "kept",
        )
        self.events = self._counter(
            "portal_events_sent",
            "Events sent to a receiver: delivered, failed for now, or given up as dead.",
            "outcome",
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)


disable_created_metrics()
_counts = _Counts()
_shared_in: Path | None = None


# --- What happens -------------------------------------------------------------------------------------------------


def answered(route: str | None, method: str, status: int, seconds: float) -> None:
    """A request was answered; ``route`` is a template such as ``/devices/{device_id}``, ``None`` where none fits."""
    template = route or "none"
    _counts.requests.labels(template, method if method in METHODS else "other", str(status)).inc()
    _counts.request_seconds.labels(template).observe(seconds)


def refused(code: str) -> None:
    """A request was refused with the stable ``code`` of an error."""
    _counts.refusals.labels(code).inc()


def registered(*, with_csr: bool, devices: int = 1) -> None:
    """Devices were registered, durably."""
    if devices:
        _counts.registrations.labels("device" if with_csr else "portal").inc(devices)


def renewed(*, by_device: bool) -> None:
    """A device that had a certificate was given another one, durably."""
    _counts.renewals.labels("device" if by_device else "operator").inc()


def bulk_rows(**rows: int) -> None:
    """Rows of an upload were answered, so many with each outcome: registered, repeated, refused."""
    for outcome, number in rows.items():
        if number:
            _counts.bulk_rows.labels(outcome).inc(number)


def revoked() -> None:
    """A device was revoked, durably."""
    _counts.revocations.inc()


def enforced(seconds: float) -> None:
    """The broker was seen to enforce a revocation, so many seconds after it was asked for."""
    _counts.enforce_seconds.observe(seconds)


def broker_pass(*, ended_well: bool) -> None:
    """A pass has ended."""
    _counts.passes.labels("enforced" if ended_well else "failed").inc()


def ocsp_answered(answer: str, *, kept: bool) -> None:
    """OCSP said ``good``, ``revoked`` or ``unknown`` of a certificate, or gave a failure's name to a request."""
    _counts.ocsp.labels(answer, "yes" if kept else "no").inc()


def event_sent(outcome: str) -> None:
    """An event was sent to a receiver: ``delivered``, ``failed`` (to be sent again) or ``dead``."""
    _counts.events.labels(outcome).inc()


# --- Several processes --------------------------------------------------------------------------------------------


def share(folder: Path) -> None:
    """Count from now on in files of ``folder``, where the figures of all processes add up.

    Called once in each process that serves, before it counts anything. The files belong to a slot rather than to a
    process: one that takes the place of another goes on where that stopped, so that figures never fall and files do
    not pile up. Where they cannot be made, this process counts for itself, and the log says so.
    """
    global _counts, _shared_in
    try:
        slot = _claim(folder)
        for kind in KINDS:
            _allocate(_file(folder, kind, slot))
    except OSError as error:
        log.error("this process's counts stay out of /metrics", extra={"problem": str(error)})
        return
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)  # where the class below looks
    shared: Any = values.MultiProcessValue(lambda: slot)
    values.ValueClass = shared
    _counts, _shared_in = _Counts(), folder


def forget(folder: Path) -> None:
    """Remove the files of processes that have ended; called at a start, so that every series begins anew."""
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
        log.error("the counts of ended processes stay in /metrics", extra={"problem": str(error)})


def _file(folder: Path, kind: str, slot: int) -> Path:
    return folder / f"{kind}_{slot}.db"  # the names that prometheus_client looks for


def _claim(folder: Path) -> int:
    """Take the first free slot, for as long as this process lives: the kernel frees it afterwards."""
    for slot in range(MOST_PROCESSES):
        if _try_lock(folder, slot) is not None:
            return slot
    raise OSError(f"{folder} has room for {MOST_PROCESSES} processes only")


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
        """Give each gauge with its samples."""
        for gauge in self._gauges:
            family = GaugeMetricFamily(gauge.name, gauge.text, labels=gauge.labels)
            for label_values, value in gauge.samples:
                family.add_metric(label_values, value)
            yield family


def exposition(gauges: Iterable[Gauge]) -> bytes:
    """What all processes have counted, with ``gauges``, in the text format 0.0.4 of Prometheus."""
    registry = CollectorRegistry()
    registry.register(_Gauges(gauges))
    if _shared_in is None:
        return generate_latest(_counts.registry) + generate_latest(registry)
    MultiProcessCollector(registry, path=str(_shared_in))
    return generate_latest(registry)
