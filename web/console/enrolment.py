"""Enrolment tokens in the console: made with the profile of the devices they admit, listed, and revoked."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any, get_args

from pydantic import Field

from core.errors import Conflict, Forbidden, InputInvalid, NotFound
from core.roles import Permission
from core.states import Approval, RepeatedSerial
from store.enrolment import EnrolmentProfile
from web.api.enrolment import ApprovalName, RepeatedSerialName
from web.api.fields import DeviceId, IntegerText, KeyTypeName, Name, Place, ProfileName, ShortText
from web.api.routing import RequestModel
from web.console.access import ACCESS, AllQuery, form_again, secret_shown, tokens_shown
from web.console.pages import Moved, Pages, Shown, Visit
from web.console.registration import Once, new_once

PAGES = Pages()
ENROLMENT = f"{ACCESS}/enrolment"


class ProfileForm(RequestModel):
    """How the devices are registered that enrol; what evidence they have to show is set at the command line."""

    type: ShortText = "device"
    location: Place = "unknown"
    firmware: ShortText = "unknown"
    name_template: Name = "{serial}"
    validity_days: Annotated[int, Field(ge=1, le=36500), IntegerText] | None = None
    approval: ApprovalName = "at_once"
    repeated_serial: RepeatedSerialName = "operator"
    profile: ProfileName = "default"


class EnrolmentTokenForm(ProfileForm):
    """A token for one pending device, or for ``count`` new ones; a form that is sent twice makes one, by ``once``."""

    once: Once
    name: ShortText
    device_id: DeviceId | None = None
    count: Annotated[int, Field(ge=1, le=1000000), IntegerText] = 1
    expires_in_hours: Annotated[int, Field(ge=1, le=8760), IntegerText] = 24


def profile_of(form: ProfileForm) -> EnrolmentProfile:
    """Return the profile of a form; all kinds of keys are allowed."""
    fields: dict[str, Any] = {name: getattr(form, name) for name in ProfileForm.model_fields}
    fields["certificate_profile"] = fields.pop("profile")
    fields |= {"approval": Approval(form.approval), "repeated_serial": RepeatedSerial(form.repeated_serial)}
    return EnrolmentProfile(**fields, key_types=get_args(KeyTypeName))


def certificate_profiles(visit: Visit) -> list[str]:
    """Return the names of the certificate profiles to choose from."""
    return [one.profile.name for one in visit.portal.profiles.profiles(visit.actor.tenant_id)]


@PAGES.add("GET", ENROLMENT, Permission.READ)
def enrolment_tokens(visit: Visit) -> Shown:
    """List the enrolment tokens that admit devices, newest first, and with ``all`` those that have ended."""
    query = visit.query(AllQuery)
    records = visit.portal.enrolment_tokens.tokens(visit.actor.tenant_id)
    usable = [
        one for one in records if one.revoked_at is None and visit.now < one.expires_at and one.uses < one.uses_allowed
    ]
    return tokens_shown("enrolment_tokens.html", query, records, usable)


@PAGES.add("GET", f"{ENROLMENT}/new", Permission.CHANGE)
def new_enrolment_token(visit: Visit) -> Shown:
    """Show the form for an enrolment token."""
    values = {"once": new_once(), "given": {}, "problems": {}, "profiles": certificate_profiles(visit)}
    return Shown("enrolment_token_new.html", values)


@PAGES.add("POST", f"{ENROLMENT}/new", Permission.CHANGE)
def create_enrolment_token(visit: Visit) -> Shown:
    """Create an enrolment token, and show its secret this once."""
    try:
        form = visit.form(EnrolmentTokenForm)
        secret, record = visit.portal.enrolment_tokens.create(
            visit.actor,
            form.name,
            profile_of(form),
            device_id=form.device_id,
            count=form.count if form.device_id is None else 1,
            life=timedelta(hours=form.expires_in_hours),
            idempotency_key=form.once,
        )
    except (InputInvalid, Conflict, Forbidden, NotFound) as error:
        profiles = certificate_profiles(visit)
        return form_again(visit, "enrolment_token_new.html", EnrolmentTokenForm, error, profiles=profiles)
    return secret_shown(
        secret,
        title="Enrolment token",
        name=record.name,
        back=ENROLMENT,
        ends=record.expires_at,
        use="The device sends it as the password of HTTP Basic when it enrols by EST. To try it:",
        command="curl --cacert ca.pem -u device:TOKEN -H 'Content-Type: application/pkcs10'"
        f" --data-binary @csr.b64 {visit.portal.settings.public_url}/.well-known/est/simpleenroll",
    )


@PAGES.add("POST", f"{ENROLMENT}/{{enrolment_token_id}}/revoke", Permission.CHANGE)
def revoke_enrolment_token(visit: Visit, enrolment_token_id: str) -> Moved:
    """Revoke an enrolment token; devices that have enrolled with it stay active."""
    visit.portal.enrolment_tokens.revoke(visit.actor, enrolment_token_id)
    return Moved(ENROLMENT)
