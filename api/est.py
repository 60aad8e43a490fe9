"""Enrolment over secure transport (RFC 7030, RFC 8951): what devices ask for by themselves."""

from __future__ import annotations

import base64
import functools
import hashlib
import ssl
from collections.abc import Callable

import ca_enrolment
from api.enrolment_clients import actor_of, certificate_holder, check_label, refusal, token_of
from api.routing import Answers, Call, Octets, Reply, Routes
from db_enrolment import EnrolmentTokenRecord
from errors import ClientCertificateRefused
from onboarding_clients import DeviceClient, ManufacturedClient
from onboarding_credentials import Wanted
from onboarding_enrolment import Waiting, by_manufacturer, by_token
from onboarding_renewal import Renewal

est = Routes("Enrolment by devices (EST)")

PKCS10 = "application/pkcs10"
MOST_BYTES = 32 * 1024
PKCS7 = "application/pkcs7-mime; smime-type=certs-only"
CSR_ATTRIBUTES = "application/csrattrs"

_RETRY = {"Retry-After": "Seconds after which to ask again, with the same key"}
_WAITING = Answers(media_type="text/plain", status=202, description="An operator has yet to decide", headers=_RETRY)
_ERRORS = (401, 403, 404, 409, 429, 503)


def _under_both_paths(
    method: str, operation: str, **options: object
) -> Callable[[Callable[[Call], Reply]], Callable[[Call], Reply]]:
    """Declare a handler under the plain path, and under that with a label (RFC 7030 section 3.2.2)."""

    def declare(handler: Callable[[Call], Reply]) -> Callable[[Call], Reply]:
        @functools.wraps(handler)
        def labelled(call: Call) -> Reply:
            check_label(call)
            return handler(call)

        labelled.__name__ = f"{handler.__name__}_labelled"
        est.route(method, f"/.well-known/est/{operation}", permission=None, **options)(handler)  # type: ignore[arg-type]
        est.route(method, f"/.well-known/est/{{label}}/{operation}", permission=None, **options)(labelled)  # type: ignore[arg-type]
        return handler

    return declare


@_under_both_paths(
    "GET", "cacerts", answers=Answers(media_type=PKCS7, description="Issuing CAs and root"), errors=(404,)
)
def est_cacerts(call: Call) -> Reply:
    """The CA certificates that a device is to trust (RFC 7030 section 4.1)."""
    authority = call.portal.authority
    return _base64(ca_enrolment.certs_only([item.der for item in authority.issuers]), PKCS7)


@_under_both_paths(
    "GET", "csrattrs", answers=Answers(media_type=CSR_ATTRIBUTES, description="CsrAttrs"), errors=(401, 403, 404, 429)
)
def est_csrattrs(call: Call) -> Reply:
    """Which kind of key a CSR is to have (RFC 7030 section 4.5); the token's own choice where one comes along."""
    token = token_of(call)
    key_types = token.terms.key_types if token is not None else (call.portal.settings.key_type,)
    return _base64(ca_enrolment.csr_attributes(key_types), CSR_ATTRIBUTES)


@_under_both_paths(
    "POST",
    "simpleenroll",
    octets=Octets(PKCS10, MOST_BYTES),
    answers=Answers(media_type=PKCS7, description="The device's certificate; the broker lets it in"),
    also=(_WAITING,),
    errors=_ERRORS,
)
def est_simpleenroll(call: Call) -> Reply:
    """Enrol a device that has its own key (RFC 7030 section 4.2.1). A repeat with the same key answers the same."""
    client = _client(call)
    request = ca_enrolment.read_enrolment_request(call.body)
    means = by_manufacturer(client) if isinstance(client, ManufacturedClient) else by_token(client, request)
    outcome = call.portal.enrolment.enrol(actor_of(call, means.tenant_id, means.label), means, request)
    if isinstance(outcome, Waiting):
        sentence = f"Device {outcome.device_id} waits for an operator; ask again with the same key.\n"
        headers = {"Retry-After": str(outcome.retry_after)}
        return Reply(content=sentence.encode(), media_type="text/plain", status=202, headers=headers)
    return _base64(ca_enrolment.certs_only([outcome.certificate]), PKCS7)


@_under_both_paths(
    "POST",
    "simplereenroll",
    octets=Octets(PKCS10, MOST_BYTES),
    answers=Answers(media_type=PKCS7, description="The device's new certificate; the one before goes on for a while"),
    errors=_ERRORS,
)
def est_simplereenroll(call: Call) -> Reply:
    """Renew a device's certificate, by the one that it has (RFC 7030 section 4.2.2)."""
    holder = certificate_holder(call)
    if holder is None:
        raise refusal(call, "A device renews with the certificate that it has from this portal; show it in TLS.")
    if not isinstance(holder, DeviceClient):
        raise ClientCertificateRefused("The client certificate is not one of this portal; use simpleenroll.")
    request = ca_enrolment.read_enrolment_request(call.body)
    ca_enrolment.check_same_names(request, holder.certificate.der)
    shown = holder.certificate.fingerprint
    actor = actor_of(call, holder.tenant_id, f"device {holder.device_id}")
    call.portal.renewals.used(actor, holder.device_id, shown)  # TLS has shown that the device has its key
    renewed = call.portal.renewals.renew(
        actor,
        holder.device_id,
        Renewal(Wanted(csr=request.pem)),
        hashlib.sha256(f"{shown}\n{request.pem}".encode()).hexdigest(),  # the same request has the same answer
        shown=shown,
    )
    if renewed.certificate is None:
        raise AssertionError("a renewal for a CSR answers with the certificate")
    return _base64(ca_enrolment.certs_only([ssl.PEM_cert_to_DER_cert(renewed.certificate)]), PKCS7)


def _client(call: Call) -> EnrolmentTokenRecord | ManufacturedClient:
    """What lets a device in; a certificate that was shown must be good even where a token would do."""
    holder = certificate_holder(call)
    token = token_of(call)
    if token is not None:
        return token
    if holder is None:
        raise refusal(call)
    if isinstance(holder, DeviceClient):
        raise ClientCertificateRefused("The device has a certificate of this portal already; use simplereenroll.")
    return holder


def _base64(content: bytes, media_type: str) -> Reply:
    """Base64 in lines (RFC 2045 section 6.8): some clients read no longer ones (RFC 8951 section 3.1)."""
    # RFC 8951 has clients ignore this header; those of RFC 7030 look for it.
    headers = {"Content-Transfer-Encoding": "base64"}
    return Reply(content=base64.encodebytes(content), media_type=media_type, headers=headers)
