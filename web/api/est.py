"""Enrolment over secure transport (RFC 7030, RFC 8951): what devices request by themselves."""

from __future__ import annotations

import base64
import dataclasses
import functools
import secrets
import ssl
from typing import Any

from core.errors import ClientCertificateRefused
from pki import est as pki_est
from web.api.device_clients import (
    WAITING,
    client_of,
    credential_of,
    enrolled,
    enrolment_token,
    noticed_client,
    renewed,
    unauthenticated,
    used,
    waiting_reply,
    when_used,
)
from web.api.routing import ANYONE, Answers, Call, Octets, Reply, Route, Routes, share_of
from workflows.enrolment.clients import DeviceClient, ManufacturedClient
from workflows.enrolment.credentials import Waiting

PKCS7 = "application/pkcs7-mime; smime-type=certs-only"
PKCS8 = "application/pkcs8"
PKCS10 = "application/pkcs10"
CSR_ATTRIBUTES = "application/csrattrs"
CSR = Octets(PKCS10, max_bytes=32 * 1024)

_UNLABELLED = Routes("Enrolment by devices (EST)")
_ERRORS = (401, 403, 404, 409, 429, 503)


@_UNLABELLED.add(
    "GET",
    "/.well-known/est/cacerts",
    ANYONE,
    Answers("Issuing CAs and those above them", media_type=PKCS7),
    errors=(403, 404, 503),
)
def est_cacerts(call: Call) -> Reply:
    """Return the CA certificates that a device trusts (RFC 7030 section 4.1): of the tenant that the label names.

    Without a label of the tenant whose certificate the device shows, else of the first one.
    """
    holder = noticed_client(call)
    tenant_id = call.device_tenant or (call.portal.first_tenant if holder is None else holder.tenant_id)
    return _base64_reply(pki_est.certs_only(call.portal.authority.of(tenant_id).trusted_der), PKCS7)


@_UNLABELLED.add(
    "GET",
    "/.well-known/est/csrattrs",
    ANYONE,
    Answers("CsrAttrs", media_type=CSR_ATTRIBUTES),
    errors=(401, 403, 404, 429),
)
def est_csrattrs(call: Call) -> Reply:
    """Return the type of key that a CSR should have (RFC 7030 section 4.5), by the token or the manufacturer."""
    holder, token = noticed_client(call), enrolment_token(call)
    enrolment, tenant_id = call.portal.enrolment, call.device_tenant or call.portal.first_tenant
    key_types: tuple[str, ...] = (call.portal.tenant_terms.of(tenant_id).key_type,)
    if token is not None:
        key_types = enrolment.key_types(token.tenant_id, token.profile, token.device_id)
    elif isinstance(holder, ManufacturedClient):
        key_types = enrolment.key_types(holder.tenant_id, holder.manufacturer.profile, None)
    elif isinstance(holder, DeviceClient):
        allowed = enrolment.key_types(holder.tenant_id, None, holder.device_id)
        usual = call.portal.tenant_terms.of(holder.tenant_id).key_type
        key_types = (usual,) if usual in allowed else allowed
    return _base64_reply(pki_est.csr_attributes(key_types), CSR_ATTRIBUTES)


@_UNLABELLED.add(
    "POST",
    "/.well-known/est/simpleenroll",
    ANYONE,
    Answers("The device's certificate; the device is active", media_type=PKCS7),
    octets=CSR,
    also=(WAITING,),
    errors=_ERRORS,
)
def est_simpleenroll(call: Call, body: bytes) -> Reply:
    """Enrol a device with its own key (RFC 7030 section 4.2.1). A repeat with the same key gets the same answer."""
    client = credential_of(call)
    outcome = enrolled(call, client, pki_est.read_enrolment_request(body))
    if isinstance(outcome, Waiting):
        return waiting_reply(outcome)
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
    holder = client_of(call)
    if holder is None:
        raise unauthenticated(call, "To renew, a device must present its certificate as the TLS client certificate.")
    if not isinstance(holder, DeviceClient):
        raise ClientCertificateRefused("The client certificate was not issued by this portal; use simpleenroll.")
    answer = renewed(call, holder, pki_est.read_enrolment_request(body))
    if answer.certificate is None:
        raise AssertionError("a renewal by CSR returns the certificate")
    return _base64_reply(pki_est.certs_only([ssl.PEM_cert_to_DER_cert(answer.certificate)]), PKCS7)


@_UNLABELLED.add(
    "POST",
    "/.well-known/est/serverkeygen",
    ANYONE,
    Answers("A new key (PKCS#8) and the device's certificate", media_type="multipart/mixed"),
    octets=CSR,
    also=(WAITING,),
    errors=_ERRORS,
)
def est_serverkeygen(call: Call, body: bytes) -> Reply:
    """Enrol or renew a device whose key is generated here (RFC 7030 section 4.4). A repeat gets another key."""
    holder = client_of(call)
    if isinstance(holder, DeviceClient) and enrolment_token(call) is None:
        return _renewed_with_key(call, holder, body)
    client = credential_of(call)
    outcome = enrolled(call, client, pki_est.read_key_request(body))
    if isinstance(outcome, Waiting):
        return waiting_reply(outcome)
    if outcome.key is None:
        raise AssertionError("a request without a key of its own gets one")
    return _key_reply(outcome.key, outcome.certificate)


def _renewed_with_key(call: Call, holder: DeviceClient, body: bytes) -> Reply:
    pki_est.check_same_names(pki_est.read_key_request(body), holder.certificate.der)
    with share_of(call.portal, holder.tenant_id):
        certificate, key = call.portal.renewals.renew_with_key(
            used(call, holder),
            holder.device_id,
            pki_est.key_type_of_certificate(holder.certificate.der),
            shown=holder.certificate.fingerprint,
            when_used=when_used(call),
        )
    return _key_reply(key, ssl.PEM_cert_to_DER_cert(certificate))


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


# --- Labels -------------------------------------------------------------------------------------------------------


def _labelled(route: Route) -> Route:
    """Return the same operation under a path with a label (RFC 7030 section 3.2.2), which is the tenant's name."""

    @functools.wraps(route.handler)
    def labelled(call: Call, label: str, **arguments: bytes) -> Any:
        if label != call.portal.first_tenant:  # which is served without a database, too
            call.portal.tenant_terms.check_label(label)
        return route.handler(dataclasses.replace(call, device_tenant=label), **arguments)

    labelled.__name__ = f"{route.name}_labelled"
    path = route.path.replace("/est/", "/est/{label}/")
    return dataclasses.replace(route, path=path, handler=labelled)


ROUTES = tuple(each for route in _UNLABELLED for each in (route, _labelled(route)))
