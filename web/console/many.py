"""What many devices are renewed with, or changed to, in the console: its fields, and what they mean for a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import EllipsisType
from typing import Any, Literal

from pydantic import ValidationError

from core.errors import FieldProblem, InputInvalid
from store.devices import DeviceRecord
from web.api.devices import pairs
from web.api.fields import BundleFormatName, KeyTypeName, Place, ProfileName, ShortText
from web.api.lifecycle import ManyChanges
from web.api.routing import RequestModel, input_invalid
from web.console.formats import csv_line, rfc_3339, value_text
from web.console.registration import Once
from web.console.text_fields import Lines, lines_of, metadata_of, of_fields, topics_of
from workflows.changes import ActionRefused
from workflows.renewal import RenewalRequest, Renewed

_COLUMNS = (
    "device_id", "name", "fingerprint", "serial_number", "expires_at", "download_url", "download_expires_at",
    "bundle_password", "code", "detail",
)  # fmt: skip
_OF_LINES = ("to_metadata", "to_remove", "to_topics")
_IN_FORM = {
    **{name: f"to_{name}" for name in ("type", "location", "firmware", "profile", "topics")},
    "metadata_changes": "to_metadata",
}


class RenewalFields(RequestModel):
    """How devices are renewed; a form that is sent twice renews each once, by ``once``."""

    once: Once | None = None
    key_type: KeyTypeName | None = None
    bundle_format: BundleFormatName | None = None
    revoke_previous: Literal["after_overlap", "when_used"] = "after_overlap"
    save: Literal["csv"] | None = None

    def renewal(self) -> RenewalRequest:
        """Return the renewal to make."""
        when_used = self.revoke_previous == "when_used"
        return RenewalRequest(key_type=self.key_type, bundle_format=self.bundle_format, when_used=when_used)


class ChangeFields(RequestModel):
    """What devices are changed to; what is left out stays as it is.

    ``to_metadata`` sets keys, a line each, ``to_remove`` removes some. ``to_own`` says whether devices get topics of
    their own, ``to_topics``, or lose them.
    """

    to_type: ShortText | None = None
    to_location: Place | None = None
    to_firmware: ShortText | None = None
    to_profile: ProfileName | None = None
    to_metadata: Lines = ""
    to_remove: Lines = ""
    to_own: Literal["set", "default"] | None = None
    to_topics: Lines = ""

    @property
    def changes(self) -> dict[str, str]:
        """The fields that are given, as a form sends them again: each line once, whichever way it ends."""
        given = {name: value for name in ChangeFields.model_fields if (value := getattr(self, name))}
        return {name: "\n".join(lines_of(value)) if name in _OF_LINES else value for name, value in given.items()}

    def wanted(self) -> ManyChanges | None:
        """Return the changes to make, ``None`` for none; raises ``InputInvalid``."""
        names = ("type", "location", "firmware", "profile")
        given: dict[str, Any] = {name: value for name in names if (value := getattr(self, f"to_{name}")) is not None}
        metadata: dict[str, Any] = dict.fromkeys(lines_of(self.to_remove))
        metadata |= metadata_of(self.to_metadata, "to_metadata")
        if metadata:
            given["metadata_changes"] = metadata
        if self.to_topics and self.to_own != "set":
            problem = FieldProblem("to_topics", "choose that devices get these topics, or leave this empty")
            raise InputInvalid("Topics are entered that nothing is said to become of.", [problem])
        if self.to_own == "set":
            given["topics"] = topics_of(self.to_topics, "to_topics")
        elif self.to_own == "default":
            given["topics"] = None
        if not given:
            return None
        try:
            return ManyChanges.model_validate(given)
        except ValidationError as error:
            raise of_fields(input_invalid(error), _IN_FORM) from None


def topics_to_set(changes: ManyChanges) -> Sequence[tuple[str, str]] | EllipsisType | None:
    """Return the topics of a change as the use cases have them: left out, none of their own, or these."""
    return pairs(changes.topics) if "topics" in changes.model_fields_set else ...


def would_change(device: DeviceRecord, changes: ManyChanges) -> bool:
    """Return whether a device differs from what it is to be; topics count as different."""
    if changes.topics is not None or ("topics" in changes.model_fields_set and device.own_topics):
        return True
    names = changes.model_fields_set & {"type", "location", "firmware", "profile"}
    if any(getattr(device, name) != getattr(changes, name) for name in names):
        return True
    return any(
        key in device.metadata if value is None else device.metadata.get(key) != value
        for key, value in changes.metadata_changes.items()
    )


def in_words(changes: ManyChanges) -> Iterator[tuple[str, str]]:
    """Yield what a change sets, each as its name and its value."""
    for name, title in (("type", "Type"), ("location", "Location"), ("firmware", "Firmware")):
        if name in changes.model_fields_set:
            yield title, getattr(changes, name)
    if "profile" in changes.model_fields_set:
        yield "Certificate profile, from the next certificate on", changes.profile
    for key, value in changes.metadata_changes.items():
        yield f"Metadata {key}", "removed" if value is None else value_text(value)
    if changes.topics is not None:
        for topic in changes.topics:
            yield "Topics", f"{topic.filter} {topic.access}"
    elif "topics" in changes.model_fields_set:
        yield "Topics", "those of their group, or the default ones"


def renewals_as_csv(answers: Iterable[Renewed | ActionRefused]) -> bytes:
    """Return what came of renewals as CSV, with links and passwords; what was refused has its reason."""
    written = [(",".join(_COLUMNS) + "\r\n").encode()]
    for one in answers:
        if isinstance(one, ActionRefused):
            cells = [one.device_id, *[""] * 7, one.error.code, one.error.detail]
        else:
            times = ["" if at is None else rfc_3339(at) for at in (one.expires_at, one.download_expires_at)]
            link, password = one.download_url or "", one.bundle_password or ""
            cells = [one.device_id, one.name, one.fingerprint, one.serial_number]
            cells += [times[0], link, times[1], password, "", ""]
        written.append(csv_line(cells))
    return b"".join(written)


def check_once(form: RenewalFields) -> str:
    """Return what makes the second sending of a form a repeat; raises ``InputInvalid`` without it."""
    if form.once is None:
        raise InputInvalid("This form is not complete; make the preview again.", [])
    return form.once
