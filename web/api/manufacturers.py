"""Manufacturers' CAs, whose certificates let devices in that are born with one."""

from __future__ import annotations

import ssl

from core.roles import Permission
from store.manufacturers import ManufacturerRecord
from web.api.enrolment import terms_fields, terms_of
from web.api.enrolment_models import ManufacturerList, ManufacturerModel, ManufacturerRequest, ProofRequest
from web.api.routing import Answers, Call, Reply, Routes

manufacturers = Routes("Manufacturers")


@manufacturers.route("GET", "/manufacturers", permission=Permission.READ, answers=Answers(ManufacturerList))
def list_manufacturers(call: Call) -> Reply:
    """List manufacturers, newest first."""
    records = call.portal.manufacturers.manufacturers(call.actor.tenant_id)
    return Reply(ManufacturerList(manufacturers=[_model(record) for record in records]))


@manufacturers.route(
    "POST",
    "/manufacturers",
    permission=Permission.TOKENS,
    body=ManufacturerRequest,
    answers=Answers(ManufacturerModel, status=201, description="The CA is taken down; it counts once it is proven"),
    errors=(409,),
)
def add_manufacturer(call: Call) -> Reply:
    """Add a manufacturer's CA; it counts for nothing before its proof."""
    wanted: ManufacturerRequest = call.body
    record = call.portal.manufacturers.add(call.actor, wanted.name, wanted.certificate, terms_of(wanted))
    return Reply(_model(record), status=201)


@manufacturers.route(
    "GET",
    "/manufacturers/{manufacturer_id}",
    permission=Permission.READ,
    answers=Answers(ManufacturerModel),
    errors=(404,),
)
def show_manufacturer(call: Call) -> Reply:
    """Show a manufacturer, with the nonce to be signed while it is unproven."""
    return Reply(_model(call.portal.manufacturers.manufacturer(call.actor.tenant_id, call.path["manufacturer_id"])))


@manufacturers.route(
    "POST",
    "/manufacturers/{manufacturer_id}/proof",
    permission=Permission.TOKENS,
    body=ProofRequest,
    answers=Answers(ManufacturerModel, description="The manufacturer is registered; a repeat answers the same"),
    errors=(404, 409),
)
def prove_manufacturer(call: Call) -> Reply:
    """Show that somebody has the CA's key, and so register it."""
    wanted: ProofRequest = call.body
    record = call.portal.manufacturers.prove(
        call.actor, call.path["manufacturer_id"], certificate=wanted.certificate, signature=wanted.signature
    )
    return Reply(_model(record))


@manufacturers.route(
    "DELETE",
    "/manufacturers/{manufacturer_id}",
    permission=Permission.TOKENS,
    answers=Answers(ManufacturerModel, description="The CA lets nobody in any more; a repeat answers the same"),
    errors=(404,),
)
def remove_manufacturer(call: Call) -> Reply:
    """Let nobody in by this CA any more; devices that have enrolled by it stay."""
    return Reply(_model(call.portal.manufacturers.remove(call.actor, call.path["manufacturer_id"])))


def _model(record: ManufacturerRecord) -> ManufacturerModel:
    plain = ("name", "status", "fingerprint", "not_after", "created_at", "proven_at", "removed_at")
    unproven = record.status == "unproven"
    return ManufacturerModel(
        **{name: getattr(record, name) for name in plain},
        **terms_fields(record.terms),
        manufacturer_id=record.id,
        nonce=record.nonce if unproven else None,
        nonce_expires_at=record.nonce_expires_at if unproven else None,
        certificate=ssl.DER_cert_to_PEM_cert(record.der),
    )
