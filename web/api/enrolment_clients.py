"""Who a device that speaks EST is: by its enrolment token, or by the certificate it has shown."""

from __future__ import annotations

import base64
import contextlib
import dataclasses

from core.errors import ClientCertificateRefused, EnrolmentUnauthenticated, NotFound, PortalError
from pki.est import EnrolmentRequest
from store.enrolment import EnrolmentTokenRecord
from web.api.client_certificate import presented
from web.api.routing import Call
from workflows.audit import Actor
from workflows.enrolment.clients import DeviceClient, ManufacturedClient
from workflows.enrolment.means import Enrolled, Waiting, by_manufacturer, by_token

_NONE_GIVEN = (
    "An enrolment token is needed, as the password of HTTP Basic authentication, or a client certificate of a"
    " manufacturer that is registered here."
)

Client = DeviceClient | ManufacturedClient | None


def check_label(call: Call) -> None:
    """Raise ``NotFound`` for a label (RFC 7030 section 3.2.2) that is not the name of the portal's tenant."""
    if call.path.get("label", call.portal.tenant_id) != call.portal.tenant_id:
        raise NotFound("There is nothing to enrol at under this label; leave it out, or use the tenant's name.")


def certificate_holder(call: Call) -> Client:
    """Whose certificate the client has shown, ``None`` where it has shown none.

    Raises ``ClientCertificateRefused``, recorded as refused, and ``RequestMalformed``.
    """
    der = presented(call.environ, call.portal.settings.trusted_proxies)
    if der is None:
        return None
    try:
        return call.portal.clients.identify(der)
    except PortalError as error:
        call.portal.operators.came_too_late(call.actor, "device:enrol", "client certificate", error.code)
        raise


def notice(call: Call) -> Client:
    """Take note of a certificate that was shown where none is asked for: its use may end the ones before it.

    A device tries a new certificate in that way before it throws the old one away. Whoever shows what counts for
    nothing is answered as anyone is, and ``None`` here.
    """
    with contextlib.suppress(PortalError):
        der = presented(call.environ, call.portal.settings.trusted_proxies)
        holder = None if der is None else call.portal.clients.identify(der)
        if isinstance(holder, DeviceClient):
            actor = actor_of(call, holder.tenant_id, f"device {holder.device_id}")
            call.portal.renewals.used(actor, holder.device_id, holder.certificate.fingerprint)
        return holder
    return None


def token_of(call: Call) -> EnrolmentTokenRecord | None:
    """The enrolment token that came with the request, ``None`` where there is no HTTP Basic authentication.

    The user's name says nothing. Raises ``EnrolmentUnauthenticated``, recorded as refused, and ``TooManyAttempts``.
    """
    scheme, _, credentials = call.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    record = call.portal.enrolment_tokens.find(_password(credentials))
    if record is None:
        raise refusal(call, "The enrolment token is not known here; check that it was copied whole.")
    return record


def newcomer(call: Call) -> EnrolmentTokenRecord | ManufacturedClient:
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


def enrolled(
    call: Call, client: EnrolmentTokenRecord | ManufacturedClient, request: EnrolmentRequest
) -> Enrolled | Waiting:
    """Let a device in by its token or manufacturer; raises as ``Enrolment.enrol`` does."""
    means = by_manufacturer(client) if isinstance(client, ManufacturedClient) else by_token(client, request)
    return call.portal.enrolment.enrol(actor_of(call, means.tenant_id, means.label), means, request)


def refusal(call: Call, sentence: str = _NONE_GIVEN) -> EnrolmentUnauthenticated:
    """What to raise, once it is counted and recorded; raises ``TooManyAttempts``."""
    error = EnrolmentUnauthenticated(sentence)
    call.portal.operators.login_failed(call.actor, "device:enrol", "enrolment", error.code)
    return error


def actor_of(call: Call, tenant_id: str, name: str) -> Actor:
    """The device, or what lets it in, as the audit record names it."""
    return dataclasses.replace(call.actor, tenant_id=tenant_id, name=name, role="device")


def _password(credentials: str) -> str:
    try:
        return base64.b64decode(credentials.strip(), validate=True).decode("utf-8").partition(":")[2]
    except ValueError:
        return ""
