"""What a person must act on: read from the database, and what of it was not mailed yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy.engine import Connection

from store import enrolment, generations, issuers, mail

CERTIFICATES_WITHIN, CAS_WITHIN = timedelta(days=30), timedelta(days=90)
PENDING_FOR = timedelta(minutes=5)  # a restart of the broker takes less
AWAY_SECONDS = 120.0
MAX_OF_A_KIND = 1000  # in one message; the rest is in the next


class Kind(StrEnum):
    """The kinds of matters; a template of each name says what to do."""

    REQUEST = "request"
    CERTIFICATE = mail.CERTIFICATE
    CA = "ca"
    REVOCATION = "revocation"
    BROKER = "broker"


@dataclass(frozen=True, slots=True)
class Matter:
    """One thing to act on; ``subject`` tells it from others of its kind, and from its next occurrence."""

    kind: Kind
    subject: str
    line: str


class Absence:
    """Since when the broker has not answered this process."""

    def __init__(self, answers: Callable[[], bool]) -> None:
        self._answers = answers
        self._since: float | None = None

    def is_long(self) -> bool | None:
        """Ask the broker; return whether it has been away for ``AWAY_SECONDS``, ``None`` if it is there."""
        if self._answers():
            self._since = None
            return None
        self._since = time.monotonic() if self._since is None else self._since
        return time.monotonic() - self._since >= AWAY_SECONDS


def unsaid(tx: Connection, tenant_id: str, *, now: datetime, broker_is_away: bool) -> list[Matter]:
    """Return the matters of a tenant, and those of the installation, that were not mailed yet."""
    certificates = mail.ending_certificates(tx, tenant_id, now=now, within=CERTIFICATES_WITHIN, limit=MAX_OF_A_KIND)
    found = [
        Matter(Kind.CERTIFICATE, str(one.certificate_id), f"{plain(one.name)} ({one.device_id}), {_day(one.not_after)}")
        for one in certificates
    ]
    for kind, matters in (
        (Kind.REQUEST, list(_requests(tx, tenant_id))),
        (Kind.CA, list(_cas(tx, now))),
        (Kind.REVOCATION, list(_behind(tx, now))),
        (Kind.BROKER, [Matter(Kind.BROKER, "", "It does not answer the portal.")] * broker_is_away),
    ):
        known = mail.said(tx, tenant_id, kind, [matter.subject for matter in matters])
        found += [matter for matter in matters if matter.subject not in known]
    return found


def _requests(tx: Connection, tenant_id: str) -> Iterator[Matter]:
    first = enrolment.waiting_enrolments(tx, tenant_id, limit=MAX_OF_A_KIND)
    again: Sequence[enrolment.WaitingDevice] = enrolment.waiting_reenrolments(tx, tenant_id, limit=MAX_OF_A_KIND)
    for one in (*first, *again):
        asks = "asks for another key" if one.again else "is new"
        line = f"{plain(one.name)} ({one.device_id}) {asks}, since {_minute(one.asked_at)}"
        yield Matter(Kind.REQUEST, f"{one.device_id} {one.asked_at.timestamp():.0f}", line)


def _cas(tx: Connection, now: datetime) -> Iterator[Matter]:
    for one in issuers.list_issuers(tx):
        if one.not_after - now < CAS_WITHIN:
            yield Matter(Kind.CA, one.fingerprint, f"{plain(one.name)}, {_day(one.not_after)}")


def _behind(tx: Connection, now: datetime) -> Iterator[Matter]:
    state = generations.get_broker_state(tx)
    since = state.pending_since
    if state.applied_generation < state.generation and since is not None and now - since >= PENDING_FOR:
        yield Matter(Kind.REVOCATION, since.isoformat(), f"It was last seen to be up to date at {_minute(since)}.")


def plain(text: str) -> str:
    """Return a text as one line, without what a terminal or a mail reader would act on."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _day(at: datetime) -> str:
    return f"{at:%Y-%m-%d}"


def _minute(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"
