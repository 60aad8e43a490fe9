"""OCSP over HTTP, which anyone may ask."""

from __future__ import annotations

import base64
import binascii
import re

from pki.ocsp import MOST_BYTES, Failure
from web.api.caching import cached
from web.api.routing import Answers, Call, Octets, Reply, Routes
from workflows.authority.ocsp_responder import Answer

ocsp = Routes("Certificates, for anyone")

REQUEST, RESPONSE = "application/ocsp-request", "application/ocsp-response"
MAX_AGE = 60  # seconds that a cache may go without asking; a revocation shows no later than that
_ANSWERS = Answers(
    media_type=RESPONSE,
    description="An OCSPResponse, DER; it may say that there is no answer",
    headers={
        "ETag": "For If-None-Match",
        "Last-Modified": "The answer's thisUpdate",
        "Expires": "Its nextUpdate",
        "Cache-Control": "For how long it may be kept",
    },
)


@ocsp.route("GET", "/ocsp/{request}", permission=None, answers=_ANSWERS, on_pki_listener=True, direct=True)
def ocsp_get(call: Call) -> Reply:
    """Ask whether certificates are good, by an OCSPRequest in base64 (RFC 6960 appendix A.1)."""
    # Some encoders break lines, and some proxies take "+" in a path for a space.
    text = re.sub(r"[\t\n\v\f\r]", "", call.path["request"]).replace(" ", "+").rstrip("=")
    try:
        der = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return _reply(call, call.portal.responder.fail(Failure.MALFORMED_REQUEST))
    return _reply(call, call.portal.responder.answer(der))


@ocsp.route(
    "POST",
    "/ocsp",
    permission=None,
    octets=Octets(REQUEST, MOST_BYTES),
    answers=_ANSWERS,
    on_pki_listener=True,
    direct=True,
)
def ocsp_post(call: Call) -> Reply:
    """Ask whether certificates are good, by an OCSPRequest (RFC 6960 appendix A.1)."""
    return _reply(call, call.portal.responder.answer(call.body))


def _reply(call: Call, answer: Answer) -> Reply:
    if answer.this_update is None or answer.next_update is None:
        return Reply(content=answer.der, media_type=RESPONSE)  # and not to be kept: that is the default
    if not answer.for_anyone:
        headers = {"Cache-Control": "private, max-age=0, must-revalidate"}
        return Reply(content=answer.der, media_type=RESPONSE, headers=headers)
    left = max(0, int((answer.next_update - call.portal.clock()).total_seconds()))
    return cached(
        call,
        answer.der,
        RESPONSE,
        max_age=min(MAX_AGE, left),
        last_modified=answer.this_update.replace(microsecond=0),
        expires=answer.next_update,
        directives=", no-transform, must-revalidate",  # RFC 5019 section 6.2
    )
