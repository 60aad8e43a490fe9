"""Enrolment over secure transport (RFC 7030, RFC 8951): what devices request by themselves."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import hashlib
import re
import secrets
import socket
import ssl
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from config import EndOfPrevious
from core.errors import ClientCertificateRefused, EnrolmentUnauthenticated, NotFound, PortalError, RequestMalformed
from core.setting_values import Network
from pki import est as pki_est
from pki.est import EnrolmentRequest
from store.audit import Actor
from store.enrolment import EnrolmentTokenRecord
from web.api.proxies import is_trusted
from web.api.routing import ANYONE, Answers, Call, Octets, Reply, Route, Routes
from workflows.enrolment.clients import DeviceClient, ManufacturedClient
from workflows.enrolment.credentials import Enrolled, Waiting, by_manufacturer, by_token
from workflows.renewal import RenewalRequest

PKCS7 = "application/pkcs7-mime; smime-type=certs-only"
PKCS8 = "application/pkcs8"
PKCS10 = "application/pkcs10"
CSR_ATTRIBUTES = "application/csrattrs"
CSR = Octets(PKCS10, max_bytes=32 * 1024)
NO_CREDENTIALS = (
    "Credentials are required: an enrolment token as the password of HTTP Basic authentication, or a client certificate"
    " of a registered manufacturer."
)

Client = DeviceClient | ManufacturedClient | None
_BYTE_SEQUENCE = re.compile(r":([A-Za-z0-9+/]{1,24576}={0,2}):")  # RFC 9651 section 4.2.7
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----\n[A-Za-z0-9+/=\n]{1,32768}\n-----END CERTIFICATE-----\n*")
_UNLABELLED = Routes("Enrolment by devices (EST)")
_ERRORS = (401, 403, 404, 409, 429, 503)
_WAITING = Answers(
    "The device waits for an operator",
    media_type="",
    status=202,
    headers={"Retry-After": "Seconds after which to repeat the request, with the same key"},
)


@_UNLABELLED.add(
    "GET",
    "/.well-known/est/cacerts",
    ANYONE,
    Answers("Issuing CAs and those above them", media_type=PKCS7),
    errors=(404,),
)
def est_cacerts(call: Call) -> Reply:
    """Return the CA certificates that a device trusts (RFC 7030 section 4.1)."""
    _noticed_client(call)
    return _base64_reply(pki_est.certs_only(call.portal.authority.current.trusted_der), PKCS7)


@_UNLABELLED.add(
    "GET",
    "/.well-known/est/csrattrs",
    ANYONE,
    Answers("CsrAttrs", media_type=CSR_ATTRIBUTES),
    errors=(401, 403, 404, 429),
)
def est_csrattrs(call: Call) -> Reply:
    """Return the type of key that a CSR should have (RFC 7030 section 4.5), by the token or the manufacturer."""
    holder, token = _noticed_client(call), _enrolment_token(call)
    enrolment, usual = call.portal.enrolment, call.portal.settings.key_type
    key_types: tuple[str, ...] = (usual,)
    if token is not None:
        key_types = enrolment.key_types(token.tenant_id, token.profile, token.device_id)
    elif isinstance(holder, ManufacturedClient):
        key_types = enrolment.key_types(holder.tenant_id, holder.manufacturer.profile, None)
    elif isinstance(holder, DeviceClient):
        allowed = enrolment.key_types(holder.tenant_id, None, holder.device_id)
        key_types = key_types if usual in allowed else allowed
    return _base64_reply(pki_est.csr_attributes(key_types), CSR_ATTRIBUTES)


@_UNLABELLED.add(
    "POST",
    "/.well-known/est/simpleenroll",
    ANYONE,
    Answers("The device's certificate; the device is active", media_type=PKCS7),
    octets=CSR,
    also=(_WAITING,),
    errors=_ERRORS,
)
def est_simpleenroll(call: Call, body: bytes) -> Reply:
    """Enrol a device with its own key (RFC 7030 section 4.2.1). A repeat with the same key gets the same answer."""
    client = _credential(call)
    outcome = _enrolled(call, client, pki_est.read_enrolment_request(body))
    if isinstance(outcome, Waiting):
        return _waiting_reply(outcome)
    return _base64_reply(pki_est.certs_only([outcome.certificate]), PKCS7)


@_UNLABELLED.add(
    "POST",
    "/.well-known/est/simplereenroll",
    ANYONE,
    Answers("The device's new certificate; the previous one stays valid for a while", media_type=PKCS7),
    octets=CSR,
    errors=_ERRORS,
)
def est_simplereenroll(call: Call, body: bytes) -> Reply:
    """Renew a device's certificate; it authenticates with its present one (RFC 7030 section 4.2.2)."""
    holder = _client(call)
    if holder is None:
        raise _unauthenticated(call, "To renew, a device must present its certificate as the TLS client certificate.")
    if not isinstance(holder, DeviceClient):
        raise ClientCertificateRefused("The client certificate was not issued by this portal; use simpleenroll.")
    request = pki_est.read_enrolment_request(body)
    if request.csr is None:
        raise AssertionError("a request for a certificate has a key of its own")
    pki_est.check_same_names(request, holder.certificate.der)
    call.portal.enrolment.check_renewal_key(holder.tenant_id, holder.device_id, request)
    actor, shown = _used(call, holder), holder.certificate.fingerprint
    renewed = call.portal.renewals.renew(
        actor,
        holder.device_id,
        RenewalRequest(csr=request.csr, when_used=_when_used(call)),
        hashlib.sha256(f"{shown}\n{request.csr.pem}".encode()).hexdigest(),  # the same request has the same answer
        shown=shown,
    )
    if renewed.certificate is None:
        raise AssertionError("a renewal by CSR returns the certificate")
    return _base64_reply(pki_est.certs_only([ssl.PEM_cert_to_DER_cert(renewed.certificate)]), PKCS7)


