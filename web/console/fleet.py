"""The fleet: devices found by search as it is typed, by filters and in orders, and saved as CSV."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from pydantic import Field
from werkzeug.datastructures import MultiDict

from core.errors import InputInvalid, StateConflict
from core.roles import Permission
from store.devices import DeviceFilter, DeviceRecord
from store.groups import GroupRecord
from web.api.fields import Cursor, Description, GroupName, Place, ProfileName, ShortText, StatusName
from web.api.groups import SavedFilter
from web.api.routing import RequestModel, read_fields
from web.console.formats import csv_line, rfc_3339
from web.console.pages import Moved, Pages, Sent, Shown, Visit
from web.console.registration import new_once
from workflows.connections import DeviceConnection, connection_of
from workflows.devices import Page
from workflows.groups import CONNECTED, EXPIRES_WITHIN_DAYS

PAGES = Pages()
FLEET = "/ui/devices"
PER_PAGE = 50
_PREFIX = "filter_"  # of a filter's fields, where they are in a form with others
CSV_AT_ONCE = 200
SEARCH_SECONDS = 0.2  # after which a page shows what was found so far, and leads on
_COLUMNS = (
    "device_id", "name", "external_id", "type", "location", "firmware", "status", "created_at", "expires_at",
    "last_seen",
)  # fmt: skip


class FleetQuery(RequestModel):
    """Which devices, in which order, from where on."""

    q: Annotated[Place | None, Field(description="A part of a name, of an external id or of metadata, or an id")] = None
    status: StatusName | None = None
    connected: Literal["true", "false", "never"] | None = None
    expires_within: Annotated[str, Field(pattern="^(7|30|90)$")] | None = None
    type: ShortText | None = None
    location: Place | None = None
    profile: ProfileName | None = None
    group: GroupName | None = None
    attested: Literal["passed", "failed", "outdated", "none"] | None = None
    sort: Literal["created", "name", "-name", "expires", "last_seen", "-last_seen"] | None = None
    cursor: Cursor | None = None

    @property
    def given(self) -> dict[str, str]:
        """The filters and the order that are set, as parameters of a query; without the place in the list."""
        return self.model_dump(exclude_none=True, exclude={"cursor"})

    @property
    def is_filtered(self) -> bool:
        """Whether the list leaves devices out."""
        return bool(self.given.keys() - {"sort"})

    @property
    def conditions(self) -> dict[str, Any]:
        """What can be saved as a filter, beside what the group stands for; empty for nothing."""
        narrowed: dict[str, Any] = {**self.given}
        within = narrowed.pop("expires_within", None)
        found = {name: value for name, value in narrowed.items() if name in SavedFilter.model_fields}
        return found if within is None else {**found, EXPIRES_WITHIN_DAYS: int(within)}


class RemoveForm(RequestModel):
    """Which saved filter."""

    group: GroupName


class SaveForm(RequestModel):
    """The name under which a filter is saved, as a group that has it."""

    name: GroupName
    description: Description = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A device as a row shows it; ``not_after`` is the end of its certificate."""

    device: DeviceRecord
    not_after: datetime | None
    connection: DeviceConnection | None

    @property
    def id(self) -> str:
        """The id of the device."""
        return self.device.id


@PAGES.add("GET", FLEET, Permission.READ)
def fleet(visit: Visit) -> Shown:
    """List devices, newest first unless another order is asked for."""
    query = visit.query(FleetQuery)
    devices, cursor = _found(visit, query)
    groups = visit.portal.groups.groups(visit.actor.tenant_id)
    values = {
        "groups": [(group.name, _title_of(group)) for group in groups],
        "group": next((group for group in groups if group.name == query.group), None),
        "query": query,
        "devices": devices,
        "next": None if cursor is None else _link(query, {"cursor": cursor}),
        "first": _link(query, {}) if query.cursor else None,
        "csv": f"{FLEET}.csv?{urlencode(query.given)}",
        "once": new_once(),
        "filters": {name: value for name, value in query.given.items() if name != "sort"},
    }
    return Shown("fleet.html", values, fragment="fleet_results.html")


@PAGES.add("POST", f"{FLEET}/filters", Permission.CHANGE)
def save_filter(visit: Visit) -> Moved:
    """Save the filters of the list under a name: a group that has them."""
    sent = visit.request.form
    own = MultiDict([(name, value) for name, value in sent.items(multi=True) if name in SaveForm.model_fields])
    form = read_fields(SaveForm, own)
    others = [pair for pair in sent.items(multi=True) if pair[0].startswith(_PREFIX) and pair[1].strip()]
    query = read_fields(FleetQuery, MultiDict([(name.removeprefix(_PREFIX), value) for name, value in others]))
    if not isinstance(form, SaveForm) or not isinstance(query, FleetQuery):
        raise TypeError("a model validates to itself")
    groups, conditions = visit.portal.groups, query.conditions
    if query.group is not None:
        within = groups.group(visit.actor.tenant_id, query.group).filter
        if within is None:
            text = f"The group {query.group} has members, which no filter can stand for: add the devices to a group."
            raise InputInvalid(text, [])
        conditions = {**within, **conditions}
    if not conditions:
        raise InputInvalid("There is nothing to save: narrow the list by a filter or a search first.", [])
    saved = groups.add(visit.actor, form.name, form.description, saved=conditions, topics=None, validity_days=None)
    return Moved(f"{FLEET}?{urlencode({'group': saved.name})}")


