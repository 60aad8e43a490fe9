"""Reads a request as its route declares it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from flask import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from core.errors import (
    BodyTooLarge,
    DeviceNotFound,
    FieldProblem,
    InputInvalid,
    LinkUnknown,
    MediaTypeUnsupported,
    NotFound,
    PortalError,
    RequestMalformed,
)
from web.api.fields import IDEMPOTENCY_KEY, PATH_PARAMETERS, PATTERN_IN_WORDS
from web.api.routing import Octets, Route

MEDIA_TYPE = "application/json"
MOST_PROBLEMS = 32
_PLAIN_WORDS = {"extra_forbidden": "is not a field of this request", "missing": "is missing"}
_NOT_THERE: dict[str, PortalError] = {
    "device_id": DeviceNotFound("This is no device's id; an id is a UUID in lower case, see GET /devices."),
    "token": LinkUnknown("This download link is not known here; check that it was copied whole."),
    "token_id": NotFound("This is no token's id; list them with GET /tokens."),
    "request": RequestMalformed("The part after /ocsp/ must be an OCSP request in base64."),
    "webhook_id": NotFound("This is no webhook's id; list them with GET /webhooks."),
    "label": NotFound("There is nothing to enrol at under this label; leave it out, or use the tenant's name."),
    "enrolment_token_id": NotFound("This is no enrolment token's id; list them with GET /enrolment-tokens."),
    "manufacturer_id": NotFound("This is no manufacturer's id; list them with GET /manufacturers."),
    "issuer": NotFound("There is no issuer of this name; the chain of trust is at /ca.pem."),
}


def read_path(path: Mapping[str, str]) -> Mapping[str, str]:
    """The variable parts of the path; raises ``NotFound`` for one that can stand for nothing."""
    for name, value in path.items():
        if not re.fullmatch(PATH_PARAMETERS[name], value):
            raise type(_NOT_THERE[name])(_NOT_THERE[name].detail)
    return path


def read_body(route: Route, request: Request) -> BaseModel | bytes | None:
    """The body, checked; raises ``MediaTypeUnsupported``, ``BodyTooLarge``, ``RequestMalformed``, ``InputInvalid``.

    One of rows is not read here, only its media type is checked.
    """
    if route.row_types and request.mimetype not in route.row_types:
        kinds = " or ".join(route.row_types)
        raise MediaTypeUnsupported(f"The body must hold rows; send it with Content-Type: {kinds}.")
    if route.octets is not None:
        return _read_octets(route.octets, request)
    if route.body is None:
        return None
    content = request.get_data(cache=False)
    if not content and route.body_optional:
        return route.body()
    if request.mimetype != MEDIA_TYPE:
        raise MediaTypeUnsupported("The body must be JSON; send it with Content-Type: application/json.")
    try:
        return route.body.model_validate_json(content)
    except ValidationError as error:
        if any(problem["type"] == "json_invalid" for problem in error.errors(include_input=False)):
            raise RequestMalformed("The body is not JSON in UTF-8; check it with a JSON parser.") from None
        raise input_invalid(error) from None


def _read_octets(wanted: Octets, request: Request) -> bytes:
    if request.mimetype != wanted.media_type:
        raise MediaTypeUnsupported(f"Send the body with Content-Type: {wanted.media_type}.")
    too_long = BodyTooLarge(f"The body must not be longer than {wanted.most} bytes.")
    if request.content_length is not None and request.content_length > wanted.most:
        raise too_long
    content = request.get_data(cache=False)
    if len(content) > wanted.most:
        raise too_long
    return content


def read_query(route: Route, request: Request) -> BaseModel | None:
    """The query parameters, checked; raises ``InputInvalid``."""
    if route.query is None:
        return None
    repeated = [name for name in request.args if len(request.args.getlist(name)) > 1]
    if repeated:
        raise _refused([FieldProblem(_shown(repeated[0]), "is given more than once")])
    try:
        return route.query.model_validate(request.args.to_dict())
    except ValidationError as error:
        raise input_invalid(error) from None


def read_idempotency_key(route: Route, request: Request) -> str | None:
    """The ``Idempotency-Key`` where the route takes one; raises ``InputInvalid``."""
    key = request.headers.get("Idempotency-Key") if route.idempotency_key else None
    if key is not None and not re.fullmatch(IDEMPOTENCY_KEY, key):
        raise _refused([FieldProblem("Idempotency-Key", "must be 16 to 255 printable ASCII characters, no spaces")])
    return key


def input_invalid(error: ValidationError) -> InputInvalid:
    """Say what is wrong with each field, and never what was in it: it may be a secret."""
    return _refused(
        [
            FieldProblem(_shown(".".join(str(part) for part in problem["loc"])) or "body", _in_words(problem))
            for problem in error.errors(include_input=False, include_url=False)[:MOST_PROBLEMS]
        ]
    )


def _refused(problems: list[FieldProblem]) -> InputInvalid:
    named = ", ".join(f"{problem.field} ({problem.message})" for problem in problems[:5])
    return InputInvalid(f"The request has fields to be corrected: {named}.", problems)


def _in_words(problem: ErrorDetails) -> str:
    if problem["type"] == "string_pattern_mismatch":
        return PATTERN_IN_WORDS.get(problem["ctx"]["pattern"], problem["msg"])
    return _PLAIN_WORDS.get(problem["type"], problem["msg"].removeprefix("Value error, "))


def _shown(name: str) -> str:
    """A field's name, which whoever sent it made up, so that a terminal shows it and does nothing else with it."""
    return (name if name.isprintable() else ascii(name)[1:-1])[:128]
