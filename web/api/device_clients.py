"""Who a device is that asks by itself: what its enrolment token or its TLS client certificate says."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import re
import socket
import ssl
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from config import EndOfPrevious
from core.errors import ClientCertificateRefused, EnrolmentUnauthenticated, PortalError, RequestMalformed
from core.setting_values import Network
from pki import est as pki_est
from pki.est import EnrolmentRequest
from store import scope
from store.audit import Actor
from store.enrolment import EnrolmentTokenRecord
from web.api.proxies import is_trusted
from web.api.routing import Answers, Call, Reply, share_of
from workflows.attestation.evidence import ShownEvidence
from workflows.enrolment.clients import DeviceClient, ManufacturedClient
from workflows.enrolment.credentials import Enrolled, Waiting, by_manufacturer, by_token
from workflows.renewal import RenewalRequest, Renewed

NO_CREDENTIALS = (
    "Credentials are required: an enrolment token as the password of HTTP Basic authentication, or a client certificate"
    " of a registered manufacturer."
)

WAITING = Answers(
    "The device waits for an operator",
    media_type="",
    status=202,
    headers={"Retry-After": "Seconds after which to repeat the request, with the same key"},
)

Client = DeviceClient | ManufacturedClient | None
_BYTE_SEQUENCE = re.compile(r":([A-Za-z0-9+/]{1,24576}={0,2}):")  # RFC 9651 section 4.2.7
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----\n[A-Za-z0-9+/=\n]{1,32768}\n-----END CERTIFICATE-----\n*")


def client_of(call: Call) -> Client:
    """Return whose client certificate was presented, ``None`` if there was none.

    Raises ``ClientCertificateRefused`` and ``TenantSuspended``, recorded as refused, and ``RequestMalformed``.
    """
    der = _presented(call.environ, call.portal.settings.trusted_proxies)
    if der is None:
        return None
    try:
        return _identified(call, der)
    except PortalError as error:
        call.portal.operators.record_late_use(call.actor, "device:enrol", "client certificate", error.code)
        raise


def noticed_client(call: Call) -> Client:
    """Record the use of a client certificate that was presented without need: it may end the previous ones.

    A device tries a new certificate in this way before it discards the old one. A certificate that is refused is
    ignored: the client gets the public answer, and ``None`` is returned.
    """
    with contextlib.suppress(PortalError):
        der = _presented(call.environ, call.portal.settings.trusted_proxies)
        holder = None if der is None else _identified(call, der)
        if isinstance(holder, DeviceClient):
            used(call, holder)
        return holder
    return None


def _identified(call: Call, der: bytes) -> DeviceClient | ManufacturedClient:
    """Return whose certificate, DER, it is; raise ``ClientCertificateRefused``, ``TenantSuspended``."""
    holder = call.portal.clients.identify(der, call.device_tenant)
    if call.device_tenant not in (None, holder.tenant_id):
        raise ClientCertificateRefused("The client certificate is not known under this EST label; check the path.")
    call.portal.tenant_terms.of(holder.tenant_id).check_served()
    scope.enter(holder.tenant_id)
    return holder


def used(call: Call, holder: DeviceClient) -> Actor:
    """Record that a device has used its certificate, in TLS with proof of its key; return the device as the actor."""
    actor = actor_as(call, holder.tenant_id, f"{holder.kind} {holder.device_id}")
    call.portal.renewals.used(actor, holder.device_id, holder.certificate.fingerprint)
    return actor


def enrolment_token(call: Call) -> EnrolmentTokenRecord | None:
    """Return the enrolment token of the request, ``None`` if it has no HTTP Basic authentication.

    The user name is ignored. Raises ``EnrolmentUnauthenticated``, recorded as refused, ``TooManyAttempts``, and
    ``TenantSuspended``.
    """
    scheme, _, credentials = call.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    record = call.portal.enrolment_tokens.find(_password(credentials))
    if record is None or call.device_tenant not in (None, record.tenant_id):
        raise unauthenticated(call, "Unknown enrolment token; check that it was copied completely.")
    call.portal.tenant_terms.of(record.tenant_id).check_served()
    scope.enter(record.tenant_id)
    return record


def credential_of(call: Call) -> EnrolmentTokenRecord | ManufacturedClient:
    """Return what authorizes a new device; a certificate that is presented must be valid even if there is a token."""
    holder = client_of(call)
    token = enrolment_token(call)
    if token is not None:
        return token
    if holder is None:
        raise unauthenticated(call)
    if isinstance(holder, DeviceClient):
        raise ClientCertificateRefused("The device already has a certificate of this portal; use simplereenroll.")
    return holder


def enrolled(
    call: Call,
    client: EnrolmentTokenRecord | ManufacturedClient,
    request: EnrolmentRequest,
    shown: ShownEvidence | None = None,
) -> Enrolled | Waiting:
    """Enrol a device by its token or manufacturer; raise as ``Enrolments.enrol`` does."""
    credential = by_manufacturer(client) if isinstance(client, ManufacturedClient) else by_token(client, request)
    actor = actor_as(call, credential.tenant_id, credential.label)
    with share_of(call.portal, credential.tenant_id):
        return call.portal.enrolment.enrol(actor, credential, request, shown)


def waiting_reply(outcome: Waiting) -> Reply:
    """Tell a device that it has to wait for an operator (RFC 7030 section 4.2.3), without content, as at a 401."""
    return Reply(media_type="", status=202, headers={"Retry-After": str(outcome.retry_after)})


def renewed(call: Call, holder: DeviceClient, request: EnrolmentRequest, shown: ShownEvidence | None = None) -> Renewed:
    """Renew the certificate that a device has presented; the same request has the same answer."""
    if request.csr is None:
        raise AssertionError("a request for a certificate has a key of its own")
    pki_est.check_same_names(request, holder.certificate.der)
    fingerprint = holder.certificate.fingerprint
    with share_of(call.portal, holder.tenant_id):
        call.portal.enrolment.check_renewal_key(holder.tenant_id, holder.device_id, request)
        return call.portal.renewals.renew(
            used(call, holder),
            holder.device_id,
            RenewalRequest(csr=request.csr, when_used=when_used(call), evidence=shown),
            hashlib.sha256(f"{fingerprint}\n{request.csr.pem}".encode()).hexdigest(),
            shown=fingerprint,
        )


def when_used(call: Call) -> bool:
    """Return whether the certificates that a renewal replaces end once the new one was used."""
    return call.portal.settings.renewal_revoke_previous is EndOfPrevious.WHEN_USED


def unauthenticated(call: Call, sentence: str = NO_CREDENTIALS) -> EnrolmentUnauthenticated:
    """Count and record a failed login; return the error to raise. Raises ``TooManyAttempts``."""
    error = EnrolmentUnauthenticated(sentence)
    call.portal.operators.login_failed(call.actor, "device:enrol", "enrolment", error.code)
    return error


def actor_as(call: Call, tenant_id: str, name: str) -> Actor:
    """Return the device, or what authorizes it, as the audit record names it."""
    return dataclasses.replace(call.actor, tenant_id=tenant_id, name=name, role="device")


def _password(credentials: str) -> str:
    try:
        return base64.b64decode(credentials.strip(), validate=True).decode("utf-8").partition(":")[2]
    except ValueError:
        return ""


# --- The certificate that a client has presented -----------------------------------------------------------------


def _presented(environ: dict[str, Any], trusted_proxies: Sequence[Network]) -> bytes | None:
    """Return the client's certificate, DER, ``None`` if it has presented none; raise ``RequestMalformed``.

    A resumed TLS session has the certificate of its beginning (RFC 8446 section 4.6.1), so the caller checks what has
    happened to it since. From a trusted proxy's address the header ``Client-Cert`` (RFC 9440) counts in place of the
    proxy's own certificate. On the Unix socket ``X-SSL-Client-Cert`` (URL-encoded PEM, nginx's
    ``$ssl_client_escaped_cert``) counts, too, and the front server must set or remove both. It does not count from an
    address: proxies there are configured to remove ``Client-Cert`` alone, and would pass on what a client makes up.
    """
    if getattr(environ.get("gunicorn.socket"), "family", None) == socket.AF_UNIX:
        byte_sequence, escaped = environ.get("HTTP_CLIENT_CERT"), environ.get("HTTP_X_SSL_CLIENT_CERT")
        if byte_sequence and escaped:
            raise RequestMalformed("The proxy sends both Client-Cert and X-SSL-Client-Cert; let it send one.")
        if escaped:
            return _of_escaped_pem(escaped)
    elif is_trusted(environ.get("REMOTE_ADDR", ""), trusted_proxies):
        byte_sequence = environ.get("HTTP_CLIENT_CERT")
    else:
        getpeercert = getattr(environ.get("gunicorn.socket"), "getpeercert", None)  # the TLS client has proved its key
        return None if getpeercert is None else getpeercert(binary_form=True)
    return _of_byte_sequence(byte_sequence) if byte_sequence else None


def _of_byte_sequence(header: str) -> bytes:
    found = _BYTE_SEQUENCE.fullmatch(header.strip())
    if found is None:
        raise RequestMalformed("The proxy's Client-Cert header is not one byte sequence as in RFC 9440.")
    try:
        return base64.b64decode(found[1], validate=True)
    except ValueError as error:
        raise RequestMalformed("The proxy's Client-Cert header is not valid Base64.") from error


def _of_escaped_pem(header: str) -> bytes:
    text = unquote(header)
    if not _PEM.fullmatch(text):
        raise RequestMalformed("The proxy's X-SSL-Client-Cert header is not one URL-encoded certificate in PEM.")
    try:
        return ssl.PEM_cert_to_DER_cert(text)
    except ValueError as error:
        raise RequestMalformed("The proxy's X-SSL-Client-Cert header is not valid PEM.") from error