@PAGES.add("POST", f"{FLEET}/filters/remove", Permission.CHANGE)
def remove_filter(visit: Visit) -> Moved:
    """Remove a saved filter; devices stay as they are. A group with members is no saved filter."""
    group = visit.portal.groups.group(visit.actor.tenant_id, visit.form(RemoveForm).group)
    if group.filter is None:
        raise StateConflict(f"The group {group.name} is no saved filter: its members were added.")
    visit.portal.groups.remove(visit.actor, group.name)
    return Moved(FLEET)


def _title_of(group: GroupRecord) -> str:
    return f"{group.name} (saved filter)" if group.filter is not None else f"{group.name} ({group.members:,})"


@PAGES.add("GET", f"{FLEET}.csv", Permission.READ)
def fleet_csv(visit: Visit) -> Sent:
    """Save all devices that match as CSV, read and sent in parts, so that a large fleet takes the memory of one."""
    query = visit.query(FleetQuery)
    parts = _parts(visit, filter_of(visit, query))
    first = next(parts)  # what is refused is refused before anything is sent
    lines = itertools.chain([csv_line(_COLUMNS)], [first], parts)
    return Sent(lines, "text/csv; charset=utf-8", "devices.csv")


def filter_of(visit: Visit, query: FleetQuery) -> DeviceFilter:
    """Return the filter that a query means now."""
    within = query.expires_within
    return DeviceFilter(
        status=query.status,
        type=query.type,
        location=query.location,
        q=query.q,
        profile=query.profile,
        group=query.group,
        attested=query.attested,
        sort=query.sort,
        connected=None if query.connected is None else CONNECTED[query.connected],
        expires_before=None if within is None else visit.now + timedelta(days=int(within)),
    )


def _found(visit: Visit, query: FleetQuery) -> tuple[Sequence[Row], str | None]:
    """Return a page of devices, and where the next one begins.

    A search first names the devices that its text means by itself, or whose names begin with it, and looks on for as
    long as a reader waits gladly: ``Inventory.devices`` returns less than a page after it has looked at many devices.
    """
    inventory, tenant_id, wanted = visit.portal.inventory, visit.actor.tenant_id, filter_of(visit, query)
    found: dict[str, Row] = {}
    if query.q is not None and query.cursor is None:
        named = filter_of(visit, query.model_copy(update={"q": None}))
        found = {row.id: row for row in _rows(inventory.suggested(tenant_id, query.q, named, limit=PER_PAGE))}
    cursor, until = query.cursor, time.monotonic() + SEARCH_SECONDS
    while True:
        page = inventory.devices(tenant_id, wanted, limit=max(1, PER_PAGE - len(found)), cursor=cursor)
        for row in _rows(page):
            found.setdefault(row.id, row)
        cursor = page.cursor
        if cursor is None or len(found) >= PER_PAGE or time.monotonic() >= until:
            return list(found.values()), cursor


def _rows(page: Page) -> Iterator[Row]:
    for one in page.devices:
        yield Row(one.device, one.not_after, connection_of(one.presence, page.contacts))


def _link(query: FleetQuery, changes: Mapping[str, str]) -> str:
    parameters = {**query.given, **changes}
    return f"{FLEET}?{urlencode(parameters)}" if parameters else FLEET


def all_that_match(visit: Visit, wanted: DeviceFilter) -> Iterator[Row]:
    """Yield all devices of a filter, read in parts; what is refused is refused at the first one."""
    return itertools.chain.from_iterable(_pages(visit, wanted))


def _pages(visit: Visit, wanted: DeviceFilter) -> Iterator[Sequence[Row]]:
    inventory, tenant_id = visit.portal.inventory, visit.actor.tenant_id
    cursor: str | None = None
    while True:
        page = inventory.devices(tenant_id, wanted, limit=CSV_AT_ONCE, cursor=cursor)
        yield list(_rows(page))
        if (cursor := page.cursor) is None:
            return


def _parts(visit: Visit, wanted: DeviceFilter) -> Iterator[bytes]:
    for page in _pages(visit, wanted):
        yield b"".join(csv_line(_cells(row)) for row in page)


def _cells(row: Row) -> Sequence[str]:
    device, seen = row.device, None if row.connection is None else row.connection.last_seen
    times = (device.created_at, row.not_after, seen)
    cells = [device.id, device.name, device.external_id or "", device.type, device.location, device.firmware]
    return [*cells, device.status.value, *("" if at is None else rfc_3339(at) for at in times)]