@_UNLABELLED.add(
    "POST",
    "/.well-known/est/serverkeygen",
    ANYONE,
    Answers("A new key (PKCS#8) and the device's certificate", media_type="multipart/mixed"),
    octets=CSR,
    also=(_WAITING,),
    errors=_ERRORS,
)
def est_serverkeygen(call: Call, body: bytes) -> Reply:
    """Enrol or renew a device whose key is generated here (RFC 7030 section 4.4). A repeat gets another key."""
    holder = _client(call)
    if isinstance(holder, DeviceClient) and _enrolment_token(call) is None:
        return _renewed_with_key(call, holder, body)
    client = _credential(call)
    outcome = _enrolled(call, client, pki_est.read_key_request(body))
    if isinstance(outcome, Waiting):
        return _waiting_reply(outcome)
    if outcome.key is None:
        raise AssertionError("a request without a key of its own gets one")
    return _key_reply(outcome.key, outcome.certificate)


def _renewed_with_key(call: Call, holder: DeviceClient, body: bytes) -> Reply:
    pki_est.check_same_names(pki_est.read_key_request(body), holder.certificate.der)
    actor = _used(call, holder)
    certificate, key = call.portal.renewals.renew_with_key(
        actor,
        holder.device_id,
        pki_est.key_type_of_certificate(holder.certificate.der),
        shown=holder.certificate.fingerprint,
        when_used=_when_used(call),
    )
    return _key_reply(key, ssl.PEM_cert_to_DER_cert(certificate))


def _when_used(call: Call) -> bool:
    return call.portal.settings.renewal_revoke_previous is EndOfPrevious.WHEN_USED


def _waiting_reply(outcome: Waiting) -> Reply:
    """Tell a device that it has to wait for an operator (RFC 7030 section 4.2.3), without content, as at a 401."""
    return Reply(media_type="", status=202, headers={"Retry-After": str(outcome.retry_after)})


def _base64_reply(content: bytes, media_type: str) -> Reply:
    """Return Base64 in lines (RFC 2045 section 6.8): some clients cannot read longer ones (RFC 8951 section 3.1)."""
    # RFC 8951 has clients ignore this header; those of RFC 7030 look for it.
    headers = {"Content-Transfer-Encoding": "base64"}
    return Reply(content=base64.encodebytes(content), media_type=media_type, headers=headers)


def _key_reply(key: bytes, certificate: bytes) -> Reply:
    """Return a private key (PKCS#8, DER) and its certificate as two parts (RFC 7030 section 4.4.2)."""
    boundary = f"est-{secrets.token_hex(16)}"  # Base64 has no hyphen, so no part can contain it
    parts = ((PKCS8, key), (PKCS7, pki_est.certs_only([certificate])))
    content = b"".join(_part(boundary, media_type, part) for media_type, part in parts) + f"--{boundary}--\r\n".encode()
    return Reply(content=content, media_type=f'multipart/mixed; boundary="{boundary}"')


