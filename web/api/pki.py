"""CA certificates, CRLs and OCSP, which anyone may fetch over plain HTTP."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import re
import ssl
from datetime import datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime

from core.errors import NotFound, Unavailable
from pki.issuers import CLOCK_SKEW
from pki.ocsp import MAX_BYTES, Failure
from web.api.routing import ANYONE, Answers, Call, Octets, Reply, Routes
from workflows.authority.issuers import RecordedIssuer
from workflows.authority.ocsp import OcspAnswer
from workflows.bundles import broker_trust

ROUTES = Routes("Certificates, for anyone")


def cached(
    call: Call,
    content: bytes,
    media_type: str,
    *,
    max_age: int,
    last_modified: datetime | None = None,
    expires: datetime | None = None,
    directives: str = "",
    tag: str = "",
) -> Reply:
    """Reply with ``content`` that may be cached for ``max_age`` seconds, or 304 (RFC 9110 section 13.1).

    ``last_modified`` may be a little later than it was: the header is never in the future (section 8.8.2.1), so that a
    client that repeats it gets the content once more. ``directives`` are appended to Cache-Control; ``tag`` is an
    entity tag that is known without hashing the content.
    """
    etag = f'"{tag or tag_of(content)}"'
    headers = {"ETag": etag, "Cache-Control": f"public, max-age={max_age}{directives}"}
    if last_modified is not None:
        headers["Last-Modified"] = format_datetime(min(last_modified, call.portal.clock()), usegmt=True)
    if expires is not None:
        headers["Expires"] = format_datetime(expires, usegmt=True)
    wanted = call.headers.get("If-None-Match")
    if call.method not in ("GET", "HEAD"):
        fresh = False
    elif wanted is not None:
        fresh = wanted.strip() == "*" or etag in [tag.strip().removeprefix("W/") for tag in wanted.split(",")]
    else:
        fresh = last_modified is not None and _not_modified_since(call.headers.get("If-Modified-Since"), last_modified)
    if fresh:
        return Reply(content=b"", media_type="", status=304, headers=headers)
    return Reply(content=content, media_type=media_type, headers=headers)


def by_token(reply: Reply) -> Reply:
    """Keep a cache from giving what was answered to one token to another."""
    return dataclasses.replace(reply, headers={**reply.headers, "Vary": "Authorization"})


def tag_of(content: bytes) -> str:
    """Return an entity tag: the first half of the SHA-256 of the content."""
    return hashlib.sha256(content).hexdigest()[:32]


def _not_modified_since(header: str | None, last_modified: datetime) -> bool:
    try:
        return header is not None and parsedate_to_datetime(header) >= last_modified.replace(microsecond=0)
    except (ValueError, TypeError):
        return False


_PEM = "application/x-pem-file"
_SHA256 = re.compile("[0-9a-f]{64}")
_CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----\n[A-Za-z0-9+/=\n]+-----END CERTIFICATE-----\n?")
_ETAG = {"ETag": "For If-None-Match"}
_TIMES = {"Last-Modified": "When the CRL was made", "Expires": "Its nextUpdate"}


@ROUTES.add(
    "GET",
    "/ca.pem",
    ANYONE,
    Answers("Issuing CAs and root, PEM", media_type=_PEM, headers=_ETAG),
    token_optional=True,
    errors=(401, 403, 429, 503),
    on_pki_listener=True,
)
def ca_pem(call: Call) -> Reply:
    """Return the certificate chain, issuing CAs and root, of an operator's tenant, without a token of the first one."""
    return by_token(cached(call, call.portal.authority.of(call.actor.tenant_id).ca_pem.encode(), _PEM, max_age=3600))


@ROUTES.add(
    "GET",
    "/broker-ca.pem",
    ANYONE,
    Answers("What to trust of the broker, PEM", media_type=_PEM, headers=_ETAG),
    token_optional=True,
    errors=(401, 403, 429, 503),
)
def broker_ca_pem(call: Call) -> Reply:
    """Return what to trust of the broker: the CAs of /ca.pem, and the root of its certificate by another issuer."""
    trusted = broker_trust(call.portal.settings, call.portal.authority.of(call.actor.tenant_id).ca_pem)
    return by_token(cached(call, trusted.encode(), _PEM, max_age=3600))


@ROUTES.add(
    "GET",
    "/ca/{issuer}.pem",
    ANYONE,
    Answers("Issuing CAs and root, PEM", media_type=_PEM, headers=_ETAG),
    errors=(503,),
    on_pki_listener=True,
)
def ca_pem_of(call: Call, issuer: str) -> Reply:
    """Return what /ca.pem has for the tenant of a CA, whose certificates name the CA in their URLs."""
    tenant_id = _issuer(call, issuer).tenant_id
    return cached(call, call.portal.authority.of(tenant_id).ca_pem.encode(), _PEM, max_age=3600)


@ROUTES.add(
    "GET",
    "/ca/{issuer}.cer",
    ANYONE,
    Answers("One CA certificate, DER", media_type="application/pkix-cert", headers=_ETAG),
    errors=(503,),
    on_pki_listener=True,
)
def ca_certificate(call: Call, issuer: str) -> Reply:
    """Return one CA certificate (caIssuers of RFC 5280 section 4.2.2.1).

    In place of a CA's name the SHA-256 of a certificate that clients of this server trust may be given, in hex.
    """
    der = _trusted(call, issuer) if _SHA256.fullmatch(issuer) else _issuer(call, issuer).der
    return cached(call, der, "application/pkix-cert", max_age=3600)


