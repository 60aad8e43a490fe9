"""What lets a device in that enrols by itself, with what it is answered."""

from __future__ import annotations

from dataclasses import dataclass, field

from pki.est import EnrolmentRequest
from store.enrolment import EnrolmentProfile, EnrolmentTokenRecord
from workflows.enrolment.clients import ManufacturedClient

RETRY_AFTER = 60  # seconds after which a device that waits for an operator is to ask again


@dataclass(frozen=True, slots=True)
class Means:
    """What lets a device in. ``identity`` tells it from the others that come by the same token or manufacturer."""

    tenant_id: str
    terms: EnrolmentProfile
    identity: str
    serial: str
    label: str  # for the audit record
    token_id: str | None = None
    manufacturer_id: str | None = None
    device_id: str | None = None  # of the one device that a token is for


def by_token(token: EnrolmentTokenRecord, request: EnrolmentRequest) -> Means:
    """Let in by an enrolment token: the device is whoever has the key of the CSR."""
    return Means(
        token.tenant_id,
        token.terms,
        request.key_fingerprint,
        request.name,
        f"enrolment token {token.name} ({token.id})",
        token_id=token.id,
        device_id=token.device_id,
    )


def by_manufacturer(client: ManufacturedClient) -> Means:
    """Let in by the certificate that the device was born with."""
    return Means(
        client.tenant_id,
        client.manufacturer.terms,
        client.certificate.key_fingerprint,
        client.certificate.serial,
        f"manufacturer {client.manufacturer.name} ({client.manufacturer.id})",
        manufacturer_id=client.manufacturer.id,
    )


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A device has its certificate, DER, with its key (PKCS#8, DER) where that was made here; the broker lets it in."""

    device_id: str
    certificate: bytes = field(repr=False)
    key: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Waiting:
    """An operator has yet to decide; the device is to ask again, with the same key, in ``retry_after`` seconds."""

    device_id: str
    retry_after: int = RETRY_AFTER


@dataclass(frozen=True, slots=True)
class Issued:
    """What ``Enrolled`` says, with the generation at which it works."""

    device_id: str
    certificate: bytes = field(repr=False)
    generation: int
    key: bytes | None = field(default=None, repr=False)


class AskedMeanwhile(Exception):
    """The same device has asked in another request since this one looked."""
