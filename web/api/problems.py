"""What a client sees of an error: its status, and a problem document (RFC 9457)."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

from flask import Response
from pydantic import Field
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from core import errors
from core.errors import InputInvalid, PortalError, TokenUnavailable, TooManyAttempts
from web.api.routing import AnswerModel

MEDIA_TYPE = "application/problem+json"
# Below this path an error is a sentence in plain text, for a person who reads what a device received (RFC 7030 section
# 4.2.3), and a 401 has no content: BouncyCastle's client, which sends its password only then, fails if it has.
IN_PLAIN_TEXT = "/.well-known/est/"
# Paths at which devices authenticate as they do over EST; the others are for operators.
OF_DEVICES = frozenset({"/enroll", "/attestation/nonce"})
# The status of each kind of error; one that is not named here has that of its nearest ancestor.
STATUS_OF: Mapping[type[PortalError], int] = {
    errors.RequestMalformed: 400,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.BodyTooSlow: 408,
    errors.Conflict: 409,
    errors.Gone: 410,
    errors.BodyTooLarge: 413,
    errors.MediaTypeUnsupported: 415,
    errors.InputInvalid: 422,
    errors.TooManyAttempts: 429,
    errors.Unavailable: 503,
    PortalError: 500,
}
# What Flask refuses by itself: code and detail for each status.
_OF_FLASK = {
    400: ("malformed_request", "The request is malformed; /docs describes every request."),
    404: ("not_found", "Nothing is at this path; /docs lists all paths."),
    405: ("method_not_allowed", "This path does not allow this method; see the Allow header."),
    413: ("body_too_large", "The body is longer than PORTAL_MAX_BODY_BYTES allows."),
}
# Which token, and what is wrong with it, is for operators: GET /readyz tells them.
_TOKEN_UNAVAILABLE = "The CA's key is in a token that cannot be used now; try again later."  # noqa: S105
# Which other device it is is for operators, not for whoever has an enrolment token: the log tells them.
_TOLD_TO_DEVICES: Mapping[type[Exception], str] = {
    errors.NameInUse: "A name that the certificate would have is another device's; ask an operator, who finds it in the"
    " log.",
    errors.KeyInUse: "This key is another device's; make a new key for this device.",
}
_OTHER = ("refused", "The request is refused; /docs describes every request.")


class FieldErrorModel(AnswerModel):
    """One thing wrong with one field."""

    field: str
    message: str


class ProblemModel(AnswerModel):
    """An error (RFC 9457). `detail` is one sentence about what is wrong and what to do, `code` is stable."""

    type: str
    title: str
    status: int = Field(ge=400, le=599)
    detail: str
    code: str = Field(pattern="^[a-z_]+$")
    request_id: str
    errors: list[FieldErrorModel] | None = None


def of_error(error: Exception, *, request_id: str, path: str) -> ProblemModel:
    """Return the problem document of an error; all internal errors have one constant text."""
    status, code, detail = _described(error)
    if path.startswith(IN_PLAIN_TEXT) or path in OF_DEVICES:
        detail = _TOLD_TO_DEVICES.get(type(error), detail)
    if status == 422 and path.startswith(IN_PLAIN_TEXT):
        status = 400
    fields = error.errors if isinstance(error, InputInvalid) else ()
    return ProblemModel(
        type=f"urn:onboarding-portal:error:{code}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        request_id=request_id,
        errors=[FieldErrorModel.of(field) for field in fields] or None,
    )


def response_of(problem: ProblemModel, error: Exception, *, path: str) -> Response:
    """Return the HTTP response of an error: its problem document, or its sentence below ``IN_PLAIN_TEXT``."""
    plain = path.startswith(IN_PLAIN_TEXT)
    headers: dict[str, str] = {}
    if problem.status == 401:
        is_of_device = plain or path in OF_DEVICES
        headers["WWW-Authenticate"] = 'Basic realm="enrolment", charset="UTF-8"' if is_of_device else "Bearer"
    elif problem.status == 503:
        headers["Retry-After"] = "2"
    elif isinstance(error, TooManyAttempts):
        headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, MethodNotAllowed) and error.valid_methods:
        headers["Allow"] = ", ".join(sorted(error.valid_methods))
    if plain and problem.status == 401:
        response = Response(status=401, headers=headers)
        del response.headers["Content-Type"]
        return response
    if plain:
        return Response(f"{problem.detail}\n", problem.status, headers, content_type="text/plain; charset=utf-8")
    return Response(problem.model_dump_json(exclude_none=True), problem.status, headers, content_type=MEDIA_TYPE)


def status_of(error: PortalError) -> int:
    """Return the HTTP status of an error."""
    return next(STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF)


def _described(error: Exception) -> tuple[int, str, str]:
    """Return status, code and detail of an error."""
    if isinstance(error, PortalError):
        status = status_of(error)
        if isinstance(error, TokenUnavailable):
            return status, error.code, _TOKEN_UNAVAILABLE
        if status != 500:
            return status, error.code, error.detail
    elif isinstance(error, HTTPException) and error.code is not None and 400 <= error.code < 500:
        return error.code, *_OF_FLASK.get(error.code, _OTHER)
    return 500, "internal_error", "Unexpected error; the portal's log has the cause under this request id."
