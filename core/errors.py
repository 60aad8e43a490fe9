"""The portal's exceptions: one tree, each class raised for what it means, never for a status.

``web/api/problems.py`` maps the classes to HTTP statuses; one that has no status there has that of its parent::

    PortalError                           500, and the client learns no more than that
      RequestMalformed                    400
        RowMalformed
      InputInvalid                        422
        CsrInvalid
          KeyRefused
            KeyCompromised
        TopicRefused  ManufacturerInvalid  ProofInvalid  ProfileInvalid  ProfileRefused
        AttestationPolicyInvalid
      BodyTooLarge                        413
        RowTooLong  TooManyRows
      BodyTooSlow                         408
      MediaTypeUnsupported                415
      Unauthenticated                     401
        EnrolmentUnauthenticated            logins by an identity provider: workflows/oidc/refusals.py
      Forbidden                           403
        EnrolmentRefused  ClientCertificateRefused  TenantSuspended  ForeignOrigin
        AttestationRefused                  its kinds are in attestation/refusals.py
      TooManyAttempts                     429
        TooManyRegistrations  TooManyUploads  TenantBusy
      NotFound                            404
        DeviceNotFound  ApplicationNotFound  LinkUnknown
      Conflict                            409
        StateConflict  ExternalIdTaken  IdempotencyConflict  KeyInUse  LastAdminToken  GuardNeeded
        NameInUse  ProfileInUse  QuotaReached  GroupInUse  GroupsDisagree  NameAmbiguous
      Gone                                410
        LinkUsed  LinkExpired  LinkRevoked
      Unavailable                         503
        PortalStopping  UploadsBusy  LockUnavailable  IssuerUnusable
        TokenUnavailable
          TokenKeyUnavailable
        DatabaseUnavailable
          DatabaseInUse
        BrokerUnavailable
          BrokerNotEnforcing
      ProjectionInvalid  SignatureCheckFailed
      StartupError                        raised before there is anybody to answer
        SettingInvalid  CaKeyUnavailable  CaChainRefused  DatabaseTooNew  PortalRunning  BackupRefused
        ServerCertificateRefused
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import ClassVar, Self


class PortalError(Exception):
    """An error for the caller: ``detail`` is one sentence about what is wrong and what to do, ``code`` is stable."""

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
    """Fields of the request have invalid values; ``errors`` names each."""

    code = "invalid_input"

    def __init__(self, detail: str, errors: Iterable[FieldProblem] = ()) -> None:
        super().__init__(detail)
        self.errors = tuple(errors)


class CsrInvalid(InputInvalid):
    """The certificate signing request cannot be parsed, is not signed by its own key, or is refused."""

    code = "csr_invalid"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, [FieldProblem("csr", detail)])


class KeyRefused(CsrInvalid):
    """The public key has an algorithm, size or curve that the portal does not certify."""

    code = "key_refused"


class KeyCompromised(KeyRefused):
    """The public key was revoked as compromised; it is certified for nobody any more."""

    code = "key_compromised"


class TopicRefused(InputInvalid):
    """A topic filter is malformed or covers topics of other devices."""

    code = "topic_refused"


class ProfileInvalid(InputInvalid):
    """A certificate profile has values by which no certificate could be issued."""

    code = "profile_invalid"


class ProfileRefused(InputInvalid):
    """The certificate profile does not exist, or does not allow what was asked for."""

    code = "profile_refused"


class ManufacturerInvalid(InputInvalid):
    """The certificate is not that of a CA that can issue factory certificates (IDevIDs)."""

    code = "manufacturer_invalid"


class ProofInvalid(InputInvalid):
    """The proof of possession of a CA's key is invalid."""

    code = "proof_invalid"


class AttestationPolicyInvalid(InputInvalid):
    """An appraisal policy has trust anchors that cannot be used, or none."""

    code = "attestation_policy_invalid"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, [FieldProblem("attestation.anchors", detail)])


class BodyTooLarge(PortalError):
    """The body is longer than the limit."""

    code = "body_too_large"


class RowMalformed(RequestMalformed):
    """A row of an upload cannot be read at all."""

    code = "malformed_row"


class RowTooLong(BodyTooLarge):
    """A row of an upload is longer than any valid row can be."""

    code = "row_too_long"


class TooManyRows(BodyTooLarge):
    """An upload has more rows than the limit."""

    code = "too_many_rows"


