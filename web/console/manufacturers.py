"""Manufacturers in the console: CAs of factory certificates, added, proven, and removed."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, get_args

from pydantic import Field

from attestation.appraisal import AppraisalPolicy, PolicyMode
from core.errors import Conflict, InputInvalid
from core.roles import Permission
from core.states import ManufacturerStatus
from store.enrolment import ManufacturerRecord
from web.api.enrolment import Pem
from web.api.fields import KeyTypeName, ShortText
from web.api.routing import RequestModel
from web.console.access import ACCESS, AllQuery, access_values, form_again
from web.console.enrolment import ProfileForm, certificate_profiles, policy_text, profile_of
from web.console.pages import Moved, Pages, Shown, Visit
from web.console.text_fields import lines_of
from workflows.attestation.policies import PolicyRequest

PAGES = Pages()
MANUFACTURERS = f"{ACCESS}/manufacturers"
_NO_EVIDENCE = PolicyRequest(AppraisalPolicy(mode=PolicyMode.OFF), [])
PATH = f"{MANUFACTURERS}/{{manufacturer_id}}"


class ManufacturerForm(ProfileForm):
    """A CA that issues factory certificates, PEM, with how its devices are registered."""

    name: ShortText
    certificate: Pem


class EditForm(ProfileForm):
    """What is to hold for the devices that enrol from now on; ``certificate``: a renewed one of the same CA."""

    name: ShortText
    certificate: Annotated[str, Field(max_length=16384)] | None = None


class ProofForm(RequestModel):
    """A certificate (PEM) that the CA has issued to the nonce, or its signature of the nonce in Base64."""

    proof: Annotated[str, Field(min_length=1, max_length=16384)]


@PAGES.add("GET", MANUFACTURERS, Permission.READ)
def manufacturers(visit: Visit) -> Shown:
    """List the manufacturers, newest first, and with ``all`` those that were removed."""
    query = visit.query(AllQuery)
    records = visit.portal.manufacturers.manufacturers(visit.actor.tenant_id)
    found = [one for one in records if query.all or one.status is not ManufacturerStatus.REMOVED]
    values = {"manufacturers": found, "all": query.all, "ended": len(records) - len(found)}
    return Shown("manufacturers.html", access_values(values))


@PAGES.add("GET", f"{MANUFACTURERS}/new", Permission.TOKENS)
def new_manufacturer(visit: Visit) -> Shown:
    """Show the form for a manufacturer."""
    return Shown("manufacturer_new.html", {"given": {}, "problems": {}, "profiles": certificate_profiles(visit)})


@PAGES.add("POST", f"{MANUFACTURERS}/new", Permission.TOKENS)
def add_manufacturer(visit: Visit) -> Moved | Shown:
    """Add a manufacturer's CA; its page says what has to be signed before it is trusted."""
    try:
        form = visit.form(ManufacturerForm, many=("key_types",))
        makers = visit.portal.manufacturers
        record = makers.add(visit.actor, form.name, form.certificate, profile_of(form), form.policy())
    except (InputInvalid, Conflict) as error:
        profiles = certificate_profiles(visit)
        return form_again(visit, "manufacturer_new.html", ManufacturerForm, error, profiles=profiles)
    return Moved(f"{MANUFACTURERS}/{record.id}")


@PAGES.add("GET", PATH, Permission.READ)
def manufacturer(visit: Visit, manufacturer_id: str) -> Shown:
    """Show a manufacturer, with the nonce to be signed while it is unproven."""
    record = visit.portal.manufacturers.manufacturer(visit.actor.tenant_id, manufacturer_id)
    return Shown("manufacturer.html", {"maker": record, "given": {}, "problems": {}})


@PAGES.add("GET", f"{PATH}/edit", Permission.TOKENS)
def edit_manufacturer(visit: Visit, manufacturer_id: str) -> Shown:
    """Show the form for how a manufacturer's devices are registered, and what they have to show."""
    record = visit.portal.manufacturers.manufacturer(visit.actor.tenant_id, manufacturer_id)
    values = {"maker": record, "given": _as_form(visit, record), "problems": {}}
    return Shown("manufacturer_edit.html", {**values, "profiles": certificate_profiles(visit)})


@PAGES.add("POST", f"{PATH}/edit", Permission.TOKENS)
def change_manufacturer(visit: Visit, manufacturer_id: str) -> Moved | Shown:
    """Change a manufacturer for the devices that enrol from now on; its evidence stays if the policy is the same."""
    makers = visit.portal.manufacturers
    record = makers.manufacturer(visit.actor.tenant_id, manufacturer_id)
    try:
        form = visit.form(EditForm, many=("key_types",))
        wanted = {"name": form.name, **dataclasses.asdict(profile_of(form))}
        before = {"name": record.name, **dataclasses.asdict(record.profile)}
        wanted.pop("attestation_policy_id", None)
        changed = {name: value for name, value in wanted.items() if value != before[name]}
        shown = policy_text(visit, record.profile)
        policy = None if lines_of(form.attestation) == lines_of(shown) else form.policy() or _NO_EVIDENCE
        if changed or policy is not None or form.certificate is not None:
            makers.update(visit.actor, manufacturer_id, changed, certificate=form.certificate, attestation=policy)
    except (InputInvalid, Conflict) as error:
        profiles = certificate_profiles(visit)
        return form_again(visit, "manufacturer_edit.html", EditForm, error, maker=record, profiles=profiles)
    return Moved(f"{MANUFACTURERS}/{manufacturer_id}")


def _as_form(visit: Visit, record: ManufacturerRecord) -> dict[str, Any]:
    profile = record.profile
    names = ("type", "location", "firmware", "name_template")
    every = len(profile.key_types) == len(get_args(KeyTypeName))
    return {
        "name": record.name,
        **{name: getattr(profile, name) for name in names},
        "validity_days": "" if profile.validity_days is None else str(profile.validity_days),
        "approval": profile.approval.value,
        "repeated_serial": profile.repeated_serial.value,
        "profile": profile.certificate_profile,
        "key_types": [] if every else list(profile.key_types),
        "attestation": policy_text(visit, profile),
    }


@PAGES.add("POST", f"{PATH}/proof", Permission.TOKENS)
def prove_manufacturer(visit: Visit, manufacturer_id: str) -> Moved | Shown:
    """Register a manufacturer by proof of possession of its CA's key; one that is registered stays so."""
    makers = visit.portal.manufacturers
    record = makers.manufacturer(visit.actor.tenant_id, manufacturer_id)
    try:
        proof = visit.form(ProofForm).proof.strip()
        if "-----BEGIN" in proof:
            makers.prove(visit.actor, manufacturer_id, certificate=proof)
        else:
            makers.prove(visit.actor, manufacturer_id, signature=proof)
    except (InputInvalid, Conflict) as error:
        return form_again(visit, "manufacturer.html", ProofForm, error, maker=record)
    return Moved(f"{MANUFACTURERS}/{manufacturer_id}")


@PAGES.add("POST", f"{PATH}/remove", Permission.TOKENS)
def remove_manufacturer(visit: Visit, manufacturer_id: str) -> Moved:
    """Stop trusting a manufacturer's CA; devices that have enrolled with it stay active."""
    visit.portal.manufacturers.remove(visit.actor, manufacturer_id)
    return Moved(MANUFACTURERS)
