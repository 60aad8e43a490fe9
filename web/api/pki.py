"""CA certificates with CRLs, which anyone may fetch in plain HTTP."""

from __future__ import annotations

from core.errors import NotFound
from web.api.caching import cached, tag_of
from web.api.routing import Answers, Call, Reply, Routes
from workflows.authority.issuers import RecordedIssuer

pki = Routes("Certificates, for anyone")

_ETAG = {"ETag": "For If-None-Match"}
_TIMES = {"Last-Modified": "The CRL's thisUpdate", "Expires": "Its nextUpdate"}


@pki.route(
    "GET",
    "/ca.pem",
    permission=None,
    answers=Answers(media_type="application/x-pem-file", description="Issuing CAs and root, PEM", headers=_ETAG),
    on_pki_listener=True,
    direct=True,
)
def ca_pem(call: Call) -> Reply:
    """The chain of trust: issuing CAs and root."""
    return cached(call, call.portal.authority.ca_pem.encode(), "application/x-pem-file", max_age=3600)


@pki.route(
    "GET",
    "/ca/{issuer}.cer",
    permission=None,
    answers=Answers(media_type="application/pkix-cert", description="One CA certificate, DER", headers=_ETAG),
    errors=(404,),
    on_pki_listener=True,
    direct=True,
)
def ca_certificate(call: Call) -> Reply:
    """One CA certificate (caIssuers of RFC 5280 section 4.2.2.1)."""
    return cached(call, _issuer(call).der, "application/pkix-cert", max_age=3600)


@pki.route(
    "GET",
    "/crl/{issuer}.crl",
    permission=None,
    answers=Answers(
        media_type="application/pkix-crl", description="The issuer's newest CRL, DER", headers=_ETAG | _TIMES
    ),
    errors=(404, 503),
    on_pki_listener=True,
    direct=True,
)
def crl(call: Call) -> Reply:
    """The newest CRL of an issuer (RFC 5280 section 5)."""
    issuer = _issuer(call)
    record = call.portal.inventory.crl(issuer.id)
    if record is None:
        raise NotFound("This issuer has no CRL yet; try again in a few seconds.")
    left = max(0, int((record.next_update - call.portal.clock()).total_seconds()))
    return cached(
        call,
        record.der,
        "application/pkix-crl",
        max_age=min(60, left),  # a revocation makes a new one at once
        last_modified=record.this_update,
        expires=record.next_update,
        tag=tag_of(f"{record.issuer_id} {record.number} {record.this_update}".encode()),  # quicker than of megabytes
    )


def _issuer(call: Call) -> RecordedIssuer:
    for recorded in call.portal.authority.issuers:
        if recorded.issuer.name == call.path["issuer"]:
            return recorded
    raise NotFound("There is no issuer of this name; the chain of trust is at /ca.pem.")
