"""The audit record: entries found by filters, saved as CSV, and whether the record continues what was signed."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from pydantic import Field

from core.errors import DeviceNotFound, FieldProblem, InputInvalid, NameAmbiguous
from core.roles import Permission
from core.states import ClientKind
from store.audit import AuditRecord, Period
from web.api.fields import REFERENCE, NumericCursor, Place, ShortText
from web.api.routing import RequestModel
from web.console.access import Tab
from web.console.formats import csv_line, rfc_3339, value_text
from web.console.pages import Pages, Sent, Shown, Visit

PAGES = Pages()
RECORD = "/ui/record"
TABS = (
    Tab("Audit record", RECORD, Permission.AUDIT, alone=True),
    Tab("Webhooks", f"{RECORD}/webhooks", Permission.WEBHOOKS),
)
PER_PAGE = 50
CSV_AT_ONCE = 200
_COLUMNS = ("id", "at", "actor", "action", "object", "outcome", "address", "request_id", "detail")
Day = Annotated[str, Field(pattern="^[0-9]{4}-[0-9]{2}-[0-9]{2}$")]


class RecordQuery(RequestModel):
    """Which entries: about a device or another object, by whom, of which action, of which days in UTC, from where on.

    ``about`` is an object as in the record (``webhook:…``), or a device by its name, external id or id.
    """

    about: Place | None = None
    actor: Place | None = None
    action: ShortText | None = None
    outcome: Literal["done", "refused"] | None = None
    since: Day | None = None
    until: Day | None = None
    cursor: NumericCursor | None = None

    @property
    def given(self) -> dict[str, str]:
        """The filters that are set, as parameters of a query."""
        return self.model_dump(exclude_none=True, exclude={"cursor"})


@PAGES.add("GET", RECORD, Permission.AUDIT)
def record(visit: Visit) -> Shown:
    """List the audit record, newest entry first."""
    query = visit.query(RecordQuery)
    entries, before = _found(visit, query, limit=PER_PAGE, before=query.cursor)
    values = {
        "tabs": TABS,
        "query": query,
        "entries": entries,
        "next": None if before is None else _link(query, {"cursor": str(before)}),
        "first": _link(query, {}) if query.cursor else None,
        "csv": f"{RECORD}.csv?{urlencode(query.given)}",
    }
    if not visit.wants_fragment:
        log = visit.portal.audit_logs.of(visit.actor.tenant_id)
        values |= {"verification": log.verification(), "may_know": visit.actor.tenant_id == visit.portal.first_tenant}
    return Shown("record.html", values, fragment="record_results.html")


@PAGES.add("GET", f"{RECORD}.csv", Permission.AUDIT)
def record_csv(visit: Visit) -> Sent:
    """Save all entries that match as CSV, newest first, read and sent in parts."""
    parts = _parts(visit, visit.query(RecordQuery))
    first = next(parts)  # what is refused is refused before anything is sent
    lines = itertools.chain([csv_line(_COLUMNS)], [first], parts)
    return Sent(lines, "text/csv; charset=utf-8", "audit.csv")


def _found(
    visit: Visit, query: RecordQuery, *, limit: int, before: str | None
) -> tuple[Sequence[AuditRecord], int | None]:
    return visit.portal.operators.audit(
        visit.actor.tenant_id,
        limit=limit,
        before=None if before is None else int(before),
        filters=_filters(visit, query),
        period=Period(_midnight("since", query.since), _midnight("until", query.until, days=1)),
    )


def _filters(visit: Visit, query: RecordQuery) -> dict[str, str]:
    found = query.model_dump(include={"actor", "action", "outcome"}, exclude_none=True)
    return found if query.about is None else found | {"object": _object(visit, query.about)}


def _object(visit: Visit, about: str) -> str:
    """Return an object as the record names it; raises ``InputInvalid`` for a device that is not there."""
    if ":" in about:
        return about
    ways = ("name", "external_id", "id") if re.fullmatch(REFERENCE, about) else ("name", "external_id")
    for by in ways:
        try:
            return f"device:{visit.portal.inventory.identified(visit.actor.tenant_id, ClientKind.DEVICE, by, about)}"
        except DeviceNotFound:
            continue
        except NameAmbiguous as error:
            raise _refused("about", error.detail) from None
    raise _refused("about", "no device has this name, external id or id")


def _midnight(name: str, day: str | None, *, days: int = 0) -> datetime | None:
    try:
        return None if day is None else datetime.fromisoformat(day).replace(tzinfo=UTC) + timedelta(days=days)
    except (ValueError, OverflowError):
        raise _refused(name, "must be a day, such as 2027-01-31") from None


def _refused(name: str, message: str) -> InputInvalid:
    return InputInvalid(f"A filter cannot be used: {name} ({message}).", [FieldProblem(name, message)])


def _link(query: RecordQuery, changes: Mapping[str, str]) -> str:
    parameters = {**query.given, **changes}
    return f"{RECORD}?{urlencode(parameters)}" if parameters else RECORD


def _parts(visit: Visit, query: RecordQuery) -> Iterator[bytes]:
    before: str | None = None
    while True:
        entries, more = _found(visit, query, limit=CSV_AT_ONCE, before=before)
        yield b"".join(map(_line, entries))
        if more is None:
            return
        before = str(more)


def _line(entry: AuditRecord) -> bytes:
    detail = json.dumps(entry.detail, ensure_ascii=False)
    texts: list[Any] = [entry.actor, entry.action, entry.object, entry.outcome, entry.address, entry.request_id, detail]
    return csv_line([str(entry.id), rfc_3339(entry.at), *map(value_text, texts)])
