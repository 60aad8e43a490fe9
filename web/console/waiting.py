"""Devices that wait for an operator: what is known of each request, and one or many of them approved or rejected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from core.errors import Conflict, DeviceNotFound, NotFound
from core.roles import Permission
from store.audit import Actor
from store.enrolment import EnrolmentProfile, EnrolmentTokenRecord, ManufacturerRecord, WaitingDevice
from web.api.fields import UUID, Place
from web.api.routing import RequestModel
from web.console.pages import Moved, Pages, Shown, Visit

PAGES = Pages()
WAITING = "/ui/waiting"
PER_PAGE = 50
# A request that is ticked: the device, and the SHA-256 of the key that was shown, so that no other key is decided upon.
_TICKED = f"{UUID.rstrip('$')}[.][0-9a-f]{{64}}$"


class WaitingQuery(RequestModel):
    """Which page of the list."""

    page: Annotated[str, Field(pattern="^[1-9][0-9]?$")] = "1"


class DecisionForm(RequestModel):
    """What becomes of the requests that are ticked; ``why`` they are rejected is for the audit record."""

    decision: Literal["approve", "reject", "none"]  # none: by the key Enter, which decides nothing
    ids: Annotated[list[Annotated[str, Field(pattern=_TICKED)]], Field(max_length=PER_PAGE)] = Field(
        default_factory=list
    )
    why: Place | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A request with what is known of it; ``token`` or ``manufacturer`` is what the device has shown."""

    asked: WaitingDevice
    token: EnrolmentTokenRecord | None
    manufacturer: ManufacturerRecord | None
    address: str | None

    @property
    def ticked(self) -> str:
        """What a form sends for it."""
        return f"{self.asked.device_id}.{self.asked.key_fingerprint}"

    @property
    def profile(self) -> EnrolmentProfile | None:
        """How the device is registered."""
        by = self.token or self.manufacturer
        return None if by is None else by.profile


def path_of(device_id: str) -> str:
    """Return the path of the page of a device's request."""
    return f"{WAITING}/{device_id}"


@PAGES.add("GET", WAITING, Permission.READ)
def waiting(visit: Visit) -> Shown:
    """List the requests that wait, the longest wait first."""
    return _list(visit, int(visit.query(WaitingQuery).page))


def _list(visit: Visit, page: int, *, done: str = "", problems: Sequence[str] = (), status: int = 200) -> Shown:
    found = visit.portal.approvals.asking(visit.actor.tenant_id)
    start = (page - 1) * PER_PAGE
    more = len(found) > start + PER_PAGE
    values = {
        "requests": list(_known(visit, found[start : start + PER_PAGE])),
        "count": len(found),
        "first": WAITING if page > 1 else None,
        "next": f"{WAITING}?page={page + 1}" if more else None,
        "done": done,
        "problems": problems,
    }
    return Shown("waiting.html", values, status=status, fragment="waiting_results.html")


def _known(visit: Visit, found: Sequence[WaitingDevice]) -> Iterator[Request]:
    """Yield the requests with what is known of them; what is read for all is read once."""
    if not found:
        return
    portal, tenant_id = visit.portal, visit.actor.tenant_id
    tokens = {one.id: one for one in portal.enrolment_tokens.tokens(tenant_id)}
    makers = {one.id: one for one in portal.manufacturers.manufacturers(tenant_id)}
    addresses = portal.approvals.addresses(tenant_id, [one.device_id for one in found])
    for one in found:
        token, maker = tokens.get(one.token_id or ""), makers.get(one.manufacturer_id or "")
        yield Request(one, token, maker, addresses.get(one.device_id))


@PAGES.add("GET", f"{WAITING}/{{device_id}}", Permission.READ)
def request(visit: Visit, device_id: str) -> Shown | Moved:
    """Show one request; a device that does not wait any more has its own page."""
    details = visit.portal.inventory.device(visit.actor.tenant_id, device_id)
    asking = visit.portal.approvals.asking(visit.actor.tenant_id)
    found = [one for one in asking if one.device_id == details.device.id]
    if not found:
        return Moved(f"/ui/devices/{details.device.id}")
    [known] = _known(visit, found[:1])
    return Shown("waiting_request.html", {"request": known, "details": details, "device": details.device})


@PAGES.add("POST", f"{WAITING}/decide", Permission.CHANGE)
def decide(visit: Visit) -> Moved | Shown:
    """Approve or reject the requests that are ticked; each that cannot be is told with the reason."""
    form = visit.form(DecisionForm, many=("ids",))
    if form.decision == "none":
        return _list(visit, 1, problems=["Press Approve or Reject; nothing was changed."], status=422)
    if not form.ids:
        return _list(visit, 1, problems=["Tick the requests that you mean first; nothing was changed."], status=422)
    done, problems = 0, []
    for ticked in dict.fromkeys(form.ids):
        device_id, _, key = ticked.partition(".")
        try:
            _decide(visit, visit.actor, form, device_id, key)
            done += 1
        except (Conflict, DeviceNotFound) as error:
            if len(form.ids) == 1 and isinstance(error, NotFound):
                raise
            problems.append(f"{_name(visit, device_id)}: {error.detail}")
    if not problems:
        return Moved(WAITING)
    word = "Approved" if form.decision == "approve" else "Rejected"
    return _list(visit, 1, done=f"{word} {done}." if done else "", problems=problems, status=409)


def _decide(visit: Visit, actor: Actor, form: DecisionForm, device_id: str, key: str) -> None:
    if form.decision == "approve":
        visit.portal.approvals.approve(actor, device_id, key)
    else:
        visit.portal.approvals.reject(actor, device_id, key, why=form.why)


def _name(visit: Visit, device_id: str) -> str:
    try:
        return visit.portal.inventory.device(visit.actor.tenant_id, device_id).device.name
    except DeviceNotFound:
        return device_id
