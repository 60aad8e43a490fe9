"""Devices that enrol by themselves, as operators see them: made known, given tokens, approved or rejected."""

from __future__ import annotations

from datetime import timedelta

from core.roles import Permission
from store.enrolment import EnrolmentTokenRecord, Terms
from web.api.enrolment_models import (
    ApproveRequest,
    AskingList,
    AskingModel,
    DecisionAnswer,
    EnrolmentModel,
    EnrolmentTokenList,
    EnrolmentTokenModel,
    EnrolmentTokenRequest,
    NewEnrolmentTokenModel,
    PendingRequest,
    TermsModel,
    TermsRequest,
)
from web.api.routing import Answers, Call, Reply, Routes
from workflows.terms import Registration

enrolment = Routes("Enrolment")


@enrolment.route(
    "POST",
    "/devices",
    permission=Permission.CHANGE,
    body=PendingRequest,
    answers=Answers(
        DecisionAnswer, status=201, description="The device is pending", headers={"Location": "The device's path"}
    ),
)
def expect_device(call: Call) -> Reply:
    """Make a device known that enrols by itself later."""
    wanted: PendingRequest = call.body
    topics = None if wanted.topics is None else [(topic.filter, topic.access) for topic in wanted.topics]
    registration = Registration(**wanted.model_dump(exclude={"topics"}), topics=topics)
    device_id = call.portal.approvals.expect(call.actor, registration)
    headers = {"Location": f"/devices/{device_id}"}
    return Reply(DecisionAnswer(device_id=device_id, status="pending"), status=201, headers=headers)


@enrolment.route(
    "GET",
    "/devices/{device_id}/enrolment",
    permission=Permission.READ,
    answers=Answers(EnrolmentModel),
    errors=(404,),
)
def show_enrolment(call: Call) -> Reply:
    """Show what a device has asked for last, with the fingerprint of its key."""
    record, again = call.portal.approvals.request_of(call.actor.tenant_id, call.path["device_id"])
    return Reply(
        EnrolmentModel(
            device_id=record.device_id,
            enrolment_token_id=record.token_id,
            manufacturer_id=record.manufacturer_id,
            key_fingerprint=(again or record).key_fingerprint,
            status=(again or record).status,
            again=again is not None,
        )
    )


@enrolment.route("GET", "/enrolments", permission=Permission.READ, answers=Answers(AskingList))
def list_enrolments(call: Call) -> Reply:
    """List the devices that wait for an operator, who has waited longest first."""
    found = call.portal.approvals.asking(call.actor.tenant_id)
    plain = ("device_id", "name", "again", "key_fingerprint", "manufacturer_id", "asked_at")
    rows = [({name: getattr(item, name) for name in plain}, item.token_id) for item in found]
    return Reply(AskingList(enrolments=[AskingModel(**row, enrolment_token_id=token) for row, token in rows]))


@enrolment.route(
    "POST",
    "/devices/{device_id}/approve",
    permission=Permission.CHANGE,
    body=ApproveRequest,
    body_optional=True,
    answers=Answers(DecisionAnswer, description="The device gets its certificate when it asks again"),
    errors=(404, 409),
)
def approve(call: Call) -> Reply:
    """Let a device in that has asked; a repeat answers the same."""
    wanted: ApproveRequest = call.body
    status = call.portal.approvals.approve(call.actor, call.path["device_id"], wanted.key_fingerprint)
    return Reply(DecisionAnswer(device_id=call.path["device_id"], status=status))


@enrolment.route(
    "POST",
    "/devices/{device_id}/reject",
    permission=Permission.CHANGE,
    answers=Answers(DecisionAnswer, description="The device, or the other key of one that is in, is out for good"),
    errors=(404, 409),
)
def reject(call: Call) -> Reply:
    """Put a pending device out for good, or refuse a device that is in another key; a repeat answers the same."""
    status = call.portal.approvals.reject(call.actor, call.path["device_id"])
    return Reply(DecisionAnswer(device_id=call.path["device_id"], status=status))


# --- Tokens -------------------------------------------------------------------------------------------------------


@enrolment.route(
    "GET",
    "/enrolment-tokens",
    permission=Permission.READ,
    answers=Answers(EnrolmentTokenList),
)
def list_enrolment_tokens(call: Call) -> Reply:
    """List enrolment tokens, newest first, without their secrets."""
    records = call.portal.enrolment_tokens.tokens(call.actor.tenant_id)
    return Reply(EnrolmentTokenList(enrolment_tokens=[EnrolmentTokenModel(**_fields(record)) for record in records]))


@enrolment.route(
    "POST",
    "/enrolment-tokens",
    permission=Permission.CHANGE,
    body=EnrolmentTokenRequest,
    answers=Answers(NewEnrolmentTokenModel, status=201, description="The token, with its secret, shown this once"),
    errors=(404, 409),
)
def create_enrolment_token(call: Call) -> Reply:
    """Make a token with which devices enrol; its secret is in this answer and nowhere else."""
    wanted: EnrolmentTokenRequest = call.body
    secret, record = call.portal.enrolment_tokens.create(
        call.actor,
        wanted.name,
        terms_of(wanted),
        device_id=wanted.device_id,
        count=wanted.count,
        life=timedelta(hours=wanted.expires_in_hours),
    )
    return Reply(NewEnrolmentTokenModel(**_fields(record), token=secret), status=201)


@enrolment.route(
    "DELETE",
    "/enrolment-tokens/{enrolment_token_id}",
    permission=Permission.CHANGE,
    answers=Answers(EnrolmentTokenModel, description="The token is revoked, at once; a repeat answers the same"),
    errors=(404,),
)
def revoke_enrolment_token(call: Call) -> Reply:
    """Revoke an enrolment token; devices that have enrolled by it stay."""
    record = call.portal.enrolment_tokens.revoke(call.actor, call.path["enrolment_token_id"])
    return Reply(EnrolmentTokenModel(**_fields(record)))


def terms_of(wanted: TermsRequest) -> Terms:
    """What becomes of the devices, as the use cases take it."""
    fields = {name: getattr(wanted, name) for name in TermsRequest.model_fields}
    return Terms(**{**fields, "key_types": tuple(wanted.key_types)})


def terms_fields(terms: Terms) -> dict[str, object]:
    """The same, as it is shown."""
    return {name: getattr(terms, name) for name in TermsModel.model_fields} | {"key_types": list(terms.key_types)}


def _fields(record: EnrolmentTokenRecord) -> dict[str, object]:
    plain = ("name", "device_id", "uses", "created_at", "expires_at", "revoked_at")
    fields = {name: getattr(record, name) for name in plain}
    return fields | {"enrolment_token_id": record.id, "count": record.uses_allowed} | terms_fields(record.terms)
