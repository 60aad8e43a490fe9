"""Routes: what each declares, how its request is read and authorized, how its reply is sent."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flask import Request, Response
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from werkzeug.datastructures import Headers
from werkzeug.routing import BaseConverter, MapAdapter

from core.errors import (
    BodyTooLarge,
    DeviceNotFound,
    FieldProblem,
    Forbidden,
    InputInvalid,
    LinkUnknown,
    MediaTypeUnsupported,
    NotFound,
    PortalError,
    RequestMalformed,
    Unauthenticated,
    Unavailable,
)
from core.roles import Permission, may
from operations.wiring import Portal
from web.api.fields import IDEMPOTENCY_KEY, PATH_PARAMETERS, PATTERN_IN_WORDS
from workflows.audit import Actor

if TYPE_CHECKING:
    from operations.wiring import Portal


@dataclass(frozen=True, slots=True)
class Call:
    """A request that was let in and whose parameters were checked."""

    portal: Portal
    actor: Actor
    method: str
    path: Mapping[str, str]
    headers: Headers
    body: Any = None
    query: Any = None
    idempotency_key: str | None = None
    environ: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: a model is sent as JSON; ``content`` are bytes, or an iterator of them, of ``media_type``."""

    model: BaseModel | None = None
    content: bytes | Iterator[bytes] | None = None
    media_type: str = "application/json"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    omit_none: bool = False


@dataclass(frozen=True, slots=True)
class Answers:
    """What a route may answer with success, for the OpenAPI text: a model, or bytes of ``media_type``.

    ``headers`` says in a few words what is in each header worth knowing.
    """

    model: type[BaseModel] | None = None
    media_type: str = "application/json"
    status: int = 200
    description: str = "Done"
    other_media_types: tuple[str, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Octets:
    """A body that is handed on as the bytes it is: of ``media_type``, ``most`` bytes long at most."""

    media_type: str
    most: int


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path. ``permission`` ``None`` means: open to anyone, a decision to be made each time.

    ``token_optional``: anyone may call it, and who shows a valid token is known.
    ``rows`` is the model of each row of a body that is read while it arrives, in one of the media types ``row_types``.

    ``direct``: plain requests for it are answered by ``web/api/direct.py``.

    Every GET answers HEAD, too; with a ``head_summary`` the OpenAPI text says so.
    ``also`` are other answers than errors.
    """

    method: str
    path: str
    handler: Callable[[Call], Reply]
    permission: Permission | None
    summary: str
    answers: Answers
    tag: str
    body: type[BaseModel] | None = None
    octets: Octets | None = None
    query: type[BaseModel] | None = None
    also: tuple[Answers, ...] = ()
    errors: tuple[int, ...] = ()
    on_pki_listener: bool = False
    direct: bool = False
    idempotency_key: bool = False
    body_optional: bool = False
    token_optional: bool = False
    rows: type[BaseModel] | None = None
    row_types: tuple[str, ...] = ()
    head_summary: str = ""

    @property
    def name(self) -> str:
        """The handler's name: unique, and the operationId."""
        return self.handler.__name__


class Routes:
    """The routes of one resource."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.routes: list[Route] = []

    def route(
        self, method: str, path: str, *, permission: Permission | None, answers: Answers, **options: Any
    ) -> Callable[[Callable[[Call], Reply]], Callable[[Call], Reply]]:
        """Declare the decorated function as the handler of a route; its docstring's first line is the summary."""

        def declare(handler: Callable[[Call], Reply]) -> Callable[[Call], Reply]:
            summary = (handler.__doc__ or "").partition("\n")[0]
            self.routes.append(Route(method, path, handler, permission, summary, answers, self.tag, **options))
            return handler

        return declare


class SegmentConverter(BaseConverter):
    """One path segment of at most 512 characters."""

    regex = "[^/]{1,512}"


class RestConverter(BaseConverter):
    """All that follows, at most 8,192 characters: base64 has slashes."""

    regex = r"[\s\S]{1,8192}"
    part_isolating = False


CONVERTERS: dict[str, type[BaseConverter]] = {"segment": SegmentConverter, "rest": RestConverter}
_OF_MANY_SEGMENTS = {"request"}


def rule_of(path: str) -> str:
    """The rule by which the web framework matches a path such as ``/devices/{device_id}``."""
    return re.sub(
        r"\{(\w+)\}", lambda part: f"<{'rest' if part[1] in _OF_MANY_SEGMENTS else 'segment'}:{part[1]}>", path
    )


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


def actor_of(portal: Portal, route: Route, request: Request, request_id: str) -> Actor:
    """Who asks, where the route is not for anyone, or a token is shown to one that may be asked with it.

    Raises ``Unauthenticated``, recorded as refused, and ``TooManyAttempts``; a valid token is never told to wait.
    """
    stranger = Actor(portal.tenant_id, "anyone", "none", request_id, request.remote_addr or "")
    if route.permission is None and not (route.token_optional and "Authorization" in request.headers):
        return stranger
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    try:
        token = portal.operators.authenticate(secret.strip()) if scheme.lower() == "bearer" and secret else None
    except Unavailable:
        if route.token_optional:
            return stranger  # what is for anyone is answered without a database, too
        raise
    if token is None:
        portal.operators.login_failed(stranger, f"{route.method} {route.path}", "access", "unauthenticated")
        raise Unauthenticated(
            "A valid operator token is needed; send it as Authorization: Bearer <token>, or have an admin make one."
        )
    return Actor(token.tenant_id, f"{token.name} ({token.id})", token.role, request_id, stranger.address)


def check_permission(portal: Portal, route: Route, actor: Actor) -> None:
    """Raise ``Forbidden``, recorded as refused, where the actor's role is not enough."""
    if route.permission is None or may(actor.role, route.permission):
        return
    portal.operators.refused(actor, f"{route.method} {route.path}", "access", "forbidden")
    raise Forbidden(f"The role {actor.role} may not do this; it takes a role with the permission {route.permission}.")


def is_for_anyone_in_the_clear(adapter: MapAdapter, routes: dict[str, Route]) -> bool:
    """Whether the path asked for, by whatever method, is one that the plain HTTP listener serves."""
    endpoints = (adapter.match(method=method)[0] for method in adapter.allowed_methods())
    return any(routes[endpoint].on_pki_listener for endpoint in endpoints)


def response_of(reply: Reply) -> Response:
    """A model becomes JSON; bytes, or an iterator of them, stay as they are."""
    content: Any = reply.content
    if reply.model is not None:
        content = reply.model.model_dump_json(exclude_none=reply.omit_none).encode()
    response = Response(content, status=reply.status)
    if reply.media_type:
        response.headers["Content-Type"] = reply.media_type
    else:
        response.headers.pop("Content-Type", None)
    response.headers.update(dict(reply.headers))
    return response
