"""CA certificates with CRLs, which anyone may fetch in plain HTTP."""

from __future__ import annotations

import hashlib
from datetime import datetime
from email.utils import format_datetime, parsedate_to_datetime

from api.routing import Answers, Call, Reply, Routes
from authority import RecordedIssuer
from errors import NotFound

pki = Routes("Certificates, for anyone")

_ETAG = {"ETag": "For If-None-Match"}
_TIMES = {"Last-Modified": "The CRL's thisUpdate", "Expires": "Its nextUpdate"}


@pki.route(
    "GET",
    "/ca.pem",
    permission=None,
    answers=Answers(media_type="application/x-pem-file", description="Issuing CAs and root, PEM", headers=_ETAG),
    on_pki_listener=True,
)
def ca_pem(call: Call) -> Reply:
    """The chain of trust: issuing CAs and root."""
    return _cached(call, call.portal.authority.ca_pem.encode(), "application/x-pem-file", max_age=3600)


@pki.route(
    "GET",
    "/ca/{issuer}.cer",
    permission=None,
    answers=Answers(media_type="application/pkix-cert", description="One CA certificate, DER", headers=_ETAG),
    errors=(404,),
    on_pki_listener=True,
)
def ca_certificate(call: Call) -> Reply:
    """One CA certificate (caIssuers of RFC 5280 section 4.2.2.1)."""
    return _cached(call, _issuer(call).der, "application/pkix-cert", max_age=3600)


@pki.route(
    "GET",
    "/crl/{issuer}.crl",
    permission=None,
    answers=Answers(
        media_type="application/pkix-crl", description="The issuer's newest CRL, DER", headers=_ETAG | _TIMES
    ),
    errors=(404, 503),
    on_pki_listener=True,
)
def crl(call: Call) -> Reply:
    """The newest CRL of an issuer (RFC 5280 section 5)."""
    issuer = _issuer(call)
    record = call.portal.inventory.crl(issuer.id)
    if record is None:
        raise NotFound("This issuer has no CRL yet; try again in a few seconds.")
    left = max(0, int((record.next_update - call.portal.clock()).total_seconds()))
    return _cached(
        call,
        record.der,
        "application/pkix-crl",
        max_age=min(60, left),  # a revocation makes a new one at once
        last_modified=record.this_update,
        expires=record.next_update,
    )


def _issuer(call: Call) -> RecordedIssuer:
    for recorded in call.portal.authority.issuers:
        if recorded.issuer.name == call.path["issuer"]:
            return recorded
    raise NotFound("There is no issuer of this name; the chain of trust is at /ca.pem.")


def _cached(
    call: Call,
    content: bytes,
    media_type: str,
    *,
    max_age: int,
    last_modified: datetime | None = None,
    expires: datetime | None = None,
) -> Reply:
    """Answer 304 where the client has it already (RFC 9110 section 13.1)."""
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": f"public, max-age={max_age}"}
    if last_modified is not None:
        headers["Last-Modified"] = format_datetime(last_modified, usegmt=True)
    if expires is not None:
        headers["Expires"] = format_datetime(expires, usegmt=True)
    wanted = call.headers.get("If-None-Match")
    if wanted is not None:
        fresh = wanted.strip() == "*" or etag in [tag.strip().removeprefix("W/") for tag in wanted.split(",")]
    else:
        fresh = last_modified is not None and _not_modified_since(call.headers.get("If-Modified-Since"), last_modified)
    if fresh:
        return Reply(content=b"", media_type="", status=304, headers=headers)
    return Reply(content=content, media_type=media_type, headers=headers)


def _not_modified_since(header: str | None, last_modified: datetime) -> bool:
    try:
        return header is not None and parsedate_to_datetime(header) >= last_modified.replace(microsecond=0)
    except (ValueError, TypeError):
        return False
