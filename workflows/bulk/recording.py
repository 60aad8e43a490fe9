"""Writes what was made for a batch of rows, in one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.engine import Connection

import db
from config import AclStyle
from store import audit as store_audit
from store import bulk
from store.bulk import KnownDevice
from workflows import audit, events
from workflows.audit import Actor
from workflows.bulk.terms import Candidate
from workflows.bulk.workers import Credentials, Job
from workflows.events import EventType
from workflows.terms import Registration


@dataclass(frozen=True, slots=True)
class Task:
    """A row that needs credentials: for a new device, or for one that is ``known`` and has not fetched its own."""

    candidate: Candidate
    wanted: Registration
    job: Job
    known: KnownDevice | None


def write_batch(
    tx: Connection, actor: Actor, made: Sequence[tuple[Task, Credentials]], *, style: AclStyle, now: datetime
) -> tuple[Sequence[Candidate], Sequence[tuple[Task, Credentials]], int]:
    """Write devices, certificates, bundles, events and the audit record.

    Returns the rows that others were faster with, of which nothing was written; what was written; the generation that
    the broker must know, 0 where it need not be told.
    """
    tenant_id = actor.tenant_id
    store_audit.lock_audit_head(tx, tenant_id)  # taken anyhow; from here on no other upload writes
    taken = bulk.find_known(
        tx, tenant_id, [id_ for task, _ in made if task.known is None and (id_ := task.candidate.external_id)]
    )
    refreshed = [task.known for task, _ in made if task.known is not None]
    per_device = style is AclStyle.PER_DEVICE
    told = {task.job.device_id for task, _ in made if task.known is None and (per_device or task.job.topics)}
    generation = db.next_generation(tx, tenant_id, at=now) if told or refreshed else 0
    superseded = set[str]()
    if refreshed:
        superseded = bulk.supersede_unfetched(tx, tenant_id, refreshed, at=now, generation=generation)
    again, done = list[Candidate](), list[tuple[Task, Credentials]]()
    for task, credentials in made:
        lost = task.candidate.external_id in taken if task.known is None else task.job.device_id not in superseded
        if lost:
            again.append(task.candidate)
        else:
            done.append((task, credentials))
    new = [(task, generation if task.job.device_id in told else 0) for task, _ in done if task.known is None]
    topics = {
        task.job.device_id: [(topic.filter, topic.access) for topic in task.job.topics]
        for task, _ in new
        if task.job.topics is not None
    }
    bulk.add_devices(tx, tenant_id, [_device(task, since) for task, since in new], topics, created_at=now)
    ids = bulk.add_certificates(tx, tenant_id, [_certificate(*one) for one in done], issued_at=now)
    bulk.add_deliveries(
        tx, tenant_id, [_delivery(*one, ids) for one in done if one[1].bundle is not None], created_at=now
    )
    if events.has_subscribers(tx):
        for task, credentials in done:
            _record_event(tx, tenant_id, task, credentials, now)
    audit.record_all(tx, actor, [_act(*one) for one in done], at=now)
    return again, done, generation


def _device(task: Task, generation: int) -> dict[str, object]:
    wanted = task.wanted
    return {
        "id": task.job.device_id,
        "external_id": wanted.external_id,
        "name": wanted.name,
        "type": wanted.type,
        "location": wanted.location,
        "firmware": wanted.firmware,
        "metadata": dict(wanted.metadata),
        "generation": generation,
    }


def _certificate(task: Task, credentials: Credentials) -> dict[str, object]:
    names = ("issuer_id", "serial_number", "fingerprint", "der", "not_before", "not_after")
    return {"device_id": task.job.device_id, **{name: getattr(credentials, name) for name in names}}


def _delivery(task: Task, credentials: Credentials, certificate_ids: dict[str, int]) -> dict[str, object]:
    return {
        "id": credentials.delivery_id,
        "device_id": task.job.device_id,
        "certificate_id": certificate_ids[credentials.fingerprint],
        "bundle": credentials.bundle,
        "format": credentials.bundle_format,
        "expires_at": credentials.download_expires_at,
    }


def _record_event(tx: Connection, tenant_id: str, task: Task, credentials: Credentials, now: datetime) -> None:
    events.record(
        tx,
        tenant_id,
        EventType.REGISTERED if task.known is None else EventType.RENEWED,
        task.job.device_id,
        at=now,
        name=task.wanted.name,
        serial_number=credentials.serial_number,
        fingerprint=credentials.fingerprint,
        expires_at=credentials.not_after,
    )


def _act(task: Task, credentials: Credentials) -> tuple[str, str, dict[str, object]]:
    detail: dict[str, object] = {"serial_number": credentials.serial_number, "row": task.candidate.row}
    detail["key"] = "csr" if credentials.bundle is None else "made here"
    if task.known is None:
        return "device:register", f"device:{task.job.device_id}", detail
    return "device:reissue", f"device:{task.job.device_id}", {**detail, "superseded": task.known.serial_number}
