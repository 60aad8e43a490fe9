"""The one tree of exceptions that the portal's rooms raise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar


class PortalError(Exception):
    """Something that can be said to the caller: ``detail`` is one plain sentence, ``code`` is stable snake_case."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


# --- What a caller sent -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """One thing wrong with one field of a request, such as ``topics.0.filter``."""

    field: str
    message: str


class RequestMalformed(PortalError):
    """The request cannot be read at all, for instance because its body is not JSON."""

    code = "malformed_request"


class InputInvalid(PortalError):
    """A field of the request has a value that is refused; ``errors`` names each."""

    code = "invalid_input"

    def __init__(self, detail: str, errors: Iterable[FieldProblem] = ()) -> None:
        super().__init__(detail)
        self.errors = tuple(errors)


class CsrInvalid(InputInvalid):
    """The certificate signing request cannot be parsed, is not signed by its own key, or asks for what is refused."""

    code = "csr_invalid"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, [FieldProblem("csr", detail)])


class KeyRefused(CsrInvalid):
    """The public key is of a kind, size or curve that the portal does not certify."""

    code = "key_refused"


class TopicRefused(InputInvalid):
    """A topic filter is malformed or reaches beyond the device it is for."""

    code = "topic_refused"


class ManufacturerInvalid(InputInvalid):
    """The certificate is not one of a CA that devices could be born with."""

    code = "manufacturer_invalid"


class ProofInvalid(InputInvalid):
    """What was sent does not show that its sender has the CA's key."""

    code = "proof_invalid"


class BodyTooLarge(PortalError):
    """The body is longer than the limit."""

    code = "body_too_large"


class RowMalformed(RequestMalformed):
    """A row of an upload cannot be read at all."""

    code = "malformed_row"


class RowTooLong(BodyTooLarge):
    """A row of an upload is longer than any that can be right."""

    code = "row_too_long"


class TooManyRows(BodyTooLarge):
    """An upload has more rows than it may."""

    code = "too_many_rows"


class BodyTooSlow(PortalError):
    """The client paused for too long in the middle of a body."""

    code = "request_timeout"


class MediaTypeUnsupported(PortalError):
    """The body is of a media type that the endpoint does not read."""

    code = "unsupported_media_type"


# --- Who is asking ------------------------------------------------------------------------------------------------


class Unauthenticated(PortalError):
    """No valid operator token came with the request."""

    code = "unauthenticated"


class Forbidden(PortalError):
    """The operator token is valid, its role is not enough."""

    code = "forbidden"


class EnrolmentUnauthenticated(Unauthenticated):
    """A device that wants to enrol has brought neither a valid enrolment token nor a client certificate."""


class EnrolmentRefused(Forbidden):
    """A device may not enrol: its token is used up, expired or revoked, or an operator has said no."""

    code = "enrolment_refused"


class ClientCertificateRefused(Forbidden):
    """The client certificate is revoked, expired, or of a CA that is not registered here."""

    code = "client_certificate_refused"


class TooManyAttempts(PortalError):
    """Too many failed logins came from the address; ``retry_after`` is when to try again, in seconds."""

    code = "too_many_attempts"

    def __init__(self, detail: str, retry_after: int) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


# --- What is asked for --------------------------------------------------------------------------------------------


class NotFound(PortalError):
    """The thing asked for is not there for this tenant."""

    code = "not_found"


class DeviceNotFound(NotFound):
    """No device has that id."""

    code = "device_not_found"


class LinkUnknown(NotFound):
    """The download link is not one that this portal signed."""

    code = "link_unknown"


class Conflict(PortalError):
    """The request does not fit the state of what it is about."""

    code = "conflict"


class StateConflict(Conflict):
    """A device cannot move from the state it is in to the one wanted."""

    code = "state_conflict"


class ExternalIdTaken(Conflict):
    """The external id is that of another device, or of this one as it is not."""

    code = "external_id_taken"


class IdempotencyConflict(Conflict):
    """The idempotency key was used before with another body."""

    code = "idempotency_conflict"


class Gone(PortalError):
    """The thing was there and is not any more."""

    code = "gone"


class LinkUsed(Gone):
    """The bundle was fetched, or is being fetched, by somebody else."""

    code = "link_used"


class LinkExpired(Gone):
    """The link's time is over."""

    code = "link_expired"


class LinkRevoked(Gone):
    """The device, or the certificate in the bundle, has been revoked."""

    code = "link_revoked"


# --- What the portal depends on -----------------------------------------------------------------------------------


class Unavailable(PortalError):
    """Something the portal needs does not answer now; trying again later may help."""

    code = "unavailable"


class PortalStopping(Unavailable):
    """The portal is being stopped, and what it was doing with it."""

    code = "stopping"


class UploadsBusy(Unavailable):
    """As many bulk uploads as are allowed at a time are under way."""

    code = "too_many_uploads"


class DatabaseUnavailable(Unavailable):
    """The database does not answer or is locked."""

    code = "database_unavailable"


class LockUnavailable(Unavailable):
    """A lock among the portal's processes is held for too long by another, or its file cannot be opened."""

    code = "busy"


class BrokerUnavailable(Unavailable):
    """The broker does not answer on its internal listener, or did not take the new files in time."""

    code = "broker_unavailable"


class BrokerNotEnforcing(BrokerUnavailable):
    """The broker answers but lets in what it must refuse, or refuses what it must let in."""

    code = "broker_not_enforcing"


class IssuerUnusable(Unavailable):
    """A CA cannot sign now: it is out of date, its private key is elsewhere, or its certificate is not a CA's."""

    code = "issuer_unusable"


class ProjectionInvalid(PortalError):
    """An ACL or CRL failed its checks, so it was not put in the broker's reach."""

    code = "projection_invalid"


class SignatureCheckFailed(PortalError):
    """What was just signed does not verify under the issuer's own certificate, so it was not released."""

    code = "signature_check_failed"


# --- What stops the portal from starting --------------------------------------------------------------------------


class StartupError(PortalError):
    """The portal cannot start; the sentence says what to change."""

    code = "cannot_start"


class SettingInvalid(StartupError):
    """A setting has a value that cannot be used."""

    code = "setting_invalid"


class CaKeyUnavailable(StartupError):
    """A CA private key is missing, unreadable, or does not open with the passphrase."""

    code = "ca_key_unavailable"


class DatabaseTooNew(StartupError):
    """The database was written by a newer version of the portal."""

    code = "database_too_new"


class PortalRunning(StartupError):
    """The data folder is in use in a way that does not allow what is wanted."""

    code = "portal_running"


class BackupRefused(StartupError):
    """A backup cannot be made, or must not be restored."""

    code = "backup_refused"
