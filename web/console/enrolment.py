"""Enrolment tokens in the console: made with the profile of the devices they admit, listed, and revoked."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any, get_args

from pydantic import Field, ValidationError

from core.errors import Conflict, FieldProblem, Forbidden, InputInvalid, NotFound
from core.roles import Permission
from core.states import Approval, RepeatedSerial
from store.enrolment import EnrolmentProfile, EnrolmentTokenRecord
from web.api.enrolment import ApprovalName, RepeatedSerialName
from web.api.evidence import AttestationPolicyModel, AttestationPolicyRequest
from web.api.fields import DeviceId, IntegerText, KeyTypeName, Name, Place, ProfileName, ShortText
from web.api.routing import RequestModel, input_invalid, is_no_json
from web.console.access import ACCESS, AllQuery, form_again, secret_shown, tokens_shown
from web.console.pages import Moved, Pages, Shown, Visit
from web.console.registration import Once, new_once
from web.console.text_fields import Lines
from workflows.attestation.policies import PolicyRequest

PAGES = Pages()
ENROLMENT = f"{ACCESS}/enrolment"


class PolicyForm(RequestModel):
    """An appraisal policy, JSON: what evidence devices have to show, and whose counts."""

    attestation: Lines = ""

    def policy(self) -> PolicyRequest | None:
        """Return the policy, ``None`` for none; raises ``InputInvalid``."""
        if not self.attestation.strip():
            return None
        try:
            return AttestationPolicyRequest.model_validate_json(self.attestation).wanted()
        except ValidationError as error:
            said = "; ".join(f"{one.field} {one.message}" for one in input_invalid(error).errors[:3])
            text = "must be a policy in JSON" if is_no_json(error) else said
            raise InputInvalid("The appraisal policy cannot be used.", [FieldProblem("attestation", text)]) from None


class ProfileForm(PolicyForm):
    """How the devices are registered that enrol, and what evidence they have to show."""

    type: ShortText = "device"
    location: Place = "unknown"
    firmware: ShortText = "unknown"
    name_template: Name = "{serial}"
    validity_days: Annotated[int, Field(ge=1, le=36500), IntegerText] | None = None
    approval: ApprovalName = "at_once"
    repeated_serial: RepeatedSerialName = "operator"
    profile: ProfileName = "default"
    key_types: list[KeyTypeName] = Field(default_factory=list)


class EnrolmentTokenForm(ProfileForm):
    """A token for one pending device, or for ``count`` new ones; a form that is sent twice makes one, by ``once``."""

    once: Once
    name: ShortText
    device_id: DeviceId | None = None
    count: Annotated[int, Field(ge=1, le=1000000), IntegerText] = 1
    expires_in_hours: Annotated[int, Field(ge=1, le=8760), IntegerText] = 24


def profile_of(form: ProfileForm) -> EnrolmentProfile:
    """Return the profile of a form; without ``key_types`` all kinds of keys are allowed."""
    names = ProfileForm.model_fields.keys() - {"key_types", "attestation"}
    fields: dict[str, Any] = {name: getattr(form, name) for name in names}
    fields["certificate_profile"] = fields.pop("profile")
    fields |= {"approval": Approval(form.approval), "repeated_serial": RepeatedSerial(form.repeated_serial)}
    return EnrolmentProfile(**fields, key_types=tuple(form.key_types) or get_args(KeyTypeName))


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
        form = visit.form(EnrolmentTokenForm, many=("key_types",))
        secret, record = visit.portal.enrolment_tokens.create(
            visit.actor,
            form.name,
            profile_of(form),
            device_id=form.device_id,
            count=form.count if form.device_id is None else 1,
            life=timedelta(hours=form.expires_in_hours),
            attestation=form.policy(),
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


@PAGES.add("GET", f"{ENROLMENT}/{{enrolment_token_id}}/evidence", Permission.TOKENS)
def edit_evidence(visit: Visit, enrolment_token_id: str) -> Shown:
    """Show the form for what evidence the devices of a token have to show."""
    record = _token(visit, enrolment_token_id)
    given = {"attestation": policy_text(visit, record.profile)}
    return Shown("enrolment_token_evidence.html", {"token": record, "given": given, "problems": {}})


@PAGES.add("POST", f"{ENROLMENT}/{{enrolment_token_id}}/evidence", Permission.TOKENS)
def change_evidence(visit: Visit, enrolment_token_id: str) -> Moved | Shown:
    """Change what evidence the devices of a token have to show from now on."""
    record = _token(visit, enrolment_token_id)
    try:
        wanted = visit.form(PolicyForm).policy()
        if wanted is None:
            problem = FieldProblem("attestation", 'must be there: {"mode": "off"} asks for none')
            raise InputInvalid("There is no policy in this form.", [problem])
        visit.portal.enrolment_tokens.set_attestation(visit.actor, enrolment_token_id, wanted)
    except (InputInvalid, Conflict) as error:
        return form_again(visit, "enrolment_token_evidence.html", PolicyForm, error, token=record)
    return Moved(ENROLMENT)


def policy_text(visit: Visit, profile: EnrolmentProfile) -> str:
    """Return the appraisal policy of a profile as somebody edits it, empty for none."""
    found = visit.portal.attestation_policies.of_profiles(visit.actor.tenant_id, [profile])
    shown = AttestationPolicyModel.shown(found.get(profile.attestation_policy_id))
    return "" if shown is None else shown.model_dump_json(indent=2, exclude={"policy_id", "version"})


def _token(visit: Visit, enrolment_token_id: str) -> EnrolmentTokenRecord:
    tokens = visit.portal.enrolment_tokens.tokens(visit.actor.tenant_id)
    found = next((one for one in tokens if one.id == enrolment_token_id), None)
    if found is None:
        raise NotFound("There is no enrolment token with this id.")
    return found


@PAGES.add("POST", f"{ENROLMENT}/{{enrolment_token_id}}/revoke", Permission.CHANGE)
def revoke_enrolment_token(visit: Visit, enrolment_token_id: str) -> Moved:
    """Revoke an enrolment token; devices that have enrolled with it stay active."""
    visit.portal.enrolment_tokens.revoke(visit.actor, enrolment_token_id)
    return Moved(ENROLMENT)
