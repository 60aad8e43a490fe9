"""Enrolment over secure transport (RFC 7030, RFC 8951): what devices ask for by themselves."""

from __future__ import annotations

import functools
import hashlib
import ssl
from collections.abc import Callable

from config import KEY_TYPES
from core.errors import ClientCertificateRefused
from core.setting_values import EndOfPrevious
from pki import est as pki_est
from web.api.enrolment_clients import (
    actor_of,
    certificate_holder,
    check_label,
    enrolled,
    newcomer,
    notice,
    refusal,
    token_of,
)
from web.api.est_answers import CSR_ATTRIBUTES, PKCS7, WAITING, in_base64, key_with_certificate, waiting
from web.api.routing import Answers, Call, Octets, Reply, Routes
from workflows.credentials import Wanted
from workflows.enrolment.clients import DeviceClient, ManufacturedClient
from workflows.enrolment.means import Waiting
from workflows.renewal import Renewal

est = Routes("Enrolment by devices (EST)")

PKCS10 = "application/pkcs10"
MOST_BYTES = 32 * 1024
ERRORS = (401, 403, 404, 409, 429, 503)


def under_both_paths(
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


@under_both_paths(
    "GET", "cacerts", answers=Answers(media_type=PKCS7, description="Issuing CAs and root"), errors=(404,)
)
def est_cacerts(call: Call) -> Reply:
    """The CA certificates that a device is to trust (RFC 7030 section 4.1)."""
    notice(call)
    authority = call.portal.authority
    return in_base64(pki_est.certs_only([item.der for item in authority.issuers]), PKCS7)


@under_both_paths(
    "GET", "csrattrs", answers=Answers(media_type=CSR_ATTRIBUTES, description="CsrAttrs"), errors=(401, 403, 404, 429)
)
def est_csrattrs(call: Call) -> Reply:
    """Which kind of key a CSR is to have (RFC 7030 section 4.5): what the token or the manufacturer allows first."""
    holder, token = notice(call), token_of(call)
    key_types: tuple[str, ...] = (call.portal.settings.key_type,)
    if token is not None:
        key_types = token.terms.key_types
    elif isinstance(holder, ManufacturedClient):
        key_types = holder.manufacturer.terms.key_types
    return in_base64(pki_est.csr_attributes(key_types), CSR_ATTRIBUTES)


@under_both_paths(
    "POST",
    "simpleenroll",
    octets=Octets(PKCS10, MOST_BYTES),
    answers=Answers(media_type=PKCS7, description="The device's certificate; the broker lets it in"),
    also=(WAITING,),
    errors=ERRORS,
)
def est_simpleenroll(call: Call) -> Reply:
    """Enrol a device that has its own key (RFC 7030 section 4.2.1). A repeat with the same key answers the same."""
    client = newcomer(call)
    outcome = enrolled(call, client, pki_est.read_enrolment_request(call.body))
    if isinstance(outcome, Waiting):
        return waiting(outcome)
    return in_base64(pki_est.certs_only([outcome.certificate]), PKCS7)


@under_both_paths(
    "POST",
    "simplereenroll",
    octets=Octets(PKCS10, MOST_BYTES),
    answers=Answers(media_type=PKCS7, description="The device's new certificate; the one before goes on for a while"),
    errors=ERRORS,
)
def est_simplereenroll(call: Call) -> Reply:
    """Renew a device's certificate, by the one that it has (RFC 7030 section 4.2.2)."""
    holder = certificate_holder(call)
    if holder is None:
        raise refusal(call, "A device renews with the certificate that it has from this portal; show it in TLS.")
    if not isinstance(holder, DeviceClient):
        raise ClientCertificateRefused("The client certificate is not one of this portal; use simpleenroll.")
    request = pki_est.read_enrolment_request(call.body)
    pki_est.check_same_names(request, holder.certificate.der)
    call.portal.enrolment.check_renewal_key(holder.tenant_id, holder.device_id, request)
    shown = holder.certificate.fingerprint
    actor = actor_of(call, holder.tenant_id, f"device {holder.device_id}")
    call.portal.renewals.used(actor, holder.device_id, shown)  # TLS has shown that the device has its key
    renewed = call.portal.renewals.renew(
        actor,
        holder.device_id,
        Renewal(Wanted(csr=request.pem), when_used=_when_used(call)),
        hashlib.sha256(f"{shown}\n{request.pem}".encode()).hexdigest(),  # the same request has the same answer
        shown=shown,
    )
    if renewed.certificate is None:
        raise AssertionError("a renewal for a CSR answers with the certificate")
    return in_base64(pki_est.certs_only([ssl.PEM_cert_to_DER_cert(renewed.certificate)]), PKCS7)


@under_both_paths(
    "POST",
    "serverkeygen",
    octets=Octets(PKCS10, MOST_BYTES),
    answers=Answers(media_type="multipart/mixed", description="A new key (PKCS#8), with the device's certificate"),
    also=(WAITING,),
    errors=ERRORS,
)
def est_serverkeygen(call: Call) -> Reply:
    """Enrol or renew a device that has its key made here (RFC 7030 section 4.4). A repeat gives another key."""
    holder = certificate_holder(call)
    if isinstance(holder, DeviceClient) and token_of(call) is None:
        return _renewed_with_key(call, holder)
    client = newcomer(call)
    outcome = enrolled(call, client, pki_est.read_key_request(call.body))
    if isinstance(outcome, Waiting):
        return waiting(outcome)
    if outcome.key is None:
        raise AssertionError("the key was to be made here")
    return key_with_certificate(outcome.key, outcome.certificate)


def _renewed_with_key(call: Call, holder: DeviceClient) -> Reply:
    request = pki_est.read_key_request(call.body)
    pki_est.check_same_names(request, holder.certificate.der)
    shown, settings = holder.certificate.fingerprint, call.portal.settings
    actor = actor_of(call, holder.tenant_id, f"device {holder.device_id}")
    call.portal.renewals.used(actor, holder.device_id, shown)
    key_type = pki_est.key_type_of_certificate(holder.certificate.der)
    certificate, key = call.portal.renewals.renew_with_key(
        actor,
        holder.device_id,
        key_type if key_type in KEY_TYPES else settings.key_type,
        shown=shown,
        when_used=_when_used(call),
    )
    return key_with_certificate(key, ssl.PEM_cert_to_DER_cert(certificate))


def _when_used(call: Call) -> bool:
    return call.portal.settings.renewal_revoke_previous is EndOfPrevious.WHEN_USED
