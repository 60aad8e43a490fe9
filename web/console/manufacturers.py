"""Manufacturers in the console: CAs of factory certificates, added, proven, and removed."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core.errors import Conflict, InputInvalid
from core.roles import Permission
from core.states import ManufacturerStatus
from web.api.enrolment import Pem
from web.api.fields import ShortText
from web.api.routing import RequestModel
from web.console.access import ACCESS, AllQuery, access_values, form_again
from web.console.enrolment import ProfileForm, certificate_profiles, profile_of
from web.console.pages import Moved, Pages, Shown, Visit

PAGES = Pages()
MANUFACTURERS = f"{ACCESS}/manufacturers"
PATH = f"{MANUFACTURERS}/{{manufacturer_id}}"


class ManufacturerForm(ProfileForm):
    """A CA that issues factory certificates, PEM, with how its devices are registered."""

    name: ShortText
    certificate: Pem


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
        form = visit.form(ManufacturerForm)
        record = visit.portal.manufacturers.add(visit.actor, form.name, form.certificate, profile_of(form))
    except (InputInvalid, Conflict) as error:
        profiles = certificate_profiles(visit)
        return form_again(visit, "manufacturer_new.html", ManufacturerForm, error, profiles=profiles)
    return Moved(f"{MANUFACTURERS}/{record.id}")


@PAGES.add("GET", PATH, Permission.READ)
def manufacturer(visit: Visit, manufacturer_id: str) -> Shown:
    """Show a manufacturer, with the nonce to be signed while it is unproven."""
    record = visit.portal.manufacturers.manufacturer(visit.actor.tenant_id, manufacturer_id)
    return Shown("manufacturer.html", {"maker": record, "given": {}, "problems": {}})


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