class BodyTooSlow(PortalError):
    """The client paused for too long in the middle of a body."""

    code = "request_timeout"


class MediaTypeUnsupported(PortalError):
    """The body has a media type that the endpoint does not accept."""

    code = "unsupported_media_type"


# --- Who is asking ------------------------------------------------------------------------------------------------


class Unauthenticated(PortalError):
    """No valid operator token came with the request."""

    code = "unauthenticated"


class Forbidden(PortalError):
    """The role of the operator token does not have the permission."""

    code = "forbidden"


class ForeignOrigin(Forbidden):
    """A page of another site has made a browser send the request."""

    code = "foreign_origin"


class EnrolmentUnauthenticated(Unauthenticated):
    """A device that enrols has sent neither a valid enrolment token nor a client certificate."""


class EnrolmentRefused(Forbidden):
    """A device may not enrol: its token is used up, expired or revoked, or an operator has rejected it."""

    code = "enrolment_refused"


class ClientCertificateRefused(Forbidden):
    """The client certificate is revoked, expired, or of a CA that is not registered here."""

    code = "client_certificate_refused"


class AttestationRefused(Forbidden):
    """A device's evidence of what it is does not verify, or does not satisfy the appraisal policy."""

    code = "attestation_refused"


class TooManyAttempts(PortalError):
    """Too much was tried in a while, as failed logins from an address; ``retry_after``: seconds to wait."""

    code = "too_many_attempts"

    def __init__(self, detail: str, retry_after: int) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class TooManyRegistrations(TooManyAttempts):
    """The tenant has registered as many devices in this minute as its quota allows."""

    code = "too_many_registrations"


class TenantBusy(TooManyAttempts):
    """The tenant has as many requests under way in a process as leave room for those of others."""

    code = "tenant_busy"


class TooManyUploads(TooManyAttempts):
    """The tenant has as many bulk uploads under way as its quota allows."""

    code = "too_many_uploads_of_tenant"


# --- What is asked for --------------------------------------------------------------------------------------------


class TenantSuspended(Forbidden):
    """The tenant of the operator, the device or the link is suspended, or was removed."""

    code = "tenant_suspended"


class NotFound(PortalError):
    """The requested thing does not exist for this tenant."""

    code = "not_found"


class DeviceNotFound(NotFound):
    """No device has that id."""

    code = "device_not_found"


class ApplicationNotFound(NotFound):
    """No application has that id."""

    code = "application_not_found"


class LinkUnknown(NotFound):
    """The download link is not one that this portal signed."""

    code = "link_unknown"


class Conflict(PortalError):
    """The request conflicts with the state of its object."""

    code = "conflict"


class StateConflict(Conflict):
    """A device cannot change from its present state to the requested one."""

    code = "state_conflict"


class ExternalIdTaken(Conflict):
    """The external id belongs to another device, or to a device registered with other values."""

    code = "external_id_taken"


class KeyInUse(Conflict):
    """The public key is that of another device, which is not revoked."""

    code = "key_in_use"


class NameInUse(Conflict):
    """The DNS name or address is in a certificate of another device, which is valid."""

    code = "name_in_use"


class ProfileInUse(Conflict):
    """The certificate profile is that of devices, enrolment tokens or manufacturers, or its name is taken."""

    code = "profile_in_use"


class NameAmbiguous(Conflict):
    """Several devices or applications have the name, or an id that begins so."""

    code = "name_ambiguous"


class GroupInUse(Conflict):
    """The group sets something for devices that are in it, or its name is taken."""

    code = "group_in_use"


class GroupsDisagree(Conflict):
    """A device would be in two groups that set the same thing for it."""

    code = "groups_disagree"


class IdempotencyConflict(Conflict):
    """The idempotency key was used before with another body."""

    code = "idempotency_conflict"


class LastAdminToken(Conflict):
    """Without this token nobody could make another one."""

    code = "last_admin_token"


class QuotaReached(Conflict):
    """The tenant has as many devices and applications as its quota allows, or as many groups or members as can be."""

    code = "quota_reached"


class GuardNeeded(Conflict):
    """Only a broker with the guard can hold a client to such topics, or tell who is connected."""

    code = "guard_needed"


class Gone(PortalError):
    """The requested thing existed and is gone."""

    code = "gone"


