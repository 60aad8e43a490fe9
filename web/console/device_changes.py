"""What an operator does to a device on its page: renew, suspend, resume, revoke, change what is known of it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from core.errors import InputInvalid
from core.roles import Permission
from store.devices import DeviceRecord
from web.api.devices import PatchRequest, pairs
from web.api.fields import BundleFormatName, ExternalId, KeyTypeName, Name, Place, ReasonName, ShortText
from web.api.routing import RequestModel, input_invalid
from web.console.device import PATH, path_of
from web.console.formats import value_text
from web.console.handover import handed_over
from web.console.pages import Moved, Pages, Shown, Visit
from web.console.registration import Once
from web.console.text_fields import Lines, lines_of, metadata_of, of_fields, topics_of
from workflows.devices import DeviceDetails
from workflows.renewal import RenewalRequest

PAGES = Pages()


class RevokeForm(RequestModel):
    """Why a device is revoked."""

    reason: ReasonName = "unspecified"


class RenewForm(RequestModel):
    """How a device is renewed; a form that is sent twice renews it once, by ``once``."""

    once: Once
    key_type: KeyTypeName | None = None
    bundle_format: BundleFormatName | None = None
    revoke_previous: Literal["after_overlap", "when_used"] = "after_overlap"


class EditForm(RequestModel):
    """What is known of a device: ``metadata`` and ``topics`` a line each; ``seen`` is its state when it was shown."""

    seen: Annotated[str, Field(max_length=40)]
    name: Name
    type: ShortText
    location: Place
    firmware: ShortText
    external_id: ExternalId | None = None
    metadata: Lines = ""
    topics: Lines = ""


@PAGES.add("POST", f"{PATH}/revoke", Permission.CHANGE)
def revoke(visit: Visit, device_id: str) -> Moved:
    """Revoke a device for good; its page shows how that takes hold."""
    form = visit.form(RevokeForm)
    visit.portal.revocations.revoke(visit.actor, device_id, form.reason, waits=False)
    return Moved(path_of(device_id))


@PAGES.add("POST", f"{PATH}/suspend", Permission.CHANGE)
def suspend(visit: Visit, device_id: str) -> Moved:
    """Suspend a device until it is resumed."""
    visit.portal.revocations.suspend(visit.actor, device_id, waits=False)
    return Moved(path_of(device_id))


@PAGES.add("POST", f"{PATH}/resume", Permission.CHANGE)
def resume(visit: Visit, device_id: str) -> Moved:
    """Resume a suspended device."""
    visit.portal.revocations.resume(visit.actor, device_id)
    return Moved(path_of(device_id))


@PAGES.add("POST", f"{PATH}/renew", Permission.CHANGE)
def renew(visit: Visit, device_id: str) -> Shown:
    """Issue new credentials for a device, and show them this once."""
    form = visit.form(RenewForm)
    request = RenewalRequest(
        key_type=form.key_type, bundle_format=form.bundle_format, when_used=form.revoke_previous == "when_used"
    )
    renewed = visit.portal.renewals.renew(visit.actor, device_id, request, form.once)
    return handed_over(visit, renewed, renewed.name, is_renewal=True)


# --- What is known of it ------------------------------------------------------------------------------------------


@PAGES.add("GET", f"{PATH}/edit", Permission.CHANGE)
def edit(visit: Visit, device_id: str) -> Shown:
    """Show the form for what is known of a device."""
    details = visit.portal.inventory.device(visit.actor.tenant_id, device_id)
    return Shown("device_edit.html", {"device": details.device, "form": _as_form(details), "problems": {}})


@PAGES.add("POST", f"{PATH}/edit", Permission.CHANGE)
def save(visit: Visit, device_id: str) -> Moved | Shown:
    """Change what differs from what is known; nothing if somebody else has changed it since the form was shown."""
    details = visit.portal.inventory.device(visit.actor.tenant_id, device_id)
    try:
        form = visit.form(EditForm)
        if form.seen != _seen(details.device):
            text = (
                "Somebody has changed this device since you opened the form. What you see now is newer; enter it again."
            )
            problems = {"seen": text}
            values = {"device": details.device, "form": _as_form(details), "problems": problems}
            return Shown("device_edit.html", values, status=409)
        changes = _changes(details, form)
        if changes is not None:
            values = changes.model_dump(exclude_unset=True, exclude={"topics"})
            topics = pairs(changes.topics) if "topics" in changes.model_fields_set else ...
            visit.portal.registrations.update(visit.actor, device_id, values, topics)
    except InputInvalid as error:
        shown = {**_as_form(details), **{name: visit.request.form.get(name, "") for name in EditForm.model_fields}}
        problems = {one.field.partition(".")[0]: one.message for one in error.errors}
        values = {"device": details.device, "form": shown, "problems": problems or {"seen": error.detail}}
        return Shown("device_edit.html", values, status=422)
    return Moved(path_of(device_id))


def _seen(device: DeviceRecord) -> str:
    return device.updated_at.isoformat()


def _as_form(details: DeviceDetails) -> dict[str, str]:
    device = details.device
    topics = [f"{topic.filter} {topic.access.value}" for topic in details.topics] if device.own_topics else []
    return {
        "seen": _seen(device),
        **{name: getattr(device, name) for name in ("name", "type", "location", "firmware")},
        "external_id": device.external_id or "",
        "metadata": "\n".join(f"{key}={value_text(value)}" for key, value in _shown(device).items()),
        "topics": "\n".join(topics),
    }


def _shown(device: DeviceRecord) -> dict[str, Any]:
    """Return the metadata that lines of KEY=VALUE can show; the rest stays as it is."""
    return {key: value for key, value in device.metadata.items() if key and "=" not in key and key == key.strip()}


def _changes(details: DeviceDetails, form: EditForm) -> PatchRequest | None:
    """Return what the form changes, ``None`` if that is nothing; raises ``InputInvalid``."""
    device, before = details.device, _as_form(details)
    changed: dict[str, Any] = {
        name: getattr(form, name)
        for name in ("name", "type", "location", "firmware")
        if getattr(form, name) != getattr(device, name)
    }
    if form.external_id is not None and form.external_id != device.external_id:
        changed["external_id"] = form.external_id
    if metadata := _metadata_changes(device, form.metadata):
        changed["metadata_changes"] = metadata
    if lines_of(form.topics) != lines_of(before["topics"]):
        changed["topics"] = topics_of(form.topics) or None
    if not changed:
        return None
    try:
        return PatchRequest.model_validate(changed)
    except ValidationError as error:
        raise of_fields(input_invalid(error), {"metadata_changes": "metadata"}) from None


def _metadata_changes(device: DeviceRecord, text: str) -> dict[str, Any]:
    shown, wanted = _shown(device), metadata_of(text)
    changes: dict[str, Any] = {key: None for key in shown if key not in wanted}
    for key, value in wanted.items():
        if key not in shown or value != value_text(shown[key]).strip():
            changes[key] = value if isinstance(shown.get(key, ""), str) else _typed(value)
    return changes


def _typed(value: str) -> Any:
    """Return a value in place of one that was no text, as JSON if it is."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