def _part(boundary: str, media_type: str, content: bytes) -> bytes:
    head = f"--{boundary}\r\nContent-Type: {media_type}\r\nContent-Transfer-Encoding: base64\r\n\r\n"
    return head.encode() + base64.encodebytes(content).replace(b"\n", b"\r\n")


def _client(call: Call) -> Client:
    """Return whose client certificate was presented, ``None`` if there was none.

    Raises ``ClientCertificateRefused``, recorded as refused, and ``RequestMalformed``.
    """
    der = _presented(call.environ, call.portal.settings.trusted_proxies)
    if der is None:
        return None
    try:
        return call.portal.clients.identify(der)
    except PortalError as error:
        call.portal.operators.record_late_use(call.actor, "device:enrol", "client certificate", error.code)
        raise


def _noticed_client(call: Call) -> Client:
    """Record the use of a client certificate that was presented without need: it may end the previous ones.

    A device tries a new certificate in this way before it discards the old one. A certificate that is refused is
    ignored: the client gets the public answer, and ``None`` is returned.
    """
    with contextlib.suppress(PortalError):
        der = _presented(call.environ, call.portal.settings.trusted_proxies)
        holder = None if der is None else call.portal.clients.identify(der)
        if isinstance(holder, DeviceClient):
            _used(call, holder)
        return holder
    return None


def _used(call: Call, holder: DeviceClient) -> Actor:
    """Record that a device has used its certificate, in TLS with proof of its key; return the device as the actor."""
    actor = _actor(call, holder.tenant_id, f"{holder.kind} {holder.device_id}")
    call.portal.renewals.used(actor, holder.device_id, holder.certificate.fingerprint)
    return actor


def _enrolment_token(call: Call) -> EnrolmentTokenRecord | None:
    """Return the enrolment token of the request, ``None`` if it has no HTTP Basic authentication.

    The user name is ignored. Raises ``EnrolmentUnauthenticated``, recorded as refused, and ``TooManyAttempts``.
    """
    scheme, _, credentials = call.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    record = call.portal.enrolment_tokens.find(_password(credentials))
    if record is None:
        raise _unauthenticated(call, "Unknown enrolment token; check that it was copied completely.")
    return record


def _credential(call: Call) -> EnrolmentTokenRecord | ManufacturedClient:
    """Return what authorizes a new device; a certificate that is presented must be valid even if there is a token."""
    holder = _client(call)
    token = _enrolment_token(call)
    if token is not None:
        return token
    if holder is None:
        raise _unauthenticated(call)
    if isinstance(holder, DeviceClient):
        raise ClientCertificateRefused("The device already has a certificate of this portal; use simplereenroll.")
    return holder


def _enrolled(
    call: Call, client: EnrolmentTokenRecord | ManufacturedClient, request: EnrolmentRequest
) -> Enrolled | Waiting:
    """Enrol a device by its token or manufacturer; raise as ``Enrolment.enrol`` does."""
    credential = by_manufacturer(client) if isinstance(client, ManufacturedClient) else by_token(client, request)
    return call.portal.enrolment.enrol(_actor(call, credential.tenant_id, credential.label), credential, request)


def _unauthenticated(call: Call, sentence: str = NO_CREDENTIALS) -> EnrolmentUnauthenticated:
    """Count and record a failed login; return the error to raise. Raises ``TooManyAttempts``."""
    error = EnrolmentUnauthenticated(sentence)
    call.portal.operators.login_failed(call.actor, "device:enrol", "enrolment", error.code)
    return error


def _actor(call: Call, tenant_id: str, name: str) -> Actor:
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


# --- Labels -------------------------------------------------------------------------------------------------------


def _labelled(route: Route) -> Route:
    """Return the same operation under a path with a label (RFC 7030 section 3.2.2), which is the tenant's name."""

    @functools.wraps(route.handler)
    def labelled(call: Call, label: str, **arguments: bytes) -> Any:
        if label != call.portal.tenant_id:
            raise NotFound("Unknown EST label; leave it out, or use the tenant's name.")
        return route.handler(call, **arguments)

    labelled.__name__ = f"{route.name}_labelled"
    path = route.path.replace("/est/", "/est/{label}/")
    return dataclasses.replace(route, path=path, handler=labelled)


ROUTES = tuple(each for route in _UNLABELLED for each in (route, _labelled(route)))