class LinkUsed(Gone):
    """The bundle was downloaded already: by the delivery ``delivery_id`` of ``device_id``, at ``delivered_at``."""

    code = "link_used"

    def __init__(self, *, device_id: str, delivery_id: str, delivered_at: datetime | None) -> None:
        at = "" if delivered_at is None else f" at {delivered_at:%Y-%m-%d %H:%M:%S} UTC"
        super().__init__(
            f"This link was used{at}; if that was not you, give the device new credentials with portal renew"
            " DEVICE --overlap 0, which revokes those in the bundle at once."
        )
        self.device_id = device_id
        self.delivery_id = delivery_id
        self.delivered_at = delivered_at


class LinkExpired(Gone):
    """The download link has expired."""

    code = "link_expired"


class LinkRevoked(Gone):
    """The device, or the certificate in the bundle, has been revoked."""

    code = "link_revoked"


# --- What the portal depends on -----------------------------------------------------------------------------------


class Unavailable(PortalError):
    """Something the portal depends on does not answer; a later retry may succeed."""

    code = "unavailable"


class PortalStopping(Unavailable):
    """The portal is stopping, and has ended the request."""

    code = "stopping"


class UploadsBusy(Unavailable):
    """The maximum number of concurrent bulk uploads is reached."""

    code = "too_many_uploads"


class DatabaseUnavailable(Unavailable):
    """The database does not answer or is locked."""

    code = "database_unavailable"


class DatabaseInUse(DatabaseUnavailable):
    """A portal with another data folder, and so another broker, works on the database."""


class LockUnavailable(Unavailable):
    """Another process of the portal holds a lock for too long, or the lock file cannot be opened."""

    code = "busy"


class BrokerUnavailable(Unavailable):
    """The broker does not answer on its internal listener, or did not take the new files in time."""

    code = "broker_unavailable"

    @classmethod
    def unwritable(cls, path: Path, error: OSError) -> Self:
        """Return the error for a file or folder of the broker's that the portal cannot write."""
        advice = "give the folder to the portal's user and check that its disk has space"
        return cls(f"{path} cannot be written: {error.strerror}; {advice}.")


class BrokerNotEnforcing(BrokerUnavailable):
    """The broker answers, but admits a client that it must refuse, or refuses one that it must admit."""

    code = "broker_not_enforcing"


class IssuerUnusable(Unavailable):
    """A CA cannot sign: it has expired, its private key is not here, or its certificate is not a CA certificate."""

    code = "issuer_unusable"


class TokenUnavailable(Unavailable):
    """The token that holds a CA's key does not answer in time, has failed or is another one, or refuses its PIN."""

    code = "token_unavailable"


class TokenKeyUnavailable(TokenUnavailable):
    """The token does not have a key, or does not sign with it; it does so with others."""


class ProjectionInvalid(PortalError):
    """An ACL or CRL failed its checks, so it was not handed to the broker."""

    code = "projection_invalid"


class SignatureCheckFailed(PortalError):
    """A new signature does not verify under the issuer's certificate, so it was not released."""

    code = "signature_check_failed"


# --- What stops the portal from starting --------------------------------------------------------------------------


class StartupError(PortalError):
    """The portal cannot start; the sentence says what to change."""

    code = "cannot_start"


class SettingInvalid(StartupError):
    """A setting has an invalid value; ``settings`` are the fields that the sentence is about, if several are."""

    code = "setting_invalid"

    def __init__(self, detail: str, *settings: str) -> None:
        super().__init__(detail)
        self.settings = settings


class CaKeyUnavailable(StartupError):
    """A CA private key is missing, unreadable, or does not open with the passphrase."""

    code = "ca_key_unavailable"


class CaChainRefused(StartupError):
    """The chain of a CA that another CA has signed is not one that clients could verify, or not for a key here."""

    code = "ca_chain_refused"


class ServerCertificateRefused(StartupError):
    """A server certificate of another issuer, or its key, is not one with which clients could be served."""

    code = "server_certificate_refused"


class DatabaseTooNew(StartupError):
    """The database was written by a newer version of the portal."""

    code = "database_too_new"


class PortalRunning(StartupError):
    """Another process uses the data folder in a way that excludes the command."""

    code = "portal_running"


class BackupRefused(StartupError):
    """A backup cannot be made, or must not be restored."""

    code = "backup_refused"
