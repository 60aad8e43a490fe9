"""Suspends, resumes, revokes, renews, changes or groups many devices: those selected, or all that match.

A preview comes first, and changes nothing. What is confirmed is what was previewed: if other devices match by then, it
is shown again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from werkzeug.datastructures import MultiDict

from core.errors import InputInvalid, StateConflict
from core.roles import Permission
from core.states import DeviceStatus
from store.devices import DeviceFilter, DeviceRecord
from web.api.devices import pairs
from web.api.fields import DeviceId, GroupName, ReasonName
from web.api.routing import read_fields
from web.console.fleet import FLEET, PER_PAGE, FleetQuery, all_that_match, filter_of
from web.console.many import (
    ChangeFields,
    RenewalFields,
    check_once,
    in_words,
    renewals_as_csv,
    topics_to_set,
    would_change,
)
from web.console.pages import FORM_TOKEN, Pages, Sent, Shown, Visit
from web.console.registration import new_once
from web.console.watching import watched
from workflows.admission import checked_topics
from workflows.changes import ActionRefused
from workflows.devices import MOST_AT_ONCE, MOST_RENEWED
from workflows.registration import Updated
from workflows.renewal import Renewed
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


@dataclass(frozen=True, slots=True)
class Words:
    """What pages say of an action: its verb, what becomes of devices, and of those to which it is not done."""

    verb: str
    will: str
    same: str
    refused: str
    past: str


_WORDS: Mapping[str, Words] = {
    "revoke": Words("Revoke", "will be revoked, which is final", "are revoked already", "cannot be revoked", "revoked"),
    "suspend": Words(
        "Suspend",
        "will be suspended until they are resumed",
        "are suspended already",
        "cannot be suspended: pending or revoked",
        "suspended",
    ),
    "resume": Words(
        "Resume", "will be active again", "are active already", "cannot be resumed: pending or revoked", "resumed"
    ),
    "renew": Words("Renew", "will get a new key and certificate", "", "cannot be renewed: not active", "renewed"),
    "update": Words("Change", "will be changed", "are so already", "cannot be changed: revoked", "changed"),
    "add": Words("Add", "", "", "", "added to"),
    "remove": Words("Remove", "", "", "", "removed from"),
}


class ActionForm(RenewalFields, ChangeFields):
    """What is to be done to which devices; ``shown`` and ``count`` come from the preview."""

    action: Literal["revoke", "suspend", "resume", "renew", "update", "add", "remove"]
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
    changes: Mapping[str, str] = field(default_factory=dict)

    @property
    def devices(self) -> list[DeviceRecord]:
        """All of them."""
        return [*self.changed, *self.same, *self.refused]

    @property
    def digest(self) -> str:
        """What tells this preview from one of other devices, or of the same in another state."""
        told = [f"{device.id} {device.status}" for device in self.devices]
        wanted = json.dumps(self.changes, sort_keys=True)
        return hashlib.sha256("\n".join([self.action, wanted, *sorted(told)]).encode()).hexdigest()


@PAGES.add("POST", f"{PATH}/preview", Permission.CHANGE)
def preview(visit: Visit) -> Shown:
    """Show what an action would do, and do nothing."""
    form, query, ids = _read(visit)
    if form.action != "update":
        return _preview(visit, form, query, ids)
    try:
        if form.wanted() is None:
            return _ask_changes(visit, form, query, ids)
        return _preview(visit, form, query, ids)
    except InputInvalid as error:
        return _ask_changes(visit, form, query, ids, error)


@PAGES.add("POST", PATH, Permission.CHANGE)
def act(visit: Visit) -> Shown | Sent:
    """Do what was previewed, and show what came of it; to send it again does no harm."""
    form, query, ids = _read(visit)
    if form.action == "renew":
        return _renew(visit, form, query, ids)
    found = _found(visit, form, query, ids)
    if form.shown is None or not hmac.compare_digest(form.shown, found.digest):
        return _preview(visit, form, query, ids, "What this would do has changed since you saw it. Look again.")
    if form.action in _GROUPING:
        return _group(visit, form, query, ids, found)
    if form.action == "update":
        return _update(visit, form, found)
    action = Action(form.action)
    if action is Action.REVOKE and form.count != str(len(found.changed)):
        return _preview(visit, form, query, ids, "To revoke them, enter how many there are.")
    names = {device.id: device.name for device in found.devices}
    waits = action is Action.RESUME  # the others are watched
    answers = list(visit.portal.revocations.act(visit.actor, action, [*names], form.reason, waits=waits))
    generation = max((one.generation for one in answers if not isinstance(one, ActionRefused)), default=0)
    values = {"words": _WORDS[form.action], "names": names, **_outcome(answers)}
    is_watched = bool(values["pending"]) and not waits
    return Shown("actions_done.html", {**values, **watched(visit, generation if is_watched else 0)})


def _renew(visit: Visit, form: ActionForm, query: FleetQuery, ids: Sequence[str]) -> Shown | Sent:
    """Renew the devices that the preview has named; a repeat gets the same links and passwords for 24 hours."""
    if form.of != "selected":
        return _preview(visit, form, query, ids, "Look at what will be renewed first.")
    answers = list(visit.portal.renewals.renew_many(visit.actor, ids, form.renewal(), check_once(form)))
    if form.save is not None:
        return Sent(renewals_as_csv(answers), "text/csv; charset=utf-8", "renewed-devices.csv")
    renewed = [one for one in answers if isinstance(one, Renewed)]
    repeated = form.model_dump(exclude_defaults=True, include={*RenewalFields.model_fields, "action", "of"})
    values = {
        "renewed": renewed,
        "refused": [one for one in answers if isinstance(one, ActionRefused)],
        "problem": next((one.problem for one in renewed if one.problem), None),
        "again": {**repeated, "save": "csv"},
        "ids": ids,
    }
    return Shown("actions_renewed.html", values)


def _update(visit: Visit, form: ActionForm, found: Preview) -> Shown:
    """Change what was previewed; each device that cannot be is told with the reason."""
    changes = form.wanted()
    if changes is None:
        raise AssertionError("what was previewed changes something")
    values = changes.model_dump(exclude_unset=True, exclude={"topics"})
    wanted = [device.id for device in found.changed]
    answers = list(visit.portal.registrations.update_many(visit.actor, wanted, values, topics_to_set(changes)))
    names = {device.id: device.name for device in found.changed}
    outcome = _outcome(answers)
    outcome["done"]["same"] = len(found.same)
    outcome["refused"] += [ActionRefused(one.id, StateConflict("The device is revoked.")) for one in found.refused]
    names |= {device.id: device.name for device in found.refused}
    return Shown("actions_done.html", {"words": _WORDS["update"], "names": names, **outcome, **watched(visit, 0)})


def _ask_changes(
    visit: Visit, form: ActionForm, query: FleetQuery, ids: Sequence[str], error: InputInvalid | None = None
) -> Shown:
    """Return the form for what is to be changed of many devices."""
    found = () if error is None else error.errors
    problems = {one.field.partition(".")[0]: one.message for one in found}
    if error is not None and not problems.keys() & ChangeFields.model_fields.keys():
        problems = {"": error.detail}
    values = {
        "count": None if form.of == "all" else len(ids),
        "form": form,
        "filters": _filters(query),
        "ids": ids,
        "problems": problems,
        "profiles": [one.profile.name for one in visit.portal.profiles.profiles(visit.actor.tenant_id)],
    }
    return Shown("actions_change.html", values, status=422 if problems else 200)


def _filters(query: FleetQuery) -> dict[str, str]:
    return {name: value for name, value in query.given.items() if name != "sort"}


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


def _outcome(answers: Iterable[Revoked | Suspended | Updated | ActionRefused]) -> dict[str, Any]:
    done = Counter[str]()
    refused, pending = [], []
    for answer in answers:
        if isinstance(answer, ActionRefused):
            refused.append(answer)
            continue
        repeated = not isinstance(answer, Updated) and answer.repeated
        done["same" if repeated else "changed"] += 1
        if answer.enforced is False:
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
    if len(ids) > (MOST_RENEWED if form.action == "renew" else 4 * PER_PAGE):
        raise InputInvalid("Too many devices are selected; use a filter, and all that match.", [])
    try:
        for device_id in ids:
            _DEVICE_ID.validate_python(device_id)
    except ValidationError:
        raise InputInvalid("A device that is selected has no id; load the list again.", []) from None
    return form, query, ids


def _found(visit: Visit, form: ActionForm, query: FleetQuery, ids: Sequence[str]) -> Preview:
    devices = list(_devices(visit, form, query, ids))
    if form.action in _GROUPING:
        return Preview(form.action, devices, [], [])
    if form.action == "renew":
        active = [device for device in devices if device.status is DeviceStatus.ACTIVE]
        return Preview(form.action, active, [], [one for one in devices if one.status is not DeviceStatus.ACTIVE])
    if form.action == "update":
        return _found_to_update(visit, form, devices)
    action = Action(form.action)
    return Preview(
        form.action,
        [device for device in devices if device.status in _CHANGES[action]],
        [device for device in devices if device.status is _SO_ALREADY[action]],
        [device for device in devices if device.status not in {*_CHANGES[action], _SO_ALREADY[action]}],
    )


def _devices(visit: Visit, form: ActionForm, query: FleetQuery, ids: Sequence[str]) -> Iterator[DeviceRecord]:
    if form.of == "selected":
        inventory, tenant_id = visit.portal.inventory, visit.actor.tenant_id
        for device_id in ids:  # one of another tenant is not found
            page = inventory.devices(tenant_id, DeviceFilter(id=device_id), limit=1, cursor=None)
            yield from (listed.device for listed in page.devices)
        return
    most = MOST_RENEWED if form.action == "renew" else MOST_AT_ONCE
    for number, listed in enumerate(all_that_match(visit, filter_of(visit, query)), start=1):
        if number > most:
            text = f"More than {most:,} devices match, which is too many for one action; narrow the list."
            raise InputInvalid(text, [])
        yield listed.device


def _found_to_update(visit: Visit, form: ActionForm, devices: Sequence[DeviceRecord]) -> Preview:
    """Return what a change would do; raises ``InputInvalid`` (``TopicRefused``)."""
    changes = form.wanted()
    if changes is None:
        raise InputInvalid("Nothing to change: enter what the devices are to have.", [])
    terms = visit.portal.tenant_terms.of(visit.actor.tenant_id)
    checked_topics(visit.portal.settings, terms, pairs(changes.topics), None)
    kept = [device for device in devices if device.status is not DeviceStatus.REVOKED]
    changed = [device for device in kept if would_change(device, changes)]
    same = [device for device in kept if not would_change(device, changes)]
    revoked = [device for device in devices if device.status is DeviceStatus.REVOKED]
    return Preview(form.action, changed, same, revoked, form.changes)


def _preview(visit: Visit, form: ActionForm, query: FleetQuery, ids: Sequence[str], problem: str = "") -> Shown:
    found = _found(visit, form, query, ids)
    groups = visit.portal.groups.groups(visit.actor.tenant_id) if form.action in _GROUPING else ()
    changes = form.wanted() if form.action == "update" else None
    renews = form.action == "renew"
    ids = [device.id for device in (found.changed if renews else found.devices)]
    values = {
        "groups": [(group.name, group.name) for group in groups if group.filter is None],
        "preview": found,
        "form": form,
        "of": "selected" if renews else form.of,
        "words": _WORDS[form.action],
        "changes": [] if changes is None else list(in_words(changes)),
        "once": new_once(),
        "filters": _filters(query),
        "ids": ids if renews or form.of == "selected" else [],
        "problem": problem,
        "shown_at_most": SHOWN,
    }
    return Shown("actions_preview.html", values, status=409 if problem else 200)
