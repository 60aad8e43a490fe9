"""Checks of what the database says: schema, audit record, generation, links, tokens."""

from __future__ import annotations

import time
from datetime import timedelta

import sqlalchemy as sa

from core import roles
from core.states import PENDING_DELIVERY
from operations.doctor.findings import Verdict, problem, some, warning, well
from operations.doctor.subject import Subject
from store import copy as store_copy
from store import generations, tenants
from store.tables import Delivery
from workflows import audit

LATE = timedelta(minutes=5)


def database(subject: Subject) -> Verdict:
    """Whether it answers and has the schema of this version."""
    with subject.snapshot() as tx:
        found, wanted = store_copy.revision(tx), store_copy.head()
        if found != wanted:
            return problem(
                f"The database has schema {found}, this version of the portal works with {wanted}.",
                "Start the portal of this version, which changes an older schema, or use the version it is of.",
            )
        if tx.dialect.name == "sqlite":
            sound = tx.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
            if sound != "ok":
                return problem(f"The database file is damaged: {sound}.", "Stop the portal and restore a backup.")
    return well(f"It answers, with schema {found}.")


def audit_record(subject: Subject) -> Verdict:
    """Whether the chain of hashes holds from the first entry to the last."""
    with subject.snapshot() as tx:
        verdict = audit.verify(tx, subject.tenant_id)
    if verdict.problem is not None:
        return problem(verdict.problem, "Somebody changed the database by hand: compare it with a backup.")
    return well(f"All {verdict.entries} entries hold.")


def generation(subject: Subject) -> Verdict:
    """Whether the broker was seen to enforce what the database says, now or after as long as a pass may take."""
    with subject.snapshot() as tx:
        wanted = generations.get_broker_state(tx, subject.tenant_id).generation
    deadline = time.monotonic() + subject.settings.enforce_timeout
    while True:
        with subject.snapshot() as tx:
            state = generations.get_broker_state(tx, subject.tenant_id)
        if state.applied_generation >= wanted:
            return well(f"The broker was seen to enforce generation {state.applied_generation}.")
        if time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    since = f" since {state.applied_at:%Y-%m-%d %H:%M:%S} UTC" if state.applied_at else ""
    return problem(
        f"The broker enforces generation {state.applied_generation}{since}, the newest is {wanted}:"
        " revocations made since are not in force.",
        "The portal goes on trying; its log and /readyz say what keeps it.",
    )


def links(subject: Subject) -> Verdict:
    """Bundles that wait for their download, and whether those whose time is over are destroyed."""
    now = subject.clock()
    waiting = Delivery.status.in_(PENDING_DELIVERY)
    with subject.snapshot() as tx:
        count, oldest = tx.execute(sa.select(sa.func.count(), sa.func.min(Delivery.created_at)).where(waiting)).one()
        over = tx.execute(
            sa.select(sa.func.count()).select_from(Delivery).where(waiting, Delivery.expires_at <= now - LATE)
        ).scalar_one()
    if over:
        return warning(
            f"{over} bundles are still there although their links are over.",
            "The portal destroys them within a minute while it runs: see that it does, and its log.",
        )
    return well(
        f"{count} bundles wait for their download" + (f", since {oldest:%Y-%m-%d %H:%M} UTC." if count else ".")
    )


def tokens(subject: Subject) -> Verdict:
    """Operator tokens without an end, apart from the one that this machine itself keeps."""
    now = subject.clock()
    path = subject.settings.secrets_dir / "operator-token"
    with subject.snapshot() as tx:
        own = None
        if path.exists():
            own = tenants.find_token(tx, roles.hash_token(path.read_text(encoding="ascii").strip()))
        valid = [token for token in tenants.list_tokens(tx, subject.tenant_id) if token.is_valid(now)]
    endless = [token.name for token in valid if token.expires_at is None and (own is None or token.id != own.id)]
    if endless:
        return warning(
            f"{len(endless)} operator tokens never expire: {some(endless)}.",
            "Make new ones with an end (./portal token create NAME --days 90), then revoke these.",
        )
    return well(f"{len(valid)} operator tokens are valid; each has an end, but for the one in {path.name}.")
