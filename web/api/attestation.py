"""Attestation by devices: a nonce, and enrolment with evidence beside the CSR."""

from __future__ import annotations

import base64
import contextlib
import ssl
from typing import Annotated, Self

from pydantic import Field, model_validator

from attestation.evidence import EvidenceType
from attestation.refusals import EvidenceMalformed
from core.errors import Forbidden
from core.roles import MAY, Permission
from pki import est as pki_est
from web.api.device_clients import (
    WAITING,
    client_of,
    credential_of,
    enrolled,
    enrolment_token,
    renewed,
    unauthenticated,
    waiting_reply,
)
from web.api.devices import OfDevice, RegisteredAnswer
from web.api.evidence import EvidenceRequest, NonceAnswer, PolicyId
from web.api.routing import ANYONE, Answers, Call, Reply, RequestModel, Routes, share_of
from workflows.attestation.nonces import EndorsementKey, NonceHolder
from workflows.enrolment.clients import DeviceClient, ManufacturedClient
from workflows.enrolment.credentials import Enrolled, Waiting, nonce_holder

ROUTES = Routes("Attestation")
Base64Text = Annotated[str, Field(max_length=16384, pattern="^[A-Za-z0-9+/]*={0,2}$", description="Base64")]


class NonceRequest(RequestModel):
    """For a TPM whose endorsement key is certified, what it takes to challenge it; for all other evidence nothing.

    `ek_certificate` and its `intermediates` are certificates in DER, `ak_public` is the TPMT_PUBLIC of the attestation
    key. An operator, who registers a device, names the policy by which it will be appraised.
    """

    type: EvidenceType | None = None
    ek_certificate: Base64Text | None = None
    intermediates: list[Base64Text] = Field(default=[], max_length=4)
    ak_public: Base64Text | None = None
    policy_id: PolicyId | None = None

    @model_validator(mode="after")
    def _challenges_a_tpm(self) -> Self:
        if (self.ek_certificate is None) != (self.ak_public is None):
            raise ValueError("give both ek_certificate and ak_public, or neither")
        if self.ek_certificate is not None and self.type is not EvidenceType.TPM:
            raise ValueError("ek_certificate and ak_public go with the type tpm2")
        return self

    def key(self) -> EndorsementKey | None:
        """Return the endorsement key that is to be challenged; raises ``EvidenceMalformed``."""
        if self.ek_certificate is None or self.ak_public is None:
            return None
        above = tuple(map(_decoded, self.intermediates))
        return EndorsementKey(_decoded(self.ek_certificate), above, _decoded(self.ak_public))


class EnrollRequest(RequestModel):
    """A request for a certificate for the device's own key."""

    csr: Annotated[str, Field(max_length=16384, description="PEM, PKCS#10")]
    attestation: EvidenceRequest | None = None


class EnrolledAnswer(RegisteredAnswer, OfDevice):
    """The device with its certificate and chain."""


@ROUTES.add(
    "POST",
    "/attestation/nonce",
    ANYONE,
    Answers("A nonce for five minutes and one use", model=NonceAnswer, status=201),
    body_optional=True,
    token_optional=True,
    for_devices=True,
    errors=(401, 403, 404, 429),
)
def make_nonce(call: Call, body: NonceRequest) -> NonceAnswer:
    """Get a nonce for evidence, as a device with a credential to enrol, or as an operator."""
    holder, policy_id = _holder(call, body)
    # An operator's request is a part of the share already.
    share = share_of(call.portal, holder.tenant_id) if call.actor.token_id is None else contextlib.nullcontext()
    with share:
        issued = call.portal.attestations.challenge(holder, policy_id, body.key())
    credential = issued.credential
    return NonceAnswer.of(
        issued,
        credential=None if credential is None else base64.b64encode(credential.blob).decode(),
        secret=None if credential is None else base64.b64encode(credential.secret).decode(),
    )


@ROUTES.add(
    "POST",
    "/enroll",
    ANYONE,
    Answers("The device's certificate; the device is active", model=EnrolledAnswer, status=201),
    also=(WAITING,),
    errors=(401, 403, 404, 409, 429, 503),
)
def enroll(call: Call, body: EnrollRequest) -> Reply:
    """Enrol a device as EST does, or renew its certificate, with evidence beside its CSR."""
    request = pki_est.read_enrolment_request(body.csr.encode())
    shown = None if body.attestation is None else body.attestation.shown()
    holder = client_of(call)
    if isinstance(holder, DeviceClient) and enrolment_token(call) is None:
        answer = renewed(call, holder, request, shown)
        name = call.portal.inventory.device(holder.tenant_id, holder.device_id, kind=holder.kind).device.name
        return Reply(EnrolledAnswer.of(answer, name=name, status="active"))
    client = credential_of(call)
    outcome = enrolled(call, client, request, shown)
    if isinstance(outcome, Waiting):
        return waiting_reply(outcome)
    return Reply(_answer(call, client.tenant_id, outcome))


def _answer(call: Call, tenant_id: str, outcome: Enrolled) -> EnrolledAnswer:
    device, record = call.portal.inventory.certified(tenant_id, outcome.device_id, outcome.certificate)
    signer = call.portal.authority.current.by_id[record.issuer_id]
    pem = ssl.DER_cert_to_PEM_cert(record.der)
    return EnrolledAnswer.of(
        record,
        device_id=device.id,
        name=device.name,
        status=device.status,
        expires_at=record.not_after,
        certificate=pem,
        chain=signer.chain_pem(pem),
    )


def _holder(call: Call, body: NonceRequest) -> tuple[NonceHolder, str | None]:
    """Return who asks for a nonce, and by which policy their evidence will be appraised."""
    if call.actor.token_id is not None:
        if Permission.CHANGE not in MAY.get(call.actor.role, ()):
            raise Forbidden(f"The role {call.actor.role} may not register devices, so it is given no nonce.")
        return NonceHolder.of_operator(call.actor.tenant_id, call.actor.token_id), body.policy_id
    client, token = client_of(call), enrolment_token(call)
    if token is not None:
        own = token.profile.attestation_policy_id
        return nonce_holder(token), call.portal.attestations.policy_for(token.tenant_id, token.device_id, own)
    if isinstance(client, ManufacturedClient):
        holder = NonceHolder.of_factory_key(client.tenant_id, client.certificate.key_fingerprint)
        return holder, client.manufacturer.profile.attestation_policy_id
    if isinstance(client, DeviceClient):
        holder = NonceHolder.of_device(client.tenant_id, client.device_id)
        return holder, call.portal.attestations.policy_of(client.tenant_id, client.device_id)
    raise unauthenticated(call)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise EvidenceMalformed("ek_certificate, intermediates and ak_public must be Base64 with padding.") from error
