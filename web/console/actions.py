"""Suspends, resumes, revokes or groups many devices: those selected, or all that match, after a preview.

A preview changes nothing. What is confirmed is what was previewed: if other devices match by then, it is shown again.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from werkzeug.datastructures import MultiDict

from core.errors import InputInvalid
from core.roles import Permission
from core.states import DeviceStatus
from store.devices import DeviceFilter, DeviceRecord
from web.api.fields import DeviceId, GroupName, ReasonName
from web.api.routing import RequestModel, read_fields
from web.console.fleet import FLEET, PER_PAGE, FleetQuery, all_that_match, filter_of
from web.console.pages import FORM_TOKEN, Pages, Shown, Visit
from workflows.changes import ActionRefused
from workflows.devices import MOST_AT_ONCE
from workflows.revocation import Action, Revoked, Suspended

PAGES = Pages()
PATH = f"{FLEET}/actions"
SHOWN = 20  # devices that are listed by name
_DEVICE_ID = TypeAdapter(DeviceId)
_GROUPING = ("add", "remove")
# What each action does to a device in a state: it changes it, or finds it so already; for all others it is refused.
_CHANGES = {
    Action.REVOKE: {DeviceStatus.PENDING, DeviceStatus.ACTIVE, DeviceStatus.SUSPENDED},
    Action.SUSPEND: {DeviceStatus.ACTIVE},
    Action.RESUME: {DeviceStatus.SUSPENDED},
}
_SO_ALREADY = {
    Action.REVOKE: DeviceStatus.REVOKED,
    Action.SUSPEND: DeviceStatus.SUSPENDED,
    Action.RESUME: DeviceStatus.ACTIVE,
}


class ActionForm(RequestModel):
    """What is to be done to which devices; ``shown`` and ``count`` come from the preview."""

    action: Literal["revoke", "suspend", "resume", "add", "remove"]
    of: Literal["selected", "all"]
    reason: ReasonName = "unspecified"
    to_group: GroupName | None = None
    shown: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    count: Annotated[str, Field(pattern="^[0-9]{1,6}$")] | None = None


@dataclass(frozen=True, slots=True)
class Preview:
    """The devices that an action is for: those that it changes, those that are so already, those it is refused for."""

    action: str
    changed: Sequence[DeviceRecord]
    same: Sequence[DeviceRecord]
    refused: Sequence[DeviceRecord]

    @property
    def devices(self) -> list[DeviceRecord]:
        """All of them."""
        return [*self.changed, *self.same, *self.refused]

    @property
    def digest(self) -> str:
        """What tells this preview from one of other devices, or of the same in another state."""
        told = [f"{device.id} {device.status}" for device in self.devices]
        return hashlib.sha256("\n".join([self.action, *sorted(told)]).encode()).hexdigest()


@PAGES.add("POST", f"{PATH}/preview", Permission.CHANGE)
def preview(visit: Visit) -> Shown:
    """Show what an action would do, and do nothing."""
    form, query, ids = _read(visit)
    return _preview(visit, form, query, ids)


@PAGES.add("POST", PATH, Permission.CHANGE)
def act(visit: Visit) -> Shown:
    """Do what was previewed, and show what came of it; to send it again does no harm."""
    form, query, ids = _read(visit)
    found = _found(visit, form, query, ids)
    if form.shown is None or not hmac.compare_digest(form.shown, found.digest):
        return _preview(visit, form, query, ids, "What this would do has changed since you saw it. Look again.")
    if form.action in _GROUPING:
        return _group(visit, form, query, ids, found)
    action = Action(form.action)
    if action is Action.REVOKE and form.count != str(len(found.changed)):
        return _preview(visit, form, query, ids, "To revoke them, enter how many there are.")
    names = {device.id: device.name for device in found.devices}
    answers = list(visit.portal.revocations.act(visit.actor, action, [*names], form.reason))
    return Shown("actions_done.html", {"action": form.action, "names": names, **_outcome(answers)})


def _group(visit: Visit, form: ActionForm, query: FleetQuery, ids: Sequence[str], found: Preview) -> Shown:
    """Add the devices to a group, or remove them from it; those that are in it, or not in it, stay so."""
    if form.to_group is None:
        return _preview(visit, form, query, ids, "Choose the group.")
    devices = [device.id for device in found.changed]
    add, remove = (devices, []) if form.action == "add" else ([], devices)
    changed = visit.portal.groups.put(visit.actor, form.to_group, add, remove)
    number = changed.added + changed.removed
    values = {"group": changed.group, "number": number, "same": len(devices) - number, "problem": changed.problem}
    return Shown("actions_grouped.html", {"action": form.action, **values})


def _outcome(answers: Iterable[Revoked | Suspended | ActionRefused]) -> Mapping[str, Any]:
    done = Counter[str]()
    refused, pending = [], []
    for answer in answers:
        if isinstance(answer, ActionRefused):
            refused.append(answer)
            continue
        done["same" if answer.repeated else "changed"] += 1
        if not answer.enforced:
            pending.append(answer)
    problem = next((answer.problem for answer in pending if answer.problem), None)
    return {"done": done, "refused": refused, "pending": pending, "problem": problem, "shown_at_most": SHOWN}


def _read(visit: Visit) -> tuple[ActionForm, FleetQuery, list[str]]:
    """Return the form, the filters that come with it, and the devices that are selected; raises ``InputInvalid``."""
    sent = visit.request.form
    ids = list(dict.fromkeys(sent.getlist("ids")))
    given = [(name, value) for name, value in sent.items(multi=True) if value.strip()]
    own = ActionForm.model_fields.keys() | {FORM_TOKEN, "ids"}
    form = read_fields(ActionForm, MultiDict([pair for pair in given if pair[0] in ActionForm.model_fields]))
    query = read_fields(FleetQuery, MultiDict([pair for pair in given if pair[0] not in own]))
    if not isinstance(form, ActionForm) or not isinstance(query, FleetQuery):
        raise TypeError("a model validates to itself")
    if form.of == "all" and not query.is_filtered:
        raise InputInvalid(
            "Narrow the list by a filter or a search first: without one, this would be every device.", []
        )
    if form.of == "selected" and not ids:
        raise InputInvalid("No device is selected: tick those you mean, or choose all that match.", [])
    if len(ids) > 4 * PER_PAGE:
        raise InputInvalid("Too many devices are selected; use a filter, and all that match.", [])
    try:
        for device_id in ids:
            _DEVICE_ID.validate_python(device_id)
    except ValidationError:
        raise InputInvalid("A device that is selected has no id; load the list again.", []) from None
    return form, query, ids


def _found(visit: Visit, form: ActionForm, query: FleetQuery, ids: Sequence[str]) -> Preview:
    devices: list[DeviceRecord] = []
    if form.of == "selected":
        inventory, tenant_id = visit.portal.inventory, visit.actor.tenant_id
        for device_id in ids:  # one of another tenant is not found
            page = inventory.devices(tenant_id, DeviceFilter(id=device_id), limit=1, cursor=None)
            devices += [listed.device for listed in page.devices]
    else:
        for listed in all_that_match(visit, filter_of(visit, query)):
            devices.append(listed.device)
            if len(devices) > MOST_AT_ONCE:
                text = f"More than {MOST_AT_ONCE:,} devices match, which is too many for one action; narrow the list."
                raise InputInvalid(text, [])
    if form.action in _GROUPING:
        return Preview(form.action, devices, [], [])
    action = Action(form.action)
    return Preview(
        form.action,
        [device for device in devices if device.status in _CHANGES[action]],
        [device for device in devices if device.status is _SO_ALREADY[action]],
        [device for device in devices if device.status not in {*_CHANGES[action], _SO_ALREADY[action]}],
    )


def _preview(visit: Visit, form: ActionForm, query: FleetQuery, ids: Sequence[str], problem: str = "") -> Shown:
    found = _found(visit, form, query, ids)
    groups = visit.portal.groups.groups(visit.actor.tenant_id) if form.action in _GROUPING else ()
    values = {
        "groups": [(group.name, group.name) for group in groups if group.filter is None],
        "preview": found,
        "form": form,
        "filters": {name: value for name, value in query.given.items() if name != "sort"},
        "ids": [device.id for device in found.devices] if form.of == "selected" else [],
        "problem": problem,
        "shown_at_most": SHOWN,
    }
    return Shown("actions_preview.html", values, status=409 if problem else 200)