@ROUTES.add(
    "GET",
    "/crl/{issuer}.crl",
    ANYONE,
    Answers("The issuer's newest CRL, DER", media_type="application/pkix-crl", headers=_ETAG | _TIMES),
    errors=(503,),
    on_pki_listener=True,
)
def crl(call: Call, issuer: str) -> Reply:
    """Return the newest CRL of an issuer (RFC 5280 section 5)."""
    record = call.portal.inventory.crl(_issuer(call, issuer).id)
    if record is None:
        raise NotFound("This issuer has no CRL yet; try again in a few seconds.")
    left = max(0, int((record.next_update - call.portal.clock()).total_seconds()))
    return cached(
        call,
        record.der,
        "application/pkix-crl",
        max_age=min(60, left),  # a revocation publishes a new one at once
        # When it was made, or a little later after several in one second: it rises with each, as thisUpdate does. And a
        # second more, since the one before may have been fetched in the same second. So nobody who has an older one is
        # told that it is the newest.
        last_modified=record.this_update + CLOCK_SKEW + timedelta(seconds=1),
        expires=record.next_update,
        tag=tag_of(f"{record.issuer_id} {record.number} {record.this_update}".encode()),  # cheaper than of megabytes
    )


def _trusted(call: Call, fingerprint: str) -> bytes:
    """Return the certificate, DER, among those that clients of HTTPS trust; raise ``NotFound``."""
    try:
        found = _CERTIFICATE.findall(call.portal.settings.https_ca_file.read_text(encoding="ascii"))
    except OSError as error:
        raise Unavailable("What clients trust cannot be read; restart the portal.") from error
    for der in map(ssl.PEM_cert_to_DER_cert, found):
        if hashlib.sha256(der).hexdigest() == fingerprint:
            return der
    raise NotFound("Clients of this server trust no certificate with this fingerprint; the chain is at /ca.pem.")


def _issuer(call: Call, name: str) -> RecordedIssuer:
    recorded = call.portal.authority.current.by_url_name.get(name)
    if recorded is None:
        raise NotFound("No issuer has this name; the certificate chain is at /ca.pem.")
    return recorded


_BASE64 = str.maketrans(" -_", "++/")
REQUEST, RESPONSE = "application/ocsp-request", "application/ocsp-response"
MAX_AGE = 60  # seconds; a revocation is visible no later than that
_ANSWERS = Answers(
    "An OCSPResponse, DER; errors are OCSP responses, too",
    media_type=RESPONSE,
    headers={
        "ETag": "For If-None-Match",
        "Last-Modified": "When the answer was made",
        "Expires": "Its nextUpdate",
        "Cache-Control": "How long it may be cached",
    },
)


@ROUTES.add("GET", "/ocsp/{request}", ANYONE, _ANSWERS, on_pki_listener=True)
def ocsp_get(call: Call, request: str) -> Reply:
    """Answer an OCSPRequest in base64 (RFC 6960 appendix A.1), or in base64url."""
    # Some clients are told of a URL with a slash at its end, and add one; no request begins with it, as its first byte
    # is 0x30. Some encoders break lines, and some proxies take "+" in a path for a space.
    text = re.sub(r"[\t\n\v\f\r]", "", request).lstrip("/").translate(_BASE64).rstrip("=")
    try:
        der = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return _reply(call, call.portal.responder.fail(Failure.MALFORMED_REQUEST))
    return _reply(call, call.portal.responder.answer(der))


@ROUTES.add("POST", "/ocsp", ANYONE, _ANSWERS, octets=Octets(REQUEST, MAX_BYTES), on_pki_listener=True)
def ocsp_post(call: Call, body: bytes) -> Reply:
    """Answer an OCSPRequest (RFC 6960 appendix A.1)."""
    return _reply(call, call.portal.responder.answer(body))


@ROUTES.add("POST", "/ocsp/", ANYONE, _ANSWERS, octets=Octets(REQUEST, MAX_BYTES), on_pki_listener=True)
def ocsp_post_with_slash(call: Call, body: bytes) -> Reply:
    """Answer an OCSPRequest of a client that was told of a URL with a slash at its end."""
    return ocsp_post(call, body)


def _reply(call: Call, answer: OcspAnswer) -> Reply:
    if answer.made_at is None or answer.next_update is None:
        return Reply(content=answer.der, media_type=RESPONSE)  # not to be cached: that is the default
    if not answer.for_anyone:
        headers = {"Cache-Control": "private, max-age=0, must-revalidate"}
        return Reply(content=answer.der, media_type=RESPONSE, headers=headers)
    left = max(0, int((answer.next_update - call.portal.clock()).total_seconds()))
    return cached(
        call,
        answer.der,
        RESPONSE,
        max_age=min(MAX_AGE, left),
        last_modified=answer.made_at + timedelta(seconds=1),  # another may have been made in the same second before
        expires=answer.next_update,
        directives=", no-transform, must-revalidate",  # RFC 5019 section 6.2
    )
